"""Terms through the Distiller against restatements, the logit-scale policy, warm-ups, and what a step leaves behind."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.config.objective import LogitScaleConfig, ObjectiveConfig, QueueConfig
from clipkd.config.terms import (
    ClosedSetTerm,
    FeatureTerm,
    GKLTerm,
    GradientTerm,
    InfoNCETerm,
    InteractiveTerm,
    MixedTargetTerm,
    SigmoidTerm,
    SoftBCETerm,
    SoftTargetTerm,
)
from clipkd.objective import terms
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.views import Features
from tests.objective.tiny_clip import (
    NUM_CLASSES,
    OBJECTIVES,
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
    distiller, student, targets = make(gd=GradientTerm(weight=1.0))
    t = targets.teachers[0]
    expected = peers.gradient_distillation(
        *project(distiller, student), student.logit_scale, t.image, t.text, t.logit_scale
    )
    assert_equal(distiller.loss(student, targets)[0], expected, student, distiller)


def test_augmented_feature_distillation() -> None:
    distiller, student, targets = make(afd=FeatureTerm(weight=1.0))
    t = targets.teachers[0]
    fusion = distiller.image_fusion, distiller.text_fusion
    weights = [tensor for layer in fusion for tensor in (layer.weight, layer.bias)]
    scale = distiller.scales["fusion_logit_scale"].exp()
    expected = peers.augmented_feature(*project(distiller, student), t.image, t.text, *weights, scale)
    assert_equal(distiller.loss(student, targets)[0], expected, student, distiller)
    assert scale.item() == pytest.approx(1 / 0.07, rel=1e-6)


def test_sigmoid_losses_with_hard_and_soft_labels() -> None:
    distiller, student, targets = make(sigmoid=SigmoidTerm(weight=2.0), soft_bce=SoftBCETerm(weight=3.0))
    t = targets.teachers[0]
    own = (student.image, student.text, student.logit_scale, student.logit_bias)
    expected = 2 * peers.siglip(*own) + 3 * peers.soft_bce(*own, t.image, t.text, t.logit_scale, t.logit_bias)
    assert_equal(distiller.loss(student, targets)[0], expected, student, distiller)


@pytest.mark.parametrize("class_prior", [True, False])
def test_closed_set_weighs_labelled_images_by_their_classes_running_prior(class_prior: bool) -> None:
    """Over three steps: uniform at first, then the mean of the teacher's probabilities; unlabelled images weigh by their own."""
    term = ClosedSetTerm(
        weight=1.0, classes="x", gamma=0.5, mse_weight=0.7, weight_temperature=2.0, class_prior=class_prior
    )
    distiller = make_distiller(ObjectiveConfig(info_nce=OFF, closed_set=term), dtype=DOUBLE)
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
            own = (teacher_logits / 2).softmax(dim=1)
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
                weight_temperature=2.0,
                class_prior=torch.stack(prior),
            )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6), step  # the prior is handed out in float32
        distiller.finish_step()
        for row, label in enumerate(targets.labels.tolist()):
            if label >= 0:
                seen.setdefault(label, []).append(own[row])
    assert len(seen) > 1


def test_mixed_targets_of_true_pairs_average_and_teacher_on_teacher_keys() -> None:
    """By loops, with a queue that holds some of the batch's ids once more."""
    term = MixedTargetTerm(weight=1.0, keys="teacher", queue=True, momentum_share=0.3, teacher_share=0.25, ramp_steps=4)
    distiller, student, targets = make(itc=term, queue=QueueConfig(capacity=30))
    assert distiller.queue is not None
    _, old = make_batch(dtype=DOUBLE, number=1)
    assert old.ids is not None
    assert old.momentum is not None
    assert targets.ids is not None
    assert targets.momentum is not None
    old_teacher, t = old.teachers[0], targets.teachers[0]
    names = ("teacher_image", "teacher_text", "momentum_image", "momentum_text")
    rows = (old_teacher.image, old_teacher.text, old.momentum.image, old.momentum.text)
    distiller.queue.push(old.ids, dict(zip(names, rows, strict=True)))
    loss, series = distiller.loss(student, targets, step=2)  # half-way up the ramp

    image, text = project(distiller, student)
    keys = [torch.cat([a, b]) for a, b in ((t.text, old_teacher.text), (t.image, old_teacher.image))]
    average = [
        torch.cat(p) for p in ((targets.momentum.text, old.momentum.text), (targets.momentum.image, old.momentum.image))
    ]
    ids = [*targets.ids.tolist(), *old.ids.tolist()]
    total = torch.zeros((), dtype=DOUBLE)
    queries = ((image, t.image, targets.momentum.image), (text, t.text, targets.momentum.text))
    entropy, several = 0.0, 0
    for way, (query, teacher, momentum) in enumerate(queries):
        for i in range(len(query)):
            positives = [j for j in range(len(ids)) if ids[j] == ids[i]]
            several += len(positives) > 1
            soft_teacher = (t.logit_scale * keys[way] @ teacher[i]).softmax(dim=0)
            soft_momentum = (student.logit_scale.detach() * average[way] @ momentum[i]).softmax(dim=0)
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
    options = {"kl": SoftTargetTerm(weight=1.0, keys="student"), "logit_scale": LogitScaleConfig(teacher=policy)}
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


