"""`clipkd train`: the same numbers on one and two processes, after a kill, and with any teacher."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from clipkd import models
from clipkd.arguments import parse
from clipkd.closed_set import closed_set_fingerprint
from clipkd.config import DataConfig, StudentConfig
from clipkd.data import BatchOrder, open_source, training_batches
from clipkd.resume import require_same_run
from tests.e2e.conftest import SMALL, Run

ALL_TERMS = tuple(
    f"--objective.{option}"
    for option in (
        *("gkl.weight=1", "gkl.queue=true", "dkl.weight=0.1", "kl.weight=0.5", "kl.keys=student", "kl.queue=true"),
        *(
            "soft_ce.weight=0.1",
            "soft_ce.keys=momentum",
            "affinity.weight=0.1",
            "features.weight=10",
            "features.warmup_steps=4",
        ),
        *("icl.weight=1", "icl.queue=true", "gd.weight=100", "afd.weight=0.5", "vrd.weight=0.1", "xrd.weight=0.1"),
        *("itc.weight=0.3", "itc.queue=true", "itc.teacher_share=0.2", "itc.ramp_steps=5", "sigmoid.weight=0.01"),
        *("closed_set.weight=1", "closed_set.gamma=0.5", "queue.capacity=40"),
    )
)
"""All that need no second kind of teacher; the queue wraps around at the third step of 16 pairs."""


VARYING = {"seconds", "images_per_second", "data_wait", "world_size"}


def with_all_terms(data: Path) -> tuple[str, ...]:
    classes = ("--objective.closed_set.classes", str(data / "noto" / "classnames.txt"), "--data.label_key", "label")
    return (*ALL_TERMS, *classes, "--optim.ema_momentum", "0.9")


def read_metrics(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_log_the_losses_of_one(clipkd: Run, data: Path, teacher: Path, tmp_path: Path) -> None:
    arguments = (
        *SMALL,
        *with_all_terms(data),
        "--steps",
        6,
        "--teacher.model",
        f"local-dir:{teacher}",
        "--data.path",
        data / "pairs",
    )
    clipkd("train", *arguments, "--output", tmp_path / "one")
    done = clipkd("train", *arguments, "--output", tmp_path / "two", "--log.trackers", "[tensorboard]", processes=2)
    assert "trained 6 steps" in done.stdout
    assert done.stdout.count("trained") == 1  # one process speaks
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [row["world_size"] for row in (one[0], two[0])] == [1, 2]
    assert [row["step"] for row in one] == [1, 2, 3, 4, 5, 6]
    for name in one[0].keys() - VARYING:
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], rel=1e-5, abs=1e-5), name
    assert one[0]["loss"] != one[5]["loss"]
    logged = {
        "loss",
        "info_nce",
        "gkl",
        "gkl_kl",
        "gkl_wmse",
        "kl",
        "soft_ce",
        "soft_ce_kl",
        "features",
        "closed_set_kl",
        "itc",
    }
    assert (
        logged | {"logit_scale", "cross_logit_scale", "grad_norm", "vrd", "xrd", "afd", "gd", "sigmoid"}
        <= one[0].keys()
    )
    assert any((tmp_path / "two").rglob("events.out.tfevents*"))


@pytest.mark.parametrize(("workers", "processes"), [(0, 1), (2, 1), (0, 2)])
def test_killed_and_resumed_run_is_bitwise_the_uninterrupted_run(
    clipkd: Run, environment: dict[str, str], data: Path, teacher: Path, tmp_path: Path, workers: int, processes: int
) -> None:
    arguments = [
        *(
            *SMALL,
            *with_all_terms(data),
            "--steps",
            "6",
            "--teacher.model",
            f"local-dir:{teacher}",
            "--data.path",
            str(data / "pairs"),
        ),
        *("--checkpoint.every_steps", "3", "--data.num_workers", str(workers)),
    ]
    clipkd("train", *arguments, "--output", tmp_path / "whole", processes=processes)

    killed = tmp_path / "killed"
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [*launcher, "-m", "clipkd", "train", *arguments, "--output", str(killed)]
    process = subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_000003").is_dir():
        assert time.monotonic() < deadline
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    if processes == 1:
        process.send_signal(signal.SIGKILL)
    else:
        subprocess.run(["pkill", "-KILL", "-s", str(process.pid)], check=True)  # torchrun and all its children
    process.wait()
    # Whatever the race between the kill and step 6: make sure that steps 4 to 6 are done again.
    for later in (killed / "checkpoints").glob("step_000006*"):
        later.rename(tmp_path / later.name)

    done = clipkd("train", *arguments, "--output", killed, "--resume", "latest", processes=processes)
    assert "trained 6 steps" in done.stdout
    for file in ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "memory.safetensors"):
        paths = [run / "checkpoints" / "step_000006" / file for run in (tmp_path / "whole", killed)]
        whole, resumed = map(load_file, paths)
        assert whole.keys() == resumed.keys()
        assert [name for name in whole if not whole[name].equal(resumed[name])] == []
    rows = [
        [{k: v for k, v in row.items() if k not in VARYING} for row in read_metrics(run)]
        for run in (tmp_path / "whole", killed)
    ]
    assert rows[0] == rows[1]


def test_a_run_is_not_overwritten_and_resumes_only_as_itself(clipkd: Run, data: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 2, "--output", tmp_path / "run")
    clipkd("train", *arguments)
    again = clipkd("train", *arguments, check=False)
    assert again.returncode == 2
    assert "--resume latest" in again.stderr
    other = clipkd("train", *arguments, "--resume", "latest", "--optim.learning_rate", "1e-4", check=False)
    assert other.returncode == 2
    assert "optim.learning_rate = 0.001, now it is 0.0001" in other.stderr
    assert len(read_metrics(tmp_path / "run")) == 2


def test_a_resumed_run_keeps_its_teachers_and_its_classes(
    clipkd: Run, data: Path, teacher: Path, tmp_path: Path
) -> None:
    """By what they hold: another path is no other run, another content is."""
    shutil.copytree(teacher, tmp_path / "moved")
    shutil.copy(data / "noto" / "classnames.txt", tmp_path / "classes.txt")
    arguments = [*SMALL, "--data.path", data / "pairs", "--output", tmp_path / "run", "--data.label_key", "label"]
    arguments += ["--teacher.model", teacher, "--objective.closed_set.weight", 1]
    classes = ["--objective.closed_set.classes", data / "noto" / "classnames.txt"]
    clipkd("train", *arguments, *classes, "--steps", 1)
    moved = ["--teacher.model", tmp_path / "moved", "--objective.closed_set.classes", tmp_path / "classes.txt"]
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_000001" / "state.json").read_text())
    config = parse([*map(str, arguments), *map(str, moved), "--steps", "1", "--resume", "latest"])
    identity = {**state["identity"], "classes": closed_set_fingerprint(config.objective.closed_set)}
    require_same_run(tmp_path, state, config, identity)
    names = (tmp_path / "classes.txt").read_text().splitlines()
    (tmp_path / "classes.txt").write_text("\n".join([names[1], names[0], *names[2:]]))
    identity["classes"] = closed_set_fingerprint(config.objective.closed_set)
    with pytest.raises(ValueError, match="was made with classes = "):
        require_same_run(tmp_path, state, config, identity)
    with pytest.raises(ValueError, match="was made with further_teachers_sha256 = None"):
        require_same_run(tmp_path, state, config, {**state["identity"], "further_teachers_sha256": ["x"]})


def test_checkpoints_are_pruned_and_evaluation_runs_on_the_way(clipkd: Run, data: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 5, "--output", tmp_path / "run")
    options = ("--checkpoint.every_steps", 1, "--checkpoint.keep", 2, "--optim.ema_momentum", 0.5)
    evaluation = ("--evaluation.data", f"[{data / 'noto'}]", "--evaluation.every_steps", 2)
    clipkd("train", *arguments, *options, *evaluation, processes=2)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step_000004", "step_000005"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "results.jsonl").read_text().splitlines()]
    assert [(row["step"], row["weights"]) for row in rows] == [(s, w) for s in (2, 4, 5) for w in ("student", "ema")]
    assert {row["n"] for row in rows} == {32}


def test_non_finite_gradient_stops_the_run_before_the_weights(clipkd: Run, data: Path, tmp_path: Path) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 5, "--output", tmp_path / "run")
    done = clipkd("train", *arguments, "--optim.learning_rate", "1e30", "--optim.clip_norm", 0, check=False)
    assert done.returncode == 1
    assert "stopped before the weights were touched" in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_transformers_teacher_sees_its_own_resolution_and_tokens(
    clipkd: Run, data: Path, clip_folder: Path, tmp_path: Path
) -> None:
    arguments = (*SMALL, "--data.path", data / "pairs", "--steps", 2, "--output", tmp_path / "run")
    teacher = ("--teacher.model", clip_folder, "--objective.gkl.weight", 1, "--objective.features.weight", 1)
    clipkd("train", *arguments, *teacher, "--precision", "bf16")
    rows = read_metrics(tmp_path / "run")
    assert [row["teacher_logit_scale"] for row in rows] == pytest.approx([14.2857] * 2, rel=1e-3)
    assert all(0 < row["gkl_kl"] < 10 for row in rows)
    weights = load_file(tmp_path / "run" / "checkpoints" / "step_000002" / "model.safetensors")
    assert weights["image_projection.weight"].shape == (8, 128)
    assert not any(name.startswith("teacher") for name in weights)

    encoder = models.load(str(clip_folder))
    student = models.create_student(StudentConfig(model="demo-student"))
    assert (encoder.spec.size, student.spec.size) == ((48, 48), (32, 32))
    config = DataConfig(path=str(data / "pairs"), caption_key="captions", num_workers=0)
    order = BatchOrder(64, batch_size=4, seed=0, start=0, stop=1, rank=0, world_size=1)
    source = open_source(config)
    batch = next(
        training_batches(source, config, student=student.spec, teachers=[encoder.spec], order=order, pin_memory=False)
    )
    assert (batch.student.images.shape, batch.teachers[0].images.shape) == ((4, 3, 32, 32), (4, 3, 48, 48))
    assert (batch.student.texts.shape, batch.teachers[0].texts.shape) == ((4, 12), (4, 16))


def test_accelerate_launch_runs_the_module(environment: dict[str, str], data: Path, tmp_path: Path) -> None:
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--cpu",
    ]
    options = ["--mixed_precision", "no", "--dynamo_backend", "no", "-m", "clipkd", "train", *SMALL]
    paths = ["--steps", "1", "--data.path", str(data / "pairs"), "--output", str(tmp_path / "run")]
    done = subprocess.run([*launch, *options, *paths], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert len(read_metrics(tmp_path / "run")) == 1
