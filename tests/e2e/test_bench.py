"""`clipkd bench`: every format of a folder measured in a subprocess; a format that fails becomes a row."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clipkd.inference import bench, measure
from clipkd.models.onnx_student import onnx_file
from tests.e2e.conftest import Run, refused

QUICK = ("--seconds", 0, "--threads", 1)
FORMATS = ("torch", "onnx", "onnx-fp16", "onnx-int8")


@pytest.fixture(scope="module")
def benched(clipkd: Run, written: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A copy of an exported folder with its bench.json, and the printed output."""
    folder = tmp_path_factory.mktemp("bench") / "student"
    shutil.copytree(written["softmax"], folder)
    return folder, clipkd("bench", folder, *QUICK, "--batch", 1, 3).stdout


def test_every_format_tower_and_batch_has_a_row(benched: tuple[Path, str]) -> None:
    folder, printed = benched
    record = json.loads((folder / "bench.json").read_text())
    assert record["errors"] == {}
    assert (record["order"], record["threads"], record["model"]) == (list(FORMATS), 1, str(folder))
    assert {"python", "torch", "open_clip_torch", "onnxruntime"} <= record["versions"].keys()
    rows = record["rows"]
    expected = [(format, batch, tower) for format in FORMATS for batch in (1, 3) for tower in ("image", "text")]
    assert [(row["runtime"], row["batch"], row["tower"]) for row in rows] == expected
    weights = load_file(folder / "open_clip_model.safetensors")
    image = sum(tensor.numel() for name, tensor in weights.items() if name.startswith("visual."))
    text = sum(tensor.numel() for tensor in weights.values()) - image - 1  # the logit scale
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"]
        assert row["per_second"] == pytest.approx(1000 * row["batch"] / row["p50_ms"], rel=0.05)
        assert (row["runs"], row["threads"]) == (5, 1)
        assert 10 < row["baseline_rss_mb"] <= row["peak_rss_mb"]
        parameters, file = {"image": (image, "vision"), "text": (text, "text")}[row["tower"]]
        size = 4 * parameters if row["runtime"] == "torch" else onnx_file(folder, file, row["runtime"]).stat().st_size
        assert row["parameters"] == parameters
        assert row["file_mb"] == pytest.approx(size / 1e6, abs=0.01)
    for first, second in itertools.pairwise(rows):
        assert first["runtime"] != second["runtime"] or first["peak_rss_mb"] <= second["peak_rss_mb"]
    assert len({(row["tower"], row["macs"]) for row in rows}) == 2
    tokens = {(row["runtime"], row["tokens"]) for row in rows if row["tower"] == "text"}
    assert tokens == {("torch", 12), *((format, 10) for format in FORMATS[1:])}
    assert printed.splitlines()[-1] == f"results: {folder / 'bench.json'}"
    assert all(printed.count(f"│ {format} ") == 4 for format in FORMATS)


def test_an_onnx_runtime_is_measured_without_torch_in_memory(written: dict[str, Path]) -> None:
    task = {"runtime": "onnx", "folder": str(written["softmax"]), "batch": [1], "seconds": 0, "threads": 1}
    heavy = {"torch", "open_clip", "transformers"}
    code = f"import sys\nfrom clipkd.inference.measure import measure\nmeasure(**{task!r})\n"
    code += f"print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "[]"


def test_a_format_that_fails_is_a_row_and_the_others_are_measured(
    clipkd: Run, written: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "student"
    shutil.copytree(written["sigmoid"], folder)
    (folder / "onnx" / "text_model_fp16.onnx").write_bytes(b"damaged")
    options = ("--format", "onnx-fp16", "onnx", *QUICK, "--batch", 1, "--output", tmp_path / "found" / "bench.json")
    done = clipkd("bench", folder, *options, check=False)
    assert done.returncode == 1
    (problem,) = [line for line in done.stderr.splitlines() if "problem" in line]
    assert problem.startswith("clipkd bench: problem: onnx-fp16: ")
    assert "text_model_fp16.onnx cannot be loaded" in problem
    record = json.loads((tmp_path / "found" / "bench.json").read_text())
    assert [row["runtime"] for row in record["rows"]] == ["onnx-fp16", "onnx", "onnx"]
    assert record["rows"][0]["error"] == record["errors"]["onnx-fp16"]
    assert not (folder / "bench.json").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/no/such",), ("no folder /no/such", "clipkd export")),
        (("{empty}",), ("holds no model", "open_clip_config.json")),
        (("{model}", "--batch", "0", "--seconds", "-1", "--threads", "0"), ("batch is [0]",)),
        (("{model}", "--output", "{empty}"), ("is a folder", "--output")),
    ],
)
def test_wrong_input_is_one_line(
    clipkd: Run, written: dict[str, Path], tmp_path: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    line = refused(clipkd, "bench", arguments, model=written["softmax"], empty=tmp_path)
    assert all(word in line for word in words), line
    assert not (written["softmax"] / "bench.json").exists()


@pytest.mark.parametrize(("load", "warned"), [(0.0, False), (64.0 * (os.cpu_count() or 1), True)])
def test_a_busy_machine_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, warned: bool
) -> None:
    (tmp_path / "config.json").touch()
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(bench, "measure_isolated", lambda task: "not now")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _, record = bench.run(bench.BenchConfig(model=str(tmp_path)))
    assert [str(each.message).startswith("other work is running (load ") for each in caught] == [True] * warned
    assert (record["load"], record["errors"]) == (load, {"torch": "not now"})


def test_percentiles_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [3.0, 20.0, 1.0, 2.0, *range(4, 20)]  # 1 … 20 s, 210 s in all
    clock = iter([time for duration in durations for time in (0.0, float(duration))])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls: list[int] = []
    found = measure.time_runs(lambda: calls.append(1), size=40, seconds=210)
    assert found == {"runs": 20, "p50_ms": 10_000.0, "p95_ms": 19_000.0, "per_second": 4.0}
    assert len(calls) == measure.NUM_WARM_UP + 20
