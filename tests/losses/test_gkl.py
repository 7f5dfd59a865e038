"""The GKL family against loops over the published formula, hand-made numbers, the paper's theorem and float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clipkd.losses import dkl, gkl, kl, row_statistics, row_weights, soft_cross_entropy, weighted_squared_error
from tests.losses.random_logits import GAMMAS, SCALES, TEMPERATURES, clustered_logits, random_logits
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


def loop_squared_error(student: Tensor, teacher: Tensor, weight_temperature: float, gamma: float) -> Tensor:
    """¼ Σ_i Σ_jk w_ij w_ik ((t_ij − t_ik) − (s_ij − s_ik))² / Σ_ijk w_ij w_ik, by the triple loop that is published."""
    squares, normaliser = student.new_zeros(()), student.new_zeros(())
    for s, t in zip(student, teacher, strict=True):
        w = power(t.detach(), weight_temperature, gamma)
        for j, k in itertools.product(range(len(s)), repeat=2):
            squares = squares + w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
            normaliser = normaliser + w[j] * w[k]
    return squares / normaliser / 4


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("weight_temperature", TEMPERATURES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_value_and_student_gradient_equal_the_published_triple_loop(
    temperature: float, weight_temperature: float, gamma: float, scale: float
) -> None:
    student, teacher = random_logits(2, scale=scale, seed=1)
    by_loop, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = 0.7 * loop_cross_entropy(by_loop, teacher, temperature)
    expected = expected + 1.9 * loop_squared_error(by_loop, teacher, weight_temperature, gamma)
    powers = {"gamma": gamma, "temperature": temperature, "weight_temperature": weight_temperature}
    value = gkl(ours, teacher, ce_weight=0.7, mse_weight=1.9, **powers)
    (expected_gradient,) = torch.autograd.grad(expected, by_loop)
    (gradient,) = torch.autograd.grad(value, ours)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_row_weights_are_equal_or_the_squared_masses_of_the_pair_weights(gamma: float) -> None:
    student, teacher = random_logits(2, 5, 6, scale=10.0, seed=2)
    value = gkl(student, teacher, ce_weight=0.0, mse_weight=1.0, gamma=gamma, row_weight="uniform")
    rows = [loop_squared_error(student[i : i + 1], teacher[i : i + 1], 1.0, gamma).item() for i in range(5)]
    assert value.item() == pytest.approx(sum(rows) / 5, rel=1e-12)
    masses = [sum(share.item() for share in power(row, 2.0, gamma)) for row in teacher]
    found = row_statistics(teacher, teacher, weight_temperature=2.0, gamma=gamma).log_weight_mass
    assert found.tolist() == pytest.approx([math.log(m) for m in masses], rel=1e-12, abs=1e-14)
    expected = [m * m / sum(m * m for m in masses) for m in masses]
    assert row_weights(found, "reference").tolist() == pytest.approx(expected, rel=1e-12)
    assert row_weights(found, "uniform").tolist() == [0.2] * 5


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


def test_a_temperature_softens_both_sides_and_its_square_is_opt_in() -> None:
    # Halved by T = 2, these are the logits of the case by hand.
    student, teacher = torch.tensor([[5.0, 5.0]]), torch.tensor([[2 * LN3, 0.0]])
    half_variance = LN3**2 / 2  # at weight temperature 1, of (2 ln 3, 0) with equal weights
    for squared, factor in ((False, 1), (True, 4)):
        options: dict[str, Any] = {"temperature": 2.0, "scale_by_temperature_squared": squared}
        divergence, ce = kl(student, teacher, **options), soft_cross_entropy(student, teacher, **options)
        assert divergence.item() == pytest.approx(factor * (0.75 * LN3 - LN2), rel=1e-6)
        assert ce.item() == pytest.approx(factor * LN2, rel=1e-6)
        value = gkl(student, teacher, ce_weight=3.0, mse_weight=1.0, gamma=0.0, **options)
        assert value.item() == pytest.approx(3 * factor * LN2 + half_variance, rel=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy_and_pulls_alike(temperature: float) -> None:
    student, teacher = random_logits(2, 4, 5, scale=10.0, seed=5)
    student.requires_grad_()
    ce = soft_cross_entropy(student, teacher, temperature=temperature)
    divergence = kl(student, teacher, temperature=temperature)
    entropy = loop_cross_entropy(teacher, teacher, temperature)
    assert (ce - divergence).item() == pytest.approx(entropy.item(), rel=1e-12)
    assert ce.item() == pytest.approx(loop_cross_entropy(student, teacher, temperature).item(), rel=1e-12)
    gradients = (torch.autograd.grad(value, student)[0] for value in (ce, divergence))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("row_weight", ["reference", "uniform"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_is_that_of_finite_differences_and_sums_to_zero(gamma: float, row_weight: Any) -> None:
    student, teacher = random_logits(2, scale=3.0, seed=6)
    options = {"ce_weight": 1.3, "mse_weight": 0.6, "gamma": gamma, "temperature": 2.0, "weight_temperature": 0.5}
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: gkl(s, teacher, row_weight=row_weight, **options), student)
    (gradient,) = torch.autograd.grad(gkl(student, teacher, row_weight=row_weight, **options), student)
    assert gradient.sum(dim=1).abs().max() < 1e-14


@pytest.mark.parametrize("gamma", GAMMAS)
def test_invariances(gamma: float) -> None:
    student, teacher = random_logits(2, 5, 6, scale=10.0, seed=8)
    options = {"temperature": 2.0, "weight_temperature": 0.5, "gamma": gamma}
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
    """At T = T_w = γ = 1: ∂KL/∂s = ∂CE/∂s, ∂KL/∂t = ∂(½ Var)/∂t and ∂(½ Var)/∂s = −∂KL/∂t (arXiv 2305.13948)."""
    student, teacher = (leaf.requires_grad_() for leaf in random_logits(2, scale=scale, seed=CLOSE_RACE))
    to_student, to_teacher = peers.dkl_gradients(student, teacher, ce_weight=1.3, mse_weight=0.6)
    value = dkl(student, teacher, ce_weight=1.3, mse_weight=0.6, row_weight="uniform")
    half = gkl(student, teacher, ce_weight=0.0, mse_weight=0.6, gamma=1.0, row_weight="uniform")
    found = (*torch.autograd.grad(value, (student, teacher)), -torch.autograd.grad(half, student)[0])
    for gradient, wanted in zip(found, (to_student, to_teacher, to_teacher), strict=True):
        assert (gradient - wanted).norm() <= 1e-11 * wanted.norm()
        assert wanted.norm() > 0.01


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("temperature", "weight_temperature"), [(1.0, 1.0), (0.5, 4.0), (4.0, 0.5)])
def test_dkl_is_gkl_in_value_and_to_the_teacher_and_only_soft_cross_entropy_to_the_student(
    temperature: float, weight_temperature: float, scale: float
) -> None:
    student, teacher = (leaf.requires_grad_() for leaf in random_logits(2, scale=scale, seed=CLOSE_RACE))
    options = {"ce_weight": 0.7, "mse_weight": 1.9, "gamma": 0.5}
    options |= {"temperature": temperature, "weight_temperature": weight_temperature}
    value, oracle = dkl(student, teacher, **options), peers.gkl(student, teacher, **options)
    assert value.item() == pytest.approx(oracle.item(), rel=1e-12)
    to_student, to_teacher = torch.autograd.grad(value, (student, teacher))
    by_gkl, expected = torch.autograd.grad(oracle, (student, teacher))
    assert (to_teacher - expected).norm() <= 1e-11 * expected.norm()
    assert (by_gkl - to_student).norm() > 0.1  # the step from DKL to GKL
    (expected,) = torch.autograd.grad(0.7 * soft_cross_entropy(student, teacher, temperature=temperature), student)
    assert (to_student - expected).norm() <= 1e-12 * expected.norm()


def test_soft_target_and_pair_weights_are_constants() -> None:
    student, teacher = random_logits(2, 4, 5, scale=5.0, seed=14)
    teacher.requires_grad_()
    ce = gkl(student, teacher, ce_weight=1.0, mse_weight=0.0, gamma=0.3)
    assert torch.count_nonzero(torch.autograd.grad(ce, teacher)[0]) == 0
    assert not kl(student, teacher).requires_grad
    # What is left is the squared error alone: equal and opposite on the two sides.
    error = gkl(student.requires_grad_(), teacher, ce_weight=0.0, mse_weight=1.0, gamma=0.3)
    to_student, to_teacher = torch.autograd.grad(error, (student, teacher))
    torch.testing.assert_close(to_student, -to_teacher, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("spread", [0.1, 0.3])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0])
def test_float32_gradient_is_good_to_1e5_at_logit_scale_100(gamma: float, spread: float) -> None:
    student, teacher = (clustered_logits(seed, spread=spread) for seed in (1, 2))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).clone().requires_grad_()
        value = gkl(leaf, teacher.to(dtype), ce_weight=1.0, mse_weight=1.0, gamma=gamma)
        gradients.append(torch.autograd.grad(value, leaf)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("weight_temperature", TEMPERATURES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_nothing_underflows_at_logit_scale_100(gamma: float, weight_temperature: float) -> None:
    # Probabilities down to e^(-400): zero in float32, so that their powers would be zero as well.
    student, teacher = (part.float() for part in random_logits(2, 8, 16, scale=100.0, seed=15))
    options = {"gamma": gamma, "weight_temperature": weight_temperature}
    leaf = student.clone().requires_grad_()
    value = gkl(leaf, teacher, ce_weight=1.0, mse_weight=1.0, **options)
    assert torch.autograd.grad(value, leaf)[0].isfinite().all()
    exact = gkl(student.double(), teacher.double(), ce_weight=1.0, mse_weight=1.0, **options)
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    rows, expected = (
        row_statistics(s, t, **options) for s, t in ((student, teacher), (student.double(), teacher.double()))
    )
    assert all(part.isfinite().all() for part in vars(rows).values())
    torch.testing.assert_close(rows.log_weight_mass.double(), expected.log_weight_mass, rtol=1e-5, atol=1e-4)


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
    weights = row_weights(rows.log_weight_mass, "reference")
    value = 0.7 * rows.ce.mean() + 1.9 * weighted_squared_error(rows.variance, weights)
    options = {"ce_weight": 0.7, "mse_weight": 1.9, "gamma": gamma, "temperature": temperature}
    oracle = peers.gkl(student, teacher, **options, weight_temperature=1.0, class_prior=prior)
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
    leaf = student.clone().requires_grad_()
    weights = {"ce_weight": 1.0, "mse_weight": 1.0, "gamma": 0.3}
    for function, options in ((gkl, weights), (dkl, weights), (kl, {}), (soft_cross_entropy, {})):
        value = function(leaf, teacher, **options)
        assert value.dtype == torch.float32
        assert value.item() == function(student.float(), teacher.float(), **options).item()
        assert torch.autograd.grad(value, leaf)[0].dtype == dtype


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": 0.0}, r"^temperature is .*positive"),
        ({"temperature": math.nan}, r"^temperature is .*positive"),
        ({"weight_temperature": -1.0}, r"^weight_temperature is .*positive"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": math.nan}, "gamma"),
        ({"row_weight": "softmax"}, "'softmax'; choose 'reference' or 'uniform'"),
        ({"student_logits": torch.zeros(2, 4)}, r"\(2, 4\).*\(2, 3\)"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    arguments = {"student_logits": torch.zeros(2, 3), "teacher_logits": torch.zeros(2, 3), "gamma": 1.0} | options
    with pytest.raises(ValueError, match=words):
        gkl(**arguments, ce_weight=1.0, mse_weight=1.0)


def test_the_annotated_shapes_are_checked_while_these_tests_run() -> None:
    with pytest.raises(Exception, match="teacher_logits"):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
