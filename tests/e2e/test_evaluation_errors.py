"""`clipkd eval` called again, killed, with damaged caches or wrong data."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import cross_check
import pytest
from safetensors.torch import load_file, save_file

from clipkd.evaluation.results import read_samples
from clipkd.models.imagenet import imagenet_synsets
from tests.data.samples import encode, write_tar
from tests.e2e.conftest import Run
from tests.e2e.forked import running
from tests.e2e.test_evaluation import (
    NAMES,
    count,
    labelled,
    noise,
    pictures,
    rows_of,
    with_labels,
    write_bench,
    write_data,
)

EVAL = Path(__file__).parents[2] / "eval" / "tasks"


def test_cross_check_reads_class_folders_and_names_the_first_difference(
    clipkd: Run, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (657, 744, 836, 837, 3, 998):  # missile twice, sunglasses twice
        folder = tmp_path / "some" / "val" / imagenet_synsets()[number]
        folder.mkdir(parents=True)
        for seed in range(3):
            noise(40 + seed, 47, 9 * seed + number).save(folder / f"{seed}.JPEG")
    (tmp_path / "task.yaml").write_text("name: subset\nlayout: imagefolder\nsplit: val\nprompts: imagenet\n")
    arguments = ("--task", tmp_path / "task.yaml", "--data", tmp_path / "some", "--output", tmp_path / "r")
    clipkd("eval", "--model", teacher, *arguments)
    expect = tmp_path / "r" / "eval_results.jsonl"
    words = [f"--model=local-dir:{teacher}", f"--data={tmp_path / 'some'}", "--split=val", "--layout=imagefolder"]

    def check(*more: str) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["cross_check.py", *words, f"--expect={expect}", *more])
        with pytest.raises(SystemExit) as stop:
            cross_check.main()
        return stop.value.code, capsys.readouterr().out.strip().splitlines()[-1]

    assert check("--key=subset") == (0, "equal")
    assert "no float32 line" in check()[0]
    row = rows_of(tmp_path / "r")[0]
    expect.write_text(json.dumps(row | {"num_correct5": 99}) + "\n")
    assert check("--key=subset") == (1, f"differs: num_correct5 is {row['num_correct5']}, expected 99")


def test_what_is_there_is_not_evaluated_again(clipkd: Run, teacher: Path, clip_folder: Path, tmp_path: Path) -> None:
    samples, results = labelled(pictures(8), 3), tmp_path / "results"
    data = write_data(tmp_path / "data", [samples], names=NAMES[:3])

    def evaluate(*options: object, models: tuple[Path, ...] = (teacher,)) -> tuple[list[bool], list[dict[str, Any]]]:
        words = ("--data", data, "--output", results, "--num_workers", 0, *options)
        lines = clipkd("eval", "--model", *models, *words).stdout.splitlines()
        return ["evaluated before" in line for line in lines if "data: " in line], rows_of(results)

    before, first = evaluate()
    files = {path: path.stat().st_mtime_ns for path in results.rglob("*")}
    assert (before, len(first)) == ([False], 1)
    assert evaluate("--batch_size", 2) == ([True], first)
    assert {path: path.stat().st_mtime_ns for path in results.rglob("*")} == files
    write_data(data, [with_labels(samples, [2] * 8)])
    before, rows = evaluate()
    assert (before, rows[-1]["n"]) == ([False], 8)
    assert rows[-1]["data_sha256"] != first[0]["data_sha256"]
    assert set(read_samples(results / rows[-1]["samples"])["label"]) == {2}
    write_data(data, [labelled(pictures(9), 3)])
    before, rows = evaluate()
    assert (before, rows[-1]["n"]) == ([False], 9)
    before, rows = evaluate(models=(teacher, clip_folder))
    assert (before, rows[-1]["model"]) == ([True, False], str(clip_folder))
    before, rows = evaluate("--precision", "bf16")
    assert (before, rows[-1]["precision"]) == ([False], "bf16")
    assert evaluate() == ([True], rows)
    made = {(row["model"], row["precision"], row["n"]) for row in rows}
    assert made >= {(str(teacher), "fp32", 9), (str(clip_folder), "fp32", 9), (str(teacher), "bf16", 9)}
    assert len({row["id"] for row in rows}) == len(rows)


def test_the_cache_answers_only_for_what_it_was_made_from(clipkd: Run, teacher: Path, tmp_path: Path) -> None:
    samples, results = labelled(pictures(12), 9), tmp_path / "results"
    data, oracle = (
        write_data(tmp_path / "data", [samples], names=NAMES),
        cross_check.Model(f"local-dir:{teacher}", None),
    )

    def evaluate() -> dict[str, Any]:
        if results.exists():
            shutil.rmtree(results / "samples")
            (results / "eval_results.jsonl").unlink()
        clipkd("eval", "--model", teacher, "--data", data, "--output", results, "--num_workers", 0)
        return read_samples(results / rows_of(results)[0]["samples"])

    def cached() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in (results / "cache").iterdir()}

    first, files = evaluate(), cached()
    assert len(files) == 2
    assert evaluate() == first
    assert cached() == files
    (path,) = (results / "cache").glob("images-*")
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    assert evaluate() == first
    assert path.read_bytes() == whole
    save_file({"features": load_file(path)["features"].flip(0).contiguous()}, path)
    assert evaluate()["margin"] != first["margin"]  # what lies there is what is taken
    samples[5] |= {"png": encode(noise(55, 41, 77), "PNG")}
    write_data(data, [samples])
    same = [old == new for old, new in zip(first["margin"], evaluate()["margin"], strict=True)]
    assert same == [place != 5 for place in range(12)]
    assert cross_check.first_difference(count(oracle, data), rows_of(results)[0]) is None
    assert len(cached()) == 3


def test_killed_among_several_tasks_it_resumes(
    clipkd: Run, environment: dict[str, str], teacher: Path, tmp_path: Path
) -> None:
    root = write_bench(tmp_path / "bench", "sizes", "few", "objects", "captions", "pairs")
    arguments = ("eval", "--model", teacher, "--task", root / "tasks", "--data", root, "--num_workers", 0, "--output")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for number in (1, 3):
        with running(*arguments, killed, environment=environment, folder=tmp_path / str(number)) as command:
            while not (killed / "eval_results.jsonl").exists() or len(rows_of(killed)) < number:
                assert command.poll() is None, command.stderr
                time.sleep(0.001)
            command.signal(signal.SIGKILL)
            assert command.wait() == -signal.SIGKILL
    finished = len(rows_of(killed))
    assert finished < 5
    assert clipkd(*arguments, killed).stdout.count("evaluated before") == finished
    clipkd(*arguments, whole)
    rows, expected = (
        [{name: value for name, value in row.items() if name not in ("seconds", "cost")} for row in rows_of(results)]
        for results in (killed, whole)
    )
    assert rows == expected
    assert len(rows) == 5
    for row in rows:
        assert read_samples(killed / row["samples"]) == read_samples(whole / row["samples"])


def test_every_task_is_listed(clipkd: Run, tmp_path: Path) -> None:
    named = [path.stem for path in EVAL.glob("*.yaml") if "\nname: " in f"\n{path.read_text()}"]
    write_data(tmp_path / ("long" * 20) / "wds_mnist_test", [labelled(pictures(3), 3)], names=NAMES[:3])
    listed = clipkd("eval", "ls", "--data", tmp_path / ("long" * 20)).stdout
    assert len(named) > 50
    assert {*named} <= {cells.split("│")[1].strip() for cells in listed.splitlines() if "│" in cells}
    assert str(tmp_path / ("long" * 20) / "wds_mnist_test") in listed


def break_image(root: Path) -> None:
    write_tar(root / "test" / "1.tar", [("s0.png", pictures(1)[0]["png"][:300]), ("s0.cls", b"1")])


def refuse(clipkd: Run, words: str, model: object, results: Path, *arguments: object, processes: int = 1) -> None:
    data = arguments[arguments.index("--data") + 1]
    found = clipkd("eval", "validate", data, *(word for word in arguments if word not in ("--data", data)), check=False)
    assert found.returncode in (1, 2)
    (line,) = found.stderr.splitlines()
    assert words in line
    stopped = clipkd("eval", "--model", model, *arguments, "--output", results, check=False, processes=processes)
    assert stopped.returncode == 2, stopped.stderr
    assert "Traceback" not in stopped.stderr
    lines = [line for line in stopped.stderr.splitlines() if "error" in line]
    assert [line.startswith("clipkd eval") and words in line for line in lines] == [True] * processes
    assert not (results / "eval_results.jsonl").exists()
    assert not (results / "samples").exists()


def test_a_cut_shard_or_a_damaged_image_is_refused_in_a_line_and_leaves_nothing(
    clipkd: Run, teacher: Path, tmp_path: Path
) -> None:
    samples = with_labels(pictures(6), [0, 1, 2, 0, 1, 2])
    root = write_data(tmp_path / "data", [samples[:3], samples[3:]], names=NAMES[:3])
    good = clipkd("eval", "validate", root)
    assert (good.stdout.count("\n"), good.stderr) == (1, "")
    os.truncate(root / "test" / "1.tar", (root / "test" / "1.tar").stat().st_size // 2)
    refuse(clipkd, "1.tar", teacher, tmp_path / "r", "--data", root)
    break_image(root)
    refuse(clipkd, "1.tar: sample 1/s0: cannot be decoded", teacher, tmp_path / "r", "--data", root, processes=2)


def test_damaged_weights_are_refused_in_a_line(clipkd: Run, teacher: Path, tmp_path: Path) -> None:
    folder, root = shutil.copytree(teacher, tmp_path / "model"), write_bench(tmp_path / "bench", "few")
    for file in (folder / "open_clip_model.safetensors", tmp_path / "model.pt"):
        file.write_bytes((teacher / "open_clip_model.safetensors").read_bytes()[:-50])
    for model in (folder, f"tiny-teacher@{tmp_path / 'model.pt'}"):
        stopped = clipkd("eval", "--model", model, "--data", root / "few", "--output", tmp_path / "r", check=False)
        assert (stopped.returncode, "Traceback" in stopped.stderr) == (2, False)
        assert str(tmp_path / "model.pt" if model != folder else folder) in stopped.stderr
