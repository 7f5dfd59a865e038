"""`clipkd eval` and `clipkd export`: equal counts for any batch size, process count and software."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clipkd.models.load import imagenet_synsets
from tests.e2e.conftest import SMALL, Run

CROSS_CHECK = Path(__file__).parents[2] / "eval" / "cross_check.py"


@pytest.fixture(scope="module")
def run_folder(clipkd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "run"
    clipkd(
        "train", *SMALL, "--data.path", data / "pairs", "--steps", 12, "--optim.ema_momentum", 0.5, "--output", folder
    )
    return folder


def test_export_loads_bit_equal_in_stock_open_clip(clipkd: Run, run_folder: Path, tmp_path: Path) -> None:
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


def rows_of(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "eval_results.jsonl").read_text().splitlines()]


def test_counts_are_equal_for_any_batch_size_process_count_and_in_open_clip(
    clipkd: Run, data: Path, run_folder: Path, tmp_path: Path
) -> None:
    clipkd("export", run_folder, "--output", tmp_path / "student")
    student = f"local-dir:{tmp_path / 'student'}"
    rows = []
    for number, (options, processes) in enumerate(
        [
            (("--batch_size", 1, "--num_workers", 0), 1),
            (("--batch_size", 16, "--num_workers", 2), 1),
            (("--batch_size", 5), 2),
        ]
    ):
        results = tmp_path / str(number)
        clipkd("eval", "--model", student, "--data", data / "noto", "--output", results, *options, processes=processes)
        rows += rows_of(results)
    clipkd("eval", "--model", run_folder, "--data", data / "noto", "--output", tmp_path / "run")
    rows += rows_of(tmp_path / "run")
    assert len(rows) == 4
    counts = [(row["n"], row["num_correct1"], row["num_correct5"]) for row in rows]
    assert set(counts) == {counts[0]}
    assert counts[0][0] == 32
    assert counts[0][2] > 0
    assert len({row["weights_sha256"] for row in rows}) == 1
    assert rows[3]["checkpoint"].endswith("step_000012")

    local = [f"--model={student}", f"--data={data / 'noto'}"]
    first_lines = tmp_path / "first.jsonl"
    first_lines.write_text(json.dumps(rows[0]) + "\n")
    check = [sys.executable, str(CROSS_CHECK), *local, f"--expect={first_lines}"]
    done = subprocess.run(check, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("equal")
    first_lines.write_text(json.dumps(rows[0] | {"num_correct1": rows[0]["num_correct1"] + 1}) + "\n")
    assert subprocess.run(check, capture_output=True, timeout=200).returncode == 1


def test_imagenet_folders_take_openai_prompts(clipkd: Run, run_folder: Path, tmp_path: Path) -> None:
    for number, synset in enumerate(imagenet_synsets()):
        folder = tmp_path / "imagenet" / "val" / synset
        folder.mkdir(parents=True)
        if number % 250 == 0:
            Image.new("RGB", (40, 33), (number % 256, 9, 9)).save(folder / "image.png")
    task = tmp_path / "task.yaml"
    task.write_text("name: tiny\nlayout: imagefolder\nsplit: val\nprompts: imagenet\nnum_images: 4\n")
    arguments = ("eval", "--model", run_folder, "--task", task, "--data", tmp_path / "imagenet")
    clipkd(*arguments, "--output", tmp_path / "r")
    (row,) = rows_of(tmp_path / "r")
    assert (row["n"], row["num_classes"], row["key"]) == (4, 1000, "tiny")
    task.write_text(task.read_text().replace("num_images: 4", "num_images: 50000"))
    wrong = clipkd(*arguments, "--output", tmp_path / "wrong", check=False)
    assert wrong.returncode == 2
    assert "the task expects 50000" in wrong.stderr
    assert not (tmp_path / "wrong").exists()
