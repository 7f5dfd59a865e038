"""The objective on one batch against restatements that tests/losses hold to loops; its gradients, scales, weights and state."""

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd.config.objective import LogitScaleConfig, ObjectiveConfig
from clipkd.config.terms import FeaturesTerm, ICLTerm, InfoNCETerm, ITCTerm, KLTerm
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.objective.entry import TERMS
from clipkd.views import Features, View
from tests.objective.tiny_clip import (
    OBJECTIVES,
    OFF,
    QUEUE_CAPACITY,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    make_batch,
    make_distiller,
    make_encoder,
    needs,
    take_loss,
)
from tests.oracles import peers

DOUBLE = torch.float64


def one_teacher(**options: Any) -> tuple[View, Targets]:
    view, targets = make_batch(**options)
    return view, needs("", targets)


@pytest.mark.parametrize("name", ["teacher keys", "student keys"])
def test_every_series_equals_its_restatement_over_both_directions(name: str) -> None:
    objective, distiller = OBJECTIVES[name], make_distiller(OBJECTIVES[name], dtype=DOUBLE)
    view, targets = one_teacher(dtype=DOUBLE)
    loss, found = take_loss(distiller, view, targets)
    with torch.no_grad():
        student, teacher = distiller.student.features(view), targets.teachers[0]
        queries, keys, sides = student[:2], student[:2], ("image", "text")
        if name == "teacher keys":
            weights = (getattr(distiller, f"{side}_projection").weight for side in sides)
            queries = [F.normalize(own @ weight.T, dim=1) for own, weight in zip(queries, weights, strict=True)]
            keys = teacher[:2]
    ways = [
        (student.logit_scale * queries[a] @ keys[b].T, teacher.logit_scale * teacher[a] @ teacher[b].T)
        for a, b in ((0, 1), (1, 0))
    ]

    def soft(temperature: float) -> dict[str, Tensor]:
        rows = [((x / temperature).log_softmax(dim=1), (y / temperature).softmax(dim=1)) for x, y in ways]
        soft_ce, entropy = (
            -torch.stack([(q * log).sum(dim=1) for q, log in pairs]).mean()
            for pairs in ([(q, p) for p, q in rows], [(q, q.log()) for _, q in rows])
        )
        return {"kl": soft_ce - entropy, "soft_ce": soft_ce, "teacher_entropy": entropy}

    def gkl(ce_weight: float, mse_weight: float) -> Tensor:
        options = {"gamma": objective.gkl.gamma, "temperature": 1.0}
        both = (peers.gkl(*way, ce_weight=ce_weight, mse_weight=mse_weight, **options) for way in ways)
        return torch.stack([*both]).mean()

    kl = soft(objective.kl.temperature)
    expected = {"kl": kl.pop("kl"), **{f"kl_{part}": value for part, value in kl.items()}}
    expected |= {f"gkl_{part}": value for part, value in soft(1.0).items()} | {"gkl_wmse": gkl(0, 1)}
    expected["gkl"] = gkl(objective.gkl.ce_weight, objective.gkl.mse_weight)
    if name == "teacher keys":
        expected["info_nce"] = peers.info_nce(*student[:3])
        expected["features"] = sum(map(F.mse_loss, queries, keys))
    expected["loss"] = sum(term.weight * expected[each] for each, term in objective.active().items())
    expected = {each: value.item() for each, value in expected.items()}
    expected |= {"logit_scale": math.exp(2.0), "teacher_logit_scale": 12.0}
    assert {key: value.item() for key, value in found.items()} == pytest.approx(expected, rel=1e-10)
    assert loss.item() == found["loss"].item()
    assert not any(value.requires_grad for value in found.values())


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"ramped"}))
def test_gradient_of_the_students_features_and_scale_is_that_of_finite_differences(name: str) -> None:
    """Queries and keys both: student keys without a gradient would pass every comparison of values.

    Without what holds a part of the student constant on purpose: those terms are compared with their peers' restatements.
    """
    objective = OBJECTIVES[name]
    stopped = {part: dataclasses.replace(getattr(objective, part), weight=0.0) for part in ("itc", "vrd", "xrd")}
    distiller = make_distiller(dataclasses.replace(objective, **stopped), dtype=DOUBLE)
    for number in range(2):  # the second batch finds the first in the queue
        view, targets = make_batch(dtype=DOUBLE, num=4, number=number)
        targets = needs(name, targets)
        take_loss(distiller, view, targets)
        if number == 0:
            distiller.finish_step()
    with torch.no_grad():
        student = distiller.student.features(view)
        classes = distiller.student.encode_text(torch.arange(12).view(4, 3)[[0, 1, 2, 3, 3]])

    def value(image: Tensor, text: Tensor, scale: Tensor, classes: Tensor) -> Tensor:
        return distiller.loss(Features(image, text, scale, student.logit_bias), targets, class_features=classes)[0]

    leaves = [part.clone().requires_grad_() for part in (*student[:3], classes)]
    assert torch.autograd.gradcheck(value, leaves, fast_mode=True)


