"""The GKL family against loops over the published formula, hand-made numbers, the paper's theorem and float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkd.losses import RowStatistics, gkl, row_statistics, row_weights
from tests.losses.random_features import GAMMAS, GRID, SCALES, TEMPERATURES, clustered_logits, random_logits
from tests.oracles import peers

LN2, LN3 = math.log(2), math.log(3)
CLOSE_RACE = 38
"""Seed whose teacher has a query with two likely candidates even at scale 100, so that the squared error has a gradient."""


def power(row: Tensor, temperature: float, exponent: float) -> list[Tensor]:
    """softmax(row / temperature) ** exponent, one candidate at a time."""
    shares = [torch.exp(value / temperature) for value in row]
    total = sum(shares[1:], shares[0])
    return [(share / total) ** exponent for share in shares]


def loop_cross_entropy(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Mean over rows of −Σ_j q_j log π_j, by loops."""
    total = student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        targets, predictions = power(t, temperature, 1.0), power(s, temperature, 1.0)
        for target, prediction in zip(targets, predictions, strict=True):
            total = total - target * torch.log(prediction)
    return total / len(student)


def loop_squared_error(student: Tensor, teacher: Tensor, gamma: float) -> Tensor:
    """¼ Σ_i Σ_jk w_ij w_ik ((t_ij − t_ik) − (s_ij − s_ik))² / Σ_ijk w_ij w_ik, by the triple loop that is published."""
    squares, normaliser = student.new_zeros(()), student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        w = power(t.detach(), 1.0, gamma)
        for j, k in itertools.product(range(len(s)), repeat=2):
            squares = squares + w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
            normaliser = normaliser + w[j] * w[k]
    return squares / normaliser / 4


@pytest.mark.parametrize(("temperature", "gamma", "scale"), GRID)
def test_value_and_student_gradient_equal_the_published_triple_loop(
    temperature: float, gamma: float, scale: float
) -> None:
    student, teacher = random_logits(2, scale=scale, seed=1)
    by_loop, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = 0.7 * loop_cross_entropy(by_loop, teacher, temperature)
    expected = expected + 1.9 * loop_squared_error(by_loop, teacher, gamma)
    value = gkl(ours, teacher, ce_weight=0.7, mse_weight=1.9, gamma=gamma, temperature=temperature)
    (expected_gradient,) = torch.autograd.grad(expected, by_loop)
    (gradient,) = torch.autograd.grad(value, ours)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


def test_two_candidates_by_hand() -> None:
    # Teacher softmax (3/4, 1/4), student (1/2, 1/2), difference of logits (ln 3, 0).
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[LN3, 0.0]])
    entropy = 2 * LN2 - 0.75 * LN3
    found = [each.item() for each in vars(row_statistics(student, teacher)).values()]
    assert found == pytest.approx([LN2, LN2 - entropy, entropy, 3 / 16 * LN3**2, 0.0], rel=1e-6, abs=1e-7)
    value = gkl(student, teacher, ce_weight=2.0, mse_weight=3.0, gamma=1.0)
    assert value.item() == pytest.approx(2 * LN2 + 9 / 32 * LN3**2, rel=1e-6)
    uniform = gkl(student, teacher, ce_weight=0.0, mse_weight=1.0, gamma=0.0)
    assert uniform.item() == pytest.approx(LN3**2 / 8, rel=1e-6)


def test_a_temperature_softens_both_sides_and_no_square_multiplies_it() -> None:
    # Halved by T = 2, these are the logits of the case by hand.
    student, teacher = torch.tensor([[5.0, 5.0]]), torch.tensor([[2 * LN3, 0.0]])
    value = gkl(student, teacher, ce_weight=3.0, mse_weight=1.0, gamma=0.0, temperature=2.0)
    assert value.item() == pytest.approx(3 * LN2 + LN3**2 / 2, rel=1e-6)  # ½ Var without a temperature, uniform
    rows = row_statistics(student, teacher, temperature=2.0)
    assert rows.kl.item() == pytest.approx(0.75 * LN3 - LN2, rel=1e-6)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_is_that_of_finite_differences_and_sums_to_zero(gamma: float) -> None:
    student, teacher = random_logits(2, scale=3.0, seed=6)
    options = {"ce_weight": 1.3, "mse_weight": 0.6, "gamma": gamma, "temperature": 2.0}
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: gkl(s, teacher, **options), student)
    (gradient,) = torch.autograd.grad(gkl(student, teacher, **options), student)
    assert gradient.sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize("gamma", GAMMAS)
