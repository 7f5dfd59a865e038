"""The oracles of peers.py against numbers made by hand and against open_clip's own losses."""

import math

import pytest
import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss, DistillClipLoss, SigLipLoss
from torch import Tensor, nn

from tests.oracles import peers

LN2, LN3 = math.log(2), math.log(3)
EYE = torch.eye(2, dtype=torch.float64)


def number(value: float | list[float]) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def features(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return list(F.normalize(torch.randn(count, 5, 4, generator=generator, dtype=torch.float64), dim=-1))


class Student(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale, self.weight = nn.Parameter(number(9.0)), nn.Parameter(number(1.0))

    def encode_image(self, x: Tensor) -> Tensor:
        return self.weight * x

    encode_text = encode_image


def test_open_clip_losses_equal_the_installed_classes() -> None:
    image, text, t_image, t_text = features(4)
    a, b, bias = number(10.0), number(30.0), number(-3.0)
    torch.testing.assert_close(peers.info_nce(image, text, a), ClipLoss()(image, text, a))
    torch.testing.assert_close(peers.siglip(image, text, a, bias), SigLipLoss()(image, text, a, bias))
    hard, soft = DistillClipLoss()(image, text, a, t_image, t_text, b)
    torch.testing.assert_close(peers.open_clip_distill((image, text, a), (t_image, t_text, b)), hard + soft)
    ensemble = (soft + DistillClipLoss()(image, text, a, image, text, a)[1]) / 2
    two_teachers = peers.mobileclip(image, text, a, [(t_image, t_text, b), (image, text, a)], 0.75)
    torch.testing.assert_close(two_teachers, 0.25 * hard + 0.75 * ensemble)
    _, at_50 = DistillClipLoss()(image, text, 50.0, t_image, t_text, 50.0)
    torch.testing.assert_close(peers.tinyclip(image, text, t_image, t_text), at_50)


def test_losses_of_two_orthogonal_pairs_by_hand() -> None:
    scale, zero, ce = number(LN3), number(0.0), math.log(4 / 3)  # every softmax is (3/4, 1/4)
    right = (EYE, EYE, scale)
    assert peers.soft_bce(right, zero, right, zero).item() == pytest.approx(0.75 * ce + 1.5 * LN2)
    student = (right, (EYE, EYE.flip(0)), scale)  # its projected texts are exchanged, all else is right
    expected = {"task": ce, "crd": 0.0, "icl": ce / 2 + LN2, "fd": 1.0, "total": 1.5 * ce + LN2 + 2000}
    kd = peers.clip_kd(*student, right)
    assert {name: part.item() for name, part in kd.items()} == pytest.approx(expected, abs=1e-12)
    rd = peers.clip_rd(*student, right, scale, number(2 * LN3))  # texts' softmaxes are (1/10, 9/10)
    vrd = 0.1 * math.log(0.1 / 0.75) + 0.9 * math.log(0.9 / 0.25) + ce + math.log(10)
    expected |= {"vrd": vrd, "xrd": LN3 / 2, "total": expected["total"] + vrd + LN3 / 2}
    assert {name: part.item() for name, part in rd.items()} == pytest.approx(expected, abs=1e-12)
    keep_student = (torch.cat([EYE, 0 * EYE], dim=1), number([0, 0]))  # a fusion's weight and bias
    fused = peers.augmented_feature((EYE, EYE), (EYE.flip(0), EYE), keep_student, keep_student, scale)
    assert fused.item() == pytest.approx(ce)


def test_gradient_distillation_equals_the_closed_form() -> None:
    def closed(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        errors = F.softmax(scale * queries @ keys.T, dim=1) - torch.eye(len(queries), dtype=torch.float64)
        return scale / len(queries) * torch.stack([errors @ keys, errors.T @ queries])

    image, text, t_image, t_text, a, b = (x.requires_grad_() for x in [*features(4), number(10.0), number(30.0)])
    pairs = ((image, text, t_image, t_text), (text, image, t_text, t_image))
    expected = sum(2 * F.mse_loss(closed(q, k, a), closed(tq, tk, b).detach()) for q, k, tq, tk in pairs)
    losses = (peers.gradient_distillation((image, text, a), (t_image, t_text, b)), expected)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*(torch.autograd.grad(loss, (image, text, a)) for loss in losses))


def test_gkl_by_hand_and_by_the_theorem() -> None:
    once = {"ce_weight": 1.0, "mse_weight": 1.0, "gamma": 1.0, "temperature": 1.0}
    hand = (math.log(4) + math.log(4 / 3)) / 2 + LN3**2 / 8  # targets 1/2, predictions 3/4 and 1/4
    assert peers.gkl(LN3 * EYE[:1], 0 * EYE[:1], **once).item() == pytest.approx(hand)
    student, teacher = (3 * x.requires_grad_() for x in features(2))
    loss = peers.gkl(student, teacher, **once)
    by_student, by_teacher = peers.dkl_gradients(student, teacher, ce_weight=1, mse_weight=1)
    torch.testing.assert_close(torch.autograd.grad(loss, (student, teacher)), (by_student - by_teacher, by_teacher))
    torch.testing.assert_close(peers.gkl(student, teacher, **once, class_prior=F.softmax(teacher, dim=1)), loss)


def test_albef_by_hand() -> None:
    settings = {"queue_size": 3, "momentum": 0.5, "alpha": 0.5, "ramp_steps": 2, "max_scale": LN3}
    albef = peers.Albef(Student(), **settings)
    assert albef.step(EYE, EYE, [5, 6], 0).item() == pytest.approx(math.log(4 / 3))  # clamped to LN3, no soft targets
    albef.student.weight.data.fill_(3.0)  # momentum model at 2: logits LN3 (6, 0, 3, 0), its own LN3 (4, 0, 2, 0)
    first, second = 0.25 * 81 / 92, 0.25 * 9 / 92  # targets a quarter soft; id 5 is in the queue, 7 is not
    expected = math.log(758) - LN3 * ((6 * first + 3 * second + 0.75 * 4.5) + (6 * (first + 0.75) + 3 * second)) / 2
    assert albef.step(EYE, EYE, [5, 7], 1).item() == pytest.approx(expected)
    torch.testing.assert_close(torch.cat([entry[1] for entry in albef.queue]), number([0, 1, 2, 0, 0, 2]))
