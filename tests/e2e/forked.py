"""Commands in processes forked from a server that has imported everything (multiprocessing's forkserver): quick to start."""

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path

from tests.e2e.events import Event
from tests.processes import enforce_contiguity

PRELOAD = [
    "clipkd.cli",
    "clipkd.training.loop",
    "clipkd.export.command",
    "clipkd.evaluation.command",
    "transformers",
    "datasets",
    "torch._dynamo",
]

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOAD)


def run_command(arguments: list[str], environment: dict[str, str], out: str, err: str, event: Event | None) -> None:
    """What a fork does: `clipkd ARGUMENTS`, its output in files."""
    os.setsid()  # so that a kill reaches its loader processes too
    multiprocessing.set_start_method("fork", force=True)  # as in a process that a shell has started
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["clipkd", *arguments]
    enforce_contiguity()
    from clipkd import progress
    from clipkd.cli import main

    progress.console.file = sys.stderr
    if event is not None and int(environment.get("RANK", "0")) == event.rank:
        event.install()
    main()


@dataclass
class Command:
    """One command on one or several processes, as a launcher would start them."""

    folder: Path
    processes: list[BaseProcess] = field(default_factory=list)

    def poll(self) -> int | None:
        """The exit status once all are done: the first that is not 0, negative for a signal."""
        codes = [process.exitcode for process in self.processes]
        return None if None in codes else next((code for code in codes if code), 0)

    def wait(self, timeout: float = 300) -> int:
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        code = self.poll()
        if code is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"{timeout} s and not done:\n{self.stderr}")
        return code

    def signal(self, number: int) -> None:
        """To every process and its children."""
        for process in self.processes:
            assert process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # it is over
                young = os.getpgid(process.pid) != process.pid  # before its setsid
                (os.kill if young else os.killpg)(process.pid, number)

    @property
    def stdout(self) -> str:
        return (self.folder / "out").read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return (self.folder / "err").read_text(encoding="utf-8")


def start(
    arguments: Sequence[object],
    environment: Mapping[str, str],
    folder: Path,
    *,
    processes: int = 1,
    event: Event | None = None,
) -> Command:
    """Begin `clipkd ARGUMENTS`; folder: where its output goes."""
    folder.mkdir(parents=True)
    for name in ("out", "err"):
        (folder / name).touch()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = Command(folder)
    for rank in range(processes):
        own = dict(environment)
        if processes > 1:
            own |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            own |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        words = [*map(str, arguments)]
        process = context.Process(
            target=run_command, args=(words, own, str(folder / "out"), str(folder / "err"), event)
        )
        process.start()
        command.processes.append(process)
    return command


@contextlib.contextmanager
def running(
    *arguments: object,
    environment: Mapping[str, str],
    folder: Path,
    processes: int = 1,
    event: Event | None = None,
) -> Iterator[Command]:
    """A command that is certainly over afterwards. event: what happens in it."""
    command = start(arguments, environment, folder, processes=processes, event=event)
    try:
        yield command
    finally:
        command.signal(signal.SIGKILL)
        for process in command.processes:
            process.join()
