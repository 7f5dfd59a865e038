"""Metrics of a benchmark: averages, confidence intervals, paired tests, calibration."""

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def proportion_interval(num_hits: int, n: int) -> Interval:
    """Wilson's 95 % interval of a share."""
    share, z2 = num_hits / n, Z95 * Z95
    centre, half = share + z2 / (2 * n), Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return max(0.0, (centre - half) / (1 + z2 / n)), min(1.0, (centre + half) / (1 + z2 / n))


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
    scores: Float[Tensor, "n k"], targets: Bool[Tensor, "n k"], *, resamples: int = 200, seed: int = 0
) -> Interval:
    """95 % interval of the mean average precision: ± 1.96 standard deviations over resampled images.

    Not percentiles of the resamples: an image drawn twice raises the average precision.
    """

    def mean(drawn: Tensor) -> Tensor:
        return average_precisions(scores[drawn], targets[drawn]).mean()

    spread = bootstrap_deviation(mean, len(scores), resamples=resamples, seed=seed)
    return around(average_precisions(scores, targets).mean().item(), spread)


def bootstrap_deviation(
    statistic: Callable[[Int[Tensor, "n"]], Float[Tensor, ""]], n: int, *, resamples: int = 200, seed: int = 0
) -> float:
    """Standard deviation of a statistic over resamples. statistic: takes the positions of n samples, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    values = [statistic(torch.randint(n, (n,), generator=generator)) for _ in range(resamples)]
    return torch.stack(values).std().item()


def around(mean: float, standard_error: float) -> Interval:
    return max(0.0, mean - Z95 * standard_error), min(1.0, mean + Z95 * standard_error)


@dataclass(frozen=True)
class Paired:
    """Two models on the same samples; differences are second minus first."""

    n: int
    difference: float
    ci95: Interval
    mcnemar_p: float
    """Exact two-sided p of McNemar's test: probability of flips this unequal between equal models."""
    won: int
    """Samples that only the second model gets right."""
    lost: int
    """Samples that only the first model gets right."""


def compare_paired(first: Bool[Tensor, "n"], second: Bool[Tensor, "n"]) -> Paired:
    """first, second: whether each sample is right. The interval: Agresti and Min (2005), half a sample added per cell."""
    won, lost, n = int((second & ~first).sum()), int((first & ~second).sum()), len(first)
    centre, spread = (won - lost) / (n + 2), (won + lost + 1) / (n + 2)
    half = Z95 * math.sqrt(max(0.0, spread - centre**2) / (n + 2))
    interval = max(-1.0, centre - half), min(1.0, centre + half)
    return Paired(n, (won - lost) / n, interval, mcnemar_p(won, lost), won, lost)


def difference_interval(differences: Float[Tensor, "n"]) -> Interval:
    """95 % interval of the mean of paired differences in [−1, 1] that are not binary."""
    mean, n = differences.double().mean().item(), len(differences)
    half = Z95 * differences.double().std(correction=0).item() / math.sqrt(n)
    return max(-1.0, mean - half), min(1.0, mean + half)


def mcnemar_p(won: int, lost: int) -> float:
    """Exact two-sided p: twice the smaller tail of a fair coin thrown won + lost times."""
    thrown = won + lost
    if not thrown:
        return 1.0
    heads = torch.arange(min(won, lost) + 1, dtype=torch.float64)
    ways = math.lgamma(thrown + 1) - torch.lgamma(heads + 1) - torch.lgamma(thrown - heads + 1)
    return min(1.0, 2 * math.exp(torch.logsumexp(ways, 0).item() - thrown * math.log(2)))


@dataclass(frozen=True)
class Calibration:
    """Confidence against accuracy in bins of equal width (arXiv 1706.04599)."""

    ece: float
    """Expected calibration error: mean gap between confidence and accuracy, in [0, 1]."""
    counts: list[int]
    confidences: list[float | None]
    """Mean of each bin; None where it is empty."""
    accuracies: list[float | None]


def calibrate(confidence: Float[Tensor, "n"], correct: Bool[Tensor, "n"]) -> Calibration:
    """confidence: the largest class probability of each image."""
    bins = (confidence.double() * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1  # (0, 1/15], (1/15, 2/15] …
    counts = torch.bincount(bins, minlength=NUM_BINS)
    sums = torch.zeros(2, NUM_BINS, dtype=torch.float64)
    sums[0].index_add_(0, bins, confidence.double())
    sums[1].index_add_(0, bins, correct.double())
    ece = (sums[0] - sums[1]).abs().sum().item() / len(confidence)
    confidences, accuracies = (
        [total / count if count else None for total, count in zip(row.tolist(), counts.tolist(), strict=True)]
        for row in sums
    )
    return Calibration(ece, counts.tolist(), confidences, accuracies)
