"""The losses that make up the peers' objectives: loops and peers.py, numbers made by hand, finite differences, float32."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.losses import (
    RowStatistics,
    dkl,
    gkl,
    info_nce,
    info_nce_gradients,
    log_mean_softmax,
    mixed_target,
    row_statistics,
    row_weights,
    sigmoid_loss,
    soft_cross_entropy,
    soft_label_bce,
    soft_target_statistics,
    weighted_squared_error,
)
from tests.oracles import peers

TEMPERATURES = (0.5, 1.0, 4.0)
GAMMAS = (0.0, 0.05, 0.5, 1.0)
SCALES = (1.0, 10.0, 100.0)
LN2, LN3 = math.log(2), math.log(3)
CLOSE_RACE = 38
"""Seed whose teacher has a query with two likely candidates even at scale 100, so that the squared error has a gradient."""
MASK = torch.tensor([[True, False, True, False], [False, True, False, False], [True, True, True, False]])
"""Two, one and three positives."""


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def logits(count: int, *, scale: float, seed: int) -> list[Tensor]:
    """`count` matrices of 3 queries and 4 candidates, float64, from −scale to scale."""
    generator = torch.Generator().manual_seed(seed)
    return list(scale * (2 * torch.rand(count, 3, 4, generator=generator, dtype=torch.float64) - 1))


def features(count: int, *, seed: int) -> list[Tensor]:
    """`count` times 6 unit vectors of width 5, float64."""
    generator = torch.Generator().manual_seed(seed)
    return list(F.normalize(torch.randn(count, 6, 5, generator=generator, dtype=torch.float64), dim=-1))


def shares(row: list[float], temperature: float = 1.0) -> list[float]:
    """softmax(row / temperature), one number at a time."""
    powers = [math.exp(value / temperature) for value in row]
    return [power / math.fsum(powers) for power in powers]


# InfoNCE with several positives


def test_info_nce_of_two_positives_by_hand() -> None:
    # softmax (1/2, 1/4, 1/4): half of ln 2 and half of ln 4
    value = info_nce(torch.tensor([[LN2, 0.0, 0.0]]), torch.tensor([[True, True, False]]))
    assert value.item() == pytest.approx(1.5 * LN2, rel=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_several_positives_share_their_query_equally(scale: float) -> None:
    (student,) = logits(1, scale=scale, seed=1)
    total = 0.0
    for row, mask in zip(student.tolist(), MASK.tolist(), strict=True):
        losses = [-math.log(p) for p, positive in zip(shares(row), mask, strict=True) if positive]
        total += sum(losses) / len(losses) / 3
    assert info_nce(student, MASK).item() == pytest.approx(total, rel=1e-12)


def test_a_mask_of_one_positive_is_its_index() -> None:
    (student,) = logits(1, scale=10.0, seed=2)
    index = torch.tensor([3, 0, 1])
    mask = torch.tensor([[column == i for column in range(4)] for i in index.tolist()])
    assert info_nce(student, mask).item() == pytest.approx(info_nce(student, index).item(), rel=1e-14)


# SigLIP's loss, with hard and with soft labels


def test_sigmoid_loss_of_single_pairs_by_hand() -> None:
    logit = torch.tensor([[LN3]])  # σ = 3/4
    assert sigmoid_loss(logit, torch.tensor([[True]])).item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert sigmoid_loss(logit, torch.tensor([[False]])).item() == pytest.approx(math.log(4), rel=1e-6)


def test_soft_label_bce_of_single_pairs_by_hand() -> None:
    # Labels 3/4 and 1/2 against σ = 1/2 and 1/4; two rows of one candidate.
    value = soft_label_bce(torch.tensor([[0.0], [-LN3]]), torch.tensor([[LN3], [0.0]]))
    assert value.item() == pytest.approx((LN2 + 0.5 * math.log(4) + 0.5 * math.log(4 / 3)) / 2, rel=1e-6)


def test_sigmoid_losses_and_their_feature_gradients_are_those_of_the_loops() -> None:
    image, text, t_image, t_text = features(4, seed=3)
    teacher = (t_image, t_text, number(90.0), number(-11.0))
    leaves = [leaf.requires_grad_() for leaf in (image, text, number(12.0), number(-7.0))]
    student_logits = leaves[2] * image @ text.T + leaves[3]
    teacher_logits = teacher[2] * t_image @ t_text.T + teacher[3]
    for ours, oracle in (
        (sigmoid_loss(student_logits, torch.eye(6, dtype=torch.bool)), peers.siglip(*leaves)),
        (soft_label_bce(student_logits, teacher_logits), peers.soft_bce(*leaves, *teacher)),
    ):
        assert ours.item() == pytest.approx(oracle.item(), rel=1e-12)
        gradients = torch.autograd.grad(ours, leaves, retain_graph=True)
        for gradient, expected in zip(gradients, torch.autograd.grad(oracle, leaves), strict=True):
            torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-13)


def test_sigmoid_loss_of_the_batch_is_the_mean_over_processes_of_their_rows() -> None:
    student, teacher = (torch.cat(logits(2, scale=10.0, seed=seed)) for seed in (4, 5))
    mask = torch.cat([MASK, ~MASK])
    total = 0.0
    for row, positives in zip(student.tolist(), mask.tolist(), strict=True):
        total -= sum(math.log(1 / (1 + math.exp(-v if p else v))) for v, p in zip(row, positives, strict=True))
    assert sigmoid_loss(student, mask).item() == pytest.approx(total / 6, rel=1e-12)
    halves = [sigmoid_loss(student[rows], mask[rows]).item() for rows in (slice(3), slice(3, 6))]
    assert sum(halves) / 2 == pytest.approx(total / 6, rel=1e-12)
    halves = [soft_label_bce(student[rows], teacher[rows]).item() for rows in (slice(3), slice(3, 6))]
    assert sum(halves) / 2 == pytest.approx(soft_label_bce(student, teacher).item(), rel=1e-12)


def test_soft_labels_that_are_certain_are_hard_labels() -> None:
    (student,) = logits(1, scale=10.0, seed=6)
    certain = torch.where(MASK, 800.0, -800.0).double()
    assert soft_label_bce(student, certain).item() == pytest.approx(sigmoid_loss(student, MASK).item(), rel=1e-14)


def test_soft_label_bce_rests_where_student_and_teacher_agree_and_never_moves_the_teacher() -> None:
    student, teacher = (leaf.requires_grad_() for leaf in logits(2, scale=5.0, seed=7))
    agreeing = torch.autograd.grad(soft_label_bce(student, student.detach()), student)[0]
    assert agreeing.abs().max() < 1e-15
    to_student, to_teacher = torch.autograd.grad(
        soft_label_bce(student, teacher), (student, teacher), allow_unused=True
    )
    assert to_student.abs().max() > 0.1
    assert to_teacher is None


# Gradients of InfoNCE in closed form (CLIP-KD's GD)


def closed_form(image: Tensor, text: Tensor, scale: Tensor, rows: slice = slice(None)) -> list[Tensor]:
    """info_nce_gradients of some pairs of the batch, whose normalizers come from all."""
    per_image, per_text = scale * image @ text.T, scale * text @ image.T
    return info_nce_gradients(
        per_image[rows],
        per_text[rows],
        image_keys=image,
        text_keys=text,
        logit_scale=scale,
        positives=torch.eye(len(image), dtype=torch.bool)[rows],
        image_normalizers=per_image.logsumexp(dim=1),
        text_normalizers=per_text.logsumexp(dim=1),
    )


def test_gradients_of_two_orthogonal_pairs_by_hand() -> None:
    eye = torch.eye(2, dtype=torch.float64)  # every softmax is (3/4, 1/4)
    expected = LN3 / 2 * torch.tensor([[-0.25, 0.25], [0.25, -0.25]], dtype=torch.float64)
    gradients = closed_form(eye, eye, number(LN3))
    assert len(gradients) == 4
    for gradient in gradients:
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_in_closed_form_are_those_of_autograd_of_either_direction(scale: float) -> None:
    image, text = (leaf.requires_grad_() for leaf in features(2, seed=8))
    own = torch.arange(6)
    image_query, text_key = torch.autograd.grad(F.cross_entropy(scale * image @ text.T, own), (image, text))
    text_query, image_key = torch.autograd.grad(F.cross_entropy(scale * text @ image.T, own), (text, image))
    gradients = closed_form(image, text, number(scale))
    for gradient, expected in zip(gradients, (image_query, image_key, text_query, text_key), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert expected.norm() > 0.01
    assert (image_query - image_key).norm() > 0.01 * image_query.norm()  # else an exchange of the two would not show


def test_gradients_of_two_halves_of_the_batch_are_the_rows_of_the_whole() -> None:
    image, text = features(2, seed=9)
    whole = closed_form(image, text, number(10.0))
    halves = [closed_form(image, text, number(10.0), rows) for rows in (slice(2), slice(2, 6))]
    for number_, gradient in enumerate(whole):
        joined = torch.cat([half[number_] for half in halves])
        torch.testing.assert_close(joined, gradient, rtol=1e-12, atol=1e-15)


def test_gradients_can_be_distilled() -> None:
    image, text, t_image, t_text = features(4, seed=10)
    leaves = [leaf.requires_grad_() for leaf in (image, text, number(8.0))]
    wanted = closed_form(t_image, t_text, number(30.0))
    value = sum(F.mse_loss(s, t) for s, t in zip(closed_form(*leaves), wanted, strict=True))
    oracle = peers.gradient_distillation(*leaves, t_image, t_text, number(30.0))
    assert value.item() == pytest.approx(oracle.item(), rel=1e-11)
    for gradient, expected in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(oracle, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


# Soft targets of one or several teachers


def test_mean_of_two_opposite_teachers_by_hand() -> None:
    # (3/4, 1/4) and (1/4, 3/4); at half the temperature (9/10, 1/10) and (1/10, 9/10)
    pair = [torch.tensor([[LN3, 0.0]]), torch.tensor([[0.0, LN3]])]
    for temperature in (1.0, 0.5):
        assert log_mean_softmax(pair, temperature=temperature).tolist() == [pytest.approx([-LN2, -LN2], rel=1e-6)]
    uneven = [pair[0], pair[0], pair[1]]  # (7/12, 5/12)
    assert log_mean_softmax(uneven).exp().tolist() == [pytest.approx([7 / 12, 5 / 12], rel=1e-6)]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_log_mean_softmax_equals_loops_and_of_one_teacher_is_its_log_softmax(temperature: float, scale: float) -> None:
    teachers = logits(3, scale=scale, seed=11)
    expected = []
    for rows in zip(*(teacher.tolist() for teacher in teachers), strict=True):
        columns = zip(*(shares(row, temperature) for row in rows), strict=True)
        expected.append(pytest.approx([math.log(sum(column) / 3) for column in columns], rel=1e-10, abs=1e-12))
    assert log_mean_softmax(teachers, temperature=temperature).tolist() == expected
    single = [
        pytest.approx([math.log(p) for p in shares(row, temperature)], rel=1e-10, abs=1e-12)
        for row in teachers[0].tolist()
    ]
    assert log_mean_softmax(teachers[:1], temperature=temperature).tolist() == single


def test_log_mean_softmax_stays_finite_where_every_probability_underflows() -> None:
    row = torch.tensor([[100.0, -100.0, -60.0]])  # e^(-200) is zero in float32
    assert log_mean_softmax([row, row], temperature=0.5).tolist() == [pytest.approx([0.0, -400.0, -320.0], abs=1e-4)]
    mixed = log_mean_softmax([row, -row]).tolist()[0]
    assert mixed == pytest.approx([-LN2, -LN2, -LN2 - 40.0], abs=1e-4)


def test_no_teacher_and_temperatures_that_are_not_positive_are_refused() -> None:
    with pytest.raises(ValueError, match="no teacher"):
        log_mean_softmax([])
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match=r"^temperature is .*positive"):
            log_mean_softmax([torch.zeros(2, 3)], temperature=temperature)
        with pytest.raises(ValueError, match=r"^temperature is .*positive"):
            soft_target_statistics(torch.zeros(2, 3), torch.zeros(2, 3), temperature=temperature)


@pytest.mark.usefixtures("unchecked_shapes")
def test_a_soft_target_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2, 4\).*differ"):
        soft_target_statistics(torch.zeros(2, 3), torch.zeros(2, 4))


def test_soft_target_statistics_by_hand() -> None:
    # Target (3/4, 1/4); the student's temperature makes (9/10, 1/10) of it, and leaves the target alone.
    target = torch.tensor([[0.75, 0.25]]).log()
    rows = soft_target_statistics(torch.tensor([[LN3, 0.0]]), target, temperature=0.5)
    entropy = 2 * LN2 - 0.75 * LN3
    ce = math.log(10) - 1.5 * LN3
    assert rows.teacher_entropy.item() == pytest.approx(entropy, rel=1e-6)
    assert rows.ce.item() == pytest.approx(ce, rel=1e-6)
    assert rows.kl.item() == pytest.approx(ce - entropy, rel=1e-5)


@pytest.mark.parametrize("scale", SCALES)
def test_kl_is_cross_entropy_less_the_entropy_and_the_target_is_constant(scale: float) -> None:
    student, *teachers = logits(3, scale=scale, seed=12)
    leaf = student.clone().requires_grad_()
    target = log_mean_softmax([teacher.requires_grad_() for teacher in teachers])
    rows = soft_target_statistics(leaf, target)
    for i in range(3):
        q, p = target[i].exp().tolist(), shares(student[i].tolist())
        assert rows.ce[i].item() == pytest.approx(-sum(a * math.log(b) for a, b in zip(q, p, strict=True)), rel=1e-11)
        entropy = -sum(a * math.log(a) for a in q if a)
        assert rows.teacher_entropy[i].item() == pytest.approx(entropy, rel=1e-10)
        assert rows.kl[i].item() == pytest.approx(rows.ce[i].item() - entropy, rel=1e-10)
        assert rows.kl[i].item() > 0
    (gradient,) = torch.autograd.grad(rows.kl.sum() + 0 * target.sum(), leaf)
    torch.testing.assert_close(gradient, student.softmax(dim=1) - target.exp().detach(), rtol=1e-11, atol=1e-14)
    assert not rows.teacher_entropy.requires_grad


def test_an_ensemble_gives_mobileclips_loss() -> None:
    image, text, *teachers = features(6, seed=13)
    both = [(teachers[0], teachers[1], number(70.0)), (teachers[2], teachers[3], number(60.0))]
    leaves = [leaf.requires_grad_() for leaf in (image, text, number(20.0))]
    per_image = log_mean_softmax([s * i @ t.T for i, t, s in both])
    per_text = log_mean_softmax([s * t @ i.T for i, t, s in both])
    value = soft_target_statistics(leaves[2] * image @ text.T, per_image).ce.mean() / 2
    value = value + soft_target_statistics(leaves[2] * text @ image.T, per_text).ce.mean() / 2
    oracle = peers.mobileclip(*leaves, both, 1.0)
    assert value.item() == pytest.approx(oracle.item(), rel=1e-12)
    for gradient, expected in zip(torch.autograd.grad(value, leaves), torch.autograd.grad(oracle, leaves), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-13)


# Mixed targets (ALBEF)


def test_mixed_target_of_two_positives_and_two_sources_by_hand() -> None:
    half = torch.tensor([[LN2, 0.0, 0.0]])  # (1/2, 1/4, 1/4)
    tenths = torch.tensor([[0.0, LN2, math.log(7)]])  # (1, 2, 7)/10
    positives = torch.tensor([[True, True, False]])
    one = mixed_target(positives, [(0.4, half)])
    assert one.tolist() == [pytest.approx([0.5, 0.4, 0.1], rel=1e-6)]
    two = mixed_target(positives, [(0.4, half), (0.2, tenths)])
    assert two.tolist() == [pytest.approx([0.42, 0.34, 0.24], rel=1e-6)]
    assert mixed_target(positives, []).tolist() == [[0.5, 0.5, 0.0]]
    assert mixed_target(positives, [(1.0, half)]).tolist() == [pytest.approx([0.5, 0.25, 0.25], rel=1e-6)]


@pytest.mark.parametrize("scale", SCALES)
def test_mixed_target_equals_loops_sums_to_one_and_is_constant(scale: float) -> None:
    first, second = (leaf.requires_grad_() for leaf in logits(2, scale=scale, seed=14))
    target = mixed_target(MASK, [(0.3, first), (0.25, second)])
    for i, row in enumerate(target.tolist()):
        hard, positives = MASK[i].tolist(), int(MASK[i].sum())
        softened = zip(hard, shares(first[i].tolist()), shares(second[i].tolist()), strict=True)
        expected = [0.45 * h / positives + 0.3 * a + 0.25 * b for h, a, b in softened]
        assert row == pytest.approx(expected, rel=1e-12)
        assert sum(row) == pytest.approx(1.0, rel=1e-14)
    assert not target.requires_grad
    assert mixed_target(MASK, [(0.4, first.half())]).sum(dim=1).tolist() == pytest.approx([1.0] * 3, rel=1e-6)


@pytest.mark.parametrize("sources", [(1.01,), (0.6, 0.6), (-0.1,), (1.5, -0.6)])
def test_shares_that_leave_no_target_of_probabilities_are_refused(sources: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"^shares of a mixed target are \["):
        mixed_target(MASK, [(share, torch.zeros(3, 4)) for share in sources])


def test_shares_of_one_together_are_allowed_in_spite_of_rounding() -> None:
    alphas = (0.2, 0.4, 0.3, 0.1)
    assert sum(alphas) > 1
    target = mixed_target(MASK, [(alpha, torch.zeros(3, 4)) for alpha in alphas])
    assert target.flatten().tolist() == pytest.approx([0.25] * 12, rel=1e-6)


# DKL


@pytest.mark.parametrize("scale", SCALES)
def test_theorem_1_dkl_has_the_gradients_of_kl_on_both_sides(scale: float) -> None:
    student, teacher = (leaf.requires_grad_() for leaf in logits(2, scale=scale, seed=CLOSE_RACE))
    expected = peers.dkl_gradients(student, teacher, ce_weight=1.3, mse_weight=0.6)
    value = dkl(student, teacher, ce_weight=1.3, mse_weight=0.6, row_weight="uniform")
    for gradient, wanted in zip(torch.autograd.grad(value, (student, teacher)), expected, strict=True):
        assert (gradient - wanted).norm() <= 1e-11 * wanted.norm()
        assert wanted.norm() > 0.01


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weight_temperature", TEMPERATURES)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_dkl_is_gkl_in_value_and_to_the_teacher_and_only_soft_cross_entropy_to_the_student(
    temperature: float, weight_temperature: float, scale: float
) -> None:
    student, teacher = (leaf.requires_grad_() for leaf in logits(2, scale=scale, seed=CLOSE_RACE))
    options = {"ce_weight": 0.7, "mse_weight": 1.9, "gamma": 0.5}
    options |= {"temperature": temperature, "weight_temperature": weight_temperature}
    value, oracle = dkl(student, teacher, **options), peers.gkl(student, teacher, **options)
    assert value.item() == pytest.approx(oracle.item(), rel=1e-12)
    assert value.item() == pytest.approx(gkl(student, teacher, **options).item(), rel=1e-14)
    to_student, to_teacher = torch.autograd.grad(value, (student, teacher))
    to_student_by_gkl, expected = torch.autograd.grad(oracle, (student, teacher))
    assert (to_teacher - expected).norm() <= 1e-11 * expected.norm()
    assert (to_student_by_gkl - to_student).norm() > 0.1  # the step from DKL to GKL
    (expected,) = torch.autograd.grad(0.7 * soft_cross_entropy(student, teacher, temperature=temperature), student)
    assert (to_student - expected).norm() <= 1e-12 * expected.norm()
    before_frozen = torch.autograd.grad(dkl(student, teacher.detach(), **options), student)[0]
    assert torch.equal(before_frozen, to_student)


def test_dkl_of_two_candidates_by_hand() -> None:
    # Softmaxes (3/4, 1/4) of the teacher and (1/2, 1/2) of the student; difference of logits (ln 3, 0).
    student, teacher = torch.zeros(1, 2).requires_grad_(), torch.tensor([[LN3, 0.0]]).requires_grad_()
    value = dkl(student, teacher, ce_weight=2.0, mse_weight=3.0)
    assert value.item() == pytest.approx(2 * LN2 + 9 / 32 * LN3**2, rel=1e-6)
    to_student, to_teacher = torch.autograd.grad(value, (student, teacher))
    squared = {"temperature": 2.0, "scale_by_temperature_squared": True}  # at any temperature CE is ln 2
    value = dkl(student, teacher, ce_weight=2.0, mse_weight=3.0, **squared)
    assert value.item() == pytest.approx(8 * LN2 + 9 / 32 * LN3**2, rel=1e-6)
    assert to_student.tolist() == [pytest.approx([-0.5, 0.5], rel=1e-6)]
    # ∂(½ Var)/∂u_1 = p_1 (d_1 − mean d) = ¾ · ¼ ln 3
    assert to_teacher.tolist() == [pytest.approx([9 / 16 * LN3, -9 / 16 * LN3], rel=1e-6)]


# Pairs weighed by a class prior


def class_rows(seed: int) -> Tensor:
    """The prior of each of three samples' class, two of one class."""
    generator = torch.Generator().manual_seed(seed)
    table = (3 * torch.randn(2, 4, generator=generator, dtype=torch.float64)).softmax(dim=1)
    return table[[1, 0, 1]]


