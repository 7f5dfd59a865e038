"""`clipkd train` with a text tower that is not trained: the teacher's own, or one that came with its weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkd.models.students import MODEL_CONFIGS
from tests.e2e.conftest import SMALL, Run
from tests.e2e.runs import assert_close_runs, saved


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo student's image tower beside a text tower of the demo teacher's shape."""
    student, teacher = (json.loads((MODEL_CONFIGS / f"tiny-{who}.json").read_text()) for who in ("student", "teacher"))
    path = tmp_path_factory.mktemp("students") / "mixed.json"
    path.write_text(json.dumps({**student, "text_cfg": teacher["text_cfg"]}))
    return path


@pytest.mark.parametrize("cached", [False, True])
def test_a_teacher_held_in_half_precision_gives_its_text_tower_whole(
    clipkd: Run, data: Path, teacher: Path, mixed: Path, tmp_path: Path, cached: bool
) -> None:
    """A cache knows its teacher, and is made without a term that uses it."""
    arguments = (*SMALL, "--student.model", mixed, "--student.text", "teacher", "--data.path", data / "pairs")
    models = ("--teacher.models", f"local-dir:{teacher}", "--teacher.dtype", "bf16")
    if cached:
        assert "gkl" not in clipkd("cache", *arguments, *models, "--output", tmp_path / "cache").stderr
        models = ("--teacher.cache", tmp_path / "cache")
    paths = ("--output", tmp_path / "run", "--steps", 1)
    clipkd("train", *arguments, *models, "--objective.kl.weight", 1, *paths)
    weights, theirs = saved(tmp_path / "run", 1), load_file(teacher / "open_clip_model.safetensors")
    text = [name for name in theirs if not name.startswith(("visual.", "logit"))]
    assert [name for name in text if not torch.equal(weights[f"student.model.{name}"], theirs[name])] == []
    assert any(not torch.equal(theirs[name], theirs[name].bfloat16().float()) for name in text)


@pytest.mark.parametrize(
    ("frozen", "learns"),
    [
        (("--student.text", "frozen"), ("visual.", "logit_scale")),
        (
            ("--student.image", "frozen"),
            ("text_projection", "token_", "transformer.", "positional_", "ln_", "logit_scale"),
        ),
        (
            ("--student.image", "head", "--student.text", "head", "--micro_batches", 2),
            ("visual.proj", "text_projection", "logit_scale"),
        ),
    ],
    ids=["text", "image", "all but the projections"],
)
def test_a_tower_stays_as_its_weights_came(
    clipkd: Run, data: Path, teacher: Path, tmp_path: Path, frozen: tuple[str | int, ...], learns: tuple[str, ...]
) -> None:
    start = teacher / "open_clip_model.safetensors"
    arguments = (*SMALL, "--student.model", "tiny-teacher", *frozen, "--data.path", data / "pairs")
    paths = ("--output", tmp_path / "run", "--steps", 2)
    refused = clipkd("train", *arguments, *paths, check=False)
    assert refused.returncode == 2
    assert f"{str(frozen[0])[2:]} is {frozen[1]} at random weights: name them" in refused.stderr
    clipkd("train", *arguments, *paths, "--student.model", f"tiny-teacher@{start}")
    before, after = load_file(start), saved(tmp_path / "run", 2)
    kept = {name for name, tensor in before.items() if torch.equal(after[f"student.model.{name}"], tensor)}
    assert kept == {name for name in before if not name.startswith(learns)}


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_images_alone_teach_what_images_with_captions_teach(
    clipkd: Run, data: Path, teacher: Path, mixed: Path, tmp_path: Path, micro_batches: int
) -> None:
    """The captions' features are equal with and without training, so that only the images' error moves a weight."""
    arguments = (*SMALL, "--student.model", mixed, "--student.text", "teacher", "--data.path", data / "pairs")
    arguments += ("--teacher.models", f"local-dir:{teacher}", "--objective.info_nce.weight", 0, "--steps", 2)
    features = ("--micro_batches", micro_batches, "--objective.features.weight")
    clipkd("train", *arguments, *features, 1, "--output", tmp_path / "captions")
    # Without captions an image counts as its caption too, so its error counts twice.
    clipkd("train", *arguments, *features, 0.5, "--data.caption_key", "null", "--output", tmp_path / "images")
    alone = (*arguments, "--data.caption_key", "null", "--objective.features.weight", 0.5)
    clipkd("cache", *alone, "--dtype", "float32", "--output", tmp_path / "cache")
    clipkd("train", *alone, *features[:2], "--teacher.cache", tmp_path / "cache", "--output", tmp_path / "cached")
    expected = saved(tmp_path / "captions", 2)
    for run in ("images", "cached"):
        found = saved(tmp_path / run, 2)
        assert found.keys() == expected.keys()
        assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []


@pytest.mark.parametrize("teacher_beside", [False, True])
def test_stored_outputs_of_frozen_towers_teach_what_the_towers_teach(
    clipkd: Run, data: Path, teacher: Path, tmp_path: Path, teacher_beside: bool
) -> None:
    """The input of a projection that trains, and the features of a frozen tower; the pixels are not even drawn."""
    start = teacher / "open_clip_model.safetensors"
    towers = ("--student.image", "head", "--student.text", "head" if teacher_beside else "frozen")
    arguments = (*SMALL, "--student.model", f"tiny-teacher@{start}", *towers, "--data.path", data / "pairs")
    models = ("--teacher.models", f"local-dir:{teacher}") if teacher_beside else ()
    told = clipkd("cache", *arguments, *models, "--dtype", "float32", "--output", tmp_path / "cache").stderr
    assert "the student's image and text towers" in told
    objective = ("--objective.kl.weight", 1) if teacher_beside else ()
    paths = ("--steps", 2, "--micro_batches", 2, "--output")
    clipkd("train", *arguments, *models, *objective, *paths, tmp_path / "online")
    cached = clipkd("train", *arguments, *objective, "--teacher.cache", tmp_path / "cache", *paths, tmp_path / "cached")
    assert "gkl" not in cached.stderr
    assert "the student reads its image features too; the student reads its text features too" in cached.stderr
    expected, found = saved(tmp_path / "online", 2), saved(tmp_path / "cached", 2)
    assert found.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])] == []
    words = (*arguments, *objective, "--teacher.cache", tmp_path / "cache")
    if teacher_beside:
        # Two processes, stopped after a step and resumed: the numbers of one.
        two = (*words, "--checkpoint.every_steps", 1, "--output", tmp_path / "two")
        clipkd("train", *two, "--steps", 2, processes=2)
        assert_close_runs(tmp_path / "online", tmp_path / "two", world_sizes={2})
        shutil.rmtree(tmp_path / "two" / "checkpoints" / "step_000002")
        again = clipkd("train", *two, "--steps", 2, "--resume", "latest")
        assert "resumed from step 1 of 2" in again.stderr
        assert_close_runs(tmp_path / "online", tmp_path / "two", world_sizes={1, 2})
        exported = clipkd("export", tmp_path / "two", "--to", "open_clip,onnx", "--output", tmp_path / "student")
        assert exported.stdout.count("answers changed") == 2
    else:
        refused = clipkd("train", *words, "--objective.kl.weight", 1, check=False)
        assert refused.returncode == 2
        assert "objective.kl needs a teacher" in refused.stderr
        refused = clipkd("train", *words, "--student.image", "trained", "--student.text", "trained", check=False)
        assert refused.returncode == 2
        assert (
            "the student's image and text towers, which this student does not read; leave teacher.cache"
            in refused.stderr
        )
