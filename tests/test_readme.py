"""The READMEs agree with files, options and results."""

import importlib
import json
import re
from pathlib import Path

import pytest

from clipkd import files
from clipkd.config.parse import parse
from clipkd.config.train import TrainConfig, to_dict
from clipkd.sweep import tabulate

ROOT = Path(__file__).parents[1]
READMES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for folder in ("", "configs", "eval", "eval/results", "clipkd", "clipkd/training", "clipkd/export", "scripts")
    for path in (ROOT / folder / "README.md",)
}


@pytest.mark.parametrize(
    ("script", "results", "least"),
    [
        ("results_table", "demo.jsonl", 7),
        ("bench_data", "data.jsonl", 8),
        ("bench_eval", "eval_speed.jsonl", 4),
        ("bench_loss", "loss.jsonl", 15),
        ("equal_seconds", "equal_seconds.jsonl", 8),
        ("bench_train", "train.jsonl", 8),
    ],
)
def test_a_table_is_made_from_the_committed_results(script: str, results: str, least: int) -> None:
    table = importlib.import_module(script).table(ROOT / "eval" / "results" / results)
    assert len(table.splitlines()) >= least
    assert table in READMES["README.md" if results == "demo.jsonl" else "eval/results/README.md"]


def test_the_table_of_photos_is_made_from_its_runs() -> None:
    rows = files.read_rows(ROOT / "eval" / "results" / "photos.jsonl")
    assert len(rows) == 10
    assert tabulate(rows) in READMES["eval/results/README.md"]


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


def test_the_readme_is_short() -> None:
    assert len(READMES["README.md"].splitlines()) <= 200


@pytest.mark.parametrize("name", READMES)
def test_every_file_and_option_that_a_readme_names_exists(name: str) -> None:
    text, folder = re.sub(r"```(python|diff)\n.*?```", "", READMES[name], flags=re.DOTALL), (ROOT / name).parent
    links = [link for link in re.findall(r"\]\(([^)#:]+)\)", text) if not (folder / link).exists()]
    paths = [path for path in re.findall(r"\b(?:configs|eval|scripts)/[\w./]+\w", text) if not (ROOT / path).exists()]
    assert links + paths == []
    groups = to_dict(TrainConfig())
    options = set(re.findall(rf"\b({'|'.join(k for k, v in groups.items() if isinstance(v, dict))})\.(\w+)", text))
    files = {"py", "yaml", "jsonl", "json", "path"}
    assert [f"{group}.{o}" for group, o in sorted(options) if o not in groups[group] and o not in files] == []


def test_the_readmes_configuration_is_read(tmp_path: Path) -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", READMES["README.md"], re.DOTALL)
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    config = parse(["--config", str(tmp_path / "mine.yaml")])
    assert list(config.objective.active()) == ["info_nce", "gkl"]
    assert config.teacher.names == ("ViT-B-16@laion2b_s34b_b88k",)