def test_keys_by_hand() -> None:
    # Two pairs on the axes, scales ln 3: teacher rows are softmax (ln 3, 0) = (3/4, 1/4), the student mixes them up.
    axes = torch.eye(2)
    student = Features(axes.flip(0), axes.flip(0), torch.tensor(math.log(3)))
    teacher = Features(axes, axes, torch.tensor(math.log(3)))
    # (3/4 − 1/4) ln 3; among its own keys, the student agrees with the teacher.
    for keys, expected in (("teacher", 0.5 * math.log(3)), ("student", 0.0)):
        objective = ObjectiveConfig(keys=keys, info_nce=OFF, kl=KLTerm(weight=1.0))
        loss, _ = Distiller(make_encoder(2), objective, teacher_dim=2).loss(student, Targets((teacher,)))
        assert loss.item() == pytest.approx(expected, abs=1e-6)


def test_without_captions_every_image_stands_for_its_own() -> None:
    """The example above with the images on the axes; texts have no features at all."""
    axes, none, scale = torch.eye(2), torch.empty(2, 0), torch.tensor(math.log(3))
    student, teacher = Features(axes.flip(0), none, scale), Features(axes, none, scale)
    term = KLTerm(weight=1.0)
    distiller = Distiller(make_encoder(2), ObjectiveConfig(info_nce=OFF, kl=term), teacher_dim=2, images_alone=True)
    loss, _ = distiller.loss(student, Targets((teacher,)))
    assert loss.item() == pytest.approx(0.5 * math.log(3), abs=1e-6)


def test_every_term_has_an_entry_and_these_tests_use_them_all() -> None:
    used = {name for objective in OBJECTIVES.values() for name in objective.active()}
    assert used == set(ObjectiveConfig().terms())
    assert TERMS.keys() == {type(term) for term in ObjectiveConfig().terms().values()}
    assert QUEUE_CAPACITY % 8 != 0


@pytest.mark.parametrize(
    ("objective", "teacher_dim", "expected"),
    [
        (ObjectiveConfig(kl=KLTerm(weight=1.0)), TEACHER_WIDTH, True),
        (ObjectiveConfig(keys="student", features=FeaturesTerm(weight=1.0)), TEACHER_WIDTH, True),
        (ObjectiveConfig(keys="student", kl=KLTerm(weight=1.0)), TEACHER_WIDTH, False),
        (ObjectiveConfig(kl=KLTerm(weight=1.0)), STUDENT_WIDTH, False),
        (ObjectiveConfig(), TEACHER_WIDTH, False),
        (ObjectiveConfig(), None, False),
    ],
)
def test_projections_exist_only_where_widths_differ_and_a_term_needs_them(
    objective: ObjectiveConfig, teacher_dim: int | None, expected: bool
) -> None:
    distiller = Distiller(make_encoder(), objective, teacher_dim=teacher_dim)
    shapes = {n: tuple(p.shape) for n, p in distiller.named_parameters() if not n.startswith("student.")}
    wanted = (TEACHER_WIDTH, STUDENT_WIDTH)
    assert shapes == ({"image_projection.weight": wanted, "text_projection.weight": wanted} if expected else {})
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", *(n.split(".")[0] for n in shapes)}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("teacher_dim", [STUDENT_WIDTH, TEACHER_WIDTH])
def test_every_trainable_parameter_gets_a_gradient_as_ddp_demands(name: str, teacher_dim: int) -> None:
    distiller = make_distiller(OBJECTIVES[name], dtype=DOUBLE, teacher_dim=teacher_dim)
    view, targets = make_batch(dtype=DOUBLE, teacher_dim=teacher_dim)
    take_loss(distiller, view, needs(name, targets))[0].backward()
    assert [
        n for n, p in distiller.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ] == []
    frozen = [n for n, p in distiller.named_parameters() if not p.requires_grad]
    scale = ["student.model.logit_scale"] if name == "features alone" else []  # no term has logits at it
    assert frozen == scale


