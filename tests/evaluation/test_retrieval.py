"""Ranks of the first positive against a plain sort."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.evaluation.retrieval import best_ranks


def whole_features(rows: int, dim: int, seed: int) -> Tensor:
    """Small whole numbers: products are exact, and many are equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def sorted_rank(query: list[float], keys: list[list[float]], own: set[int]) -> int:
    """Place of the first positive when all keys are sorted by product, then by index."""
    products = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys]
    ranking = sorted(range(len(keys)), key=lambda place: (-products[place], place))
    return min(ranking.index(key) for key in own)


def brute_ranks(queries: Tensor, keys: Tensor, positives: Tensor) -> list[int]:
    own = [{key for query, key in positives.tolist() if query == place} for place in range(len(queries))]
    return [sorted_rank(query, keys.tolist(), wanted) for query, wanted in zip(queries.tolist(), own, strict=True)]


def test_ranks_by_hand() -> None:
    keys = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]])
    queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # Products of the first and third 1, 0, 0.6, 1; of the second 0, 1, 0.8, 0.
    positives = torch.tensor([[0, 3], [1, 0], [1, 3], [2, 1], [2, 2], [2, 0]])
    assert best_ranks(queries, keys, positives).tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_ranks_equal_a_sort_in_both_directions_for_any_chunk(chunk: int, seed: int) -> None:
    counts = [3, 1, 5, 2, 1, 7, 4]
    images, texts = whole_features(len(counts), 4, seed), whole_features(sum(counts), 4, seed + 100)
    owner = [image for image, count in enumerate(counts) for _ in range(count)]
    pairs = torch.tensor(list(enumerate(owner)))
    shuffled = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))]
    by_text, by_image = brute_ranks(texts, images, pairs), brute_ranks(images, texts, pairs.flip(1))
    assert best_ranks(texts, images, shuffled, chunk=chunk).tolist() == by_text
    assert best_ranks(images, texts, shuffled.flip(1), chunk=chunk).tolist() == by_image
    assert len(set(by_text)) > 2
    assert len(set(by_image)) > 2


def test_of_equal_keys_the_lowest_index_comes_first() -> None:
    keys, queries = torch.eye(3)[[0, 0, 0, 1, 1]], torch.eye(3)[[0, 0, 0, 2]]
    # The third's own are 2 and 1, of which 1 comes first; the fourth is equally far from all.
    positives = torch.tensor([[0, 0], [1, 2], [2, 2], [2, 1], [3, 4]])
    assert best_ranks(queries, keys, positives).tolist() == [0, 2, 1, 4]


@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_equal_keys_are_ranked_by_index_where_products_round(chunk: int) -> None:
    # Captions that come twice have equal features; a matrix product may round equal columns differently.
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        distinct = F.normalize(torch.randn(13, 512, generator=generator), dim=1)
        queries = F.normalize(torch.randn(9, 512, generator=generator), dim=1)
        copy_of, own = (torch.randint(high, (n,), generator=generator) for high, n in ((13, 37), (37, 9)))
        positives = torch.stack([torch.arange(9), own], dim=1)
        products = (queries.double() @ distinct.double().T)[:, copy_of].tolist()
        rankings = [sorted(range(37), key=lambda key: (-row[key], key)) for row in products]
        expected = [ranking.index(key) for ranking, key in zip(rankings, own.tolist(), strict=True)]
        assert best_ranks(queries, distinct[copy_of], positives, chunk=chunk).tolist() == expected
