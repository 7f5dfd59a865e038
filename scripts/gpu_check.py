"""What no machine without a GPU can try: whether training on one is right, waits nowhere, and what it costs.

    python scripts/gpu_check.py --output eval/results/gpu.jsonl

About ten minutes on one GPU; with two, the two-process check runs over NCCL. Every check adds a row: `passed`, the figures
it saw, or its `error`. `--device cpu` runs the same code on tiny models in a few minutes, which says nothing about a GPU.

    collectives    two processes, on two GPUs, log the losses of one
    waits          host waits within a step (torch.cuda.set_sync_debug_mode), share of a step in which the device is idle;
                   the device's seconds per step of copies and casts, the host's of the moving average
    numbers        first loss against the CPU's (1e-4), in bf16 (1e-2); gradient norm of 4 micro-batches (1e-3)
    fp16           100 steps: finite losses; a run resumed at step 50 repeats the losses after it (1e-2)
    loss           bench_loss.py with tiles of 2,048 and of 8,192, plain and compiled
    evaluation     features against the CPU's, and with TF32 convolutions: largest difference, nearest captions that differ
    signal         SIGTERM during a run: exit status, seconds to the checkpoint, whether it is of the last logged step
    closed_set     seconds per step and peak memory with ImageNet's 1,000 prompts against none
"""

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_train import SETTINGS, Setting, write_files  # beside this file
from torch._C._autograd import DeviceType

from clipkd import files, progress
from clipkd.config.parse import parse
from clipkd.evaluation.embed import Embedder
from clipkd.training.assemble import assemble
from clipkd.training.run import Run, build_run

Row = dict[str, Any]
ROOT = Path(__file__).parents[1]
SIZES = {
    "cpu": SETTINGS["demo"]._replace(batch=16, images=64, steps=3),
    "cuda": Setting("ViT-T-16", "ViT-B-16", 128, 256, 2048, 20, 1),
}


