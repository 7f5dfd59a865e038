"""Metrics of a benchmark: averages, ranks of retrieval, confidence intervals, paired tests, calibration."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Z95 = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""

Interval = tuple[float, float]

NUM_BINS = 15
"""Bins of confidence, as in Guo et al. (arXiv 1706.04599)."""


def class_recalls(correct: Bool[Tensor, "n"], labels: Int[Tensor, "n"], num_classes: int) -> Float[Tensor, "k"]:
    """Share of each class's images that are classified correctly; NaN for classes without images."""
    images = torch.bincount(labels, minlength=num_classes).double()
    return torch.bincount(labels[correct], minlength=num_classes).double() / images


def average_precisions(scores: Float[Tensor, "n k"], targets: Bool[Tensor, "n k"]) -> Float[Tensor, "k"]:
    """Per class, the mean over its images of the precision at their rank; 0 for a class without images (CLIP_benchmark).

    Of equal scores the lowest index comes first.
    """
    order = scores.double().sort(dim=0, descending=True, stable=True).indices
    hits = targets.gather(0, order).double()
    precision = hits.cumsum(0) / torch.arange(1, len(hits) + 1)[:, None]
    return (precision * hits).sum(0) / hits.sum(0).clamp_min(1)


def products(queries: Float[Tensor, "q d"], keys: Float[Tensor, "k d"], chunk: int) -> Iterator[Float[Tensor, "c k"]]:
    """Dot products with all keys, for chunks of queries. Equal keys (duplicate names or captions) get equal products."""
    # A matrix product may round the columns of equal keys differently; ties must stay ties.
    distinct, copy_of = keys.unique(dim=0, return_inverse=True)
    for part in queries.split(chunk):
        yield (part @ distinct.T)[:, copy_of]


def best_ranks(
    queries: Float[Tensor, "q d"],
    keys: Float[Tensor, "k d"],
    query_groups: Int[Tensor, "q"],
    key_groups: Int[Tensor, "k"],
    *,
    chunk: int = 1024,
) -> Int[Tensor, "q"]:
    """For each query, the number of keys ranked before its first positive; ties in order of index.

    queries, keys: unit-norm features. The positives of a query are the keys of its group, at least one. chunk: queries
    per matrix product.
    """
    index, ranks = torch.arange(len(keys)), []
    for cosines, groups in zip(products(queries, keys, chunk), query_groups.split(chunk), strict=True):
        is_positive = groups[:, None] == key_groups
        highest = cosines.masked_fill(~is_positive, -torch.inf).max(dim=1, keepdim=True).values
        where = (is_positive & (cosines == highest)).int().argmax(dim=1, keepdim=True)
        ranks.append(((cosines > highest) | ((cosines == highest) & (index < where))).sum(dim=1))
    return torch.cat(ranks)


