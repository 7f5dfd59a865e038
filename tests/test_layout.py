"""What the package promises about itself: small modules, no heavy import, a wheel without anything else in it."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "clipkd").rglob("*.py"))
LONGER_FOR_A_REASON: dict[str, str] = {}
"""Module → why it may exceed 300 lines."""


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is_for_and_has_at_most_300_lines_or_a_reason(path: Path) -> None:
    text, name = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
    num_lines = len(text.splitlines())
    assert (num_lines > 300) == (name in LONGER_FOR_A_REASON)
    assert len(ast.get_docstring(ast.parse(text)) or "") > 30 or num_lines < 5


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    names = {part for path in MODULES for part in path.relative_to(ROOT).with_suffix("").parts}
    assert {"clipkd", "losses", "gkl"} <= names
    assert sorted(names & sys.stdlib_module_names - {"__main__"}) == []


@pytest.mark.parametrize("module", ["clipkd", "clipkd.cli", "clipkd.config.train", "clipkd.evaluation.listing"])
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    heavy = {"torch", "open_clip", "transformers", "datasets", "accelerate", "numpy", "PIL"}
    code = f"import sys, {module}; print(sorted({heavy!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"


def test_only_clipkd_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]["targets"]
    assert settings["wheel"]["packages"] == ["clipkd"]
    files = {file.distribution_path for file in WheelBuilder(str(ROOT)).recurse_included_files()}
    assert {Path(file).parts[0] for file in files} == {"clipkd"}
    modules = {str(path.relative_to(ROOT)) for path in MODULES}
    assert modules <= files
    data = {"clipkd/models/configs/ViT-T-16.json", "clipkd/demo/assets/concepts.tsv", "clipkd/demo/assets/noto.webp"}
    assert data <= files
    assert not {file for file in files - modules if file.endswith((".py", ".pyc", ".npz", ".safetensors"))}