def test_the_squared_error_moves_the_scale_only_if_it_may() -> None:
    gradients = {}
    for moves in (True, False):
        for ce_weight, mse_weight in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
            term = GKLTerm(weight=1.0, keys="student", ce_weight=ce_weight, mse_weight=mse_weight)
            distiller, student, targets = make(
                STUDENT_WIDTH, gkl=term, logit_scale=LogitScaleConfig(mse_moves_scale=moves)
            )
            loss, _ = distiller.loss(student, targets)
            image, _, scale = torch.autograd.grad(loss, student[:3])
            gradients[moves, ce_weight, mse_weight] = (image, scale.item())
            assert distiller.student.model.logit_scale.requires_grad == (moves or ce_weight > 0)  # type: ignore[union-attr]
    assert gradients[False, 0.0, 1.0][1] == 0
    assert gradients[False, 1.0, 1.0][1] == gradients[True, 1.0, 0.0][1] != 0
    both = gradients[True, 1.0, 0.0][1] + gradients[True, 0.0, 1.0][1]
    assert gradients[True, 1.0, 1.0][1] == pytest.approx(both, rel=1e-9)
    assert torch.allclose(gradients[True, 1.0, 1.0][0], gradients[False, 1.0, 1.0][0], rtol=1e-12)


def test_the_scale_starts_where_the_policy_says_and_stays_in_its_bounds() -> None:
    policy = LogitScaleConfig(init=20.0, minimum=10.0, maximum=30.0)
    objective = ObjectiveConfig(icl=InteractiveTerm(weight=1.0), logit_scale=policy)
    distiller = make_distiller(objective, dtype=DOUBLE)
    model: Any = distiller.student.model
    assert model.logit_scale.exp().item() == pytest.approx(20.0)
    for value, bound in ((math.log(50), 30.0), (math.log(2), 10.0)):
        model.logit_scale.data.fill_(value)
        distiller.scales["cross_logit_scale"].data.fill_(value)
        distiller.finish_step()
        assert model.logit_scale.exp().item() == pytest.approx(bound)
        assert distiller.scales["cross_logit_scale"].exp().item() == pytest.approx(bound)
    with pytest.raises(ValueError, match=r"scale is 7\.389 at first.*logit_scale\.minimum.*10 and 30"):
        make_distiller(ObjectiveConfig(logit_scale=dataclasses.replace(policy, init=None)), dtype=DOUBLE)
    fixed = make_distiller(ObjectiveConfig(logit_scale=LogitScaleConfig(learned=False)), dtype=DOUBLE)
    assert [n for n, p in fixed.named_parameters() if not p.requires_grad] == ["student.model.logit_scale"]


def test_a_weight_rises_linearly_over_its_warm_up() -> None:
    term = InfoNCETerm(weight=2.0, warmup_steps=4)
    assert [term.factor(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    distiller = make_distiller(ObjectiveConfig(info_nce=term), dtype=DOUBLE)
    view, targets = make_batch(dtype=DOUBLE)
    values = [take_loss(distiller, view, targets, step) for step in (0, 1, 9)]
    assert [loss.item() / series["info_nce"].item() for loss, series in values] == pytest.approx([0.5, 1.0, 2.0])
    ramp = MixedTargetTerm(momentum_share=0.4, teacher_share=0.1, ramp_steps=10)
    assert [ramp.shares(step)[0] for step in (0, 5, 10, 20)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert ramp.shares(5)[1] == pytest.approx(0.05)


def test_a_term_of_weight_0_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> dict[str, Tensor]:
        raise AssertionError("computed")

    for name in terms.TERMS.keys() - {"info_nce"}:
        monkeypatch.setitem(terms.TERMS, name, terms.LossTerm(fail))
    distiller = make_distiller(ObjectiveConfig(), dtype=DOUBLE)
    assert "info_nce" in take_loss(distiller, *make_batch(dtype=DOUBLE))[1]
    assert set(terms.TERMS) == set(ObjectiveConfig().terms())
    with pytest.raises(AssertionError, match="computed"):
        take_loss(make_distiller(OBJECTIVES["features alone"], dtype=DOUBLE), *make_batch(dtype=DOUBLE))


def test_the_batch_is_queued_after_its_loss_and_only_when_the_step_was_good() -> None:
    distiller = make_distiller(OBJECTIVES["queued"], dtype=DOUBLE)
    view, targets = make_batch(dtype=DOUBLE)
    targets = needs("queued", targets)
    first = take_loss(distiller, view, targets)[0].item()
    assert take_loss(distiller, view, targets)[0].item() == first  # nothing was queued by the loss itself
    assert distiller.queue is not None
    assert len(distiller.queue) == 0
    distiller.finish_step()
    assert distiller.queue.filled_ids().tolist() == list(range(8))
    assert torch.equal(distiller.queue.filled("teacher_text"), targets.teachers[0].text)
    assert take_loss(distiller, view, targets)[0].item() != first


def test_memory_goes_through_a_checkpoint_and_back() -> None:
    for name in ("queued", "closed set"):
        distiller = make_distiller(OBJECTIVES[name], dtype=DOUBLE)
        for number in range(3):
            view, targets = make_batch(dtype=DOUBLE, number=number)
            take_loss(distiller, view, needs(name, targets))
            distiller.finish_step()
        again = make_distiller(OBJECTIVES[name], dtype=DOUBLE)
        stored = {key: tensor.clone() for key, tensor in distiller.memory().items()}
        assert stored
        again.load_memory(stored)
        view, targets = make_batch(dtype=DOUBLE, number=4)
        values = [take_loss(one, view, needs(name, targets))[0].item() for one in (distiller, again)]
        assert values[0] == values[1]
    assert make_distiller(ObjectiveConfig(), dtype=DOUBLE).memory() == {}


def test_every_objective_of_these_tests_differs_and_together_they_use_every_term() -> None:
    used = {name for objective in OBJECTIVES.values() for name in objective.active()}
    assert used == set(terms.TERMS)
    assert dataclasses.asdict(OBJECTIVES["queued"])["queue"]["capacity"] % 8 != 0
