"""The README says what files and commands say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from clipkd.config.train import TrainConfig, to_dict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("script", "results", "least"),
    [
        ("results_table", "demo.jsonl", 7),
        ("compare_losses", "losses.jsonl", 40),
        ("bench_data", "data.jsonl", 8),
        ("bench_eval", "eval_speed.jsonl", 4),
        ("bench_loss", "loss.jsonl", 20),
        ("equal_seconds", "equal_seconds.jsonl", 8),
        ("bench_train", "train.jsonl", 8),
    ],
)
def test_a_table_is_made_from_the_committed_results(script: str, results: str, least: int) -> None:
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.table(ROOT / "eval" / "results" / results)
    assert len(table.splitlines()) >= least
    assert table in README


def test_every_loss_was_compared_with_three_seeds() -> None:
    lines = (ROOT / "eval" / "results" / "losses.jsonl").read_text(encoding="utf-8").splitlines()
    for row in map(json.loads, lines):
        assert row["seeds"] == [0, 1, 2], row["loss"]
        assert all(len(row[f"{style}_acc5"]) == 3 for style in ("fluent", "noto"))
        assert (row["n"], row["step"]) == (1337, 400)


def test_every_student_of_the_cache_was_trained_with_three_seeds() -> None:
    lines = (ROOT / "eval" / "results" / "equal_seconds.jsonl").read_text(encoding="utf-8").splitlines()
    rows = {row["student"]: row for row in map(json.loads, lines)}
    assert all(row["seeds"] == [0, 1, 2] and len(row["noto_acc5"]) == 3 for row in rows.values())
    for cached, alone in zip(rows["cached"]["seconds"], rows["alone, as long as cached"]["seconds"], strict=True):
        assert abs(cached - alone) < 0.005 * cached


def test_every_file_and_option_that_the_readme_names_exists() -> None:
    paths = set(re.findall(r"(?:configs|eval|scripts)/[\w./]+\w", README))
    assert len(paths) >= 8
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    options = set(re.findall(r"--((?:data|teacher|student|objective|optim)\.\w+)", README))
    assert options
    plain = to_dict(TrainConfig())
    assert [o for o in sorted(options) if o.split(".")[1] not in plain[o.split(".")[0]]] == []
