"""The demo as shipped, and the wheel as installed elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.e2e.conftest import SMALL, Run

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_quick_demo_trains_evaluates_and_exports(clipkd: Run, tmp_path: Path) -> None:
    output = tmp_path / "demo"
    done = clipkd("demo", "--quick", "--output", output)
    assert "→ student/" in done.stdout
    rows = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    models = ("teacher", "alone, from scratch", "alone", "task + features", "task + KL", "task + GKL")
    trained = {(row["model"], row["dataset"]): row for row in rows if "parameters" in row}
    assert trained.keys() == {(model, style) for model in models for style in ("noto", "fluent")}
    exported = [row for row in rows if row["model"] == f"local-dir:{output / 'student'}"]
    assert {row["dataset"] for row in exported} == {"noto", "fluent"}
    assert all(row["n"] == 200 for row in rows)
    chance5 = 5 / 200
    assert all(trained[model, "noto"]["metrics"]["acc5"] > 10 * chance5 for model in models if "scratch" not in model)
    for model in models:
        metrics = Path(trained[model, "noto"]["run"]) / "metrics.jsonl"
        losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
        assert losses[-1] < losses[0]
        assert "</html>" in (metrics.parent / "report.html").read_text(encoding="utf-8")
    assert 'class="bar ' in (output / "results" / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in output.iterdir()} >= {"teacher", "student", "samples.png", "results.jsonl"}
    with Image.open(output / "samples.png") as sheet:
        assert sheet.width > 1000
        assert len(sheet.convert("RGB").resize((64, 64)).getcolors(4096) or []) > 50

    artefacts = json.loads((output / "student" / "parity.json").read_text())["artefacts"]
    assert [row["format"] for row in artefacts] == ["open_clip", "onnx", "onnx-int8"]
    assert all({score["task"] for score in row["zero_shot"]} == {"noto", "fluent"} for row in artefacts)
    assert "student/ as onnx-int8: " in done.stdout
    check = [sys.executable, str(ROOT / "eval" / "cross_check.py"), "--model", f"local-dir:{output / 'student'}"]
    check += ["--data", str(output / "data" / "fluent"), "--expect", str(output / "results.jsonl")]
    counted = subprocess.run(check, capture_output=True, text=True, timeout=200)
    assert counted.returncode == 0, counted.stdout + counted.stderr


def test_wheel_holds_the_package_and_runs_elsewhere(data: Path, environment: dict[str, str], tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path / "dist"), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=200)
    (wheel,) = (tmp_path / "dist").glob("clipkd-*.whl")
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target"]
    subprocess.run([*install, str(site), str(wheel)], check=True, capture_output=True, timeout=200)
    assert {path.name for path in site.iterdir()} - {"bin"} == {"clipkd", f"{wheel.name.rsplit('-', 3)[0]}.dist-info"}

    path = os.pathsep.join([str(site), environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)

    def python(*arguments: object) -> str:
        command, elsewhere = [sys.executable, "-P", *map(str, arguments)], environment | {"PYTHONPATH": path}
        done = subprocess.run(command, env=elsewhere, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(*arguments: object) -> str:
        return python("-m", "clipkd", *arguments)

    where = python(
        "-c", "import clipkd; from clipkd.config.shipped import recipe; print(clipkd.__file__, recipe('demo'))"
    )
    assert where.count(str(site)) == 2
    shipped = {str(path.relative_to(site / "clipkd")) for path in site.rglob("*.yaml")}
    recipes, tasks = (sorted((ROOT / folder).rglob("*.yaml")) for folder in ("configs", "eval/tasks"))
    assert shipped == {f"configs/{path.relative_to(ROOT / 'configs')}" for path in recipes} | {
        f"tasks/{path.name}" for path in tasks
    }
    assert len(run("eval", "ls").splitlines()) == len(tasks) + 3  # frame and headings; webdataset.yaml has no name
    assert "imagenet1k" in run("eval", "ls", "--task", "imagenet")
    assert "steps: 7\n" in run("train", recipes[0].stem, "--data.path", "x", "--steps", 7, "--print_config")
    assert "trained 2 steps" in run("train", *SMALL, "--data.path", data / "pairs", "--steps", 2, "--output", "run")
    assert "acc5" in run("eval", "--model", "run", "--data", data / "noto")
    assert "0 of 64 answers changed" in run("export", "run", "--to", "open_clip", "--output", "student")
