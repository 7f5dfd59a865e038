"""Fixtures of this folder: commands run in this process, on the CPU, on data and caches that are made once."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import open_clip
import pytest
from accelerate.state import AcceleratorState

from clipkd.teachers.cache import command
from tests.teachers.world import Made, World, make_world


@pytest.fixture(scope="package", autouse=True)
def cpu() -> Iterator[None]:
    """Run commands on the CPU and leave nothing of Accelerate's state behind.

    open_clip's vocabulary is unpacked once for each context, since that takes longer than everything else.
    """
    kept: dict[str, dict[str, Any]] = {}
    make = open_clip.SimpleTokenizer.__init__

    def make_once(tokenizer: open_clip.SimpleTokenizer, *arguments: Any, **options: Any) -> None:
        key = repr((arguments, options))
        if key not in kept:
            make(tokenizer, *arguments, **options)
            kept[key] = dict(vars(tokenizer))
        vars(tokenizer).update(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(open_clip.SimpleTokenizer, "__init__", make_once)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="package")
def world(cpu: None, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="package")
def made(world: World) -> Made:
    """Two teachers, two views, three shards, float32; made without interruption. Never to be changed."""
    config = world.config(world.folder / "float32")
    return Made(world, command.run(config), config)


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """A copy of the cache that may be damaged."""
    folder = tmp_path / "copy"
    return shutil.copytree(made.folder, folder, ignore=shutil.ignore_patterns(".lock", ".verified.json"))
