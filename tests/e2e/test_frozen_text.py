"""`clipkd train` with a text tower that is not trained: the teacher's own, or one that came with its weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from clipkd.models.load import load_model
from clipkd.models.students import MODEL_CONFIGS
from tests.e2e.conftest import SMALL, Run
from tests.e2e.runs import assert_close_runs, assert_same_run, saved, with_all_terms

CAPTIONS = ["a photo of a cat", "two dogs, running"]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo student's image tower beside a text tower of the demo teacher's shape."""
    student, teacher = (json.loads((MODEL_CONFIGS / f"demo-{who}.json").read_text()) for who in ("student", "teacher"))
    path = tmp_path_factory.mktemp("students") / "mixed.json"
    path.write_text(json.dumps({**student, "text_cfg": teacher["text_cfg"]}))
    return path


@pytest.mark.slow
def test_the_teachers_text_tower_stays_while_all_else_learns(
    clipkd: Run, data: Path, teacher: Path, mixed: Path, tmp_path: Path
) -> None:
    """On one process and two, in micro-batches, resumed, averaged, with every term and a queue, and exported whole."""
    student = ("--student.model", mixed, "--student.text", "teacher", "--teacher.models", f"local-dir:{teacher}")
    arguments = [*SMALL, *with_all_terms(data), *student, "--data.path", data / "pairs", "--steps", 4]
    arguments += ["--checkpoint.every_steps", 2]
    clipkd("train", *arguments, "--output", tmp_path / "one")
    clipkd("train", *arguments, "--output", tmp_path / "two", "--micro_batches", 3, processes=2)
    assert_close_runs(tmp_path / "one", tmp_path / "two", world_sizes={2})

    theirs = load_model(f"local-dir:{teacher}")
    text = [name for name in theirs.model.state_dict() if not name.startswith(("visual", "logit"))]
    assert len(text) > 10
    for run in ("one", "two"):
        for file, prefix in (("model.safetensors", "student.model."), ("ema.safetensors", "model.")):
            weights, earlier = saved(tmp_path / run, 4, file), saved(tmp_path / run, 2, file)
            assert [n for n in text if not torch.equal(weights[prefix + n], theirs.model.state_dict()[n])] == []
            images = [name for name in weights if name.startswith(f"{prefix}visual.")]
            assert [name for name in images if torch.equal(weights[name], earlier[name])] == []
    moments = saved(tmp_path / "one", 4, "optimizer.safetensors")
    assert any(name.startswith("student.model.visual.") for name in moments)
    assert [n for n in text if any(name.startswith(f"student.model.{n}/") for name in moments)] == []

    shutil.copytree(tmp_path / "one", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "step_000004")
    again = (*arguments, "--output", tmp_path / "cut", "--resume", "latest")
    other = clipkd("train", *again, "--student.text", "trained", check=False)
    assert other.returncode == 2
    assert "was made with student.text = teacher, now it is trained" in other.stderr
    clipkd("train", *again)
    assert_same_run(tmp_path / "one", tmp_path / "cut", steps=4)

    clipkd("export", tmp_path / "one", "--output", tmp_path / "student")
    exported = load_model(str(tmp_path / "student"))
    tokens = exported.spec.tokenize(CAPTIONS)
    with torch.no_grad():
        assert torch.equal(exported.encode_text(tokens), theirs.encode_text(tokens))


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


def test_a_text_tower_stays_as_its_weights_came(clipkd: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    start = teacher / "open_clip_model.safetensors"
    arguments = (*SMALL, "--student.model", "demo-teacher", "--student.text", "frozen", "--data.path", data / "pairs")
    paths = ("--output", tmp_path / "run", "--steps", 2)
    refused = clipkd("train", *arguments, *paths, check=False)
    assert refused.returncode == 2
    assert "student.text is frozen at random weights: name them" in refused.stderr
    clipkd("train", *arguments, *paths, "--student.model", f"demo-teacher@{start}")
    before, after = load_file(start), saved(tmp_path / "run", 2)
    kept = {name for name, tensor in before.items() if torch.equal(after[f"student.model.{name}"], tensor)}
    assert kept == {name for name in before if not name.startswith(("visual.", "logit_scale"))}
