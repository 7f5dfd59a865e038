"""`clipkd export`: whole folders with a proof, or a clear error and none."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkd import files
from clipkd.export.parity import Job, prove
from clipkd.export.probes import cut_drawings, write_probes
from clipkd.models.load import load_model as load
from tests.e2e.conftest import Run
from tests.e2e.forked import running

ALL = "open_clip,hf,onnx,onnx-fp16,onnx-int8,immich"


@pytest.fixture
def run_folder(exported: dict[str, Path]) -> Path:
    return exported["softmax_run"]


@pytest.fixture
def student(exported: dict[str, Path]) -> Path:
    """Every format, evaluated."""
    return exported["softmax"]


def test_a_line_per_artefact_is_printed_and_nothing_else_is_left(exported: dict[str, Path]) -> None:
    lines = exported["log"].read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == [*ALL.split(","), "exported"]
    assert "noto acc1" in lines[4]
    assert not list(exported["softmax"].parent.glob(".*.tmp"))


def artefacts(folder: Path) -> dict[str, dict]:
    rows = json.loads((folder / "parity.json").read_text())["artefacts"]
    return {row["format"]: row for row in rows}


def test_parity_says_what_was_measured(student: Path, run_folder: Path, data: Path) -> None:
    about = json.loads((student / "parity.json").read_text())
    rows = artefacts(student)
    assert list(rows) == ALL.split(",")
    assert about["source_sha256"] == load(str(run_folder)).weights_sha256()
    for format, row in rows.items():
        assert row["error"] is None
        assert row["num_images"] == 64  # the task's 32 and as many of odd sizes
        assert row["num_captions"] > 32
        worst = max(row[tower]["max_abs_difference"] for tower in ("image", "text"))
        least = min(row[tower]["min_cosine"] for tower in ("image", "text"))
        if format in ("onnx-fp16", "onnx-int8"):
            assert 1e-6 < worst < 0.1
            assert 0.98 < least < 1 - 1e-9
        else:
            assert worst < 1e-5
            assert row["argmax_flips"] == 0
        assert all(size > 10_000 for size in row["files"].values())
        if format != "immich":
            (score,) = row["zero_shot"]
            assert (score["task"], score["n"]) == ("noto", 32)
            assert abs(score["metrics"]["acc1"] - score["student_metrics"]["acc1"] - score["difference"]) < 1e-9
    assert sum(rows["onnx-int8"]["files"].values()) < 0.4 * sum(rows["onnx"]["files"].values())
    assert sum(rows["onnx-fp16"]["files"].values()) < 0.6 * sum(rows["onnx"]["files"].values())
    assert rows["hf"]["default_processor"]["min_cosine"] > 0.9


def test_the_int8_files_score_by_eval_what_parity_says(clipkd: Run, student: Path, data: Path, tmp_path: Path) -> None:
    models = [f"onnx-int8:{student}", f"hf:{student}", f"onnx:{student}"]
    small = (
        "--num_workers",
        0,
        "--batch_size",
        5,
    )  # parity's batches were larger: no image may depend on its neighbours
    clipkd("eval", "--model", *models, "--data", data / "noto", "--output", tmp_path / "results", *small)
    rows = files.read_rows(tmp_path / "results" / "eval_results.jsonl")
    assert [row["model"] for row in rows] == models
    said = artefacts(student)
    for row, format in zip(rows, ("onnx-int8", "hf", "onnx"), strict=True):
        assert row["metrics"] == said[format]["zero_shot"][0]["metrics"]
    parameters = load(str(student)).model.visual.conv1.weight.numel()  # type: ignore[union-attr, operator]
    assert rows[0]["cost"]["parameters"]["image"] > parameters
    assert rows[0]["cost"] | {"latency_ms": 0} == rows[2]["cost"] | {"latency_ms": 0}
    assert rows[0]["cost"]["macs"]["image"] > 0
    assert len({row["weights_sha256"] for row in rows}) == 3


def test_every_file_is_readable_by_others_and_nothing_of_training_is_left(student: Path) -> None:
    files = [path for path in student.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert all(path.stat().st_mode & 0o777 == 0o644 for path in files)
    assert student.stat().st_mode & 0o777 == 0o755
    weights = load_file(student / "open_clip_model.safetensors")
    assert not [name for name in weights if "projection" in name.replace("text_projection", "") or "cross" in name]


def snippets(readme: str) -> dict[str, tuple[str, str]]:
    """Runtime → the card's code and what it says that the code prints."""
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


