"""A trained run, its export in stock open_clip and the evaluation of both: the same weights and counts."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.conftest import SMALL, Run


@pytest.fixture(scope="module")
def run_folder(clipkd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    clipkd(
        "train", *SMALL, "--data.path", data / "pairs", "--steps", 12, "--optim.ema_momentum", 0.5, "--output", folder
    )
    return folder


def test_export_loads_bit_equal_in_stock_open_clip_and_counts_as_the_run(
    clipkd: Run, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    clipkd("export", run_folder, "--to", "open_clip", "--output", tmp_path / "student")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'student'}")
    trained = load_file(run_folder / "checkpoints" / "step_000012" / "model.safetensors")
    weights = model.state_dict()
    assert {f"student.model.{name}" for name in weights} == trained.keys()
    assert all(torch.equal(weights[name], trained[f"student.model.{name}"]) for name in weights)
    assert preprocess(Image.new("RGB", (50, 41))).shape == (3, 32, 32)
    for path in (tmp_path / "student").iterdir():
        assert path.stat().st_mode & 0o044 == 0o044, f"{path} cannot be read by others"

    again = clipkd("export", run_folder, "--output", tmp_path / "student", check=False)
    assert again.returncode == 2
    assert "exists already" in again.stderr
    clipkd("export", run_folder, "--weights", "ema", "--output", tmp_path / "ema")
    average = load_file(tmp_path / "ema" / "open_clip_model.safetensors")
    assert not torch.equal(average["visual.conv1.weight"], weights["visual.conv1.weight"])

    words = ("--data", data / "noto", "--output", tmp_path / "results", "--num_workers", 0)
    clipkd("eval", "--model", run_folder, tmp_path / "student", *words)
    run, student = map(json.loads, (tmp_path / "results" / "eval_results.jsonl").read_text().splitlines())
    assert run["checkpoint"].endswith("step_000012")
    for name in ("n", "num_correct1", "num_correct5", "weights_sha256", "metrics"):
        assert run[name] == student[name]
