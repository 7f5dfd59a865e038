"""The objective on one batch against Python loops over plain lists of floats."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import FeatureTerm, GKLTerm, InfoNCETerm, SoftTargetTerm
from clipkd.losses import gkl
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.views import Features, View
from tests.objective.tiny_clip import (
    OBJECTIVES,
    OFF,
    STUDENT_WIDTH,
    TEACHER_WIDTH,
    make_batch,
    make_distiller,
    make_encoder,
    needs,
    steps,
    take_loss,
)

Rows = list[list[float]]
DOUBLE = torch.float64


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row]


def products(queries: Rows, keys: Rows, scale: float) -> Rows:
    return [[scale * sum(a * b for a, b in zip(q, k, strict=True)) for k in keys] for q in queries]


def projected(features: Tensor, weight: Tensor) -> Rows:
    """W·x of every row, normalised again."""
    return [unit([row[0] for row in products(weight.tolist(), [x], 1.0)]) for x in features.tolist()]


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(value) for value in row)
    return [math.exp(value) / total for value in row]


def divergence(student: Rows, teacher: Rows) -> float:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        total += sum(q * math.log(q / p) for q, p in zip(softmax(t), softmax(s), strict=True))
    return total / len(student)


def entropy(teacher: Rows) -> float:
    return sum(-q * math.log(q) for row in teacher for q in softmax(row)) / len(teacher)


def squared_error(student: Rows, teacher: Rows, gamma: float) -> float:
    squares = normaliser = 0.0
    for s, t in zip(student, teacher, strict=True):
        w = [q**gamma for q in softmax(t)]
        for j in range(len(s)):
            for k in range(len(s)):
                squares += w[j] * w[k] * ((t[j] - t[k]) - (s[j] - s[k])) ** 2
                normaliser += w[j] * w[k]
    return squares / normaliser / 4


def both_directions(term: Callable[[Rows, Rows], float], student: Features, teacher: Features, keys: Features) -> float:
    """Mean of image → text and text → image, of student queries against `keys`; the teacher's targets are its own."""
    values = []
    for query, key in (("image", "text"), ("text", "image")):
        s = products(getattr(student, query), getattr(keys, key), float(student.logit_scale))
        t = products(getattr(teacher, query).tolist(), getattr(teacher, key).tolist(), float(teacher.logit_scale))
        values.append(term(s, t))
    return sum(values) / 2


def one_teacher(**options: Any) -> tuple[View, Targets]:
    return (lambda view, targets: (view, needs("", targets)))(*make_batch(**options))


@pytest.fixture
def every_term() -> tuple[Distiller, Features, Features, Tensor, dict[str, Tensor]]:
    """Distiller, student's features as lists in its own space, teacher, loss and terms."""
    distiller = make_distiller(OBJECTIVES["every term"], dtype=DOUBLE)
    view, targets = one_teacher(dtype=DOUBLE)
    loss, metrics = take_loss(distiller, view, targets)
    with torch.no_grad():
        student = distiller.student.features(view)
    return distiller, student, targets.teachers[0], loss, metrics


def in_teacher_space(distiller: Distiller, student: Features) -> Features:
    return student._replace(
        image=projected(student.image, distiller.image_projection.weight),  # type: ignore[arg-type]
        text=projected(student.text, distiller.text_projection.weight),  # type: ignore[arg-type]
    )


def as_lists(features: Features) -> Features:
    return features._replace(image=features.image.tolist(), text=features.text.tolist())  # type: ignore[arg-type]


def test_loss_is_the_weighted_sum_of_the_logged_terms(every_term) -> None:
    _, _, _, loss, terms = every_term
    weights = {"info_nce": 0.5, "gkl": 1.5, "kl": 2.0, "soft_ce": 0.3, "features": 10.0}
    expected = sum(weight * terms[name].item() for name, weight in weights.items())
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    assert terms["loss"].item() == loss.item()
    assert not any(value.requires_grad for value in terms.values())


def test_task_loss_equals_loops_over_both_directions(every_term) -> None:
    _, student, teacher, _, terms = every_term

    def info_nce(s: Rows, _: Rows) -> float:
        return sum(-math.log(softmax(row)[i]) for i, row in enumerate(s)) / len(s)

    own = as_lists(student)
    assert terms["info_nce"].item() == pytest.approx(both_directions(info_nce, own, teacher, own), rel=1e-12)


