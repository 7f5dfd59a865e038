"""Result files: complete or absent, in the schemas of DataComp and CLIP_benchmark."""

import json
import math
import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from clipkd import files
from clipkd.evaluation.measure import (
    ClassScores,
    Measured,
    measure_classes,
    measure_multilabel,
    measure_pairs,
    measure_retrieval,
)
from clipkd.evaluation.results import (
    Results,
    describe_result,
    file_name,
    label,
    read_samples,
    result_id,
    result_row,
    write_samples,
)
from clipkd.evaluation.sets import EvaluationSet, Span
from clipkd.evaluation.subjects import Subject
from clipkd.evaluation.tasks import Kind, Task

ROW: dict[str, Any] = {
    "key": "vtab/pets",
    "dataset": "Oxford-IIIT Pet",
    "model": "ViT-B-32@openai",
    "pretrained": "openai",
    "task": "zeroshot_classification",
    "metrics": {"acc1": 0.5, "acc5": None, "mean_per_class_recall": 0.25, "main_metric": 0.25},
    "language": "en",
    "precision": "fp32",
    "weights": "student",
    "id": "0123",
    "main_metric_name": "mean_per_class_recall",
    "ci95": {"main_metric": None},
}
SAMPLES = {"key": ["0/s0", "0/s1"], "label": [1, 0], "correct": [True, False], "top5": [[1, 0], [1, 0]]}


def embedder(name: str = "a", *, sha256: str = "m") -> Any:
    """What a row needs of a model."""
    encoder = SimpleNamespace(name=name, logit_scale=torch.tensor(100.0), preprocess_config={}, activation="GELU")
    return SimpleNamespace(encoder=encoder, precision="fp32", weights_sha256="w", sha256=sha256)


def subject(root: Path, kind: Kind, *, metric: str, **options: Any) -> Subject:
    """Four images."""
    (root / "0.tar").exists() or (root / "0.tar").touch()
    pictures = [Span(f"0/s{place}", root / "0.tar", 0, place) for place in range(4)]
    found: dict[str, Any] = {
        "classification": {"labels": [0, 1, 2, 2]},
        "multilabel": {"targets": np.eye(4, 6, dtype=bool)},
        "retrieval": {"captions": [("a", "b"), ("c",), ("d",), ("e", "f", "g")]},
        "pairs": {"captions": [("a", "b")] * 4},
    }[kind]
    if kind in ("classification", "multilabel"):
        found |= {"classnames": list("abcdef"), "templates": ["{c}"]}
    task = Task(name="x", title="X", kind=kind, metric=metric, **options)
    return Subject(task, "x", EvaluationSet(str(root), kind, pictures, **found), metric)


def measured(about: Subject) -> Measured:
    generator = torch.Generator().manual_seed(0)
    images, texts, classifier = (torch.randn(n, 5, generator=generator) for n in (4, 8, 6))
    scores = ClassScores(images, classifier, 2.0)
    return {
        "classification": lambda: measure_classes(about.data, scores),
        "multilabel": lambda: measure_multilabel(about.data, scores),
        "retrieval": lambda: measure_retrieval(about.data, images, texts[:7]),
        "pairs": lambda: measure_pairs(about.data, images, texts),
    }[about.data.kind]()


SIDES = [f"{side}_retrieval_recall@{k}" for k in (1, 5, 10) for side in ("image", "text")]


@pytest.mark.parametrize(
    ("kind", "metric", "task", "names"),
    [
        ("classification", "acc5", "zeroshot_classification", ["acc1", "acc5", "mean_per_class_recall"]),
        ("multilabel", "mean_average_precision", "zeroshot_classification", ["mean_average_precision"]),
        ("retrieval", "mean_recall@1", "zeroshot_retrieval", [*SIDES, "mean_recall@1"]),
        ("pairs", "acc", "image_caption_selection", ["acc"]),
    ],
)
def test_a_row_has_the_names_of_datacomp_and_clip_benchmark(
    tmp_path: Path, kind: Kind, metric: str, task: str, names: list[str]
) -> None:
    about = subject(tmp_path, kind, metric=metric)
    found = measured(about)
    row = result_row(about, embedder(), found, 1.234)
    assert sorted(row["metrics"]) == sorted([*names, "main_metric"])
    assert row["metrics"]["main_metric"] == row["metrics"][metric] is not None
    assert row["ci95"]["main_metric"] == row["ci95"][metric]
    assert row["ci95"].keys() == row["metrics"].keys()
    assert (row["key"], row["dataset"], row["task"], row["main_metric_name"]) == ("x", "X", task, metric)
    assert (row["n"], row["seconds"], row["language"], row["precision"]) == (4, 1.23, "en", "fp32")
    assert (row["weights_sha256"], row["model_sha256"], row["logit_scale"]) == ("w", "m", 100.0)
    assert ("calibration" in row, "num_classes" in row) == (kind == "classification", "class" in task)
    assert json.loads(files.to_json(row))["metrics"] == row["metrics"]
    Results(tmp_path / "results").add({**row, "id": "1"}, found.samples)


