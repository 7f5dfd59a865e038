"""`clipkd export`: complete folders with parity checks, or a clear error and no folder."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clipkd import files
from clipkd.export.parity import check_parity
from clipkd.export.probes import cut_drawings, write_probes
from clipkd.models.load import load_model
from tests.e2e.conftest import Run
from tests.e2e.forked import running
from tests.e2e.runs import tmpfs
from tests.teachers.world import content_of

ALL = "open_clip,hf,onnx,onnx-fp16,onnx-int8,immich"


@pytest.fixture
def run_folder(exported: dict[str, Path]) -> Path:
    return exported["softmax_run"]


@pytest.fixture
def student(exported: dict[str, Path]) -> Path:
    """Every format, evaluated."""
    return exported["softmax"]


def artefacts(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "parity.json").read_text())["artefacts"]
    return {row["format"]: row for row in rows}


def test_parity_holds_what_was_measured(exported: dict[str, Path], student: Path, run_folder: Path) -> None:
    lines = exported["log"].read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [*ALL.split(","), "exported"]
    assert "noto acc1" in lines[4]
    assert not list(student.parent.glob(".*.tmp"))
    rows = artefacts(student)
    assert list(rows) == ALL.split(",")
    assert (
        json.loads((student / "parity.json").read_text())["source_sha256"]
        == load_model(str(run_folder)).weights_sha256()
    )
    for format, row in rows.items():
        assert row["error"] is None
        assert row["num_images"] == 64
        assert row["num_captions"] > 32
        worst = max(row[tower]["max_abs_difference"] for tower in ("image", "text"))
        least = min(row[tower]["min_cosine"] for tower in ("image", "text"))
        if format in ("onnx-fp16", "onnx-int8"):
            assert 1e-6 < worst < 0.1
            assert 0.98 < least < 1 - 1e-9
        else:
            assert worst < 1e-5
            assert row["argmax_flips"] == 0
        if format != "immich":
            (score,) = row["zero_shot"]
            assert (score["task"], score["n"]) == ("noto", 32)
            assert abs(score["metrics"]["acc1"] - score["student_metrics"]["acc1"] - score["difference"]) < 1e-9
    assert rows["hf"]["default_processor"]["min_cosine"] > 0.9


@pytest.mark.slow
def test_the_formats_score_by_eval_what_parity_states(clipkd: Run, student: Path, data: Path, tmp_path: Path) -> None:
    models = [f"onnx-int8:{student}", f"hf:{student}", f"onnx:{student}"]
    small = ("--num_workers", 0, "--batch_size", 5)  # parity's batches were larger: images must not affect each other
    clipkd("eval", "--model", *models, "--data", data / "noto", "--output", tmp_path / "results", *small)
    rows = files.read_rows(tmp_path / "results" / "eval_results.jsonl")
    assert [row["model"] for row in rows] == models
    for row, format in zip(rows, ("onnx-int8", "hf", "onnx"), strict=True):
        assert row["metrics"] == artefacts(student)[format]["zero_shot"][0]["metrics"]
    assert rows[0]["cost"] | {"latency_ms": 0} == rows[2]["cost"] | {"latency_ms": 0}
    assert rows[0]["cost"]["macs"]["image"] > 0
    assert len({row["weights_sha256"] for row in rows}) == 3


def snippets(readme: str) -> dict[str, tuple[str, str]]:
    """Format → the card's code and the output that it states."""
    found: dict[str, tuple[str, str]] = {}
    code = ""
    for section in readme.split("\n### ")[1:]:
        (printed,) = re.findall(r"```text\n(.*?)```", section, flags=re.S)
        if own := re.findall(r"```python\n(.*?)```", section, flags=re.S):
            (code,) = own
            found[section.splitlines()[0]] = (code, printed)
        else:
            vision, text = re.findall(r"`(onnx/\w+\.onnx)`", section)
            other = re.sub(r"onnx/vision_model\.onnx", vision, re.sub(r"onnx/text_model\.onnx", text, code))
            assert other != code
            found[section.splitlines()[0]] = (other, printed)
    return found


FLOAT32 = "ONNX Runtime, float32"
HEAVY = ("open_clip", "transformers", "ONNX Runtime, float16", "ONNX Runtime, int8")


@pytest.mark.parametrize("title", [FLOAT32, *(pytest.param(title, marks=pytest.mark.slow) for title in HEAVY)])
def test_the_cards_snippets_print_the_stated_output(title: str, student: Path, environment: dict[str, str]) -> None:
    found = snippets((student / "README.md").read_text(encoding="utf-8"))
    assert set(found) == {FLOAT32, *HEAVY}
    code, printed = found[title]
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=student, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, code + done.stderr
    assert done.stdout == printed
    assert len(re.findall(r"[01]\.\d{3}", printed)) == 3


