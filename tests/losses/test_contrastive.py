"""Contrastive losses and the feature loss: numbers made by hand, loops, peers.py, finite differences, float32."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.losses import feature_mse, info_nce, info_nce_gradients, sigmoid_loss, soft_label_bce
from tests.losses.random_features import SCALES, clustered_logits, random_logits, unit_vectors

LN2, LN3 = math.log(2), math.log(3)
MASK = torch.tensor([[True, False, True, False], [False, True, False, False], [True, True, True, False]])
"""Two, one and three positives."""


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def test_info_nce_by_hand() -> None:
    logits = torch.tensor([[LN3, 0.0], [0.0, LN3]], requires_grad=True)  # softmax (3/4, 1/4) in both rows
    value = info_nce(logits, torch.tensor([0, 1])).mean()
    assert value.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(value, logits)[0], torch.tensor([[-0.125, 0.125], [0.125, -0.125]]))
    assert info_nce(logits, torch.tensor([0, 0])).mean().item() == pytest.approx(math.log(16 / 3) / 2, rel=1e-6)
    # Two positives of softmax (1/2, 1/4, 1/4): half of ln 2 and half of ln 4
    several = info_nce(torch.tensor([[LN2, 0.0, 0.0]]), torch.tensor([[True, True, False]]))
    assert several.item() == pytest.approx(1.5 * LN2, rel=1e-6)


@pytest.mark.parametrize("scale", SCALES)
def test_info_nce_equals_a_loop_whose_positives_share_their_query_equally(scale: float) -> None:
    (student,) = random_logits(1, scale=scale, seed=1)
    for positives in (MASK, torch.tensor([3, 0, 1])):
        mask = positives if positives is MASK else F.one_hot(positives, 4).bool()
        total = 0.0
        for row, own in zip(student.tolist(), mask.tolist(), strict=True):
            log_sum = math.log(math.fsum(math.exp(value) for value in row))
            losses = [log_sum - value for value, positive in zip(row, own, strict=True) if positive]
            total += sum(losses) / len(losses) / 3
        assert info_nce(student, positives).mean().item() == pytest.approx(total, rel=1e-12)


def test_sigmoid_losses_of_single_pairs_by_hand() -> None:
    logit = torch.tensor([[LN3]])  # σ = 3/4
    assert sigmoid_loss(logit, torch.tensor([[True]])).item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert sigmoid_loss(logit, torch.tensor([[False]])).item() == pytest.approx(math.log(4), rel=1e-6)
    # Labels 3/4 and 1/2 against σ = 1/2 and 1/4; two rows of one candidate.
    value = soft_label_bce(torch.tensor([[0.0], [-LN3]]), torch.tensor([[LN3], [0.0]]))
    assert value.tolist() == pytest.approx([LN2, 0.5 * math.log(4) + 0.5 * math.log(4 / 3)], rel=1e-6)
    (student,) = random_logits(1, scale=10.0, seed=6)
    certain = soft_label_bce(student, torch.where(MASK, 800.0, -800.0).double())
    assert certain.tolist() == pytest.approx(sigmoid_loss(student, MASK).tolist(), rel=1e-14)


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
    for gradient in closed_form(eye, eye, number(LN3)):
        torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("scale", SCALES)
def test_gradients_in_closed_form_are_those_of_autograd_of_either_direction(scale: float) -> None:
    image, text = (leaf.requires_grad_() for leaf in unit_vectors(2, seed=8))
    own = torch.arange(6)
    image_query, text_key = torch.autograd.grad(F.cross_entropy(scale * image @ text.T, own), (image, text))
    text_query, image_key = torch.autograd.grad(F.cross_entropy(scale * text @ image.T, own), (text, image))
    halves = [closed_form(image, text, number(scale), rows) for rows in (slice(2), slice(2, 6))]
    gradients = [torch.cat(parts) for parts in zip(*halves, strict=True)]
    for gradient, expected in zip(gradients, (image_query, image_key, text_query, text_key), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
        assert expected.norm() > 0.01
    assert (image_query - image_key).norm() > 0.01 * image_query.norm()  # else an exchange of the two would not show


def test_second_derivative_of_gradient_distillation_is_that_of_finite_differences() -> None:
    leaves = [*(part[:3].clone() for part in unit_vectors(2, seed=22)), number(3.0)]
    assert torch.autograd.gradcheck(
        lambda *given: tuple(closed_form(*given)), [leaf.requires_grad_() for leaf in leaves]
    )


@pytest.mark.usefixtures("unchecked_shapes")
def test_feature_error_by_hand_and_of_unit_vectors_two_times_one_minus_cosine_over_the_width() -> None:
    one, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    found = [feature_mse(one, each).item() for each in (other, -one, one)]
    assert found == [1.0, 2.0, 0.0]  # (1² + 1²) / 2, 2² / 2
    student, teacher = unit_vectors(2, seed=3)
    cosines = [math.fsum((s * t).tolist()) for s, t in zip(student, teacher, strict=True)]
    expected = [2 * (1 - cosine) / 5 for cosine in cosines]
    assert feature_mse(student, teacher).tolist() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match=r"\(2, 4\).*project the student's"):
        feature_mse(torch.zeros(2, 4), torch.zeros(2, 5))


LOSSES = {
    "info_nce": lambda s, _, own: info_nce(s, own),
    "sigmoid": lambda s, _, own: sigmoid_loss(s - 10, own),
    "soft_bce": lambda s, t, _: soft_label_bce(s - 10, t - 12),
}


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_is_that_of_finite_differences_and_good_to_1e5_in_float32_at_scale_100(name: str) -> None:
    student, teacher = random_logits(2, scale=3.0, seed=21)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, teacher, MASK), student.requires_grad_())
    student, teacher, own = clustered_logits(1), clustered_logits(2), torch.eye(64, dtype=torch.bool)
    own |= own.roll(1, dims=1) & (torch.arange(64) % 2 == 0)[:, None]  # two positives of even queries
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = student.to(dtype).clone().requires_grad_()
        gradients.append(torch.autograd.grad(LOSSES[name](leaf, teacher.to(dtype), own).mean(), leaf)[0].double())
    assert gradients[1].norm() > 1e-3
    assert (gradients[0] - gradients[1]).norm() <= 1e-5 * gradients[1].norm()
    assert all(
        LOSSES[name](student.to(t), teacher.to(t), own).dtype == torch.float32 for t in (torch.bfloat16, torch.half)
    )
