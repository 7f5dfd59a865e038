"""Progress bars on a terminal, plain lines elsewhere, and training time."""

import contextlib
import os
import select
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True, highlight=False)

SECONDS_BETWEEN_LINES = 15.0


def drop_closed_output() -> None:
    """Send what follows to nowhere if the terminal, or the program behind a pipe, is gone: printing must not end a run."""
    if not hasattr(select, "poll"):  # Windows
        return
    poll = select.poll()
    for stream in (sys.__stdout__, sys.__stderr__):
        if stream is not None:
            poll.register(stream.fileno(), 0)
    for descriptor, event in poll.poll(0):
        if event & (select.POLLERR | select.POLLHUP):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class Bar:
    """Progress of one task of known length. Use as a context manager; call `advance` after each unit of work."""

    def __init__(self, title: str, total: int, *, done: int = 0, visible: bool = True) -> None:
        self.title, self.total, self.done, self.visible = title, total, done, visible
        self.live = visible and console.is_terminal
        self.note = ""
        self.first, self.began = done, time.monotonic()
        self.last_line = self.began
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not self.live,
        )
        self.task = self.progress.add_task(title, total=total, completed=done, note="")

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        drop_closed_output()
        self.progress.stop()

    def advance(self) -> None:
        drop_closed_output()
        self.done += 1
        self.progress.update(self.task, advance=1, note=self.note)
        now = time.monotonic()
        if self.visible and not self.live and (self.done == self.total or now - self.last_line > SECONDS_BETWEEN_LINES):
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            remaining = f"{timedelta(seconds=round(left))} left" if left else ""
            words = [f"{self.title} {self.done}/{self.total}", remaining, self.note]
            print(", ".join(filter(None, words)), file=sys.stderr, flush=True)
            self.last_line = now


def track(items: Iterable[T], title: str, total: int, *, visible: bool = True) -> Iterator[T]:
    """Iterate over items and show the progress."""
    with Bar(title, total, visible=visible) as bar:
        for item in items:
            yield item
            bar.advance()


def track_on_main(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Iterate over items; of several processes only the main one shows the progress."""
    # The launcher's variable: torch takes seconds to import, and some users of this module do not need it.
    return track(items, title, total, visible=int(os.environ.get("RANK", "0")) == 0)


class Stopwatch:
    """Training time without evaluation and checkpoints, and the share of it spent waiting for data."""

    def __init__(self, seconds: float) -> None:
        self.before, self.started, self.excluded = seconds, time.perf_counter(), 0.0
        self.window_seconds, self.window_images, self.window_wait = seconds, 0, 0.0

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.started - self.excluded

    def count(self, images: int) -> None:
        self.window_images += images

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.window_wait += time.perf_counter() - start

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.excluded += time.perf_counter() - start

    def take_window(self) -> dict[str, float]:
        """Rates since the last call, and the total seconds."""
        seconds = self.seconds
        elapsed = max(seconds - self.window_seconds, 1e-9)
        rates = {
            "images_per_second": self.window_images / elapsed,
            "data_wait": self.window_wait / elapsed,
            "seconds": seconds,
        }
        self.window_seconds, self.window_images, self.window_wait = seconds, 0, 0.0
        return rates


def mib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 20):,.1f} MiB"


MAX_LOAD = 0.25
"""Load per core above which other work slows down torch's threads, which wait for each other."""


def read_load() -> tuple[float, bool]:
    """Processes that want a core, and whether they are many."""
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0  # not on Windows
    return load, load > MAX_LOAD * count_cores()


def count_cores() -> int:
    """Physical cores that this process may use: the default number of threads of ONNX Runtime and torch."""
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    numbers = os.sched_getaffinity(0)
    siblings = [Path(f"/sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list") for number in numbers]
    return len({path.read_text() if path.is_file() else path for path in siblings})
