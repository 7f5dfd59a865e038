"""A student whose text tower is not trained: everything else learns as if it were, and it costs no activations."""

import pytest
import torch
from torch import Tensor, nn

from clipkd.config.objective import LogitScaleConfig, ObjectiveConfig
from clipkd.config.terms import GKLTerm
from clipkd.models.cost import count_saved
from clipkd.models.students import tower_of
from clipkd.objective.distiller import Distiller
from clipkd.objective.memory import MovingAverage
from clipkd.training import grad_cache, optim
from tests.objective.tiny_clip import (
    OBJECTIVES,
    OFF,
    PAIRS,
    STUDENT_WIDTH,
    make_batch,
    make_distiller,
    needs,
    steps,
    take_loss,
)

DOUBLE = torch.float64


def weights(distiller: Distiller, tower: str) -> dict[str, Tensor]:
    state = distiller.student.model.state_dict()
    return {name: tensor.clone() for name, tensor in state.items() if tower_of(name) == tower}


def wide_text(*, frozen: bool) -> Distiller:
    """Texts pass through 4096 numbers per token and a dropout."""
    distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=torch.float32)
    towers = distiller.student.model
    towers.token_embedding = nn.Sequential(  # type: ignore[assignment]
        nn.Embedding(12, 4096), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4096, 8), nn.Tanh()
    )
    if frozen:
        distiller.student.freeze("text")
    return distiller


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_leaves_the_text_tower_bit_by_bit(name: str, micro_batches: int) -> None:
    """Several steps of AdamW, whose weight decay would reach a parameter without any gradient."""
    distiller = make_distiller(OBJECTIVES[name], dtype=DOUBLE, frozen_text=True)
    average = MovingAverage(distiller.student, 0.7)
    groups = optim.parameter_groups(distiller.named_parameters(), weight_decay=0.5, logit_scale_lr=1.0)
    text = {id(p) for name, p in distiller.student.model.named_parameters() if tower_of(name) == "text"}
    assert not text & {id(parameter) for group in groups for parameter in group["params"]}
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    before = {tower: weights(distiller, tower) for tower in ("image", "text")}
    for step in range(3):
        view, targets = make_batch(dtype=DOUBLE, number=step)
        targets = needs(name, targets)
        if micro_batches == 1:
            take_loss(distiller, view, targets, step)[0].backward()
        else:
            grad_cache.backward(
                distiller, view, targets, step=step, micro_batches=micro_batches, reseed=torch.manual_seed
            )
        optimizer.step()
        optimizer.zero_grad()
        distiller.finish_step()
        average.update()
    assert len(before["text"]) == 3
    for weight, value in before["text"].items():
        assert torch.equal(weights(distiller, "text")[weight], value), weight
        assert torch.equal(average.model.model.state_dict()[weight], value), weight
    assert all(not torch.equal(weights(distiller, "image")[weight], value) for weight, value in before["image"].items())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_all_but_the_text_tower_gets_the_gradient_of_a_trained_student(name: str) -> None:
    trained, frozen = (steps(name, DOUBLE, number=1, frozen_text=frozen) for frozen in (False, True))
    text = {key for key in trained if key.startswith("gradient/student.model.t")}
    assert {key.split(".")[2] for key in text} == {"token_embedding", "text_projection"}
    assert frozen.keys() == trained.keys() - text
    for key, value in frozen.items():
        torch.testing.assert_close(value, trained[key], rtol=1e-13, atol=1e-15, msg=key)


def test_texts_keep_no_activations() -> None:
    """Of each of 8 texts of 3 tokens: 4096 numbers before the tanh or after it, its mask, at least."""
    peaks = []
    for frozen in (False, True):
        distiller = wide_text(frozen=frozen)
        view, targets = make_batch(dtype=torch.float32)
        with count_saved() as saved:
            take_loss(distiller, view, needs("teacher keys", targets))[0].backward()
        assert saved.now == 0
        peaks.append(saved.peak)
    of_texts = PAIRS * 3 * 4096 * 4
    assert peaks[0] > of_texts
    assert peaks[1] < 0.1 * of_texts


def test_a_frozen_text_tower_drops_nothing_out_whatever_mode_the_student_is_in() -> None:
    view, _ = make_batch(dtype=torch.float32)
    trained, frozen = wide_text(frozen=False), wide_text(frozen=True)
    expected = wide_text(frozen=False).eval().student.encode_text(view.texts)
    for distiller in (trained, frozen):
        distiller.train(False)
        distiller.train()
        distiller.student.train()
        assert distiller.student.model.visual.training
    assert torch.equal(frozen.student.encode_text(view.texts), expected)
    assert not torch.allclose(trained.student.encode_text(view.texts), expected, atol=1e-2)
    features, _ = frozen(view)
    assert (features.image.requires_grad, features.text.requires_grad) == (True, False)
    assert torch.equal(features.text, expected)


def test_texts_that_lead_to_nothing_trained_keep_no_logits() -> None:
    """Against the teacher's keys at a fixed scale, a frozen text tower's half of what GKL keeps is a constant."""
    objective = ObjectiveConfig(info_nce=OFF, gkl=GKLTerm(weight=1.0), logit_scale=LogitScaleConfig(learned=False))
    taken = []
    for frozen in (False, True):
        distiller = make_distiller(objective, dtype=torch.float32, teacher_dim=STUDENT_WIDTH, frozen_text=frozen)
        view, targets = make_batch(dtype=torch.float32, teacher_dim=STUDENT_WIDTH, num=300)
        student, _ = distiller(view)
        student = student._replace(image=student.image.detach().requires_grad_())
        with count_saved() as saved:
            distiller.loss(student, needs("", targets))[0].backward()
        taken.append(saved.peak)
    assert taken[1] < 0.6 * taken[0]