def test_divergence_on_student_keys_equals_loops(every_term) -> None:
    _, student, teacher, _, terms = every_term
    own = as_lists(student)
    assert terms["kl"].item() == pytest.approx(both_directions(divergence, own, teacher, own), rel=1e-11)
    expected = both_directions(lambda _, t: entropy(t), own, teacher, own)
    assert terms["kl_teacher_entropy"].item() == pytest.approx(expected, rel=1e-12)


def test_gkl_on_teacher_keys_equals_loops_over_the_published_form(every_term) -> None:
    distiller, student, teacher, _, terms = every_term
    queries, keys = in_teacher_space(distiller, student), as_lists(teacher)
    kl = both_directions(divergence, queries, teacher, keys)
    wmse = both_directions(lambda s, t: squared_error(s, t, 0.3), queries, teacher, keys)
    h = both_directions(lambda _, t: entropy(t), queries, teacher, keys)
    assert terms["gkl_kl"].item() == pytest.approx(kl, rel=1e-11)
    assert terms["gkl_wmse"].item() == pytest.approx(wmse, rel=1e-11)
    assert terms["gkl_teacher_entropy"].item() == pytest.approx(h, rel=1e-11)
    assert terms["gkl"].item() == pytest.approx(0.7 * (kl + h) + 0.2 * wmse, rel=1e-11)


def test_soft_cross_entropy_at_temperature_2_equals_loops(every_term) -> None:
    distiller, student, teacher, _, terms = every_term
    queries, keys = in_teacher_space(distiller, student), as_lists(teacher)

    def soft_ce(s: Rows, t: Rows) -> float:
        s, t = ([[value / 2 for value in row] for row in rows] for rows in (s, t))
        return divergence(s, t) + entropy(t)

    assert terms["soft_ce"].item() == pytest.approx(4 * both_directions(soft_ce, queries, teacher, keys), rel=1e-11)


def test_feature_term_is_the_sum_over_both_modalities_of_the_error_in_the_teachers_space(every_term) -> None:
    distiller, student, teacher, _, terms = every_term
    queries, keys = in_teacher_space(distiller, student), as_lists(teacher)
    expected = 0.0
    for side in ("image", "text"):
        pairs = zip(getattr(queries, side), getattr(keys, side), strict=True)
        cosines = [sum(a * b for a, b in zip(q, k, strict=True)) for q, k in pairs]
        expected += sum(2 * (1 - cosine) for cosine in cosines) / len(cosines) / TEACHER_WIDTH
    assert terms["features"].item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("name", sorted(OBJECTIVES.keys() - {"ramped"}))
def test_gradient_of_the_students_features_and_scale_is_that_of_finite_differences(name: str) -> None:
    """Queries and keys both: student keys without a gradient would pass every comparison of values.

    Without what holds a part of the student constant on purpose: those terms are compared with their peers' restatements.
    """
    objective = OBJECTIVES[name]
    stopped = {part: dataclasses.replace(getattr(objective, part), weight=0.0) for part in ("dkl", "itc", "vrd", "xrd")}
    policy = dataclasses.replace(objective.logit_scale, mse_moves_scale=True)
    distiller = make_distiller(dataclasses.replace(objective, **stopped, logit_scale=policy), dtype=DOUBLE)
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
    assert torch.autograd.gradcheck(value, leaves)


def test_gkl_in_the_objective_is_the_loss_of_that_name() -> None:
    options = {"ce_weight": 0.7, "mse_weight": 0.2, "gamma": 0.3, "temperature": 2.0, "weight_temperature": 0.5}
    for squared in (False, True):
        term = GKLTerm(weight=3.0, keys="student", **options, scale_by_temperature_squared=squared)
        distiller = make_distiller(ObjectiveConfig(info_nce=OFF, gkl=term), dtype=DOUBLE)
        view, targets = one_teacher(dtype=DOUBLE)
        with torch.no_grad():
            student = distiller.student.features(view)
        logits = student.logit_scale * student.image @ student.text.T
        teacher = targets.teachers[0]
        wanted = teacher.logit_scale * teacher.image @ teacher.text.T
        directions = [(logits, wanted), (logits.T, wanted.T)]
        expected = sum(gkl(s, t, **options, scale_by_temperature_squared=squared).item() for s, t in directions) / 2
        assert take_loss(distiller, view, targets)[0].item() == pytest.approx(3 * expected, rel=1e-12)


