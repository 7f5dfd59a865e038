"""Recipes are found by name on the command line. Names of tasks: tests/evaluation/test_tasks.py."""

from pathlib import Path

import pytest

from clipkd.config.parse import parse
from clipkd.config.shipped import recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_is_found_by_its_stem_and_by_its_path_below_configs(path: Path) -> None:
    assert recipe(path.stem) == recipe(str(path.relative_to(CONFIGS).with_suffix(""))) == path


def test_the_command_line_takes_a_recipe_by_name_unless_a_file_has_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    named = parse(["--config", "tiny", "--data.path", "x", "--steps", "7"])
    assert named == parse(["--config", str(CONFIGS / "tiny.yaml"), "--data.path", "x", "--steps", "7"])
    (tmp_path / "tiny").write_text("steps: 9")
    assert parse(["--config", "tiny"]).steps == 9
    with pytest.raises(SystemExit):
        parse(["--config", "demmo"])
    assert "no file and no recipe 'demmo' (did you mean demo" in capsys.readouterr().err
