"""Every wrong input: one clear line that names it, a non-zero exit, nothing half-written."""

import contextlib
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clipkd import files
from clipkd.cli import main
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.paths import require_writable
from clipkd.config.train import TrainConfig
from clipkd.process import read_launcher
from clipkd.training.assemble import list_notes, require_installed
from tests.e2e.conftest import SMALL, Run


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command in this process, where torch is imported already."""

    def run(*arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["clipkd", *map(str, arguments)])
        with pytest.raises(SystemExit) if not check else contextlib.nullcontext() as stop:
            main()
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(arguments, stop.value.code if stop else 0, out, err)

    return run


def assert_refused(done: subprocess.CompletedProcess[str], output: Path, *words: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]
    assert not output.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--batch_size", "128"), ("batch_size is 128", "64 pairs")),
        (("--data.caption_key", "caption"), ("no key 'caption'", "data.caption_key")),
        (("--student.model", "ViT-X-99"), ("ViT-X-99", "did you mean")),
        (("--teacher.models", "nowhere", "--objective.gkl.weight", "1"), ("nowhere",)),
        (("--precision", "fp16"), ("precision is fp16",)),
        (("--evaluation.data", "[/no/such/set]"), ("/no/such/set",)),
        (("--teacher.models", "ViT-L-14@openai", "--objective.gkl.weight", "1"), ("QuickGELU", "ViT-L-14-quickgelu")),
    ],
)
def test_wrong_option(here: Run, data: Path, tmp_path: Path, arguments: tuple, words: tuple) -> None:
    output = tmp_path / "run"
    paths = ("--data.path", data / "pairs", "--output", output, "--steps", 1)
    assert_refused(here("train", *SMALL, *paths, *arguments, check=False), output, *words)


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "2"}, ("WORLD_SIZE is 2, but RANK, LOCAL_RANK", "torchrun")),
        ({"ACCELERATE_DYNAMO_MODE": "default", "MASTER_PORT": "29500"}, ("one process on CPUs", "torchrun")),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, ("mixed precision bf16", "precision is fp32")),
    ],
)
def test_settings_of_a_launcher_that_do_not_fit(
    here: Run, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: tuple
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    paths = ("--data.path", data / "pairs", "--output", tmp_path / "run", "--steps", 1, "--precision", "fp32")
    assert_refused(here("train", *SMALL, *paths, check=False), tmp_path / "run", *words)


def test_the_processes_of_srun_find_each_other_by_its_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", environment := {"SLURM_NTASKS": "4"})
    assert read_launcher() == 1  # a batch script, not a step of it
    environment |= {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "4711"}
    environment |= {"SLURM_STEP_NODELIST": "gpu[07-08,12],cpu3", "SLURM_CPUS_PER_TASK": "8"}
    assert read_launcher() == 4
    expected = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07", "MASTER_PORT": "24711"}
    assert environment.items() >= (expected | {"OMP_NUM_THREADS": "8"}).items()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data.path", "/no/such"), ("data.path is /no/such",)),
        (("--teacher.models", "local-dir:/no/such"), ("teacher.models is /no/such",)),
        (("--teacher.cache", "no-such"), ("teacher.cache is no-such",)),
        (("--output", __file__), ("is a file; name a folder",)),
        (("--output", f"{__file__}/run"), (f"cannot be written: {__file__}",)),
    ],
)
def test_paths_are_looked_at_before_torch_is_loaded(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    code = "import sys; sys.modules['torch'] = None; from clipkd.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--objective.kl.weight", "1", "--teacher.models", "x", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert all(word in done.stderr for word in words), done.stderr


def test_an_output_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(ValueError, match=f"output {tmp_path}/a/b cannot be written: {tmp_path} is no folder that this"):
        require_writable("output", tmp_path / "a" / "b")


def test_what_is_hardly_meant_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(objective=ObjectiveConfig(keys="student"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    for load, number in ((0.0, 1), (99.0, 2)):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        notes = list_notes(config, torch.device("cpu"))
        assert len(notes) == number
    assert "load 99.0" in notes[0]
    assert "--threads 1" in notes[0]
    assert notes[1] == "objective.keys is student, but no term that is on has a choice of keys"


def test_compiling_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match=r"needs a C\+\+ compiler"):
        require_installed(TrainConfig(objective=ObjectiveConfig(compile=True)))


def test_a_sigmoid_teacher_is_for_sigmoid_and_feature_terms(here: Run, data: Path, tmp_path: Path) -> None:
    arguments = ("train", *SMALL, "--data.path", data / "pairs", "--steps", 1)
    sigmoid = ("--objective.info_nce.weight", 0, "--objective.sigmoid.weight", 1, "--objective.logit_scale.init", 10)
    here(*arguments, *sigmoid, "--output", tmp_path / "teacher")
    teacher = ("--teacher.models", tmp_path / "teacher", "--output", tmp_path / "run")
    for name in ("gkl", "affinity"):
        refused = here(*arguments, *teacher, f"--objective.{name}.weight", 1, check=False)
        assert_refused(refused, tmp_path / "run", f"objective.{name}", "teacher.models", "logit_bias", "soft_bce")
    here(*arguments, *teacher, *sigmoid, "--objective.soft_bce.weight", 1, "--objective.features.weight", 1)
    (row,) = files.read_rows(tmp_path / "run" / "metrics.jsonl")
    assert row["logit_bias"] == pytest.approx(-10, abs=0.1)
    assert row["soft_bce"] > 0


def test_a_teacher_whose_features_are_not_finite_is_named(here: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    weights = load_file(tmp_path / "teacher" / "open_clip_model.safetensors")
    weights["text_projection"].fill_(math.nan)
    save_file(weights, tmp_path / "teacher" / "open_clip_model.safetensors")
    output = tmp_path / "run"
    arguments = ("train", *SMALL, "--data.path", data / "pairs", "--output", output, "--steps", 2)
    done = here(*arguments, "--teacher.models", tmp_path / "teacher", "--objective.gkl.weight", 1, check=False)
    line = done.stderr.splitlines()[-1]
    assert (done.returncode, line.startswith("clipkd train: error: step 1: the loss is nan")) == (1, True)
    assert "teacher.models[0]'s text features are not finite" in line
    assert not (output / "checkpoints").exists()


def test_a_label_beyond_the_classes_is_named(here: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    output = tmp_path / "run"
    arguments = ("train", *SMALL, "--data.path", data / "pairs", "--output", output, "--steps", 1)
    arguments += ("--teacher.models", teacher)
    options = ("--objective.closed_set.weight", 1, "--objective.closed_set.classes", tmp_path / "classes.txt")
    done = here(*arguments, *options, "--data.label_key", "label", check=False)
    assert (done.returncode, "names 2, numbered from 0" in done.stderr) == (2, True)
    shutil.rmtree(output)
    assert_refused(here(*arguments, *options, check=False), output, "class_prior", "data.label_key")
    missing = here(*arguments, *options, "--data.label_key", "cls", check=False)
    assert_refused(missing, output, "no sample has a .cls", "data.label_key")


def test_unknown_command_in_a_process_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-m", "clipkd", "frobnicate"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    commands = "check, cache, inherit, train, sweep, report, eval, export, predict, bench, demo"
    assert done.stderr == f"clipkd: error: no command 'frobnicate'; choose from {commands}\n"


def test_without_posix_only_training_is_refused() -> None:
    """As on Windows: eval, export and predict import, training says why not."""
    code = "import os, sys; sys.modules['fcntl'] = None; del os.pread\n"
    code += "import clipkd.evaluation.command, clipkd.export.command, clipkd.inference.predict\n"
    code += "from clipkd.cli import main; sys.argv = ['clipkd', 'train']; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    line = "clipkd train: error: clipkd train needs Linux or macOS; on Windows use WSL\n"
    assert (done.returncode, done.stderr[-len(line) :]) == (2, line)


def test_a_terminal_without_utf8_gets_question_marks() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-m", "clipkd", "--help"], env=environment, capture_output=True, timeout=60)
    assert (done.returncode, b"COMMAND [--help] ?" in done.stdout) == (0, True)
