"""Metrics, intervals, paired tests and calibration against plain loops, published numbers and simulation."""

import itertools
import math
import random
import statistics
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from clipkd.evaluation.metrics import (
    NUM_BINS,
    average_precisions,
    best_ranks,
    bootstrap_interval,
    calibrate,
    class_recalls,
    compare_paired,
    difference_interval,
    mcnemar_p,
    mean_interval,
    proportion_interval,
    recall_interval,
)


def bools(text: str) -> Tensor:
    """One entry per letter: 1 is right."""
    return torch.tensor([letter == "1" for letter in text])


def test_recall_of_a_class_is_its_share_of_right_images() -> None:
    correct, labels = bools("1101001"), torch.tensor([0, 0, 0, 3, 3, 1, 4])
    recalls = class_recalls(correct, labels, 6).tolist()
    assert recalls[:2] == [2 / 3, 0.0]
    assert math.isnan(recalls[2])  # without images
    assert recalls[3:5] == [0.5, 1.0]
    assert math.isnan(recalls[5])


def loop_average_precision(scores: list[float], targets: list[bool]) -> float:
    ranked = sorted(range(len(scores)), key=lambda image: (-scores[image], image))
    precisions, num_hits = [], 0
    for rank, image in enumerate(ranked, start=1):
        num_hits += targets[image]
        if targets[image]:
            precisions.append(num_hits / rank)
    return sum(precisions) / len(precisions) if precisions else 0.0


@pytest.mark.parametrize("num_levels", [2, 7, 10**6])
def test_average_precision_equals_a_plain_loop_with_and_without_ties(num_levels: int) -> None:
    generator = torch.Generator().manual_seed(num_levels)
    scores = torch.randint(num_levels, (60, 5), generator=generator).float() / num_levels
    targets = torch.rand(60, 5, generator=generator) < torch.tensor([0.5, 0.1, 0.9, 0.0, 1.0])
    expected = [loop_average_precision(scores[:, k].tolist(), targets[:, k].tolist()) for k in range(5)]
    assert average_precisions(scores, targets).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[3] == 0.0
    assert expected[4] == 1.0


def test_average_precision_by_hand() -> None:
    scores = torch.tensor([[0.9, 0.5], [0.8, 0.5], [0.7, 0.5], [0.6, 0.5]])
    targets = torch.tensor([[True, False], [False, True], [True, False], [False, True]])
    # Hits at ranks 1 and 3; of equal scores in order of index, at 2 and 4.
    assert average_precisions(scores, targets).tolist() == pytest.approx([(1 + 2 / 3) / 2, (1 / 2 + 2 / 4) / 2])


def whole_features(rows: int, dim: int, seed: int) -> Tensor:
    """Small whole numbers: products are exact, and many are equal."""
    return torch.randint(-2, 3, (rows, dim), generator=torch.Generator().manual_seed(seed)).float()


def loop_ranks(queries: Tensor, keys: Tensor, query_groups: list[int], key_groups: list[int]) -> list[int]:
    """Place of each query's first positive when all keys are sorted by product, then by index."""
    found = []
    for query, group in zip(queries.tolist(), query_groups, strict=True):
        products = [sum(a * b for a, b in zip(query, key, strict=True)) for key in keys.tolist()]
        ranking = sorted(range(len(products)), key=lambda place: (-products[place], place))
        found.append(next(place for place, key in enumerate(ranking) if key_groups[key] == group))
    return found


def test_ranks_by_hand() -> None:
    keys, queries = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [1.0, 0.0]]), torch.eye(2)[[0, 1, 0, 1]]
    # Products of the first and third 1, 0, 0.6, 1; of the second and fourth 0, 1, 0.8, 0.
    ranks = best_ranks(queries, keys, torch.tensor([7, 7, 5, 5]), torch.tensor([5, 5, 5, 7]))
    assert ranks.tolist() == [1, 3, 0, 0]


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_ranks_equal_a_sort_in_both_directions_for_any_chunk(chunk: int) -> None:
    counts = [3, 1, 5, 2, 1, 7, 4]
    images, texts = whole_features(len(counts), 4, 0), whole_features(sum(counts), 4, 100)
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    for queries, keys, groups in ((texts, images, (owners, [*range(7)])), (images, texts, ([*range(7)], owners))):
        expected = loop_ranks(queries, keys, *groups)
        assert best_ranks(queries, keys, *map(torch.tensor, groups), chunk=chunk).tolist() == expected
        assert len(set(expected)) > 2


