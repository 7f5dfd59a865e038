"""The GKL family against loops over the published formula, hand-made numbers, the paper's theorem and float64."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.losses import gkl, kl, row_statistics, row_weights, soft_cross_entropy

TEMPERATURES = (0.5, 1.0, 4.0)
GAMMAS = (0.0, 0.05, 0.5, 1.0)
SCALES = (1.0, 10.0, 100.0)
LN2, LN3 = math.log(2), math.log(3)


def logits(rows: int, candidates: int, *, scale: float, seed: int) -> tuple[Tensor, Tensor]:
    """Student and teacher logits of random directions: cosines times the scale, float64."""
    generator = torch.Generator().manual_seed(seed)
    cosines = torch.rand(2, rows, candidates, generator=generator, dtype=torch.float64) * 2 - 1
    return scale * cosines[0], scale * cosines[1]


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
    student, teacher = logits(3, 4, scale=scale, seed=1)
    alpha, beta = 0.7, 1.9
    by_loop, ours = student.clone().requires_grad_(), student.clone().requires_grad_()
    expected = alpha * loop_cross_entropy(by_loop, teacher, temperature)
    expected = expected + beta * loop_squared_error(by_loop, teacher, weight_temperature, gamma)
    value = gkl(
        ours,
        teacher,
        ce_weight=alpha,
        mse_weight=beta,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=weight_temperature,
    )
    (expected_gradient,) = torch.autograd.grad(expected, by_loop)
    (gradient,) = torch.autograd.grad(value, ours)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    assert (gradient - expected_gradient).norm() <= 1e-12 * expected_gradient.norm()


@pytest.mark.parametrize("gamma", GAMMAS)
def test_uniform_row_weight_is_the_mean_of_the_loop_over_single_rows(gamma: float) -> None:
    student, teacher = logits(5, 6, scale=10.0, seed=2)
    value = gkl(student, teacher, ce_weight=0.0, mse_weight=1.0, gamma=gamma, row_weight="uniform")
    rows = [loop_squared_error(student[i : i + 1], teacher[i : i + 1], 1.0, gamma).item() for i in range(5)]
    assert value.item() == pytest.approx(sum(rows) / 5, rel=1e-12)


def test_reference_row_weights_are_the_squared_masses_of_the_pair_weights() -> None:
    _, teacher = logits(4, 5, scale=10.0, seed=3)
    masses = [sum(share.item() for share in power(row, 2.0, 0.3)) for row in teacher]
    mass = row_statistics(teacher, teacher, weight_temperature=2.0, gamma=0.3).log_weight_mass
    weights = row_weights(mass, "reference")
    total = sum(m * m for m in masses)
    assert mass.tolist() == pytest.approx([math.log(m) for m in masses], rel=1e-12)
    assert weights.tolist() == pytest.approx([m * m / total for m in masses], rel=1e-12)
    assert row_weights(mass, "uniform").tolist() == [0.25] * 4


def test_two_candidates_by_hand() -> None:
    # Teacher softmax (3/4, 1/4), student (1/2, 1/2), difference of logits (ln 3, 0).
    student, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[LN3, 0.0]])
    entropy = 2 * LN2 - 0.75 * LN3
    rows = row_statistics(student, teacher)
    assert rows.ce.item() == pytest.approx(LN2, rel=1e-6)
    assert rows.teacher_entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert rows.kl.item() == pytest.approx(LN2 - entropy, rel=1e-6)
    assert rows.variance.item() == pytest.approx(3 / 16 * LN3**2, rel=1e-6)
    assert rows.log_weight_mass.item() == pytest.approx(0.0, abs=1e-7)
    value = gkl(student, teacher, ce_weight=2.0, mse_weight=3.0, gamma=1.0)
    assert value.item() == pytest.approx(2 * LN2 + 9 / 32 * LN3**2, rel=1e-6)
    uniform = gkl(student, teacher, ce_weight=0.0, mse_weight=1.0, gamma=0.0)
    assert uniform.item() == pytest.approx(LN3**2 / 8, rel=1e-6)


def test_gamma_zero_gives_every_candidate_mass_one() -> None:
    student, teacher = logits(3, 7, scale=100.0, seed=4)
    rows = row_statistics(student, teacher, gamma=0.0)
    assert rows.log_weight_mass.exp().tolist() == pytest.approx([7.0] * 3, rel=1e-12)


def test_a_temperature_softens_both_sides_and_its_square_is_opt_in() -> None:
    # Halved by T = 2, these are the logits of the case by hand.
    student, teacher = torch.tensor([[5.0, 5.0]]), torch.tensor([[2 * LN3, 0.0]])
    divergence = 0.75 * LN3 - LN2
    assert kl(student, teacher, temperature=2.0).item() == pytest.approx(divergence, rel=1e-6)
    squared = kl(student, teacher, temperature=2.0, scale_by_temperature_squared=True)
    assert squared.item() == pytest.approx(4 * divergence, rel=1e-6)
    options = {"ce_weight": 3.0, "mse_weight": 1.0, "gamma": 0.0, "temperature": 2.0}
    half_variance = LN3**2 / 2  # at weight temperature 1, of (2 ln 3, 0) with equal weights
    assert gkl(student, teacher, **options).item() == pytest.approx(3 * LN2 + half_variance, rel=1e-6)
    squared = gkl(student, teacher, **options, scale_by_temperature_squared=True)
    assert squared.item() == pytest.approx(12 * LN2 + half_variance, rel=1e-6)
    assert soft_cross_entropy(student, teacher, temperature=2.0).item() == pytest.approx(LN2, rel=1e-6)
    squared = soft_cross_entropy(student, teacher, temperature=2.0, scale_by_temperature_squared=True)
    assert squared.item() == pytest.approx(4 * LN2, rel=1e-6)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_soft_cross_entropy_is_kl_plus_the_teachers_entropy_and_pulls_alike(temperature: float) -> None:
    student, teacher = logits(4, 5, scale=10.0, seed=5)
    student.requires_grad_()
    entropy = loop_cross_entropy(teacher, teacher, temperature)
    ce = soft_cross_entropy(student, teacher, temperature=temperature)
    divergence = kl(student, teacher, temperature=temperature)
    assert (ce - divergence).item() == pytest.approx(entropy.item(), rel=1e-12)
    assert ce.item() == pytest.approx(loop_cross_entropy(student, teacher, temperature).item(), rel=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(ce, student)[0], torch.autograd.grad(divergence, student)[0], rtol=1e-12, atol=1e-15
    )


@pytest.mark.parametrize("row_weight", ["reference", "uniform"])
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_is_that_of_finite_differences(gamma: float, row_weight: str) -> None:
    student, teacher = logits(3, 4, scale=3.0, seed=6)

    def value(s: Tensor) -> Tensor:
        return gkl(
            s,
            teacher,
            ce_weight=1.3,
            mse_weight=0.6,
            gamma=gamma,
            temperature=2.0,
            weight_temperature=0.5,
            row_weight=row_weight,
        )

    assert torch.autograd.gradcheck(value, student.requires_grad_())
    assert torch.autograd.gradcheck(lambda s: kl(s, teacher, temperature=2.0), student)


def test_a_constant_per_row_on_either_side_changes_no_statistic() -> None:
    student, teacher = logits(4, 6, scale=10.0, seed=7)
    shift = torch.tensor([[-3.0], [0.5], [40.0], [7.0]], dtype=torch.float64)
    options = {"temperature": 2.0, "weight_temperature": 0.5, "gamma": 0.3}
    before, after = (
        row_statistics(student, teacher, **options),
        row_statistics(student + shift, teacher - 2 * shift, **options),
    )
    for name, value in vars(before).items():
        torch.testing.assert_close(getattr(after, name), value, rtol=1e-11, atol=1e-12, msg=name)


def test_permuted_rows_give_permuted_statistics_and_the_same_loss() -> None:
    student, teacher = logits(5, 6, scale=10.0, seed=8)
    order = torch.tensor([3, 0, 4, 1, 2])
    before = row_statistics(student, teacher, gamma=0.3)
    after = row_statistics(student[order], teacher[order], gamma=0.3)
    for name, value in vars(before).items():
        torch.testing.assert_close(getattr(after, name), value[order], rtol=1e-13, atol=1e-14, msg=name)
    losses = [
        gkl(s, t, ce_weight=1.0, mse_weight=1.0, gamma=0.3).item()
        for s, t in ((student, teacher), (student[order], teacher[order]))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-13)
    assert row_weights(before.log_weight_mass, "reference").std() > 0.01  # else the loss could not tell


def test_permuted_candidates_change_nothing() -> None:
    student, teacher = logits(5, 6, scale=10.0, seed=9)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    before = row_statistics(student, teacher, gamma=0.3)
    after = row_statistics(student[:, order], teacher[:, order], gamma=0.3)
    for name, value in vars(before).items():
        torch.testing.assert_close(getattr(after, name), value, rtol=1e-13, atol=1e-14, msg=name)


@pytest.mark.parametrize("gamma", GAMMAS)
def test_doubling_every_candidate_adds_ln2_to_the_entropies_only(gamma: float) -> None:
    student, teacher = logits(4, 5, scale=10.0, seed=10)
    once = row_statistics(student, teacher, gamma=gamma)
    twice = row_statistics(student.repeat(1, 2), teacher.repeat(1, 2), gamma=gamma)
    expected = {
        "ce": once.ce + LN2,
        "kl": once.kl,
        "teacher_entropy": once.teacher_entropy + LN2,
        "variance": once.variance,
        # Twice as many candidates of half the probability: 2 (p/2)^γ.
        "log_weight_mass": once.log_weight_mass + (1 - gamma) * LN2,
    }
    for name, value in expected.items():
        torch.testing.assert_close(getattr(twice, name), value, rtol=1e-12, atol=1e-12, msg=name)


def test_divergence_and_variance_vanish_only_where_logits_agree_up_to_a_row_constant() -> None:
    student, _ = logits(4, 6, scale=10.0, seed=11)
    teacher = student + torch.tensor([[1.0], [-20.0], [0.0], [3.0]], dtype=torch.float64)
    rows = row_statistics(student, teacher, gamma=0.3)
    assert rows.kl.abs().max() < 1e-14
    assert rows.variance.max() < 1e-14
    teacher[2, 1] += 0.01
    rows = row_statistics(student, teacher, gamma=0.3)
    assert (rows.kl > 1e-10).tolist() == [False, False, True, False]
    assert (rows.variance > 1e-10).tolist() == [False, False, True, False]


def test_divergence_is_never_negative() -> None:
    for seed in range(50):
        rows = row_statistics(*logits(8, 6, scale=10.0, seed=seed))
        assert rows.kl.min() > 0
        assert rows.variance.min() > 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_gradient_of_every_row_sums_to_zero(gamma: float, scale: float) -> None:
    student, teacher = logits(5, 6, scale=scale, seed=12)
    student.requires_grad_()
    value = gkl(student, teacher, ce_weight=1.0, mse_weight=1.0, gamma=gamma)
    (gradient,) = torch.autograd.grad(value, student)
    assert gradient.abs().sum() > 1e-3
    assert gradient.sum(dim=1).abs().max() < 1e-14 * scale


def test_theorem_1_halves_of_gkl_are_the_two_gradients_of_kl() -> None:
    """With T = T_w = γ = 1: ∂KL/∂s = ∂CE/∂s, ∂KL/∂t = ∂(½ Var)/∂t and ∂(½ Var)/∂s = −∂KL/∂t (arXiv 2305.13948)."""
    student, teacher = logits(6, 7, scale=5.0, seed=13)
    student.requires_grad_()
    teacher.requires_grad_()
    divergence = F.kl_div(
        F.log_softmax(student, dim=1), F.log_softmax(teacher, dim=1), log_target=True, reduction="batchmean"
    )
    to_student, to_teacher = torch.autograd.grad(divergence, (student, teacher))

    ce = gkl(student, teacher, ce_weight=1.0, mse_weight=0.0, gamma=1.0)
    torch.testing.assert_close(torch.autograd.grad(ce, student)[0], to_student, rtol=1e-11, atol=1e-14)
    half_variance = gkl(student.detach(), teacher, ce_weight=0.0, mse_weight=1.0, gamma=1.0)
    torch.testing.assert_close(torch.autograd.grad(half_variance, teacher)[0], to_teacher, rtol=1e-11, atol=1e-14)
    half_variance = gkl(student, teacher.detach(), ce_weight=0.0, mse_weight=1.0, gamma=1.0)
    torch.testing.assert_close(torch.autograd.grad(half_variance, student)[0], -to_teacher, rtol=1e-11, atol=1e-14)
    assert to_teacher.norm() > 0.1


def test_soft_target_and_pair_weights_are_constants() -> None:
    student, teacher = logits(4, 5, scale=5.0, seed=14)
    teacher.requires_grad_()
    ce = gkl(student, teacher, ce_weight=1.0, mse_weight=0.0, gamma=0.3)
    assert torch.count_nonzero(torch.autograd.grad(ce, teacher)[0]) == 0
    assert not kl(student, teacher).requires_grad
    assert not soft_cross_entropy(student, teacher).requires_grad
    # What is left is the squared error alone: equal and opposite on the two sides.
    student.requires_grad_()
    error = gkl(student, teacher, ce_weight=0.0, mse_weight=1.0, gamma=0.3)
    to_student, to_teacher = torch.autograd.grad(error, (student, teacher))
    torch.testing.assert_close(to_student, -to_teacher, rtol=1e-12, atol=1e-15)


def clustered_pairs(spread: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Image and text features of a trained model's kind: groups of similar pairs, a gap between the modalities."""
    generator = torch.Generator().manual_seed(seed)

    def directions(num: int) -> Tensor:
        return F.normalize(torch.randn(num, 128, generator=generator), dim=1)

    meaning = F.normalize(directions(8)[torch.arange(64) % 8] + spread * directions(64), dim=1)
    gap = 0.5 * directions(1)
    return (
        F.normalize(meaning + gap + 0.1 * directions(64), dim=1),
        F.normalize(meaning - gap + 0.1 * directions(64), dim=1),
    )