def test_no_gradient_reaches_the_teachers_features() -> None:
    distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=DOUBLE)
    view, targets = one_teacher(dtype=DOUBLE)
    leaves = [part.clone().requires_grad_() for part in targets.teachers[0][:3]]
    take_loss(distiller, view, Targets((Features(*leaves),)))[0].backward()
    assert [leaf.grad for leaf in leaves] == [None] * 3


def test_under_autocast_logits_and_loss_stay_in_float32() -> None:
    distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=torch.float32)
    view, targets = one_teacher(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = take_loss(distiller, view, targets)
        student = distiller.student.features(view)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert loss.item() == distiller.loss(student, targets)[0].item()
    assert loss.item() != take_loss(distiller, view, targets)[0].item()  # the towers did run in bfloat16


# Logit scales, warm-up, and what a step leaves behind


def test_the_scale_starts_where_the_policy_says_and_stays_in_its_bounds() -> None:
    policy = LogitScaleConfig(init=20.0, maximum=30.0)
    distiller = make_distiller(ObjectiveConfig(icl=ICLTerm(weight=1.0), logit_scale=policy), dtype=DOUBLE)
    model: Any = distiller.student.model
    assert model.logit_scale.exp().item() == pytest.approx(20.0)
    for value, bound in ((math.log(50), 30.0), (math.log(0.2), 1.0)):
        model.logit_scale.data.fill_(value)
        distiller.scales["cross_logit_scale"].data.fill_(value)
        distiller.clamp_logit_scales()
        assert model.logit_scale.exp().item() == pytest.approx(bound)
        assert distiller.scales["cross_logit_scale"].exp().item() == pytest.approx(bound)
    with pytest.raises(ValueError, match=r"scale is 7\.389 at first, outside 1 and objective\.logit_scale\.maximum, 7"):
        make_distiller(ObjectiveConfig(logit_scale=LogitScaleConfig(maximum=7.0)), dtype=DOUBLE)
    fixed = make_distiller(ObjectiveConfig(logit_scale=LogitScaleConfig(learned=False)), dtype=DOUBLE)
    assert [n for n, p in fixed.named_parameters() if not p.requires_grad] == ["student.model.logit_scale"]


def test_weights_of_all_but_the_task_loss_rise_linearly_over_the_warm_up() -> None:
    objective = ObjectiveConfig(info_nce=InfoNCETerm(weight=0.5), features=FeaturesTerm(weight=2.0), warmup_steps=4)
    risen = [objective.weight_at(objective.features, step) for step in range(6)]
    assert risen == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    distiller = make_distiller(objective, dtype=DOUBLE)
    view, targets = one_teacher(dtype=DOUBLE)
    for step in (0, 1, 9):
        loss, series = take_loss(distiller, view, targets, step)
        expected = 0.5 * series["info_nce"].item() + risen[min(step, 5)] * series["features"].item()
        assert loss.item() == pytest.approx(expected, rel=1e-12)
    ramp = ITCTerm(momentum_share=0.4, teacher_share=0.1)
    assert [ramp.shares(step, 10)[0] for step in (0, 5, 10, 20)] == pytest.approx([0.0, 0.2, 0.4, 0.4])
    assert ramp.shares(5, 10)[1] == pytest.approx(0.05)


def test_the_batch_is_queued_after_its_loss_and_only_when_the_step_succeeded() -> None:
    distiller = make_distiller(OBJECTIVES["queued teacher keys"], dtype=DOUBLE)
    view, targets = one_teacher(dtype=DOUBLE)
    first = take_loss(distiller, view, targets)[0].item()
    assert take_loss(distiller, view, targets)[0].item() == first  # nothing was queued by the loss itself
    assert distiller.queue is not None
    assert len(distiller.queue) == 0
    distiller.finish_step()
    assert distiller.queue.filled_ids().tolist() == list(range(8))
    assert torch.equal(distiller.queue.filled("teacher_text"), targets.teachers[0].text)
    assert take_loss(distiller, view, targets)[0].item() != first