@pytest.mark.parametrize(
    ("num_hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        # Newcombe, Statistics in Medicine 17, 1998, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
        (30_000, 50_000, 0.5957, 0.6043),  # ImageNet: ±0.43 points
    ],
)
def test_interval_of_a_share_is_wilsons(num_hits: int, n: int, low: float, high: float) -> None:
    assert proportion_interval(num_hits, n) == pytest.approx((low, high), abs=6e-5)


def test_interval_of_mean_recall_covers_the_true_mean_19_times_of_20() -> None:
    sizes, truth = [5, 12, 40, 100], [0.95, 0.3, 0.7, 0.9]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    covered, trials = 0, 1000
    for drawn in torch.rand(trials, sum(sizes), generator=generator):
        low, high = recall_interval(drawn < torch.tensor(truth)[labels], labels, 4)
        covered += low <= statistics.mean(truth) <= high
    assert 0.93 < covered / trials < 0.99


def test_recall_intervals_of_classes_that_are_all_right_have_a_width() -> None:
    labels = torch.arange(4).repeat_interleave(10)
    low, high = recall_interval(bools("1" * 40), labels, 4)
    assert recall_interval(bools("1" * 40), labels, 6) == (low, high)  # classes without images do not count
    assert 0.7 < low < 0.98 < high == 1


def loop_mean_interval(values: list[float]) -> tuple[float, float]:
    """As if 1.92 more values were 0, and 1.92 were 1."""
    weighted = [*((value, 1.0) for value in values), (0.0, 1.920729), (1.0, 1.920729)]
    total = sum(weight for _, weight in weighted)
    mean = sum(weight * value for value, weight in weighted) / total
    variance = sum(weight * (value - mean) ** 2 for value, weight in weighted) / total
    centre, half = sum(values) / len(values), 1.959964 * math.sqrt(variance / total)
    return max(0.0, centre - half), min(1.0, centre + half)


@pytest.mark.parametrize(
    "values", [[0.2, 0.4, 0.4, 0.6, 0.9], [0.0, 1.0], [0.7], [1.0] * 50, [0.0] * 3, [1.2, 0.0, 0.5]]
)
def test_interval_of_a_mean_takes_in_two_values_more_at_each_end(values: list[float]) -> None:
    low, high = mean_interval(torch.tensor(values, dtype=torch.float64))
    assert (low, high) == pytest.approx(loop_mean_interval(values), abs=1e-6)
    assert 0 <= low < high <= 1


def test_bootstrap_draws_images_with_replacement() -> None:
    # Two images, one of them positive for two classes and one for the third, each ranked second: drawn twice, an image
    # has AP 1 for its classes and 0 for the others'; drawn once, one half. The means are 1/3, 1/2, 1/2 and 2/3.
    scores, targets = torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]), bools("001110").view(2, 3)

    def mean(drawn: Tensor, classes: slice = slice(None)) -> Tensor:
        return average_precisions(scores[drawn, classes], targets[drawn, classes]).mean()

    half = 1.96 * statistics.pstdev([1 / 3, 1 / 2, 1 / 2, 2 / 3])
    assert bootstrap_interval(mean, 2, resamples=2000) == pytest.approx((0.5 - half, 0.5 + half), rel=0.05)
    assert bootstrap_interval(lambda drawn: mean(drawn, slice(1)), 2) == (0.0, 1.0)  # ±0.69, clipped at both ends
    assert bootstrap_interval(mean, 2) == bootstrap_interval(mean, 2) != bootstrap_interval(mean, 2, seed=1)