def prior_gkl(student: Tensor, teacher: Tensor, prior: Tensor, *, gamma: float, temperature: float = 1.0) -> Tensor:
    """0.7 and 1.9 times the halves, the way a closed set's term adds them up."""
    rows = row_statistics(student, teacher, temperature=temperature, gamma=gamma, pair_prior=prior.log())
    weights = row_weights(rows.log_weight_mass, "reference")
    return 0.7 * rows.ce.mean() + 1.9 * weighted_squared_error(rows.variance, weights)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_gkl_with_a_class_prior_equals_the_published_form(temperature: float, gamma: float, scale: float) -> None:
    student, teacher = logits(2, scale=scale, seed=CLOSE_RACE)
    student.requires_grad_()
    prior = class_rows(18)
    value = prior_gkl(student, teacher, prior, gamma=gamma, temperature=temperature)
    oracle = peers.gkl(
        student,
        teacher,
        ce_weight=0.7,
        mse_weight=1.9,
        gamma=gamma,
        temperature=temperature,
        weight_temperature=1.0,
        class_prior=prior,
    )
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


@pytest.mark.parametrize("gamma", GAMMAS)
def test_the_teachers_own_softmax_as_a_prior_changes_nothing_and_no_prior_moves(gamma: float) -> None:
    student, teacher = logits(2, scale=10.0, seed=19)
    own = (teacher / 0.5).log_softmax(dim=1).requires_grad_()
    with_prior = row_statistics(student, teacher, gamma=gamma, weight_temperature=3.0, pair_prior=own)
    without = row_statistics(student, teacher, gamma=gamma, weight_temperature=0.5)
    for name, value in vars(without).items():
        torch.testing.assert_close(getattr(with_prior, name), value, rtol=1e-12, atol=1e-13, msg=name)
    assert not any(value.requires_grad for value in vars(with_prior).values())