def test_an_id_stands_for_model_data_prompts_metric_and_name(tmp_path: Path) -> None:
    about = subject(tmp_path, "classification", metric="acc1")
    same = subject(tmp_path, "classification", metric="acc1", num_images=4)
    assert result_id(about, embedder("another name")) == result_id(same, embedder())
    others = [
        Subject(about.task, "y", about.data, "acc1"),
        Subject(about.task, "x", about.data, "acc5"),
        subject(tmp_path, "pairs", metric="acc"),
    ]
    for change in ({"labels": [0, 1, 2, 3]}, {"classnames": list("abcdeg")}, {"templates": ["a {c}"]}, {"root": "y"}):
        others.append(Subject(about.task, "x", replace(about.data, **change), "acc1"))
    ids = [result_id(about, embedder(sha256="n")), *(result_id(other, embedder()) for other in others)]
    assert result_id(replace(about, data=replace(about.data)), embedder()) == result_id(about, embedder())
    os.utime(tmp_path / "0.tar", ns=(0, 1))  # rewritten
    ids.append(result_id(replace(about, data=replace(about.data)), embedder()))
    assert len({*ids, result_id(about, embedder())}) == len(ids) + 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "ViT-B-32@openai"),
        ({"model": "ViT-B-32"}, "ViT-B-32@openai"),
        ({"model": "run", "pretrained": None}, "run"),
        ({"weights": "ema", "precision": "bf16"}, "ViT-B-32@openai (ema) (bf16)"),
    ],
)
def test_a_model_is_called_by_its_weights_average_and_precision(change: dict[str, Any], name: str) -> None:
    assert label({**ROW, **change}) == name
    line = "vtab/pets: mean_per_class_recall 25.00% [20.00, 30.10], acc1 50.00%, n 7"
    assert describe_result({**ROW, **change, "ci95": {"main_metric": (0.2, 0.301)}, "n": 7}) == line


def test_a_row_is_found_again_by_its_id_and_model_while_its_samples_are_there(tmp_path: Path) -> None:
    results = Results(tmp_path)
    assert results.find("0123", ROW["model"]) is None
    assert results.rows() == []
    added = results.add(ROW, SAMPLES)
    assert added == {**ROW, "samples": added["samples"]}
    assert results.find("0123", ROW["model"]) == added
    assert results.find("0124", ROW["model"]) is None
    assert results.find("0123", "another") is None
    assert read_samples(tmp_path / added["samples"]) == SAMPLES
    assert not list(tmp_path.rglob("*.tmp"))
    (tmp_path / added["samples"]).unlink()
    assert results.find("0123", ROW["model"]) is None


def test_a_newer_row_takes_the_place_of_the_older_with_all_its_files(tmp_path: Path) -> None:
    results = Results(tmp_path)
    changes = [{}, {"key": "b"}, {"weights": "ema"}, {"precision": "bf16"}, {"model": "c"}, {"id": "new"}]
    for number, change in enumerate(changes):
        results.add({**ROW, **change, "n": number}, SAMPLES)
    rows = results.rows()
    assert [row["n"] for row in rows] == [1, 2, 3, 4, 5]
    assert {path.name for path in (tmp_path / "samples").iterdir()} == {Path(row["samples"]).name for row in rows}
    benchmark = {path.stem for path in (tmp_path / "clip_benchmark").iterdir()}
    assert benchmark == {Path(row["samples"]).stem for row in rows}


