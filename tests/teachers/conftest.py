"""Fixtures of this folder: commands run in this process, on the CPU, on data and caches that are made once."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from clipkd.teachers.cache import command
from tests.teachers.world import Made, World, make_world


@pytest.fixture(scope="package", autouse=True)
def cpu() -> Iterator[None]:
    """Run commands on the CPU and leave nothing of Accelerate's state behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
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