# A squared error that moves less than the cross-entropy does


def test_squared_error_logits_keep_every_value_and_move_only_what_they_depend_on() -> None:
    cosines, teacher = logits(2, scale=1.0, seed=20)
    cosines.requires_grad_()
    scale = number(20.0).requires_grad_()

    def statistics(squared_error_logits: Tensor | None) -> RowStatistics:
        return row_statistics(scale * cosines, 30 * teacher, gamma=0.3, squared_error_logits=squared_error_logits)

    complete = statistics(None)
    scale_held, all_held = statistics(scale.detach() * cosines), statistics((scale * cosines).detach())
    for name, value in vars(complete).items():
        assert torch.equal(getattr(scale_held, name), value), name
        assert torch.equal(getattr(all_held, name), value), name
    by_scale, by_cosine = torch.autograd.grad(complete.variance.sum(), (scale, cosines), retain_graph=True)
    held = torch.autograd.grad(scale_held.variance.sum(), (scale, cosines), retain_graph=True, allow_unused=True)
    assert held[0] is None
    assert by_scale.abs() > 0.1
    torch.testing.assert_close(held[1], by_cosine, rtol=1e-13, atol=1e-15)
    assert not all_held.variance.requires_grad
    for rows in (scale_held, all_held):  # the cross-entropy moves the scale as before
        (expected,) = torch.autograd.grad(complete.ce.sum(), scale, retain_graph=True)
        assert torch.autograd.grad(rows.ce.sum(), scale)[0].item() == pytest.approx(expected.item(), rel=1e-13)