class Checks:
    def __init__(self, device: str, folder: Path) -> None:
        self.device, self.folder, self.setting = device, folder, SIZES[device]
        write_files(self.setting, folder)

    def arguments(self, *options: object, batch: int | None = None) -> list[str]:
        shared = ("--config", "gkl", "--student.model", self.setting.student, "--log.every_steps", 1)
        data = ("--data.path", self.folder / "shards", "--teacher.models", f"local-dir:{self.folder / 'teacher'}")
        sizes = ("--batch_size", batch or self.setting.batch, "--data.num_workers", 1, "--steps", 1000)
        return [*map(str, (*shared, *data, *sizes, *options))]

    def open(self, *options: object) -> Run:
        """A run that writes nothing."""
        config = parse(self.arguments("--output", self.folder / "dry", *options))
        return build_run(config, assemble(config), dry=True)

    def take(self, run: Run, steps: int) -> tuple[list[float], float]:
        """Losses, and seconds per step after the first."""
        losses, started = [], 0.0
        for number, batch in zip(range(steps), run.batches(), strict=False):
            losses.append(run.step(batch)["loss"])
            started = started if number else self.now()
        run.learner.finish_step()
        seconds = (self.now() - started) / max(1, steps - 1)
        run.feed.close()
        return [loss.item() for loss in losses], seconds

    def now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def train(self, name: str, *options: object, processes: int = 1, cpu: bool = False) -> tuple[list[float], Path]:
        """Losses that `clipkd train` logs, and its folder."""
        output = self.folder / name
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), "-m", "clipkd", "train"]
        command += self.arguments("--output", output, *options)
        environment = {**os.environ, **({"ACCELERATE_USE_CPU": "true"} if cpu else {})}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        if done.returncode:
            raise RuntimeError(" ".join(done.stderr.split())[-400:])
        return [row["loss"] for row in files.read_rows(output / "metrics.jsonl")], output

    def collectives(self) -> Row:
        if self.device == "cuda" and torch.cuda.device_count() < 2:
            return {"passed": None, "skipped": "needs two GPUs"}
        one, two = (self.train(f"on_{n}", "--steps", 3, "--precision", "fp32", processes=n)[0] for n in (1, 2))
        return {"passed": largest_ratio(two, one) < 1e-4, "losses": one, "losses_of_two": two}

    def waits(self) -> Row:
        run = self.open("--log.every_steps", 1000, "--optim.ema_momentum", 0.99)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.take_profiled(run, 3)
        waits = sorted({str(each.message).splitlines()[0] for each in caught if "synchroniz" in str(each.message)})
        activities = [torch.profiler.ProfilerActivity.CPU]
        activities += [torch.profiler.ProfilerActivity.CUDA] if self.device == "cuda" else []
        run = self.open("--optim.ema_momentum", 0.99)
        with torch.profiler.profile(activities=activities) as profile:
            _, seconds = self.take(run, self.setting.steps)
        events, microseconds = profile.key_averages(), 1e6 * self.setting.steps
        # An operation counts the time of its kernels, which are events too.
        kernels = [event for event in events if event.device_type != DeviceType.CPU and not event.is_user_annotation]
        busy = sum(event.self_device_time_total for event in kernels) / microseconds
        copies = sum(event.self_device_time_total for event in events if event.key == "aten::copy_") / microseconds
        started = self.now()
        assert run.learner.ema is not None
        run.learner.ema.update()
        figures = {"seconds_per_step": seconds, "idle": max(0.0, 1 - busy / seconds), **run.watch.take_window()}
        figures |= {"seconds_of_copies_and_casts": copies, "host_seconds_of_ema": time.perf_counter() - started}
        return {"passed": not waits, "waits": waits, **figures}

    def take_profiled(self, run: Run, steps: int) -> None:
        """The last of some steps, in which torch warns of every wait."""
        for number, batch in zip(range(steps), run.batches(), strict=False):
            if self.device == "cuda" and number == steps - 1:
                torch.cuda.set_sync_debug_mode("warn")
            run.step(batch)
        if self.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        run.feed.close()

    def numbers(self) -> Row:
        def first(name: str, *options: object, cpu: bool = False) -> tuple[float, float]:
            _, output = self.train(name, "--steps", 1, *options, cpu=cpu)
            (row,) = files.read_rows(output / "metrics.jsonl")
            return row["loss"], row["grad_norm"]

        own, norm = first("own", "--precision", "fp32")
        bf16, _ = first("bf16", "--precision", "bf16")
        _, parts = first("parts", "--precision", "fp32", "--micro_batches", 4)
        cpu, _ = first("cpu", "--precision", "fp32", cpu=True)
        passed = largest_ratio([own], [cpu]) < 1e-4 and largest_ratio([bf16], [own]) < 1e-2
        passed &= largest_ratio([parts], [norm]) < 1e-3
        return {"passed": passed, "loss": own, "cpu": cpu, "bf16": bf16, "norm": norm, "norm_of_4_parts": parts}

    def fp16(self) -> Row:
        if self.device == "cpu":
            return {"passed": None, "skipped": "needs a GPU"}
        shared = ("--precision", "fp16", "--steps", 100, "--checkpoint.every_steps", 50, "--checkpoint.keep", 9)
        losses, output = self.train("fp16", *shared)
        scales = [saved["scaler"]["scale"] for saved in map(read_state, sorted((output / "checkpoints").iterdir()))]
        again, _ = self.train("fp16_again", *shared, "--resume", output / "checkpoints" / "step_000050")
        error, finite = largest_ratio(again, losses[50:]), bool(torch.tensor(losses).isfinite().all())
        passed = finite and error < 1e-2 and 1 <= scales[-1] <= 65536
        return {"passed": passed, "scales": scales, "first_loss": losses[0], "last_loss": losses[-1], "error": error}

    def loss(self) -> Row:
        found = {}
        for tile in (2048, 8192):
            output, batch = self.folder / f"loss_{tile}.jsonl", 16384 if self.device == "cuda" else 64
            options = ("--batch", batch, "--queue", 0, "--tile-size", tile, "--dtype", "float32", "--repeats", 3)
            variants = ("--variants", "fused", *(["fused_compiled"] if self.device == "cuda" else []))
            command = (sys.executable, ROOT / "scripts" / "bench_loss.py", "--output", output, *options, *variants)
            subprocess.run([*map(str, command), "--device", self.device], check=True, capture_output=True)
            rows = [row for row in files.read_rows(output) if row["kind"] == "loss"]
            found |= {f"{row['variant']}_{tile}_ms": row.get("ms", row.get("error")) for row in rows}
        return {"passed": all(isinstance(value, float) for value in found.values()), **found}

    def evaluation(self) -> Row:
        encoder = self.open().learner.distiller.student.eval()
        pixels = torch.rand(256, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(0)) - 0.5
        texts = [f"a photo of thing number {number}" for number in range(256)]

        def features(device: str, tf32: bool) -> tuple[torch.Tensor, torch.Tensor]:
            torch.backends.cudnn.allow_tf32 = tf32
            embedder = Embedder(encoder.to(device), torch.device(device))
            with torch.inference_mode():
                found = encoder.encode_image(pixels.to(device)).cpu(), embedder.encode_texts(texts)
            torch.backends.cudnn.allow_tf32 = False
            return found

        exact, own, tf32 = features("cpu", False), features(self.device, False), features(self.device, True)
        figures: Row = {}
        for name, found in (("fp32", own), ("tf32", tf32)):
            nearest = [(image @ text.T).argmax(dim=1) for image, text in (exact, found)]
            figures[f"difference_{name}"] = max((a - b).abs().max().item() for a, b in zip(exact, found, strict=True))
            figures[f"flips_{name}"] = int((nearest[0] != nearest[1]).sum())
        return {"passed": figures["difference_fp32"] < 1e-4, **figures}

    def signal(self) -> Row:
        output = self.folder / "stopped"
        shared = ("--output", output, "--optim.ema_momentum", 0.99)
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"]
        launcher += ["--mixed_precision", "no", "--dynamo_backend", "no"] + ["--cpu"] * (self.device == "cpu")
        command = [sys.executable, *launcher, "-m", "clipkd", "train", *self.arguments(*shared)]
        running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while len(files.read_rows(output / "metrics.jsonl")) < 3 and running.poll() is None:
            time.sleep(0.05)
        running.send_signal(signal.SIGTERM)
        started = time.perf_counter()
        status, saved = running.wait(120), output / "checkpoints"
        while not list(saved.glob("step_*[0-9]")) and time.perf_counter() - started < 60:
            time.sleep(0.05)  # a launcher may end before the run does
        seconds, steps = time.perf_counter() - started, len(files.read_rows(output / "metrics.jsonl"))
        names = sorted(path.name for path in saved.iterdir())
        return {"passed": names == [f"step_{steps:06d}"], "status": status, "seconds": seconds, "saved": names}

    def closed_set(self) -> Row:
        prompts = ("--objective.closed_set.weight", 1, "--objective.closed_set.classes", "imagenet")
        prompts += ("--objective.closed_set.class_prior", "false", "--objective.closed_set.templates", "['a {c}']")
        row: Row = {"passed": True}
        for name, options in (("without", ()), ("with", prompts)):
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            losses, row[f"seconds_{name}"] = self.take(self.open(*options), max(3, self.setting.steps // 2))
            row["passed"] &= all(map(torch.isfinite, torch.tensor(losses)))
            row[f"peak_bytes_{name}"] = torch.cuda.max_memory_allocated() if self.device == "cuda" else None
        return row | {"passed": bool(row["passed"])}


def largest_ratio(found: list[float], expected: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))


def read_state(checkpoint: Path) -> Row:
    return json.loads((checkpoint / "state.json").read_text())


NAMES = ("collectives", "waits", "numbers", "fp16", "loss", "evaluation", "signal", "closed_set")


def attempt(check: Callable[[], Row]) -> Row:
    try:
        return check()
    except (RuntimeError, ValueError, OSError, SystemExit, subprocess.SubprocessError, FloatingPointError) as error:
        return {"passed": False, "error": f"{type(error).__name__}: {error}".splitlines()[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("eval/results/gpu.jsonl"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--checks", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights
    if options.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"
    elif not torch.cuda.is_available():
        parser.error("there is no GPU; --device cpu tries the checks themselves")
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True).stdout.strip()
    device = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    options.output.unlink(missing_ok=True)
    files.append_row(
        options.output, {"kind": "machine", "commit": commit, "device": device, "torch": torch.__version__}
    )
    with tempfile.TemporaryDirectory() as folder:
        checks = Checks(options.device, Path(folder))
        for name in progress.track(options.checks, "checks", len(options.checks)):
            started = time.perf_counter()
            row = {"kind": "check", "check": name, **attempt(getattr(checks, name))}
            files.append_row(options.output, row | {"seconds_of_check": time.perf_counter() - started})
            print(f"{name:12} {json.dumps(row)}", flush=True)
    failed = [row["check"] for row in files.read_rows(options.output) if row.get("passed") is False]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
