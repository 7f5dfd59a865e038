"""A run that is killed anywhere and resumed is bit by bit the run that was never killed."""

import contextlib
import functools
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest

from tests.e2e import forked
from tests.e2e.cache_runs import Event, run_with
from tests.e2e.conftest import SMALL, Run
from tests.e2e.forked import Command, running
from tests.e2e.runs import assert_close_runs, assert_same_run, read_metrics, with_all_terms

STEPS = 8


@dataclass(frozen=True)
class Setting:
    workers: int = 0
    processes: int = 1
    every_steps: int = 2

    @property
    def options(self) -> tuple[object, ...]:
        """On two processes also in micro-batches, which a checkpoint does not depend on."""
        steps, parts = ("--checkpoint.every_steps", self.every_steps), ("--micro_batches", self.processes)
        return ("--data.num_workers", self.workers, *steps, *parts)


@dataclass
class Trial:
    """The same training with every setting, and one uninterrupted run per number of processes to compare with."""

    clipkd: Run
    environment: dict[str, str]
    arguments: list[str]
    folder: Path

    def whole(self, processes: int) -> Path:
        folder = self.folder / f"whole_{processes}"
        if not folder.exists():
            arguments = (*self.arguments, *Setting(processes=processes).options)
            self.clipkd("train", *arguments, "--output", folder, processes=processes)
        return folder

    def start(self, run: Path, setting: Setting, name: str) -> contextlib.AbstractContextManager[Command]:
        words = ("train", *self.arguments, *setting.options, "--output", run, "--resume", "latest")
        output = run.with_name(f"{run.name}_{name}_output")
        return running(*words, environment=self.environment, folder=output, processes=setting.processes)


@pytest.fixture(scope="module")
def trial(
    clipkd: Run, environment: dict[str, str], data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trial:
    arguments = [*SMALL, *with_all_terms(data), "--steps", str(STEPS), "--data.path", str(data / "pairs")]
    arguments += ["--teacher.models", f"local-dir:{teacher}", "--optim.ema_momentum", "0.9"]
    return Trial(clipkd, environment, arguments, tmp_path_factory.mktemp("faults"))


def wait_until(command: Command, reached: Callable[[], bool]) -> bool:
    """Whether it was reached before the command ended."""
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, command.stderr
        if command.poll() is not None:
            return False
        time.sleep(0.001)
    return True


def logged(run: Path) -> int:
    try:
        return len(read_metrics(run))
    except FileNotFoundError:  # not there yet, or just removed by a run that starts
        return 0


@pytest.mark.parametrize(
    ("setting", "kills"),
    [
        (Setting(workers=2, every_steps=1), [Event("step", 4), Event("save", 8)]),
        pytest.param(Setting(), [Event("save", 1), Event("step", 6), Event("save", 12)], marks=pytest.mark.slow),
        pytest.param(Setting(processes=2, every_steps=3), [Event("step", 5, rank=1)], marks=pytest.mark.slow),
    ],
    ids=["two loader processes", "one process", "two processes"],
)
def test_a_killed_and_resumed_run_is_bitwise_the_uninterrupted_run(
    trial: Trial, tmp_path: Path, setting: Setting, kills: list[Event]
) -> None:
    """Killed before a step, and when a checkpoint is half written: the eighth file synced is the second's first."""
    run = tmp_path / "killed"
    for number, event in enumerate(kills):
        happens = mock.patch.object(forked, "run_command", functools.partial(run_with, event))
        with happens, trial.start(run, setting, str(number)) as command:
            command.processes[event.rank].join(120)
            assert command.processes[event.rank].exitcode == -signal.SIGKILL, command.stderr
        assert bool(list((run / "checkpoints").glob("*.tmp"))) == (event.place == "save")
    with trial.start(run, setting, "last") as command:
        assert command.wait() == 0, command.stderr
    assert_same_run(trial.whole(setting.processes), run, steps=STEPS)
    assert list((run / "checkpoints").glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("number", "setting"),
    [(signal.SIGTERM, Setting(2, 2, 2)), (signal.SIGINT, Setting(workers=2, every_steps=1))],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_ends_a_run_after_it_is_saved(
    trial: Trial, tmp_path: Path, number: signal.Signals, setting: Setting
) -> None:
    """On two processes one alone gets it; all stop after the same step."""
    run = tmp_path / "stopped"
    with trial.start(run, setting, "first") as command:
        assert wait_until(command, lambda: logged(run) > 0)
        if setting.processes > 1:
            assert command.processes[1].pid is not None
            os.kill(command.processes[1].pid, number)
        else:
            command.signal(number)  # to the loader processes too, as a terminal or a scheduler does
        assert command.wait() == 128 + number, command.stderr
        assert {process.exitcode for process in command.processes} == {128 + number}
    (line,) = [line for line in command.stderr.splitlines() if "stopped by" in line]
    last = read_metrics(run)[-1]["step"]
    saved = run / "checkpoints" / f"step_{last:06d}"
    assert f"{number.name} after step {last}; saved {saved}, continue with --resume latest" in line
    assert 1 <= last < STEPS
    with trial.start(run, setting, "second") as command:
        assert command.wait() == 0, command.stderr
    assert f"resumed from step {last} of {STEPS}" in command.stderr
    assert_same_run(trial.whole(setting.processes), run, steps=STEPS)


def test_a_run_may_continue_with_another_number_of_processes(trial: Trial, tmp_path: Path) -> None:
    """The same global batches: what is logged differs by rounding only."""
    run = tmp_path / "moved"
    with trial.start(run, Setting(processes=2), "first") as command:
        assert wait_until(command, lambda: logged(run) > 2)
        command.signal(signal.SIGTERM)
        assert command.wait() == 143, command.stderr
    with trial.start(run, Setting(workers=2), "second") as command:
        assert command.wait() == 0, command.stderr
    assert_close_runs(trial.whole(1), run, world_sizes={1, 2}, rel=1e-4)
