"""Shares, averages, intervals, paired tests and calibration against plain loops, published numbers and simulation."""

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


@pytest.mark.parametrize(
    ("num_hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        # Newcombe, Statistics in Medicine 17, 1998, Table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_interval_of_a_share_is_wilsons(num_hits: int, n: int, low: float, high: float) -> None:
    assert proportion_interval(num_hits, n) == pytest.approx((low, high), abs=6e-5)


def test_interval_of_imagenet_accuracy_is_less_than_half_a_point_to_either_side() -> None:
    low, high = proportion_interval(30_000, 50_000)
    assert (high - low) / 2 == pytest.approx(0.0043, abs=1e-4)


def test_interval_of_mean_recall_covers_the_true_mean_19_times_of_20() -> None:
    sizes, truth = [5, 12, 40, 100], [0.95, 0.3, 0.7, 0.9]
    labels = torch.repeat_interleave(torch.arange(4), torch.tensor(sizes))
    generator = torch.Generator().manual_seed(0)
    covered, trials = 0, 1000
    for drawn in torch.rand(trials, sum(sizes), generator=generator):
        low, high = recall_interval(drawn < torch.tensor(truth)[labels], labels, 4)
        covered += low <= statistics.mean(truth) <= high
    assert 0.93 < covered / trials < 0.99


@pytest.mark.parametrize("letter", ["0", "1"])
def test_interval_of_a_class_that_is_all_right_or_all_wrong_has_a_width(letter: str) -> None:
    labels = torch.arange(4).repeat_interleave(10)
    low, high = recall_interval(bools(letter * 40), labels, 4)
    assert recall_interval(bools(letter * 40), labels, 6) == (low, high)  # classes without images do not count
    assert 0.02 < high - low < 0.3
    assert (high if letter == "1" else low) == float(letter)


def test_more_images_narrow_the_interval_of_mean_recall() -> None:
    widths = []
    for times in (1, 100):
        labels = torch.arange(2).repeat_interleave(10 * times)
        low, high = recall_interval(bools("1111100000" * 2 * times), labels, 2)
        assert (low + high) / 2 == pytest.approx(0.5)
        widths.append(high - low)
    # 2000 images at one half: the added ones hardly count.
    assert widths[1] == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2000), rel=5e-3)
    assert widths[0] > 5 * widths[1]


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


def test_interval_of_a_mean_of_many_values_is_the_usual_one() -> None:
    values = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    low, high = mean_interval(values)
    assert (high - low) / 2 == pytest.approx(1.96 * statistics.stdev(values.tolist()) / math.sqrt(20_000), rel=1e-3)
    assert (low + high) / 2 == pytest.approx(statistics.mean(values.tolist()))


def test_bootstrap_contains_the_mean_and_can_be_repeated() -> None:
    generator = torch.Generator().manual_seed(3)
    targets = torch.rand(80, 4, generator=generator) < 0.3
    scores = torch.randn(80, 4, generator=generator) + targets
    low, high = bootstrap_interval(scores, targets)
    mean = average_precisions(scores, targets).mean().item()
    assert 0 < low < high < 1
    assert (low + high) / 2 == pytest.approx(mean)
    assert 0.05 < high - low < 0.4
    assert bootstrap_interval(scores, targets) == (low, high)
    assert bootstrap_interval(scores, targets, seed=1) != (low, high)


def test_bootstrap_draws_images_with_replacement() -> None:
    # Two images, one of them positive for two classes and one for the third, each ranked second: drawn twice, an image
    # has AP 1 for its classes and 0 for the others'; drawn once, one half. The means are 1/3, 1/2, 1/2 and 2/3.
    scores, targets = torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9]]), bools("001110").view(2, 3)
    half = 1.96 * statistics.pstdev([1 / 3, 1 / 2, 1 / 2, 2 / 3])
    assert bootstrap_interval(scores, targets, resamples=2000) == pytest.approx((0.5 - half, 0.5 + half), rel=0.05)
    assert bootstrap_interval(scores[:, :1], targets[:, :1]) == (0.0, 1.0)  # ±0.69, cut at both ends


def test_paired_comparison_by_hand() -> None:
    paired = compare_paired(bools("1111100000"), bools("1110011110"))
    assert (paired.n, paired.won, paired.lost) == (10, 4, 2)
    assert paired.difference == pytest.approx(0.2)
    # Half a sample more in each cell: 4.5 won, 2.5 lost, 5 the same, of 12.
    values = {1: 4.5 / 12, -1: 2.5 / 12, 0: 5 / 12}
    centre = sum(value * share for value, share in values.items())
    half = 1.959964 * math.sqrt(sum(share * (value - centre) ** 2 for value, share in values.items()) / 12)
    assert paired.ci95 == pytest.approx((centre - half, centre + half))
    assert paired.mcnemar_p == pytest.approx(2 * (1 + 6 + 15) / 64)


def test_interval_of_a_paired_difference_covers_the_truth_19_times_of_20() -> None:
    generator, covered, trials = torch.Generator().manual_seed(0), 0, 1000
    for drawn in torch.rand(trials, 40, generator=generator):  # 12 % won, 5 % lost
        low, high = compare_paired((drawn > 0.12) & (drawn < 0.6), (drawn < 0.55)).ci95
        covered += low <= 0.07 <= high
    assert 0.93 < covered / trials < 0.99