def test_invariances(gamma: float) -> None:
    student, teacher = random_logits(2, 5, 6, scale=10.0, seed=8)
    options = {"temperature": 2.0, "gamma": gamma}
    expected = vars(row_statistics(student, teacher, **options))
    shift = torch.tensor([[-3.0], [0.5], [40.0], [7.0], [0.0]], dtype=torch.float64)
    rows, columns = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([5, 2, 0, 1, 4, 3])
    shifted = vars(row_statistics(student + shift, teacher - 2 * shift, **options))
    turned = vars(row_statistics(student[rows][:, columns], teacher[rows][:, columns], **options))
    doubled = vars(row_statistics(student.repeat(1, 2), teacher.repeat(1, 2), **options))
    # Twice as many candidates of half the probability: 2 (p/2)^γ.
    more = {"ce": LN2, "teacher_entropy": LN2, "log_weight_mass": (1 - gamma) * LN2}
    for name, value in expected.items():
        torch.testing.assert_close(shifted[name], value, rtol=1e-11, atol=1e-12, msg=name)
        torch.testing.assert_close(turned[name], value[rows], rtol=1e-12, atol=1e-13, msg=name)
        torch.testing.assert_close(doubled[name], value + more.get(name, 0.0), rtol=1e-12, atol=1e-12, msg=name)
    assert min(expected["kl"].min(), expected["variance"].min()) > 0


def test_divergence_and_variance_vanish_only_where_logits_agree_up_to_a_row_constant() -> None:
    (student,) = random_logits(1, 4, 6, scale=10.0, seed=11)
    teacher = student + torch.tensor([[1.0], [-20.0], [0.0], [3.0]], dtype=torch.float64)
    rows = row_statistics(student, teacher, gamma=0.3)
    assert torch.stack([rows.kl, rows.variance]).abs().max() < 1e-14
    teacher[2, 1] += 0.01
    rows = row_statistics(student, teacher, gamma=0.3)
    assert (rows.kl > 1e-10).tolist() == (rows.variance > 1e-10).tolist() == [False, False, True, False]
    teacher = 10 * teacher.float()
    rows = row_statistics(teacher.clone(), teacher)
    assert torch.stack([rows.kl, rows.variance]).abs().max() == 0


@pytest.mark.parametrize("scale", SCALES)
def test_theorem_1(scale: float) -> None:
    """At T = γ = 1: ∂KL/∂s = ∂CE/∂s, ∂KL/∂t = ∂(½ Var)/∂t and ∂(½ Var)/∂s = −∂KL/∂t (arXiv 2305.13948)."""
    student, teacher = (leaf.requires_grad_() for leaf in random_logits(2, scale=scale, seed=CLOSE_RACE))
    to_student, to_teacher = peers.dkl_gradients(student, teacher, ce_weight=1.3, mse_weight=0.6)
    rows = row_statistics(student, teacher)
    (by_ce,) = torch.autograd.grad(1.3 * rows.ce.mean(), student, retain_graph=True)
    by_variance, of_teacher = torch.autograd.grad(0.6 * rows.variance.mean() / 2, (student, teacher))
    for gradient, wanted in ((by_ce, to_student), (of_teacher, to_teacher), (-by_variance, to_teacher)):
        assert (gradient - wanted).norm() <= 1e-11 * wanted.norm()
        assert wanted.norm() > 0.01