def test_squared_error_is_that_of_the_logits_given_for_it() -> None:
    # Cross-entropy of (0, 0), variance of teacher (ln 3, 0) less (−ln 3, 0) under (3/4, 1/4).
    other = torch.tensor([[-LN3, 0.0]])
    rows = row_statistics(torch.zeros(1, 2), torch.tensor([[LN3, 0.0]]), squared_error_logits=other)
    assert rows.ce.item() == pytest.approx(LN2, rel=1e-6)
    assert rows.variance.item() == pytest.approx(3 / 16 * (2 * LN3) ** 2, rel=1e-6)


# Of each term: finite differences, float32 at the scale of real models, half precision

TERMS: dict[str, Callable[[Tensor, list[Tensor]], Tensor]] = {
    "info_nce": lambda s, _: info_nce(s, positives_of(s)),
    "mixed target": lambda s, t: F.cross_entropy(s, mixed_target(positives_of(s), [(0.4, t[0]), (0.3, t[1])])),
    "sigmoid": lambda s, _: sigmoid_loss(s - 10, positives_of(s)),
    "soft_bce": lambda s, t: soft_label_bce(s - 10, t[0] - 12),
    "ensemble ce": lambda s, t: soft_target_statistics(
        s, log_mean_softmax(t, temperature=2.0), temperature=2.0
    ).ce.mean(),
    "ensemble kl": lambda s, t: soft_target_statistics(s, log_mean_softmax(t)).kl.mean(),
    "dkl": lambda s, t: dkl(s, t[0], ce_weight=1.3, mse_weight=0.6, gamma=0.3, temperature=2.0),
    "prior gkl": lambda s, t: prior_gkl(s, t[0], (t[1] / 4).softmax(dim=1), gamma=0.3),
}
"""Name → loss of the student's logits against two teachers'."""


