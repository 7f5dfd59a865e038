"""Soft targets of one or several teachers, and mixed targets: numbers made by hand, loops, float32."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.losses import log_mean_softmax, mixed_target, soft_target_statistics
from tests.losses.random_features import SCALES, TEMPERATURES, clustered_logits, random_logits

LN2, LN3 = math.log(2), math.log(3)
MASK = torch.tensor([[True, False, True, False], [False, True, False, False], [True, True, True, False]])
"""Two, one and three positives."""


def shares(row: list[float], temperature: float = 1.0) -> list[float]:
    """softmax(row / temperature), one number at a time."""
    powers = [math.exp(value / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


def test_mean_of_two_opposite_teachers_by_hand() -> None:
    # (3/4, 1/4) and (1/4, 3/4); at half the temperature (9/10, 1/10) and (1/10, 9/10)
    pair = [torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, LN3]])]
    for temperature in (1.0, 0.5):
        assert log_mean_softmax(pair, temperature=temperature).tolist() == [pytest.approx([-LN2, -LN2], rel=1e-6)]
    with pytest.raises(ValueError, match="no teacher"):
        log_mean_softmax([])


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_mean_softmax_equals_loops_over_one_or_several_teachers(temperature: float, scale: float) -> None:
    teachers = random_logits(3, scale=scale, seed=11)
    for number in (1, 3):
        expected = []
        for rows in zip(*(teacher.tolist() for teacher in teachers[:number]), strict=True):
            columns = zip(*(shares(row, temperature) for row in rows), strict=True)
            means = [math.log(sum(column) / number) for column in columns]
            expected.append(pytest.approx(means, rel=1e-10, abs=1e-12))
        assert log_mean_softmax(teachers[:number], temperature=temperature).tolist() == expected


def test_log_mean_softmax_stays_finite_where_every_probability_underflows() -> None:
    row = torch.tensor([[100.0, -100.0, -60.0]])  # e^(-200) is zero in float32
    assert log_mean_softmax([row, row], temperature=0.5).tolist() == [pytest.approx([0.0, -400.0, -320.0], abs=1e-4)]
    assert log_mean_softmax([row, -row]).tolist()[0] == pytest.approx([-LN2, -LN2, -LN2 - 40.0], abs=1e-4)


def test_soft_target_statistics_by_hand() -> None:
    # Target (3/4, 1/4); the student's temperature makes (9/10, 1/10) of it, and leaves the target alone.
    target = torch.tensor([[0.75, 0.25]]).log()
    rows = soft_target_statistics(torch.tensor([[LN3, 0.0]]), target, temperature=0.5)
    entropy, ce = 2 * LN2 - 0.75 * LN3, math.log(10) - 1.5 * LN3
    assert [each.item() for each in vars(rows).values()] == pytest.approx([ce, ce - entropy, entropy], rel=1e-5)


# Mixed targets (ALBEF)


def test_mixed_target_of_two_positives_and_two_sources_by_hand() -> None:
    half = torch.tensor([[LN2, 0.0, 0.0]])  # (1/2, 1/4, 1/4)
    tenths = torch.tensor([[0.0, LN2, math.log(7)]])  # (1, 2, 7)/10
    positives = torch.tensor([[True, True, False]])
    assert mixed_target(positives, [(0.4, half)]).tolist() == [pytest.approx([0.5, 0.4, 0.1], rel=1e-6)]
    two = mixed_target(positives, [(0.4, half), (0.2, tenths)])
    assert two.tolist() == [pytest.approx([0.42, 0.34, 0.24], rel=1e-6)]
    assert mixed_target(positives, []).tolist() == [[0.5, 0.5, 0.0]]


def test_shares_that_leave_no_target_of_probabilities_are_refused() -> None:
    def mix(*shares: float) -> Tensor:
        return mixed_target(MASK, [(share, torch.zeros(3, 4)) for share in shares])

    for wrong in ((0.6, 0.6), (-0.1,), (1.5, -0.6)):
        with pytest.raises(ValueError, match=r"^shares of a mixed target are \["):
            mix(*wrong)
    rounded = mix(0.2, 0.4, 0.3, 0.1)  # together a little more than 1
    assert rounded.flatten().tolist() == pytest.approx([0.25] * 12, rel=1e-6)


@pytest.mark.parametrize("name", ["ensemble", "mixed"])
def test_gradient_is_that_of_finite_differences_and_good_to_1e5_in_float32_at_scale_100(name: str) -> None:
    def loss(student: Tensor, first: Tensor, second: Tensor) -> Tensor:
        if name == "ensemble":
            target = log_mean_softmax([first, second], temperature=2.0)
            return soft_target_statistics(student, target, temperature=2.0).kl.mean()
        own = torch.eye(*student.shape, dtype=torch.bool)
        return F.cross_entropy(student, mixed_target(own, [(0.4, first), (0.3, second)]))

    student, *teachers = random_logits(3, scale=3.0, seed=21)
    assert torch.autograd.gradcheck(lambda s: loss(s, *teachers), student.requires_grad_())
    student, *teachers = (clustered_logits(seed) for seed in (1, 2, 3))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(leaf, *(t.to(dtype) for t in teachers)), leaf)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
