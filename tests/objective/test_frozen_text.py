"""A student whose text tower is not trained: everything else learns as if it were, and it costs no activations."""

import pytest
import torch
from torch import nn

from clipkd.config.objective import LogitScaleConfig, ObjectiveConfig
from clipkd.config.terms import GKLTerm
from clipkd.models.cost import count_saved
from clipkd.objective.distiller import Distiller
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
