"""Find the recipes of configs/ and the tasks of eval/tasks/ by name, in a clone as in an installed wheel."""

import difflib
import functools
import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
RECIPES = next(filter(Path.is_dir, (PACKAGE / "configs", PACKAGE.parent / "configs")), PACKAGE)
TASKS = next(filter(Path.is_dir, (PACKAGE / "tasks", PACKAGE.parent / "eval" / "tasks")), PACKAGE)


def recipe(name: str) -> Path:
    """The training configuration of a recipe: demo, gkl or losses/gkl. Raises: ValueError that lists the known names."""
    files = {path.stem: path for path in sorted(RECIPES.rglob("*.yaml"))}
    known = files | {str(path.relative_to(RECIPES).with_suffix("")): path for path in files.values()}
    if name in known:
        return known[name]
    raise ValueError(f"no file and no recipe {name!r}{near_misses(name, known)}; recipes: {', '.join(files)}")


def task(name: str) -> Path:
    """The task file with this name (imagenet1k, vtab/pets) or file stem (imagenet). Raises: ValueError with near misses."""
    known = {path.stem: path for path in task_files()} | task_names()
    if name in known:
        return known[name]
    raise ValueError(f"no file, folder or task {name!r}{near_misses(name, known)}; `clipkd eval ls` lists the tasks")


@functools.cache
def task_files() -> list[Path]:
    """Every shipped task, in alphabetical order."""
    return sorted(TASKS.glob("*.yaml"))


@functools.cache
def task_names() -> dict[str, Path]:
    """The `name:` of every shipped task → its file."""
    lines = ((re.search(r"^name: *(\S+)", path.read_text(encoding="utf-8"), re.M), path) for path in task_files())
    return {name[1]: path for name, path in lines if name}


def near_misses(name: str, known: dict[str, Path]) -> str:
    near = difflib.get_close_matches(name, known, n=3)
    return f" (did you mean {' or '.join(near)}?)" if near else ""
