"""The shipped commands, run in subprocesses on small data made once."""

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from clipkd.config.train import StudentConfig
from clipkd.demo import pairs
from clipkd.export.artefacts import write_formats, write_open_clip
from clipkd.models.initial import create_student
from clipkd.models.load import load_model
from tests.e2e.forked import start

Run = Callable[..., subprocess.CompletedProcess[str]]

SMALL = (
    *("--student.model", "tiny-student", "--batch_size", "16", "--data.caption_key", "captions"),
    *("--data.num_workers", "0", "--log.every_steps", "1", "--threads", "1", "--optim.warmup_steps", "2"),
)


def refused(clipkd: Run, command: str, arguments: Sequence[str], **places: object) -> str:
    """The line by which a command refuses its arguments. places: values of {names} in them."""
    done = clipkd(command, *(argument.format(**places) for argument in arguments), check=False)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"clipkd {command}: error: ")
    return line


def write_model(folder: Path) -> Path:
    """model/ of the run in run/, as open_clip reads it; without the checks of an export, which take longer than the run."""
    (folder / "model").mkdir()
    write_open_clip(load_model(str(folder / "run")), folder / "model")
    return folder / "model"


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}


@pytest.fixture(scope="session")
def clipkd(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """clipkd ARGUMENTS… in processes of their own; check=False returns failures instead of raising."""

    def run(*arguments: object, processes: int = 1, check: bool = True) -> subprocess.CompletedProcess[str]:
        folder = tmp_path_factory.mktemp("command") / "output"
        command = start(arguments, environment, folder, processes=processes)
        done = subprocess.CompletedProcess(arguments, command.wait(), command.stdout, command.stderr)
        assert not check or done.returncode == 0, f"{done.args}\n{done.stdout}\n{done.stderr}"
        return done

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs/: 64 pairs of 32 things in two shards; noto/: the same things in an unseen style."""
    folder = tmp_path_factory.mktemp("data")
    assert pairs.write_pairs(folder / "pairs", num_concepts=32, num_shards=2) == 64
    assert pairs.write_held_out(folder / "noto", "noto", num_concepts=32) == 32
    return folder


@pytest.fixture(scope="session")
def teacher(clipkd: Run, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An open_clip folder of another width and scale than the student's: trained for two steps."""
    folder = tmp_path_factory.mktemp("teacher")
    arguments = (*SMALL, "--student.model", "tiny-teacher", "--data.path", data / "pairs", "--steps", 2)
    clipkd("train", *arguments, "--output", folder / "run")
    return write_model(folder)


@pytest.fixture(scope="session")
def exported(clipkd: Run, data: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """softmax: a distilled student (softmax_run) in every format but ExecuTorch's, each evaluated; log: the output."""
    folder = tmp_path_factory.mktemp("exported")
    paths = {name: folder / name for name in ("softmax_run", "softmax", "log")}
    distilled = ("--teacher.models", f"local-dir:{teacher}", "--objective.gkl.weight", 1, "--optim.ema_momentum", 0.5)
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 4, *distilled)
    clipkd("train", *arguments, "--output", paths["softmax_run"])
    formats = ("--to", "open_clip,hf,onnx,onnx-fp16,onnx-int8,immich", "--data", data / "noto")
    paths["log"].write_text(clipkd("export", paths["softmax_run"], *formats, "--output", paths["softmax"]).stdout)
    return paths


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """softmax and sigmoid: untrained students, without and with a logit bias, in open_clip's and the ONNX formats."""
    folder = tmp_path_factory.mktemp("written")
    paths = {"softmax": folder / "softmax", "sigmoid": folder / "sigmoid"}
    for name, bias in (("softmax", None), ("sigmoid", -5.0)):
        torch.manual_seed(0)
        encoder = create_student(StudentConfig(model="tiny-student"), logit_bias=bias).eval()
        paths[name].mkdir()
        formats = ("open_clip", "onnx", "onnx-fp16", "onnx-int8")
        assert write_formats(encoder, paths[name], formats[: 4 if bias is None else 3]) == {}
    return paths