def test_soft_target_and_pair_weights_are_constants() -> None:
    student, teacher = random_logits(2, 4, 5, scale=5.0, seed=14)
    rows = row_statistics(student, teacher.requires_grad_(), gamma=0.3)
    found = {name: value.requires_grad for name, value in vars(rows).items()}
    assert {name for name, moves in found.items() if moves} == {"variance"}
    # What is left is the squared error alone: equal and opposite on the two sides.
    error = gkl(student.requires_grad_(), teacher, ce_weight=0.0, mse_weight=1.0, gamma=0.3)
    to_student, to_teacher = torch.autograd.grad(error, (student, teacher))
    torch.testing.assert_close(to_student, -to_teacher, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("kind", ["clustered", "far"])
def test_float32_is_good_to_1e5_at_logit_scale_100(kind: str, gamma: float) -> None:
    if kind == "clustered":
        student, teacher = clustered_logits(1), clustered_logits(2)
    else:  # probabilities down to e^(-400): zero in float32, so that their powers would be zero as well
        student, teacher = (part.float() for part in random_logits(2, 8, 16, scale=100.0, seed=15))

    def compute(dtype: torch.dtype) -> tuple[RowStatistics, Tensor]:
        leaf = student.to(dtype, copy=True).requires_grad_()
        value = gkl(leaf, teacher.to(dtype), ce_weight=1.0, mse_weight=1.0, gamma=gamma)
        return row_statistics(leaf, teacher.to(dtype), gamma=gamma), torch.autograd.grad(value, leaf)[0].double()

    (rows, gradient), (exact_rows, exact) = compute(torch.float32), compute(torch.float64)
    assert (gradient - exact).norm() <= 1e-5 * exact.norm()
    for name, value in vars(exact_rows).items():
        torch.testing.assert_close(getattr(rows, name).double(), value, rtol=1e-5, atol=1e-4, msg=name)


@pytest.mark.parametrize("gamma", [0.0, 0.3])
def test_small_variance_around_a_large_mean_keeps_its_digits_in_float32(gamma: float) -> None:
    generator = torch.Generator().manual_seed(17)
    student = torch.randn(4, 4096, generator=generator)
    teacher = student + 60 + 0.2 * torch.randn(4, 4096, generator=generator)
    variance = row_statistics(student, teacher, gamma=gamma).variance
    expected = []
    for s, t in zip(student.double(), teacher.double(), strict=True):
        w = torch.exp(gamma * (t - t.max()))
        mean = (w * (t - s)).sum() / w.sum()
        expected.append(((w * (t - s - mean) ** 2).sum() / w.sum()).item())
    assert expected[0] == pytest.approx(0.04, rel=0.1)
    assert variance.tolist() == pytest.approx(expected, rel=1e-4)


# Pairs weighed by a class prior


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gkl_with_a_class_prior_equals_the_published_form(temperature: float, gamma: float, scale: float) -> None:
    student, teacher = random_logits(2, scale=scale, seed=CLOSE_RACE)
    student.requires_grad_()
    generator = torch.Generator().manual_seed(18)
    prior = (3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)[[1, 0, 1]]
    rows = row_statistics(student, teacher, temperature=temperature, gamma=gamma, pair_prior=prior.log())
    value = 0.7 * rows.ce.mean() + 1.9 * 0.5 * (row_weights(rows.log_weight_mass) * rows.variance).sum()
    options = {"ce_weight": 0.7, "mse_weight": 1.9, "gamma": gamma, "temperature": temperature}
    oracle = peers.gkl(student, teacher, **options, class_prior=prior)
    assert value.item() == pytest.approx(oracle.item(), rel=1e-12)
    (gradient,), (expected,) = torch.autograd.grad(value, student), torch.autograd.grad(oracle, student)
    assert (gradient - expected).norm() <= 1e-12 * expected.norm()


def test_a_class_prior_weighs_two_candidates_by_hand() -> None:
    # The prior is (3/4, 1/4), the teacher's own softmax (1/10, 9/10); difference of logits (0, 2 ln 3).
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 2 * LN3]])
    prior = torch.tensor([[0.75, 0.25]]).log()
    rows = row_statistics(student, teacher, pair_prior=prior)
    assert rows.variance.item() == pytest.approx(3 / 4 * LN3**2, rel=1e-6)
    assert rows.log_weight_mass.item() == pytest.approx(0.0, abs=1e-6)
    assert rows.ce.item() == pytest.approx(LN2, rel=1e-6)
    half = row_statistics(student, teacher, pair_prior=prior, gamma=0.5)
    assert half.log_weight_mass.item() == pytest.approx(math.log((math.sqrt(3) + 1) / 2), rel=1e-6)


# Types and wrong arguments


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (part.to(dtype) for part in random_logits(2, 4, 6, scale=20.0, seed=18))
    weights = {"ce_weight": 1.0, "mse_weight": 1.0, "gamma": 0.3}
    value = gkl(student.requires_grad_(), teacher, **weights)
    assert value.dtype == torch.float32
    assert value.item() == gkl(student.float(), teacher.float(), **weights).item()
    assert torch.autograd.grad(value, student)[0].dtype == dtype


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": math.nan}, r"^temperature is .*positive"),
        ({"gamma": -0.1}, "gamma"),
        ({"student_logits": torch.zeros(2, 4)}, r"\(2, 4\).*\(2, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    arguments = {"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3), "gamma": 1.0} | options
    with pytest.raises(ValueError, match=words):
        row_statistics(**arguments)


def test_the_annotated_shapes_are_checked_while_these_tests_run() -> None:
    with pytest.raises(Exception, match="teacher_logits"):
        row_statistics(torch.zeros(2, 3), torch.zeros(2, 4))