def test_paired_comparison_by_hand() -> None:
    paired = compare_paired(bools("1111100000"), bools("1110011110"))
    assert (paired["n"], paired["won"], paired["lost"]) == (10, 4, 2)
    assert paired["difference"] == pytest.approx(0.2)
    # Half a sample more in each cell: 4.5 won, 2.5 lost, 5 the same, of 12.
    shares = {1: 4.5 / 12, -1: 2.5 / 12, 0: 5 / 12}
    centre = sum(value * share for value, share in shares.items())
    half = 1.959964 * math.sqrt(sum(share * (value - centre) ** 2 for value, share in shares.items()) / 12)
    assert paired["ci95"] == pytest.approx((centre - half, centre + half))
    assert paired["mcnemar_p"] == pytest.approx(2 * (1 + 6 + 15) / 64)
    same = compare_paired(bools("10110"), bools("10110"))
    assert [same[name] for name in ("difference", "mcnemar_p", "won", "lost")] == [0, 1, 0, 0]
    assert same["ci95"] == pytest.approx((-1.959964 / 7, 1.959964 / 7))  # one of 7 differs
    assert compare_paired(bools("0"), bools("1"))["ci95"][1] == 1.0  # clipped
    values = [0.5, -0.25, 0.0, 0.75]
    half = 1.959964 * statistics.pstdev(values) / 2
    assert difference_interval(torch.tensor(values)) == pytest.approx((0.25 - half, 0.25 + half))


def exact_mcnemar(won: int, lost: int) -> float:
    thrown = won + lost
    tail = sum(math.comb(thrown, heads) for heads in range(min(won, lost) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**thrown)))


def test_mcnemar_is_the_exact_binomial() -> None:
    small = list(itertools.product(range(31), range(31)))
    for won, lost in [*small, (300, 380), (0, 60), (1, 1000), (2000, 2101)]:
        p = mcnemar_p(won, lost)
        assert p == pytest.approx(exact_mcnemar(won, lost), rel=1e-8)
        assert p == mcnemar_p(lost, won) <= 1
    assert mcnemar_p(0, 5) == pytest.approx(1 / 16)
    # Normal approximation with continuity correction: z = (400 − 1) / √40400
    assert mcnemar_p(20_000, 20_400) == pytest.approx(math.erfc(399 / math.sqrt(40_400) / math.sqrt(2)), rel=1e-3)
    assert (mcnemar_p(25_000, 25_000), mcnemar_p(0, 50_000)) == (1.0, 0.0)  # the second 2⁻⁴⁹⁹⁹⁹


def loop_calibration(confidences: list[float], correct: list[bool]) -> tuple[float, list[list[int]]]:
    bins: list[list[int]] = [[] for _ in range(15)]
    for image, confidence in enumerate(confidences):
        edges = [number for number in range(15) if number / 15 < confidence <= (number + 1) / 15]
        bins[edges[0]].append(image)
    gaps = [
        len(images) * abs(statistics.mean(correct[i] for i in images) - statistics.mean(confidences[i] for i in images))
        for images in bins
        if images
    ]
    return sum(gaps) / len(confidences), bins


@pytest.mark.parametrize("n", [1, 300])
def test_calibration_equals_a_plain_loop(n: int) -> None:
    draw = random.Random(n)
    confidences, correct = [draw.random() for _ in range(n)], [draw.random() < 0.6 for _ in range(n)]
    ece, bins = loop_calibration(confidences, correct)
    ours = calibrate(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct))
    assert ours["ece"] == pytest.approx(ece, abs=1e-12)
    assert ours["counts"] == [len(images) for images in bins]
    for name, values in (("confidences", confidences), ("accuracies", correct)):
        means = [statistics.mean(values[i] for i in images) if images else None for images in bins]
        assert ours[name] == pytest.approx(means)


def test_bins_of_calibration_hold_their_upper_edge() -> None:
    edges = torch.arange(1, 16, dtype=torch.float64) / 15
    assert calibrate(edges, bools("1" * 15))["counts"] == [1] * NUM_BINS
    ends = torch.tensor([0.0, 1e-9, 0.999, 1.0, 1.0000001], dtype=torch.float64)  # a softmax may round above one
    assert calibrate(ends, bools("11111"))["counts"] == [2, *[0] * (NUM_BINS - 2), 3]
