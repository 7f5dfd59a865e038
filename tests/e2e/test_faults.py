"""A run that is killed anywhere and resumed is bit by bit the run that was never killed."""

import contextlib
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Run
from tests.e2e.events import Event
from tests.e2e.forked import Command, running
from tests.e2e.runs import assert_close_runs, assert_same_run, with_all_terms

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

    def start(
        self, run: Path, setting: Setting, name: str, event: Event | None = None
    ) -> contextlib.AbstractContextManager[Command]:
        words = ("train", *self.arguments, *setting.options, "--output", run, "--resume", "latest")
        output = run.with_name(f"{run.name}_{name}_output")
        return running(*words, environment=self.environment, folder=output, processes=setting.processes, event=event)


@pytest.fixture(scope="module")
def trial(
    clipkd: Run, environment: dict[str, str], data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> Trial:
    arguments = [*SMALL, *with_all_terms(data), "--steps", str(STEPS), "--data.path", str(data / "pairs")]
    arguments += ["--teacher.models", f"local-dir:{teacher}", "--optim.ema_momentum", "0.9"]
    return Trial(clipkd, environment, arguments, tmp_path_factory.mktemp("faults"))


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
        with trial.start(run, setting, str(number), event) as command:
            command.processes[event.rank].join(120)
            assert command.processes[event.rank].exitcode == -signal.SIGKILL, command.stderr
        assert bool(list((run / "checkpoints").glob("*.tmp"))) == (event.place == "save")
    with trial.start(run, setting, "last") as command:
        assert command.wait() == 0, command.stderr
    assert_same_run(trial.whole(setting.processes), run, steps=STEPS)
    assert list((run / "checkpoints").glob("*.tmp")) == []


@pytest.mark.parametrize(
    ("event", "setting"),
    [
        (Event("step", 3, "SIGTERM", rank=1), Setting(2, 2, 2)),
        (Event("step", 3, "SIGINT"), Setting(workers=2, every_steps=1)),
    ],
    ids=["SIGTERM", "SIGINT"],
)
def test_a_signal_ends_a_run_after_it_is_saved(trial: Trial, tmp_path: Path, event: Event, setting: Setting) -> None:
    """On two processes one alone gets it; all stop after the same step."""
    run, status = tmp_path / "stopped", 128 + signal.Signals[event.what]
    with trial.start(run, setting, "first", event) as command:
        assert command.wait() == status, command.stderr
        assert {process.exitcode for process in command.processes} == {status}
    (line,) = [line for line in command.stderr.splitlines() if "stopped by" in line]
    last = 2 + setting.processes  # several processes learn of a signal one step later
    saved = run / "checkpoints" / f"step_{last:06d}"
    assert f"{event.what} after step {last}; saved {saved}, continue with --resume latest" in line
    with trial.start(run, setting, "second") as command:
        assert command.wait() == 0, command.stderr
    assert f"resumed from step {last} of {STEPS}" in command.stderr
    assert_same_run(trial.whole(setting.processes), run, steps=STEPS)


def test_a_run_may_continue_with_another_number_of_processes(trial: Trial, tmp_path: Path) -> None:
    """The same global batches: what is logged differs by rounding only."""
    run = tmp_path / "moved"
    with trial.start(run, Setting(processes=2), "first", Event("step", 3, "SIGTERM")) as command:
        assert command.wait() == 143, command.stderr
    with trial.start(run, Setting(workers=2), "second") as command:
        assert command.wait() == 0, command.stderr
    assert_close_runs(trial.whole(1), run, world_sizes={1, 2}, rel=1e-4)
