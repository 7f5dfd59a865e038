"""Every launcher × every signal to it, in the middle of a step or of a checkpoint: saved, nobody left, resumed to the bit."""

import functools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from clipkd import files
from tests.e2e.conftest import SMALL, Run
from tests.e2e.forked import running
from tests.e2e.runs import assert_same_run, read_metrics

STEPS = 24
ACCELERATE = f"{sys.executable} -m accelerate.commands.launch"
TORCHRUN = f"{sys.executable} -m torch.distributed.run"
NODE = "--nnodes 2 --nproc_per_node 1 --master_addr 127.0.0.1 --master_port {port} --node_rank"
YAML = "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nnum_processes: 1\nuse_cpu: true\n"


@dataclass(frozen=True)
class Launcher:
    commands: tuple[str, ...]
    """What stands before `-m clipkd train`, one for each command that is started."""
    variables: dict[str, str] = field(default_factory=dict)
    """Set for every command; {place} is its number."""
    processes: int = 1
    precision: str = "no"
    """Accelerate's, which a resumed run must be given again."""
    survives: tuple[signal.Signals, ...] = ()


RANKS = {"RANK": "{place}", "LOCAL_RANK": "{place}", "WORLD_SIZE": "2"}
RANKS |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "{port}", "OMP_NUM_THREADS": "1"}
SLURM = {"SLURM_PROCID": "{place}", "SLURM_LOCALID": "{place}", "SLURM_STEP_NUM_TASKS": "2"}
SLURM |= {"SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "{port}"}
LAUNCHERS = {
    "python": Launcher((sys.executable,)),
    "nohup": Launcher((f"nohup {sys.executable}",), survives=(signal.SIGHUP,)),
    "timeout": Launcher((f"timeout 600 {sys.executable}",)),
    "accelerate": Launcher((f"{ACCELERATE} --cpu",)),
    "accelerate yaml": Launcher((f"{ACCELERATE} --config_file {{yaml}}",), precision="bf16"),
    "accelerate bf16": Launcher((f"{ACCELERATE} --cpu --mixed_precision bf16",), precision="bf16"),
    "torchrun 1x2": Launcher((f"{TORCHRUN} --standalone --nproc_per_node 2",), processes=2),
    "nohup torchrun": Launcher((f"nohup {TORCHRUN} --standalone --nproc_per_node 2",), processes=2),
    "torchrun 2x1": Launcher((f"{TORCHRUN} {NODE} 0", f"{TORCHRUN} {NODE} 1"), processes=2),
    "ranks": Launcher((sys.executable,) * 2, RANKS, processes=2),
    "slurm": Launcher((sys.executable,) * 2, SLURM, processes=2),
}
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
USUAL = [("accelerate", signal.SIGTERM, "step"), ("torchrun 1x2", signal.SIGHUP, "checkpoint")]
CELLS = [(name, number, place) for place in ("step", "checkpoint") for name in LAUNCHERS for number in SIGNALS]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remaining(run: Path) -> list[str]:
    """Processes that work on a run, by their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_text(errors="replace").split("\0")
        except OSError:  # it has ended meanwhile
            continue
        found += [" ".join(words)] * (str(run) in words)
    return found


def wait_until(reached: Callable[[], bool], output: Path) -> None:
    deadline = time.monotonic() + 120
    while not reached():
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.002)


@pytest.fixture(scope="module")
def whole(clipkd: Run, environment: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """The uninterrupted run with a launcher's number of processes and precision."""
    runs: dict[tuple[int, str], Path] = {}
    folder = tmp_path_factory.mktemp("whole")

    def make(launcher: Launcher) -> Path:
        key = (launcher.processes, launcher.precision)
        if key not in runs:
            runs[key] = folder / "-".join(map(str, key))
            resume(runs[key], launcher, environment, data)
        return runs[key]

    return make


def options(data: Path, run: Path) -> list[str]:
    arguments = [*SMALL, "--steps", STEPS, "--data.path", data / "pairs", "--optim.ema_momentum", 0.9]
    return [*map(str, arguments), "--checkpoint.every_steps", "2", "--resume", "latest", "--output", str(run)]


def resume(run: Path, launcher: Launcher, environment: dict[str, str], data: Path) -> None:
    own = environment | {"ACCELERATE_MIXED_PRECISION": launcher.precision}
    folder = run.with_name(f"{run.name}_output")
    words = ("train", *options(data, run))
    with running(*words, environment=own, folder=folder, processes=launcher.processes) as command:
        assert command.wait() == 0, command.stderr


@pytest.mark.parametrize(
    ("name", "number", "place"),
    [pytest.param(*cell, marks=() if cell in USUAL else pytest.mark.slow) for cell in CELLS],
)
def test_a_signal_to_a_launcher_saves_the_run(
    name: str,
    number: signal.Signals,
    place: str,
    whole: Callable[[Launcher], Path],
    environment: dict[str, str],
    data: Path,
    tmp_path: Path,
) -> None:
    launcher, run, output, port = LAUNCHERS[name], tmp_path / "run", tmp_path / "output", free_port()
    (tmp_path / "accelerate.yaml").write_text(YAML)
    own = {name: value for name, value in environment.items() if name != "ACCELERATE_USE_CPU"}
    with output.open("wb") as file:
        commands = []
        for index, prefix in enumerate(launcher.commands):
            words = prefix.format(port=port, yaml=tmp_path / "accelerate.yaml").split()
            words += ["-m", "clipkd", "train", *options(data, run)]
            variables = {key: value.format(place=index, port=port) for key, value in launcher.variables.items()}
            start = functools.partial(subprocess.Popen, words, env=own | variables, stdout=file, stderr=file)
            # A shell has its background processes ignore SIGINT, which their children inherit.
            heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            commands.append(start(start_new_session=True, preexec_fn=heed))
        try:
            wait_until(lambda: len(read_metrics(run)) > 2, output)
            if place == "checkpoint":
                wait_until(lambda: any((run / "checkpoints").glob(".step_*.tmp")), output)
            os.kill(commands[0].pid, number)
            codes = [command.wait(120) for command in commands]
            wait_until(lambda: not remaining(run), output)
        finally:
            for command in commands:
                command.kill()
    last = read_metrics(run)[-1]["step"]
    if number in launcher.survives:
        assert (codes, last) == ([0], STEPS)
    else:
        assert all(codes)
        assert last < STEPS, output.read_text()
        assert f"after step {last}; saved" in output.read_text()
    assert (run / "checkpoints" / f"step_{last:06d}" / "state.json").is_file()
    resume(run, launcher, environment, data)
    assert_same_run(whole(launcher), run, steps=STEPS)
    assert files.read_rows(run / "skipped.jsonl") == []