def test_the_card_describes_the_student(student: Path, run_folder: Path) -> None:
    card = (student / "README.md").read_text(encoding="utf-8")
    for words in (
        "pipeline_tag: zero-shot-image-classification",
        "license_name: not-stated",
        "distilled from local-dir:model with clipkd",
        "student of softmax_run/checkpoints/step_000004, step 4",
        "4 of 4 steps, batch 16 over all processes",
        "gkl × 1",
        "accelerate launch -m clipkd train --config training.yaml",
        load_model(str(run_folder)).weights_sha256(),
        "| noto | ONNX Runtime, int8 | acc1 |",
        "| immich |",
        "No licence was stated",
    ):
        assert words in card, words
    everything = "".join((student / name).read_text() for name in ("README.md", "parity.json", "training.yaml"))
    assert str(student.parent.parent) not in everything, "a path of this machine"
    assert re.search(r"^steps: 4$", (student / "training.yaml").read_text(), flags=re.M) is not None


def test_average_licence_and_force(clipkd: Run, run_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "ema"
    clipkd("export", run_folder, "--weights", "ema", "--license", "mit", "--output", output)
    average = load_file(output / "open_clip_model.safetensors")
    trained = load_file(run_folder / "checkpoints" / "step_000004" / "model.safetensors")
    assert not torch.equal(average["visual.conv1.weight"], trained["student.model.visual.conv1.weight"])
    card = (output / "README.md").read_text()
    assert "license: mit" in card
    assert "ema of " in card
    assert json.loads((output / "parity.json").read_text())["source"]["weights"] == "ema"
    before = content_of(output)
    refused = clipkd("export", run_folder, "--output", output, check=False)
    assert (refused.returncode, "exists already" in refused.stderr, content_of(output) == before) == (2, True, True)
    clipkd("export", run_folder, "--output", output, "--force")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{output}")
    replaced = {f"student.model.{name}": tensor for name, tensor in model.state_dict().items()}
    assert [name for name, tensor in replaced.items() if not torch.equal(tensor, trained[name])] == []
    assert preprocess(Image.new("RGB", (50, 41))).shape == (3, 32, 32)  # type: ignore[operator]
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "tflite"), "to has 'tflite'; choose from open_clip, hf, onnx"),
        (("--to", "executorch"), "pip install 'clipkd[executorch]'"),
        (("--verify", "imagenet1k"), "verify needs data"),
        (("--data", "nowhere"), "nowhere"),
        (("{empty}", "--force"), "no model that clipkd knows"),
        (("/no/such",), "no checkpoint"),
    ],
)
def test_wrong_input_is_one_line_and_leaves_nothing(
    clipkd: Run, student: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "empty").mkdir()
    first, *rest = (argument.replace("{empty}", str(tmp_path / "empty")) for argument in arguments)
    source = [student, first] if first.startswith("--") else [first]
    before = content_of(tmp_path)
    done = clipkd("export", *source, *rest, "--output", tmp_path / "out", check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert content_of(tmp_path) == before


def test_an_interrupted_export_leaves_no_folder(
    clipkd: Run, student: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("export", student, "--to", "open_clip", "--output", tmp_path / "out")
    with running(*arguments, environment=environment, folder=tmp_path / "log") as command:
        while "verifying" not in command.stderr:
            assert command.poll() is None, command.stderr
            time.sleep(0.05)
        time.sleep(0.5)
        command.signal(signal.SIGINT)
        assert command.wait() == 130
    assert "interrupted" in command.stderr
    assert "Traceback" not in command.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "log"]


def test_a_full_disk_is_an_error_and_leaves_nothing(clipkd: Run, student: Path, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "20m") as small:
        done = clipkd("export", student, "--to", "open_clip,hf", "--output", small / "out", check=False)
        assert done.returncode == 1, done.stderr
        assert "No space left" in done.stderr
        assert "free space" in done.stderr, done.stderr
        assert list(small.iterdir()) == []


def test_crashes_and_damage_are_rows(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A runtime that ends in SIGSEGV, and damaged weights; the format after them is proven."""
    fake = tmp_path / "site" / "onnxruntime"
    fake.mkdir(parents=True)
    crash = "import os, signal\nSessionOptions = lambda: os.kill(os.getpid(), signal.SIGSEGV)\n"
    (fake / "__init__.py").write_text(crash, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{Path(__file__).parents[2]}")
    folder = tmp_path / "damaged"
    shutil.copytree(student, folder)
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] += 1e-3 * torch.randn_like(state["visual_projection.weight"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_probes(load_model(f"local-dir:{student}"), tmp_path / "probes", cut_drawings(3), ["a cat", "two dogs"])
    rows = check_parity(folder, tmp_path, ["onnx", "hf", "open_clip"], sigmoid=False)
    assert rows["onnx"]["error"] == "its process died of SIGSEGV"
    assert "more than 1e-05" in rows["hf"]["error"]
    assert rows["open_clip"]["error"] is None