def test_teacher_keys_by_hand() -> None:
    # Two pairs on the axes, scales ln 3: teacher rows are softmax (ln 3, 0) = (3/4, 1/4), the student mixes them up.
    axes = torch.eye(2)
    student = Features(axes.flip(0), axes.flip(0), torch.tensor(math.log(3)))
    teacher = Features(axes, axes, torch.tensor(math.log(3)))
    encoder = make_encoder(2)
    objective = ObjectiveConfig(info_nce=OFF, kl=SoftTargetTerm(weight=1.0, keys="teacher"))
    loss, _ = Distiller(encoder, objective, teacher_dim=2).loss(student, Targets((teacher,)))
    assert loss.item() == pytest.approx(0.5 * math.log(3), rel=1e-6)  # (3/4 − 1/4) ln 3
    objective = ObjectiveConfig(info_nce=OFF, kl=SoftTargetTerm(weight=1.0, keys="student"))
    loss, _ = Distiller(encoder, objective, teacher_dim=2).loss(student, Targets((teacher,)))
    assert loss.item() == pytest.approx(0.0, abs=1e-7)  # among its own, the student agrees with the teacher


GKL_SERIES = {"gkl", "gkl_kl", "gkl_soft_ce", "gkl_wmse", "gkl_teacher_entropy"}


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("task alone", {"info_nce"}),
        ("features alone", {"features"}),
        ("gkl with equal rows", {"info_nce"} | GKL_SERIES),
        ("gkl on student keys", GKL_SERIES),
        (
            "every term",
            {"info_nce", "kl", "kl_soft_ce", "kl_teacher_entropy", "soft_ce", "soft_ce_kl", "soft_ce_teacher_entropy"}
            | {"soft_ce_soft_ce"}  # the term itself is multiplied by T²
            | {"features"}
            | GKL_SERIES,
        ),
    ],
)
def test_only_terms_with_a_weight_are_logged(name: str, terms: set[str]) -> None:
    distiller = make_distiller(OBJECTIVES[name], dtype=torch.float32)
    _, metrics = take_loss(distiller, *one_teacher(dtype=torch.float32))
    uses_teacher_logits = {"teacher_logit_scale"} if name not in ("task alone", "features alone") else set()
    assert set(metrics) == terms | {"loss", "logit_scale"} | uses_teacher_logits
    assert metrics["logit_scale"].item() == pytest.approx(math.exp(2.0), rel=1e-6)
    assert metrics.get("teacher_logit_scale", torch.tensor(12.0)).item() == 12.0


def test_without_a_teacher_the_task_loss_is_all() -> None:
    distiller = make_distiller(OBJECTIVES["task alone"], dtype=torch.float32, teacher_dim=None)
    view, targets = one_teacher(dtype=torch.float32)
    loss, metrics = take_loss(distiller, view, Targets())
    assert set(metrics) == {"loss", "logit_scale", "info_nce"}
    assert loss.item() == take_loss(distiller, view, targets)[0].item()


TEACHER_KEYS = SoftTargetTerm(weight=1.0, keys="teacher")
STUDENT_KEYS = SoftTargetTerm(weight=1.0, keys="student")


@pytest.mark.parametrize(
    ("objective", "teacher_dim", "expected"),
    [
        (ObjectiveConfig(kl=TEACHER_KEYS), TEACHER_WIDTH, True),
        (ObjectiveConfig(gkl=GKLTerm(weight=1.0)), TEACHER_WIDTH, True),
        (ObjectiveConfig(soft_ce=TEACHER_KEYS), TEACHER_WIDTH, True),
        (ObjectiveConfig(features=FeatureTerm(weight=1.0), kl=STUDENT_KEYS), TEACHER_WIDTH, True),
        (ObjectiveConfig(kl=STUDENT_KEYS), TEACHER_WIDTH, False),
        (ObjectiveConfig(gkl=GKLTerm(weight=0.0, keys="teacher"), kl=STUDENT_KEYS), TEACHER_WIDTH, False),
        (ObjectiveConfig(kl=TEACHER_KEYS), STUDENT_WIDTH, False),
        (ObjectiveConfig(), None, False),
    ],
)
def test_projections_exist_only_where_widths_differ_and_a_term_needs_them(
    objective: ObjectiveConfig, teacher_dim: int | None, expected: bool
) -> None:
    distiller = Distiller(make_encoder(), objective, teacher_dim=teacher_dim)
    shapes = {n: tuple(p.shape) for n, p in distiller.named_parameters() if "projection" in n and "student" not in n}
    wanted = (TEACHER_WIDTH, STUDENT_WIDTH)
    assert shapes == ({"image_projection.weight": wanted, "text_projection.weight": wanted} if expected else {})
    unprojected = dataclasses.replace(objective, projection="none")
    if expected:
        with pytest.raises(ValueError, match=r"6 wide, the teacher 9.*objective\.projection"):
            Distiller(make_encoder(), unprojected, teacher_dim=teacher_dim)
    else:
        Distiller(make_encoder(), unprojected, teacher_dim=teacher_dim)


