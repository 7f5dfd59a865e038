"""A signal that comes to a command at a chosen place."""

import io
import itertools
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

from clipkd import files


@dataclass(frozen=True)
class Event:
    place: Literal["half", "written", "batch", "unlink", "step", "save"]
    """Half through or after writing a file of a cache; before encoding a batch, removing a file, taking a training step, or
    syncing a file of a checkpoint."""
    number: int
    """Which of them, from 1."""
    what: Literal["SIGKILL", "SIGINT", "SIGTERM"] = "SIGKILL"
    rank: int = 0
    """The process to which it happens."""

    def happen(self) -> None:
        os.killpg(0, signal.Signals[self.what])  # its loader processes too, as a terminal or a scheduler does

    def install(self) -> None:
        """Replace a function of this process by one in which it happens."""
        from clipkd import files
        from clipkd.teachers.cache import encode
        from clipkd.training.learner import Learner

        places = {"batch": (encode.FeatureEncoder, "encode_images"), "unlink": (Path, "unlink")}
        places |= {"save": (files, "sync"), "step": (Learner, "step")}
        if self.place in places:
            self.install_before(*places[self.place])
        else:
            self.install_in_writing()

    def install_before(self, owner: Any, name: str) -> None:
        original, calls = getattr(owner, name), itertools.count(1)

        def call(*arguments: Any, **options: Any) -> Any:
            if next(calls) == self.number:
                self.happen()
            return original(*arguments, **options)

        setattr(owner, name, call)

    def install_in_writing(self) -> None:
        original, calls = files.write_whole, itertools.count(1)

        def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, durable: bool = False) -> None:
            is_counted = path.suffix in (".npy", ".json") and path.name != ".verified.json"
            due = is_counted and next(calls) == self.number

            def write_half(file: BinaryIO) -> None:
                content = io.BytesIO()
                write(content)
                file.write(content.getvalue()[: len(content.getvalue()) // 2])
                file.flush()
                self.happen()

            original(path, write_half if due and self.place == "half" else write, durable=durable)
            if due:
                self.happen()

        files.write_whole = write_whole