def positives_of(student_logits: Tensor) -> Tensor:
    """The own partner and, of even queries, the candidate after it."""
    own = torch.eye(*student_logits.shape, dtype=torch.bool)
    return own | (own.roll(1, dims=1) & (torch.arange(len(own)) % 2 == 0)[:, None])


@pytest.mark.parametrize("name", [name for name in TERMS if name != "dkl"])  # whose constants make it none of any value
def test_gradient_is_that_of_finite_differences(name: str) -> None:
    student, *teachers = logits(3, scale=3.0, seed=21)
    assert torch.autograd.gradcheck(lambda s: TERMS[name](s, teachers), student.requires_grad_())


def test_second_derivative_of_gradient_distillation_is_that_of_finite_differences() -> None:
    image, text = (part[:3] for part in features(2, seed=22))
    leaves = [leaf.clone().requires_grad_() for leaf in (image, text, number(3.0))]
    assert torch.autograd.gradcheck(lambda *given: tuple(closed_form(*given)), leaves)


def clustered_logits(seed: int) -> Tensor:
    """100 times the cosines of a trained model's kind: 64 pairs in 8 groups, with a gap between the modalities."""
    generator = torch.Generator().manual_seed(seed)
    centres, meanings, *noise = (torch.randn(n, 128, generator=generator) for n in (8, 64, 64, 64, 1))
    pairs = F.normalize(F.normalize(centres, dim=1).repeat(8, 1) + 0.3 * F.normalize(meanings, dim=1), dim=1)
    gap = 0.5 * F.normalize(noise[2], dim=1)
    image = F.normalize(pairs + gap + 0.1 * F.normalize(noise[0], dim=1), dim=1)
    text = F.normalize(pairs - gap + 0.1 * F.normalize(noise[1], dim=1), dim=1)
    return 100 * image @ text.T


@pytest.mark.parametrize("name", TERMS)
def test_float32_gradient_is_good_to_1e5_at_logit_scale_100(name: str) -> None:
    student, *teachers = (clustered_logits(seed) for seed in (1, 2, 3))
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).clone().requires_grad_()
        value = TERMS[name](leaf, [teacher.to(dtype) for teacher in teachers])
        gradients.append(torch.autograd.grad(value, leaf)[0].double())
    assert gradients[1].norm() > 1e-3
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_in_float32(dtype: torch.dtype) -> None:
    student, teacher = (part.to(dtype) for part in logits(2, scale=20.0, seed=23))
    for function, target in (
        (lambda s, t: info_nce(s, t), MASK),
        (lambda s, t: sigmoid_loss(s, t), MASK),
        (lambda s, t: soft_label_bce(s, t), teacher),
        (lambda s, t: dkl(s, t, ce_weight=1.0, mse_weight=1.0), teacher),
        (lambda s, t: soft_target_statistics(s, log_mean_softmax([t])).kl.mean(), teacher),
    ):
        value = function(student, target)
        assert value.dtype == torch.float32
        assert value.item() == function(student.float(), target if target is MASK else target.float()).item()