@pytest.mark.parametrize("spread", [0.1, 0.3])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0])
def test_float32_gradient_is_good_to_1e5_at_logit_scale_100(gamma: float, spread: float) -> None:
    images, texts = clustered_pairs(spread, seed=1)
    teacher_images, teacher_texts = clustered_pairs(spread, seed=2)
    student, teacher = 100 * images @ texts.T, 100 * teacher_images @ teacher_texts.T
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).clone().requires_grad_()
        value = gkl(leaf, teacher.to(dtype), ce_weight=1.0, mse_weight=1.0, gamma=gamma)
        gradients.append(torch.autograd.grad(value, leaf)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("spread", [0.1, 0.3])
@pytest.mark.parametrize("gamma", [0.05, 0.3, 1.0])
def test_float32_gradient_of_the_features_is_good_to_1e4_at_logit_scale_100(gamma: float, spread: float) -> None:
    # A digit less: float32 logits near 100 are 7.6e-6 apart, and the loss sees what that rounding left.
    gradients = []
    for dtype in (torch.float32, torch.float64):
        images, texts = (part.to(dtype) for part in clustered_pairs(spread, seed=1))
        teacher_images, teacher_texts = (part.to(dtype) for part in clustered_pairs(spread, seed=2))
        leaf = images.clone().requires_grad_()
        logits, targets = 100 * leaf @ texts.T, 100 * teacher_images @ teacher_texts.T
        value = gkl(logits, targets, ce_weight=1.0, mse_weight=1.0, gamma=gamma)
        gradients.append(torch.autograd.grad(value, leaf)[0].double())
    assert (gradients[0] - gradients[1]).norm() <= 1e-4 * gradients[1].norm()


@pytest.mark.parametrize("weight_temperature", TEMPERATURES)
@pytest.mark.parametrize("gamma", GAMMAS)
def test_nothing_underflows_at_logit_scale_100(gamma: float, weight_temperature: float) -> None:
    # Probabilities down to e^(-400): zero in float32, so that their powers would be zero as well.
    student, teacher = (part.float() for part in logits(8, 16, scale=100.0, seed=15))
    options = {"ce_weight": 1.0, "mse_weight": 1.0, "gamma": gamma, "weight_temperature": weight_temperature}
    leaf = student.clone().requires_grad_()
    value = gkl(leaf, teacher, **options)
    value.backward()
    rows = row_statistics(student, teacher, gamma=gamma, weight_temperature=weight_temperature)
    expected = row_statistics(student.double(), teacher.double(), gamma=gamma, weight_temperature=weight_temperature)
    assert all(part.isfinite().all() for part in vars(rows).values())
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()
    assert value.item() == pytest.approx(gkl(student.double(), teacher.double(), **options).item(), rel=1e-5)
    torch.testing.assert_close(rows.log_weight_mass.double(), expected.log_weight_mass, rtol=1e-5, atol=1e-4)


def test_equal_logits_at_scale_100_have_no_divergence_in_float32() -> None:
    _, teacher = (part.float() for part in logits(8, 16, scale=100.0, seed=16))
    rows = row_statistics(teacher.clone(), teacher)
    assert rows.kl.abs().max() == 0
    assert rows.variance.max() == 0


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_input_is_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (part.to(dtype) for part in logits(4, 6, scale=20.0, seed=18))
    options = {"ce_weight": 1.0, "mse_weight": 1.0, "gamma": 0.3}
    leaf = student.clone().requires_grad_()
    value = gkl(leaf, teacher, **options)
    value.backward()
    assert value.dtype == torch.float32
    assert value.item() == gkl(student.float(), teacher.float(), **options).item()
    assert leaf.grad is not None
    assert leaf.grad.dtype == dtype
    for function in (kl, soft_cross_entropy):
        assert function(student, teacher).dtype == torch.float32
        assert function(student, teacher).item() == function(student.float(), teacher.float()).item()


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperatures_that_are_not_positive_are_refused_by_name(temperature: float) -> None:
    student, teacher = torch.zeros(2, 3), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^temperature is .*positive"):
        gkl(student, teacher, ce_weight=1.0, mse_weight=1.0, gamma=1.0, temperature=temperature)
    with pytest.raises(ValueError, match=r"^weight_temperature is .*positive"):
        gkl(student, teacher, ce_weight=1.0, mse_weight=1.0, gamma=1.0, weight_temperature=temperature)
    for function in (kl, soft_cross_entropy):
        with pytest.raises(ValueError, match=r"^temperature is .*positive"):
            function(student, teacher, temperature=temperature)


@pytest.mark.parametrize("gamma", [-0.1, math.nan])
def test_a_gamma_below_zero_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="gamma"):
        gkl(torch.zeros(2, 3), torch.zeros(2, 3), ce_weight=1.0, mse_weight=1.0, gamma=gamma)


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (1, 3)])
def test_unequal_shapes_are_refused_with_both_named(shape: tuple[int, int]) -> None:
    student, teacher = torch.zeros(2, 3), torch.zeros(shape)
    for call in (
        lambda: gkl(student, teacher, ce_weight=1.0, mse_weight=1.0, gamma=1.0),
        lambda: kl(student, teacher),
        lambda: soft_cross_entropy(student, teacher),
    ):
        with pytest.raises(ValueError, match=rf"\(2, 3\).*\({shape[0]}, {shape[1]}\)"):
            call()


@pytest.mark.usefixtures("unchecked_shapes")
def test_an_unknown_row_weight_is_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="'softmax'; choose 'reference' or 'uniform'"):
        gkl(torch.zeros(2, 3), torch.zeros(2, 3), ce_weight=1.0, mse_weight=1.0, gamma=1.0, row_weight="softmax")


def test_the_annotated_shapes_are_checked_while_these_tests_run() -> None:
    with pytest.raises(Exception, match="teacher_logits"):
        kl(torch.zeros(2, 3), torch.zeros(2, 4))
