"""A run that is killed anywhere and resumed is bit by bit the run that was never killed."""

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.e2e.conftest import SMALL, Run
from tests.e2e.forked import Command, running
from tests.e2e.test_train import VARYING, read_metrics, with_all_terms

STEPS = 8
STATE = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "memory.safetensors")


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


SETTINGS = [Setting(), Setting(workers=2, every_steps=1), Setting(processes=2, every_steps=3), Setting(2, 2, 2)]


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


def assert_bitwise_equal(whole: Path, other: Path) -> None:
    for file in STATE:
        expected, found = (load_file(run / "checkpoints" / f"step_{STEPS:06d}" / file) for run in (whole, other))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not expected[name].equal(found[name])] == [], file
    rows = [[{k: v for k, v in row.items() if k not in VARYING} for row in read_metrics(run)] for run in (whole, other)]
    assert rows[0] == rows[1]


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
    except FileNotFoundError:  # not there yet, or just removed by a run that starts anew
        return 0


def kill_after_lines(number: int, delay: float) -> Callable[[Command, Path], bool]:
    """SIGKILL some time after so many more steps are logged: in a forward pass, an optimizer's step, between steps …"""

    def kill(command: Command, run: Path) -> bool:
        before = logged(run)
        reached = wait_until(command, lambda: not before <= logged(run) < before + number)
        time.sleep(delay)
        return reached

    return kill


def half_written(run: Path) -> set[int]:
    """Folders with their temporary name, by what identifies them on disk: an earlier kill leaves one of the same name."""
    found: set[int] = set()
    for path in (run / "checkpoints").glob("step_*.tmp"):
        with contextlib.suppress(FileNotFoundError):
            found.add(path.stat().st_ino)
    return found


def kill_while_saving(delay: float) -> Callable[[Command, Path], bool]:
    """SIGKILL when a checkpoint is being written: its folder has its temporary name still."""

    def kill(command: Command, run: Path) -> bool:
        before = half_written(run)
        reached = wait_until(command, lambda: bool(half_written(run) - before))
        time.sleep(delay)
        return reached

    return kill


def survive(trial: Trial, setting: Setting, run: Path, points: list[Callable[[Command, Path], bool]]) -> int:
    """Kill and resume at each point, then run to the end; returns how many kills found it alive."""
    kills = 0
    for number, point in enumerate(points):
        with trial.start(run, setting, str(number)) as command:
            if point(command, run) and command.poll() is None:
                command.signal(signal.SIGKILL)
                for process in command.processes:
                    process.join()
                kills += command.poll() == -signal.SIGKILL
    with trial.start(run, setting, "last") as command:
        assert command.wait() == 0, command.stderr
    return kills


@pytest.mark.parametrize(
    ("setting", "points"),
    [
        (SETTINGS[1], [kill_after_lines(2, 0.02), kill_while_saving(0.005)]),
        pytest.param(SETTINGS[2], [kill_after_lines(4, 0.0)], marks=pytest.mark.slow),
    ],
    ids=["two loader processes", "two processes"],
)
def test_a_killed_and_resumed_run_is_bitwise_the_uninterrupted_run(
    trial: Trial, tmp_path: Path, setting: Setting, points: list[Callable[[Command, Path], bool]]
) -> None:
    run = tmp_path / "killed"
    assert survive(trial, setting, run, points) == len(points)
    assert_bitwise_equal(trial.whole(setting.processes), run)
    assert [path.name for path in (run / "checkpoints").glob("*.tmp")] == []


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(SETTINGS)))
def test_twenty_and_more_random_kills_change_nothing(trial: Trial, tmp_path: Path, number: int) -> None:
    rng, setting, kills = random.Random(number), SETTINGS[number], 0
    for attempt in range(2):
        points = [kill_after_lines(rng.randint(0, 2), rng.uniform(0, 0.3)) for _ in range(3)]
        points += [kill_while_saving(rng.choice([0, 0.003, 0.01, 0.03]))]
        rng.shuffle(points)
        run = tmp_path / f"killed_{attempt}"
        kills += survive(trial, setting, run, points)
        assert_bitwise_equal(trial.whole(setting.processes), run)
    print(f"{setting}: {kills} kills")
    assert kills >= 6  # of eight; a run may be over before a late one


@pytest.mark.parametrize(
    ("number", "setting"), [(signal.SIGTERM, SETTINGS[3]), (signal.SIGINT, SETTINGS[1])], ids=["SIGTERM", "SIGINT"]
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
    assert_bitwise_equal(trial.whole(setting.processes), run)


def test_a_run_may_continue_with_another_number_of_processes(trial: Trial, tmp_path: Path) -> None:
    """The same global batches: what is logged differs by rounding only."""
    run = tmp_path / "moved"
    with trial.start(run, Setting(processes=2), "first") as command:
        assert wait_until(command, lambda: logged(run) > 2)
        command.signal(signal.SIGTERM)
        assert command.wait() == 143, command.stderr
    with trial.start(run, Setting(workers=2), "second") as command:
        assert command.wait() == 0, command.stderr
    expected, found = read_metrics(trial.whole(1)), read_metrics(run)
    assert [row["step"] for row in found] == list(range(1, STEPS + 1))
    assert {row["world_size"] for row in found} == {1, 2}
    for name in expected[0].keys() - VARYING:
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-4, abs=1e-5), name