def test_with_equal_widths_features_are_compared_as_they_are() -> None:
    distiller = make_distiller(OBJECTIVES["features alone"], dtype=DOUBLE, teacher_dim=STUDENT_WIDTH)
    view, targets = one_teacher(dtype=DOUBLE, teacher_dim=STUDENT_WIDTH)
    student, teacher = distiller.student.features(view), targets.teachers[0]
    cosines = (student.image * teacher.image).sum(dim=1), (student.text * teacher.text).sum(dim=1)
    expected = sum(2 * (1 - c.mean().item()) / STUDENT_WIDTH for c in cosines)
    assert take_loss(distiller, view, targets)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("teacher_dim", [STUDENT_WIDTH, TEACHER_WIDTH])
def test_every_trainable_parameter_gets_a_gradient_as_ddp_demands(name: str, teacher_dim: int) -> None:
    distiller = make_distiller(OBJECTIVES[name], dtype=DOUBLE, teacher_dim=teacher_dim)
    view, targets = make_batch(dtype=DOUBLE, teacher_dim=teacher_dim)
    take_loss(distiller, view, needs(name, targets))[0].backward()
    without = [n for n, p in distiller.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert without == []


def test_logit_scale_is_frozen_where_no_term_has_logits() -> None:
    frozen = make_distiller(OBJECTIVES["features alone"], dtype=torch.float32)
    assert not frozen.student.model.logit_scale.requires_grad
    assert [n for n, p in frozen.named_parameters() if not p.requires_grad] == ["student.model.logit_scale"]
    for objective in (
        ObjectiveConfig(info_nce=InfoNCETerm(weight=0.1)),
        ObjectiveConfig(info_nce=OFF, kl=STUDENT_KEYS),
        ObjectiveConfig(info_nce=OFF, soft_ce=TEACHER_KEYS),
        ObjectiveConfig(info_nce=OFF, gkl=GKLTerm(weight=1.0)),
    ):
        distiller = make_distiller(objective, dtype=torch.float32)
        assert all(p.requires_grad for p in distiller.parameters())


def test_no_gradient_reaches_the_teachers_features() -> None:
    distiller = make_distiller(OBJECTIVES["every term"], dtype=DOUBLE)
    view, targets = one_teacher(dtype=DOUBLE)
    leaves = [part.clone().requires_grad_() for part in targets.teachers[0][:3]]
    take_loss(distiller, view, Targets((Features(*leaves),)))[0].backward()
    assert [leaf.shape for leaf in leaves if leaf.grad is not None] == []


def test_under_autocast_logits_and_loss_stay_in_float32() -> None:
    distiller = make_distiller(OBJECTIVES["every term"], dtype=torch.float32)
    view, targets = one_teacher(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss, metrics = take_loss(distiller, view, targets)
        student = distiller.student.features(view)
    assert loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in metrics.values())
    assert loss.item() == distiller.loss(student, targets)[0].item()
    assert loss.item() != take_loss(distiller, view, targets)[0].item()  # the towers did run in bfloat16


def test_the_checkpoint_of_a_distiller_holds_student_and_projections() -> None:
    distiller = make_distiller(OBJECTIVES["every term"], dtype=torch.float32)
    names = {name.split(".")[0] for name in distiller.state_dict()}
    assert names == {"student", "image_projection", "text_projection"}
    assert isinstance(make_distiller(OBJECTIVES["task alone"], dtype=DOUBLE).image_projection, nn.Identity)


@pytest.mark.parametrize(("dtype", "tolerance"), [(DOUBLE, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("tile_size", [1, 5, 7])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_any_panel_of_queries_gives_the_same_series_gradients_and_memory(
    name: str, tile_size: int, dtype: torch.dtype, tolerance: float
) -> None:
    whole, panels = steps(name, dtype), steps(name, dtype, tile_size=tile_size)
    assert panels.keys() == whole.keys()
    for key, expected in whole.items():
        error = (panels[key] - expected).double().norm().item()
        assert error <= tolerance * max(expected.double().norm().item(), 1e-3), f"{key}: {error}"
