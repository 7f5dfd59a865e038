"""The README says what files and commands say."""

import importlib.util
import re
from pathlib import Path

from clipkd.config import TrainConfig, to_dict

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_demos_table_is_made_from_the_committed_results() -> None:
    spec = importlib.util.spec_from_file_location("results_table", ROOT / "scripts" / "results_table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    table = module.table(ROOT / "eval" / "results" / "demo.jsonl")
    assert len(table.splitlines()) == 7
    assert table in README


def test_every_file_and_option_that_the_readme_names_exists() -> None:
    paths = set(re.findall(r"(?:configs|eval|scripts)/[\w./]+\w", README))
    assert len(paths) >= 8
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    options = set(re.findall(r"--((?:data|teacher|student|objective|optim)\.\w+)", README))
    assert options
    plain = to_dict(TrainConfig())
    assert [o for o in sorted(options) if o.split(".")[1] not in plain[o.split(".")[0]]] == []