def test_the_cards_snippets_print_what_it_says(student: Path, environment: dict[str, str]) -> None:
    found = snippets((student / "README.md").read_text(encoding="utf-8"))
    runtimes = ["float32", "float16", "int8"]
    assert list(found) == ["open_clip", "transformers", *(f"ONNX Runtime, {name}" for name in runtimes)]
    for code, printed in found.values():
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=student, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, code + done.stderr
        assert done.stdout == printed
        assert len(re.findall(r"[01]\.\d{3}", printed)) == 3


def test_the_card_tells_what_the_student_is(student: Path, run_folder: Path) -> None:
    card = (student / "README.md").read_text(encoding="utf-8")
    for words in (
        "pipeline_tag: zero-shot-image-classification",
        "license_name: not-stated",
        "distilled from local-dir:model with clipkd",
        "student of softmax_run/checkpoints/step_000004, step 4",
        "gkl × 1 (teacher keys)",
        "accelerate launch -m clipkd train --config training.yaml",
        load(str(run_folder)).weights_sha256(),
        "| noto | ONNX Runtime, int8 | acc1 |",
        "| immich |",
        "No licence was stated",
    ):
        assert words in card, words
    everything = "".join((student / name).read_text() for name in ("README.md", "parity.json", "training.yaml"))
    assert str(student.parent.parent) not in everything, "a path of this machine"
    steps = re.search(r"^steps: 4$", (student / "training.yaml").read_text(), flags=re.M)
    assert steps is not None


def test_the_average_and_a_licence_are_exported_when_asked_for(clipkd: Run, run_folder: Path, tmp_path: Path) -> None:
    clipkd("export", run_folder, "--weights", "ema", "--license", "mit", "--output", tmp_path / "ema")
    average = load_file(tmp_path / "ema" / "open_clip_model.safetensors")
    trained = load_file(run_folder / "checkpoints" / "step_000004" / "model.safetensors")
    assert not torch.equal(average["visual.conv1.weight"], trained["student.model.visual.conv1.weight"])
    card = (tmp_path / "ema" / "README.md").read_text()
    assert "license: mit" in card
    assert "ema of " in card
    assert json.loads((tmp_path / "ema" / "parity.json").read_text())["source"]["weights"] == "ema"