def test_a_name_is_no_more_than_a_label(tmp_path: Path) -> None:
    """The same typed name for other weights or data: nothing is lost, and the weights tell the models apart."""
    results = Results(tmp_path)
    things = [(w, d) for w in ("aaaaaaaaa", "bbbbbbbbb") for d in ("1", "2")]
    for number, (weights, data) in enumerate(things):
        results.add({**ROW, "model": "run", "id": str(number), "weights_sha256": weights, "data_sha256": data}, SAMPLES)
    rows = results.rows()
    assert [(row["weights_sha256"], row["data_sha256"]) for row in rows] == things
    assert [label(row) for row in rows] == ["run@openai #aaaaaaaa"] * 2 + ["run@openai #bbbbbbbb"] * 2
    assert all((tmp_path / row["samples"]).is_file() for row in rows)


def add_rows(folder: Path, name: str) -> None:
    """Slowly enough to meet another process between reading and writing."""
    read = files.read_rows
    files.read_rows = lambda path: (read(path), time.sleep(0.02))[0]
    for number in range(5):
        Results(folder).add({**ROW, "model": name, "key": str(number), "id": f"{name}{number}"}, SAMPLES)


def test_two_processes_write_into_one_folder(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=add_rows, args=(tmp_path, name)) for name in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    rows = Results(tmp_path).rows()
    assert sorted((row["model"], int(row["key"])) for row in rows) == [(name, n) for name in "ab" for n in range(5)]
    assert len(list((tmp_path / "samples").iterdir())) == 10


def test_rows_of_other_programs_are_kept(tmp_path: Path) -> None:
    results, other = Results(tmp_path), {"key": ROW["key"], "model": ROW["model"], "metrics": {"acc1": 0.1}}
    files.append_row(results.path, other)  # DataComp's
    for id in ("1", "2"):
        added = results.add({**ROW, "id": id}, SAMPLES)
        assert results.rows() == [added]
        assert files.read_rows(results.path) == [other, added]


@pytest.mark.parametrize("id", ["0123", "4567"], ids=["first row", "newer row"])
def test_a_kill_between_samples_and_row_keeps_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, id: str
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    results, newer = Results(tmp_path), {**SAMPLES, "correct": [False, True]}
    before = [results.add(ROW, SAMPLES)] if id == "4567" else []
    with monkeypatch.context() as patched:
        patched.setattr(files, "write_text", killed)
        with pytest.raises(KeyboardInterrupt):
            results.add({**ROW, "id": id}, newer)
    assert results.rows() == before
    assert all(read_samples(tmp_path / row["samples"]) == SAMPLES for row in before)
    with results.path.open("a") as file:
        file.write(json.dumps(ROW)[:40])  # a row cut short by a kill
    assert results.rows() == before
    added = results.add({**ROW, "id": id}, newer)
    assert results.rows() == [added] == [results.find(id, ROW["model"])]
    assert read_samples(tmp_path / added["samples"]) == newer


def test_clip_benchmarks_file_has_its_fields_and_no_others(tmp_path: Path) -> None:
    numbers = {"acc1": 0.5, "acc5": math.nan, "mean_per_class_recall": None, "main_metric": math.inf}
    Results(tmp_path).add({**ROW, "metrics": numbers}, SAMPLES)
    (path,) = (tmp_path / "clip_benchmark").iterdir()
    assert path.suffix == ".json"

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "dataset": "vtab/pets",
        "model": "ViT-B-32",
        "pretrained": "openai",
        "task": "zeroshot_classification",
        "metrics": {"acc1": 0.5, "acc5": None, "mean_per_class_recall": None, "main_metric": None},
        "language": "en",
    }
    (line,) = (tmp_path / "eval_results.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=refuse)["metrics"]["acc5"] is None


def test_file_names_are_safe_and_never_those_of_another() -> None:
    texts = ["a/b", "a-b", "a b", "a//b", "ä", "ö", "", "..", "A/b", "猫", "a\n", "x" * 300, f"y{'x' * 299}", "a.b"]
    names = [file_name(text, id) for text in texts for id in ("0123", "4567")]
    assert len({name.lower() for name in names}) == 2 * len(texts)  # also where case does not count
    for name in names:
        assert name == Path(name).name
        assert set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        assert len(name) < 150


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_half_written_or_missing_table_of_samples_is_named(tmp_path: Path, share: float) -> None:
    path = tmp_path / "samples" / "x.parquet"
    write_samples(path, SAMPLES)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match=r"x\.parquet is no complete table of samples .*; evaluate again"):
        read_samples(path)
    path.unlink()
    with pytest.raises(ValueError, match=r"x\.parquet is no complete table of samples"):
        read_samples(path)
