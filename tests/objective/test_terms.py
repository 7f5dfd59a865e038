"""Terms through the Distiller against restatements: values, and gradients of all that is trained."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.config.objective import LogitScaleConfig, ObjectiveConfig
from clipkd.config.terms import AFDTerm, ClosedSetTerm, GDTerm, GKLTerm, ITCTerm, KLTerm, SigmoidTerm, SoftBCETerm
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.views import Features
from tests.objective.tiny_clip import (
    NUM_CLASSES,
    OFF,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    make_batch,
    make_distiller,
    needs,
    take_loss,
)
from tests.oracles import peers

DOUBLE = torch.float64


def make(width: int = TEACHER_WIDTH, **options: Any) -> tuple[Distiller, Features, Targets]:
    """A distiller with some terms and no task loss, the student's features as leaves, and targets of one teacher."""
    distiller = make_distiller(ObjectiveConfig(info_nce=OFF, **options), dtype=DOUBLE, teacher_dim=width)
    view, targets = make_batch(dtype=DOUBLE, teacher_dim=width)
    with torch.no_grad():
        student = distiller.student.features(view)
    leaves = [part.clone().requires_grad_() for part in student if part is not None]
    return distiller, Features(*leaves), needs("", targets)


def project(distiller: Distiller, features: Features) -> tuple[Tensor, Tensor]:
    weights = distiller.image_projection.weight, distiller.text_projection.weight
    return F.normalize(features.image @ weights[0].T, dim=1), F.normalize(features.text @ weights[1].T, dim=1)  # type: ignore[operator, union-attr]


def assert_equal(loss: Tensor, expected: Tensor, student: Features, distiller: Distiller) -> None:
    """Value, and gradient of features, scale, bias and whatever else is trained beside the student."""
    assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
    own = [p for n, p in distiller.named_parameters() if not n.startswith("student.")]
    leaves = [*(part for part in student if part is not None), *own]
    ours, theirs = (torch.autograd.grad(value, leaves, allow_unused=True) for value in (loss, expected))
    compared = 0
    for gradient, wanted in zip(ours, theirs, strict=True):
        if wanted is None or gradient is None:
            assert all(one is None or not one.any() for one in (gradient, wanted))
        else:
            assert torch.allclose(gradient, wanted, rtol=1e-9, atol=1e-13)
            compared += 1
    assert compared >= 2


def test_gradient_distillation_equals_the_gradients_that_autograd_finds() -> None:
    distiller, student, targets = make(gd=GDTerm(weight=1.0))
    expected = peers.gradient_distillation((*project(distiller, student), student.logit_scale), targets.teachers[0][:3])
    assert_equal(distiller.loss(student, targets)[0], expected, student, distiller)


def test_augmented_feature_distillation() -> None:
    distiller, student, targets = make(afd=AFDTerm(weight=1.0))
    fusion: list[Any] = [distiller.term_modules[f"{side}_fusion"] for side in ("image", "text")]
    layers = [(layer.weight, layer.bias) for layer in fusion]
    scale = distiller.scales["fusion_logit_scale"].exp()
    expected = peers.augmented_feature(project(distiller, student), targets.teachers[0][:2], *layers, scale)
    assert_equal(distiller.loss(student, targets)[0], expected, student, distiller)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_sigmoid_losses_with_hard_and_soft_labels() -> None:
    distiller, student, targets = make(
        keys="student", sigmoid=SigmoidTerm(weight=2.0), soft_bce=SoftBCETerm(weight=3.0)
    )
    t = targets.teachers[0]
    expected = 2 * peers.siglip(*student) + 3 * peers.soft_bce(student[:3], student.logit_bias, t[:3], t.logit_bias)
    assert_equal(distiller.loss(student, targets)[0], expected, student, distiller)