def tree(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_an_export_of_an_export_is_the_same_and_force_replaces(clipkd: Run, student: Path, tmp_path: Path) -> None:
    output = tmp_path / "again"
    clipkd("export", f"local-dir:{student}", "--to", "onnx", "--output", output)
    again = tree(output)
    assert "README.md" in again
    assert "open_clip_model.safetensors" not in again
    refused = clipkd("export", student, "--output", output, check=False)
    assert refused.returncode == 2
    assert "exists already" in refused.stderr
    assert tree(output) == again
    clipkd("export", student, "--output", output, "--force")
    replaced = tree(output)
    assert "onnx/vision_model.onnx" not in replaced
    assert replaced["open_clip_model.safetensors"] == tree(student)["open_clip_model.safetensors"]
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--to", "tflite"), "to has 'tflite'; choose from open_clip, hf, onnx"),
        (("--to", ","), "to is empty"),
        (("--to", "executorch"), "pip install 'clipkd[executorch]'"),
        (("--verify", "eval/imagenet.yaml"), "verify needs data"),
        (("--data", "nowhere"), "nowhere"),
        (("--weights", "average"), "weights"),
        (("--push-to-hub",), "push_to_hub"),
    ],
)
def test_wrong_options_are_one_line_and_leave_nothing(
    clipkd: Run, student: Path, tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    done = clipkd("export", student, "--output", tmp_path / "out", *arguments, check=False)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_wrong_checkpoints_are_one_line_and_leave_nothing(clipkd: Run, run_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    other = tmp_path / "in" / "step_000004"
    other.mkdir()
    for path in (run_folder / "checkpoints" / "step_000004").iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    state = json.loads((other / "state.json").read_text())
    (other / "state.json").write_text(json.dumps({**state, "format_version": 1}))
    (tmp_path / "in" / "empty").mkdir()
    for checkpoint, words in (
        (other, "checkpoint format 1, this clipkd reads"),
        (tmp_path / "in" / "empty", "no model that clipkd knows"),
        (tmp_path / "in" / "missing", "no checkpoint"),
    ):
        done = clipkd("export", checkpoint, "--output", tmp_path / "out", check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert not (tmp_path / "out").exists()
    for output in (run_folder, run_folder.parent, run_folder / "checkpoints" / "step_000004" / "out"):
        done = clipkd("export", run_folder, "--output", output, "--force", check=False)
        assert done.returncode == 2
        assert "choose another --output" in done.stderr
    assert load(str(run_folder)).name == "demo-student"
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    done = clipkd("export", run_folder, "--output", tmp_path / "link", "--force", check=False)
    assert done.returncode == 2
    assert "is a link" in done.stderr
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = clipkd("export", run_folder, "--output", tmp_path / "mine", "--force", check=False)
    assert done.returncode == 2
    assert "no export of clipkd has written (thesis.txt" in done.stderr
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_export_leaves_no_folder_and_the_next_one_works(
    number: int, clipkd: Run, student: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    arguments = ("export", student, "--to", "open_clip", "--output", tmp_path / "out")
    with running(*arguments, environment=environment, folder=tmp_path / "log") as command:
        while "verifying" not in command.stderr:
            assert command.poll() is None, command.stderr
            time.sleep(0.05)
        time.sleep(0.5)
        command.signal(number)
        code = command.wait()
    assert not (tmp_path / "out").exists()
    if number == signal.SIGINT:
        assert code == 130
        assert "interrupted" in command.stderr
        assert "Traceback" not in command.stderr
        assert not list(tmp_path.glob(".*.tmp"))
    clipkd(*arguments)
    assert "open_clip" in artefacts(tmp_path / "out")
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_full_disk_is_said_and_leaves_no_half_folder(clipkd: Run, student: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        for formats in ("open_clip,hf", "open_clip,onnx"):
            done = clipkd("export", student, "--to", formats, "--output", small / "out", check=False)
            assert done.returncode == 1, done.stderr
            assert "No space left" in done.stderr
            assert "free space" in done.stderr, done.stderr
            assert list(small.iterdir()) == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_runtime_that_crashes_is_a_row(student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends in a segmentation fault; what comes before and after it is proven all the same."""
    fake = tmp_path / "site" / "onnxruntime"
    fake.mkdir(parents=True)
    (fake / "__init__.py").write_text(
        "import os, signal\nSessionOptions = lambda: os.kill(os.getpid(), signal.SIGSEGV)\n", encoding="utf-8"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}{os.pathsep}{Path(__file__).parents[2]}")
    encoder = load(f"local-dir:{student}")
    probes = write_probes(encoder, tmp_path / "probes", cut_drawings(3), ["a cat"])
    rows = prove(
        Job(str(student), str(probes.folder), str(tmp_path / "rows.jsonl"), str(student)), ["onnx", "open_clip"]
    )
    assert [row["format"] for row in rows] == ["onnx", "open_clip"]
    assert rows[0]["error"] == "its process died of SIGSEGV"
    assert rows[1]["error"] is None


def test_damaged_artefacts_are_told_from_whole_ones(student: Path, tmp_path: Path) -> None:
    """Weights that are not the student's, cut files, a tokenizer of another model."""
    folder = tmp_path / "damaged"
    for path in student.rglob("*"):
        if path.is_file():
            (folder / path.relative_to(student)).parent.mkdir(parents=True, exist_ok=True)
            (folder / path.relative_to(student)).write_bytes(path.read_bytes())
    encoder = load(f"local-dir:{student}")
    probes = write_probes(encoder, tmp_path / "probes", cut_drawings(3), ["a cat", "two dogs"])
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] += 1e-3 * torch.randn_like(state["visual_projection.weight"])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    cut = folder / "onnx" / "text_model_quantized.onnx"
    cut.write_bytes(cut.read_bytes()[:-5000])
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(tokenizer.read_text(encoding="utf-8").replace('"Lowercase"', '"NFC"'), encoding="utf-8")
    job = Job(str(folder), str(probes.folder), str(tmp_path / "rows.jsonl"), str(student))
    rows = {row["format"]: row for row in prove(job, ["open_clip", "hf", "onnx", "onnx-int8"])}
    assert rows["open_clip"]["error"] is None
    assert "more than 1e-05" in rows["hf"]["error"]
    assert "tokenizer.json" in rows["onnx"]["error"]
    assert "text_model_quantized.onnx cannot be loaded" in rows["onnx-int8"]["error"]