def proportion_interval(num_hits: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share."""
    share, z2 = num_hits / n, Z95 * Z95
    centre, half = share + z2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return clip((centre - half) / (1 + z2 / n), (centre + half) / (1 + z2 / n))


def recall_interval(correct: Bool[Tensor, "n"], labels: Int[Tensor, "n"], num_classes: int) -> Interval:
    """95 % interval of the mean per-class recall: the classes are fixed, their images drawn at random."""
    recalls = class_recalls(correct, labels, num_classes)
    counted = ~recalls.isnan()
    images = torch.bincount(labels, minlength=num_classes)[counted]
    # Agresti and Coull's pseudo-counts: a class that is all correct or all wrong still has a variance.
    shrunk = (recalls[counted] * images + Z95**2 / 2) / (images + Z95**2)
    variance = (shrunk * (1 - shrunk) / (images + Z95**2)).sum() / counted.sum() ** 2
    return around(recalls[counted].mean().item(), variance.sqrt().item())


def mean_interval(values: Float[Tensor, "n"]) -> Interval:
    """95 % interval of the mean of independent values, mostly in [0, 1], such as each image's share of found captions."""
    # Two pseudo-values at each end, as in recall_interval: equal values still have a variance.
    n, total, squares = len(values) + Z95**2, values.double().sum().item(), values.double().square().sum().item()
    mean = (total + Z95**2 / 2) / n
    variance = max(0.0, (squares + Z95**2 / 2) / n - mean**2)
    return around(values.double().mean().item(), math.sqrt(variance / n))


def bootstrap_interval(
    statistic: Callable[[Int[Tensor, "n"]], Float[Tensor, ""]],
    n: int,
    *,
    lowest: float = 0.0,
    resamples: int = 200,
    seed: int = 0,
) -> Interval:
    """95 % interval of a statistic in [lowest, 1]: ± 1.96 standard deviations over resampled images.

    statistic: takes the positions of n samples, drawn with replacement. Not percentiles of the resamples: an image drawn
    twice raises the average precision.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    return around(statistic(torch.arange(n)).item(), torch.stack(drawn).std().item(), lowest=lowest)


def around(mean: float, standard_error: float, *, lowest: float = 0.0) -> Interval:
    return clip(mean - Z95 * standard_error, mean + Z95 * standard_error, lowest=lowest)


def clip(low: float, high: float, *, lowest: float = 0.0) -> Interval:
    return max(lowest, low), min(1.0, high)


def compare_paired(first: Bool[Tensor, "n"], second: Bool[Tensor, "n"]) -> dict[str, Any]:
    """Difference (second minus first) with its interval, samples won and lost, and the p value of McNemar's test.

    first, second: whether each sample is right. The interval: Agresti and Min (2005), half a sample added per cell.
    """
    won, lost, n = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    centre, spread = (won - lost) / (n + 2), (won + lost + 1) / (n + 2)
    half = Z95 * math.sqrt(max(0.0, spread - centre**2) / (n + 2))
    interval = clip(centre - half, centre + half, lowest=-1.0)
    paired = {"n": n, "difference": (won - lost) / n, "ci95": interval, "mcnemar_p": mcnemar_p(won, lost)}
    return paired | {"won": won, "lost": lost}


def difference_interval(differences: Float[Tensor, "n"]) -> Interval:
    """95 % interval of the mean of paired differences in [−1, 1] that are not binary."""
    values = differences.double()
    return around(values.mean().item(), values.std(correction=0).item() / math.sqrt(len(values)), lowest=-1.0)


def mcnemar_p(won: int, lost: int) -> float:
    """Exact two-sided p: twice the smaller tail of a fair coin thrown won + lost times."""
    thrown = won + lost
    if not thrown:
        return 1.0
    heads = torch.arange(min(won, lost) + 1, dtype=torch.float64)
    ways = math.lgamma(thrown + 1) - torch.lgamma(heads + 1) - torch.lgamma(thrown - heads + 1)
    return min(1.0, 2 * math.exp(torch.logsumexp(ways, 0).item() - thrown * math.log(2)))


def calibrate(confidence: Float[Tensor, "n"], correct: Bool[Tensor, "n"]) -> dict[str, Any]:
    """Confidence against accuracy in bins of equal width (arXiv 1706.04599).

    ece: expected calibration error, the mean gap of confidence and accuracy, in [0, 1]; counts, confidences, accuracies:
    of each bin, the last two None where it is empty. confidence: the largest class probability of each image.
    """
    bins = (confidence.double() * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # (0, 1/15], (1/15, 2/15] …
    counts = torch.bincount(bins, minlength=NUM_BINS)
    sums = torch.zeros(2, NUM_BINS, dtype=torch.float64)
    sums[0].index_add_(0, bins, confidence.double())
    sums[1].index_add_(0, bins, correct.double())
    means = [[mean if mean == mean else None for mean in row] for row in (sums / counts).tolist()]  # 0/0 is NaN
    ece = (sums[0] - sums[1]).abs().sum().item() / len(confidence)
    return {"ece": ece, "counts": counts.tolist(), "confidences": means[0], "accuracies": means[1]}