@pytest.mark.parametrize("class_prior", [True, False])
def test_closed_set_weighs_labelled_images_by_their_classes_running_prior(class_prior: bool) -> None:
    """Over three steps: uniform at first, then the mean of the teacher's probabilities; unlabelled images weigh by their own."""
    term = ClosedSetTerm(weight=1.0, classes="x", class_prior=class_prior)
    numbers = GKLTerm(gamma=0.5, mse_weight=0.7)
    distiller = make_distiller(ObjectiveConfig(info_nce=OFF, closed_set=term, gkl=numbers), dtype=DOUBLE)
    assert distiller.closed_set is not None
    seen: dict[int, list[Tensor]] = {}
    for step in range(3):
        view, targets = make_batch(dtype=DOUBLE, number=step)
        targets = needs("", targets)
        t = targets.teachers[0]
        assert targets.labels is not None
        loss, _ = take_loss(distiller, view, targets, step)
        with torch.no_grad():
            student = distiller.student.features(view)
            classes = distiller.student.encode_text(distiller.closed_set.prompts[step % 2])
            teacher_logits = t.logit_scale * t.image @ distiller.closed_set.teacher_classes.T
            own = teacher_logits.softmax(dim=1)
            prior = [
                own[row]
                if label < 0 or not class_prior
                else torch.stack(seen[label]).mean(dim=0)
                if label in seen
                else torch.full((NUM_CLASSES,), 1 / NUM_CLASSES, dtype=DOUBLE)
                for row, label in enumerate(targets.labels.tolist())
            ]
            expected = peers.gkl(
                student.logit_scale * student.image @ classes.T,
                teacher_logits,
                ce_weight=1.0,
                mse_weight=0.7,
                gamma=0.5,
                temperature=1.0,
                class_prior=torch.stack(prior),
            )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), step  # the prior is handed out in float32
        distiller.finish_step()
        for row, label in enumerate(targets.labels.tolist()):
            if label >= 0:
                seen.setdefault(label, []).append(own[row])
    assert len(seen) > 1


def test_mixed_targets_of_true_pairs_average_and_teacher() -> None:
    """By loops, with a queue that holds some of the batch's ids once more."""
    term = ITCTerm(weight=1.0, momentum_share=0.3, teacher_share=0.25)
    distiller, student, targets = make(itc=term, queue=2, warmup_steps=4)
    assert distiller.queue is not None
    _, old = make_batch(dtype=DOUBLE, number=1)
    assert old.ids is not None
    assert old.momentum is not None
    assert targets.ids is not None
    assert targets.momentum is not None
    old_teacher, t, average = old.teachers[0], targets.teachers[0], targets.momentum
    names = ("teacher_image", "teacher_text", "momentum_image", "momentum_text")
    rows = (old_teacher.image, old_teacher.text, old.momentum.image, old.momentum.text)
    distiller.queue.push(old.ids, dict(zip(names, rows, strict=True)))
    loss, series = distiller.loss(student, targets, step=2)  # half-way up the ramp

    keys = [torch.cat(p) for p in ((average.text, old.momentum.text), (average.image, old.momentum.image))]
    teacher_keys = [torch.cat(p) for p in ((t.text, old_teacher.text), (t.image, old_teacher.image))]
    ids = [*targets.ids.tolist(), *old.ids.tolist()]
    total = torch.zeros((), dtype=DOUBLE)
    queries = ((student.image, t.image, average.image), (student.text, t.text, average.text))
    entropy, several = 0.0, 0
    for way, (query, teacher, momentum) in enumerate(queries):
        for i in range(len(query)):
            positives = [j for j in range(len(ids)) if ids[j] == ids[i]]
            several += len(positives) > 1
            soft_teacher = (t.logit_scale * teacher_keys[way] @ teacher[i]).softmax(dim=0)
            soft_momentum = (student.logit_scale.detach() * keys[way] @ momentum[i]).softmax(dim=0)
            log_prediction = (student.logit_scale * keys[way] @ query[i]).log_softmax(dim=0)
            for j in range(len(ids)):
                hard = (j in positives) / len(positives)
                target = 0.15 * soft_momentum[j] + 0.125 * soft_teacher[j] + 0.725 * hard
                total = total - target * log_prediction[j] / len(query) / 2
                entropy -= (target * target.log()).item() / len(query) / 2
    assert several > 0
    assert series["itc_target_entropy"].item() == pytest.approx(entropy, rel=1e-10)
    assert series["itc_kl"].item() == pytest.approx(total.item() - entropy, rel=1e-10)
    assert_equal(loss, total, student, distiller)


@pytest.mark.parametrize(("policy", "scale"), [("own", 12.0), ("student", math.exp(2.0)), (31.0, 31.0), ((8.0,), 8.0)])
def test_the_teachers_scale_is_its_own_the_students_or_a_fixed_one(policy: Any, scale: float) -> None:
    options = {"keys": "student", "kl": KLTerm(weight=1.0), "logit_scale": LogitScaleConfig(teacher=policy)}
    distiller, student, targets = make(STUDENT_WIDTH, **options)
    loss, metrics = distiller.loss(student, targets)
    t = targets.teachers[0]
    wanted = scale * t.image @ t.text.T
    logits = student.logit_scale * student.image @ student.text.T
    expected = sum(
        F.kl_div(s.log_softmax(1), u.softmax(1), reduction="batchmean") / 2
        for s, u in ((logits, wanted), (logits.T, wanted.T))
    )
    assert isinstance(expected, Tensor)
    assert metrics["teacher_logit_scale"].item() == pytest.approx(scale)
    assert_equal(loss, expected, student, distiller)
