"""Retrieval between images and captions, exact and in chunks (recall@k as CLIP_benchmark counts it)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def best_ranks(
    queries: Float[Tensor, "q d"],
    keys: Float[Tensor, "k d"],
    positives: Int[Tensor, "p 2"],
    *,
    chunk: int = 1024,
) -> Int[Tensor, "q"]:
    """For each query, the number of keys ranked before its first positive; ties in order of index.

    queries, keys: unit-norm features. positives: (query, key) pairs, at least one per query. chunk: queries per matrix product.
    """
    ranks = torch.empty(len(queries), dtype=torch.long)
    order = positives[:, 0].argsort(stable=True)
    query, key = positives[order].T.contiguous()
    # A matrix product may round the columns of equal keys (duplicate captions) differently; ties must stay ties.
    distinct, copy_of = keys.unique(dim=0, return_inverse=True)
    index = torch.arange(len(keys), device=keys.device)
    for start in range(0, len(queries), chunk):
        cosines = (queries[start : start + chunk] @ distinct.T)[:, copy_of]
        first, last = (int(torch.searchsorted(query, place)) for place in (start, start + len(cosines)))
        rows, columns = (query[first:last] - start).to(keys.device), key[first:last].to(keys.device)
        is_positive = torch.zeros(cosines.shape, dtype=torch.bool, device=keys.device)
        is_positive[rows, columns] = True
        highest = cosines.masked_fill(~is_positive, -torch.inf).max(dim=1, keepdim=True).values
        where = (is_positive & (cosines == highest)).int().argmax(dim=1, keepdim=True)
        before = (cosines > highest) | ((cosines == highest) & (index < where))
        ranks[start : start + chunk] = before.sum(dim=1).cpu()
    return ranks
