"""Commands to which a signal comes at a chosen place."""

import contextlib
import functools
import io
import itertools
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal
from unittest import mock

import torch

from clipkd.config.train import StudentConfig
from clipkd.export.artefacts import write_open_clip
from clipkd.models.create import create_student
from tests.e2e import forked
from tests.e2e.forked import Command, running
from tests.teachers.world import content_of


@dataclass(frozen=True)
class Event:
    place: Literal["write", "half", "written", "batch", "unlink", "step", "save"]
    """Before, half through or after writing a file of a cache; before encoding a batch, removing a file, taking a training
    step, or syncing a file of a checkpoint."""
    number: int
    """Which of them, from 1."""
    what: Literal["SIGKILL", "SIGINT", "SIGTERM"] = "SIGKILL"
    rank: int = 0
    """The process to which it happens."""

    def happen(self) -> None:
        os.killpg(0, signal.Signals[self.what])  # its loader processes too, as a terminal or a scheduler does


def wrap(owner: Any, name: str, event: Event) -> None:
    """The event before the n-th call."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments: Any, **options: Any) -> Any:
        if next(calls) == event.number:
            event.happen()
        return original(*arguments, **options)

    setattr(owner, name, call)


def is_counted(path: Path) -> bool:
    """Whether a file belongs to a cache's format."""
    return path.suffix in (".npy", ".json") and path.name != ".verified.json"


def break_writing(event: Event) -> None:
    """The event before, in the middle of or after the n-th file of a cache."""
    from clipkd import files

    original, calls = files.write_whole, itertools.count(1)

    def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, durable: bool = False) -> None:
        due = is_counted(path) and next(calls) == event.number

        def write_halves(file: BinaryIO) -> None:
            content = io.BytesIO()
            write(content)
            half = len(content.getvalue()) // 2
            file.write(content.getvalue()[:half])
            file.flush()
            event.happen()
            file.write(content.getvalue()[half:])

        if due and event.place == "write":
            event.happen()
        original(path, write_halves if due and event.place == "half" else write, durable=durable)
        if due and event.place == "written":
            event.happen()

    files.write_whole = write_whole


def run_with(event: Event, arguments: list[str], environment: dict[str, str], out: str, err: str) -> None:
    """Replaces forked.run_command in the forked process."""
    if int(environment.get("RANK", "0")) == event.rank:
        from clipkd.teachers.cache import encode
        from clipkd.training import checkpoint
        from clipkd.training.learner import Learner

        if event.place in ("write", "half", "written"):
            break_writing(event)
        elif event.place == "batch":
            wrap(encode.FeatureEncoder, "encode_images", event)
        elif event.place == "unlink":
            wrap(Path, "unlink", event)
        elif event.place == "save":
            wrap(checkpoint, "sync", event)
        else:
            wrap(Learner, "step", event)
    forked.run_command(arguments, environment, out, err)


@contextlib.contextmanager
def with_event(
    event: Event, *arguments: object, environment: Mapping[str, str], folder: Path, processes: int = 1
) -> Iterator[Command]:
    """A command in which an event happens."""
    with (
        mock.patch.object(forked, "run_command", functools.partial(run_with, event)),
        running(*arguments, environment=environment, folder=folder, processes=processes) as command,
    ):
        yield command


def tree(folder: Path) -> dict[str, bytes]:
    """Content of every file of a cache; of config.yaml without the output."""
    found = content_of(folder)
    lines = found["config.yaml"].splitlines()
    return found | {"config.yaml": b"\n".join(line for line in lines if not line.startswith(b"output:"))}


def write_teacher(folder: Path, *, seed: int) -> Path:
    """An untrained model of the demo teacher's architecture."""
    torch.manual_seed(seed)
    folder.mkdir(parents=True)
    write_open_clip(create_student(StudentConfig(model="demo-teacher")).eval(), folder)
    return folder