def test_equal_models_do_not_differ_but_are_not_certain_to_be_equal() -> None:
    paired = compare_paired(bools("10110"), bools("10110"))
    assert (paired.difference, paired.mcnemar_p, paired.won, paired.lost) == (0.0, 1.0, 0, 0)
    assert paired.ci95 == pytest.approx((-1.959964 / 7, 1.959964 / 7))  # one of 7 differs
    assert compare_paired(bools("0"), bools("1")).ci95[1] == 1.0  # cut
    assert compare_paired(bools("1"), bools("0")).ci95[0] == -1.0


def test_interval_of_a_mean_difference_by_hand() -> None:
    values = [0.5, -0.25, 0.0, 0.75]
    half = 1.959964 * statistics.pstdev(values) / 2
    assert difference_interval(torch.tensor(values)) == pytest.approx((0.25 - half, 0.25 + half))
    assert difference_interval(torch.tensor([1.0, -1.0])) == (-1.0, 1.0)  # ±1.39, cut at both ends


def test_exchanged_models_change_the_sign_only() -> None:
    a, b = bools("1101100101"), bools("1001111111")
    there, back = compare_paired(a, b), compare_paired(b, a)
    assert there.difference == -back.difference > 0
    assert there.ci95 == pytest.approx((-back.ci95[1], -back.ci95[0]))
    assert there.mcnemar_p == back.mcnemar_p
    assert (there.won, there.lost) == (back.lost, back.won)


def exact_mcnemar(won: int, lost: int) -> float:
    thrown = won + lost
    tail = sum(math.comb(thrown, heads) for heads in range(min(won, lost) + 1))
    return float(min(Fraction(1), Fraction(2 * tail, 2**thrown)))


def test_mcnemar_is_the_exact_binomial_for_every_small_count() -> None:
    for won in range(31):
        for lost in range(31):
            p = mcnemar_p(won, lost)
            assert p == pytest.approx(exact_mcnemar(won, lost), rel=1e-9)
            assert p == mcnemar_p(lost, won) <= 1
    assert mcnemar_p(0, 5) == pytest.approx(1 / 16)
    assert mcnemar_p(7, 7) == 1.0


@pytest.mark.parametrize(("won", "lost"), [(300, 380), (0, 60), (1, 1000), (2000, 2101), (999, 1001)])
def test_mcnemar_is_the_exact_binomial_for_large_counts(won: int, lost: int) -> None:
    assert mcnemar_p(won, lost) == pytest.approx(exact_mcnemar(won, lost), rel=1e-8)


def test_mcnemar_of_a_whole_benchmark_is_finite() -> None:
    # Normal approximation with continuity correction: z = (400 − 1) / √40400
    assert mcnemar_p(20_000, 20_400) == pytest.approx(math.erfc(399 / math.sqrt(40_400) / math.sqrt(2)), rel=1e-3)
    assert mcnemar_p(25_000, 25_000) == 1.0
    assert mcnemar_p(0, 50_000) == 0.0  # 2⁻⁴⁹⁹⁹⁹


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


@pytest.mark.parametrize("n", [1, 7, 300])
def test_calibration_equals_a_plain_loop(n: int) -> None:
    draw = random.Random(n)
    confidences, correct = [draw.random() for _ in range(n)], [draw.random() < 0.6 for _ in range(n)]
    ece, bins = loop_calibration(confidences, correct)
    ours = calibrate(torch.tensor(confidences, dtype=torch.float64), torch.tensor(correct))
    assert ours.ece == pytest.approx(ece, abs=1e-12)
    assert ours.counts == [len(images) for images in bins]
    for images, confidence, accuracy in zip(bins, ours.confidences, ours.accuracies, strict=True):
        if not images:
            assert confidence is None
            assert accuracy is None
            continue
        assert confidence == pytest.approx(statistics.mean(confidences[i] for i in images))
        assert accuracy == pytest.approx(statistics.mean(correct[i] for i in images))


@pytest.mark.parametrize(("confidence", "place"), [(0.0, 0), (1e-9, 0), (1 / 15 + 1e-6, 1), (0.999, 14), (1.0, 14)])
def test_bins_of_calibration_hold_their_upper_edge(confidence: float, place: int) -> None:
    counts = calibrate(torch.tensor([confidence], dtype=torch.float64), bools("1")).counts
    assert counts == [int(number == place) for number in range(NUM_BINS)]
    edges = torch.arange(1, 16, dtype=torch.float64) / 15
    assert calibrate(edges, bools("1" * 15)).counts == [1] * 15


def test_a_softmax_that_rounds_above_one_falls_into_the_last_bin() -> None:
    assert calibrate(torch.tensor([1.0000001]), bools("1")).counts[-1] == 1


def test_calibration_error_of_the_sure_and_of_the_honest() -> None:
    assert calibrate(torch.ones(4), bools("1000")).ece == pytest.approx(0.75)
    honest = calibrate(torch.tensor([0.25] * 4 + [0.75] * 4, dtype=torch.float64), bools("10001110"))
    assert honest.ece == pytest.approx(0.0, abs=1e-15)
    assert sum(count > 0 for count in honest.counts) == 2
