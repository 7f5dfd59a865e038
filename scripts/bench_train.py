"""Images per second of training: clipkd alone, with a teacher, from cached teacher features, and a loop of open_clip's parts.

    OMP_WAIT_POLICY=PASSIVE python scripts/bench_train.py --output eval/results/train.jsonl

All get the same models (random weights, of the same seed), the same JPEGs and captions in the same shards (made here), batch,
precision, threads, loader processes and AdamW. They take turns window by window, so that a busy machine slows all alike.

    plain          clipkd, contrastive loss, no teacher
    online         clipkd, configs/losses/openclip.yaml: DistillClipLoss, the teacher at every step; online_gkl: gkl.yaml
    cached         as online with teacher.cache, made by `clipkd cache` (timed and weighed apart); cached_gkl likewise
    open_clip      create_model_and_transforms, tokenizer, webdataset and WebLoader, DistillClipLoss, clipped fused AdamW

A window opens everything anew and takes a step on one batch, then as many from the loader as it fetches ahead (no more than
are timed), which do not count: its queue is then as full as it stays. --steps more are timed with the loader in the loop. A
third as many go part by part, the device synchronised between them: shares of data (waiting, moving, normalising), teacher,
student (forward and backward), loss (both, from features that are leaves), optimizer (clipping, checks and bounds, too).

clipkd's step is the product's: clipkd.training.learner.Learner.step, without log and checkpoint. What differs in the open_clip
loop: it draws shards with replacement, shuffles within a buffer of 1,000, crops at torchvision's ratios, normalises in the
loader and sends floats, computes the loss under autocast, looks for no loss that is not finite, a fixed rate. `first_loss`
of online and open_clip, on one batch, are the same number to rounding. of_plain, of_open_clip: median over rounds of the
ratio of rates in a round. cpu_seconds_per_step: of the training process alone, the least of the rounds: what other work on
the machine disturbs least. data_wait: share of the timed steps. peak_bytes: torch.cuda.max_memory_allocated, each alone on the
device. Without --batch a GPU takes the largest that fits, by doubling to 2,048. What fails has a row with its `error`.
"""

import argparse
import gc
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
from rich.console import Console
from webdataset.writer import TarWriter

from clipkd import files, progress
from clipkd.config.train import StudentConfig
from clipkd.export.artefacts import write_open_clip
from clipkd.inference import bench
from clipkd.models.initial import create_student

Row = dict[str, Any]
VARIANTS = ("plain", "online", "cached", "online_gkl", "cached_gkl", "open_clip")
HUNGRIEST = ("online_gkl", "open_clip")
PARTS = ("data", "teacher", "student", "loss", "optimizer")
LARGEST_BATCH = 2048
WORDS = ("red", "small", "on", "the", "wooden", "table", "beside", "a", "window", "and", "two", "people", "outdoors")
SHOWN = ("setting", "variant", "batch", "images_per_second", "seconds_per_step", "seconds_per_step_min", "of_plain")
SHOWN += ("of_open_clip", *(f"share_{part}" for part in PARTS), "peak_bytes", "cache_bytes", "cache_seconds")
SHOWN += ("first_loss", "error")


class Setting(NamedTuple):
    student: str
    teacher: str
    batch: int
    side: int
    """Pixels of the square JPEGs."""
    images: int
    steps: int
    """Timed in a window."""
    rounds: int


SETTINGS = {
    "demo": Setting("tiny-student", "tiny-teacher", 128, 40, 1024, 24, 5),
    "vit_t16": Setting("ViT-T-16", "ViT-B-32", 8, 256, 256, 2, 3),
    "vit_b16": Setting("ViT-B-16", "ViT-L-14", 256, 256, 16384, 32, 5),
    "vit_b32": Setting("ViT-B-32", "ViT-L-14", 256, 256, 16384, 32, 5),
}
DEFAULTS = {"cpu": ["demo", "vit_t16"], "cuda": ["vit_b16", "vit_b32"]}


class Laps:
    """Seconds of each part, the device synchronised at the borders."""

    def __init__(self, device: str) -> None:
        self.wait = torch.cuda.synchronize if device == "cuda" else lambda: None
        self.seconds: dict[str, float] = {}
        self.wait()
        self.last = time.perf_counter()

    def lap(self, part: str) -> None:
        self.wait()
        last, self.last = self.last, time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + self.last - last


class Bench:
    """One setting: its files, and its variants as they are opened again and again."""

    def __init__(self, name: str, setting: Setting, folder: Path, options: argparse.Namespace) -> None:
        import train_loops  # beside this file

        self.name, self.setting, self.options, self.loops = name, setting, options, train_loops
        self.task = train_loops.Task(
            *(folder, setting.student, setting.batch), *(options.device, options.precision, options.workers)
        )
        self.warm_up: dict[str, Any] = {}
        """Variant → the batch of its first steps."""

    def write_cache(self) -> Row:
        """The teacher's features, by the command line, in a process of its own."""
        output, views = self.task.folder / "cache", self.options.views
        how = ["--output", str(output), "--views", str(views), "--dtype", "float16"]
        started, command = time.perf_counter(), [sys.executable, "-m", "clipkd", "cache"]
        command += self.loops.train_arguments("openclip", self.task)
        done = subprocess.run([*command, *how], capture_output=True, text=True)
        taken = time.perf_counter() - started
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["clipkd cache said nothing"])[-1])
        num_bytes = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
        return {"cache_views": views, "cache_bytes": num_bytes, "cache_seconds": taken}

    def try_out(self, variant: str) -> Row:
        """The loss of a first step and the peak of two; keeps the batch, the same for all."""
        batch, loop = self.loops.first_batch(variant, self.task), self.loops.open_loop(variant, self.task)
        release()
        on_gpu = self.options.device == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        first, _ = (loop.step(batch).item() for _ in range(2))
        loop.close()
        self.warm_up[variant] = batch
        return {"first_loss": first, "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None}

    def window(self, variant: str) -> dict[str, float]:
        """Seconds of the timed steps, of waiting for data and of this process's CPU in them, of the parts in further steps."""
        loop, wait, steps = self.loops.open_loop(variant, self.task), 0.0, self.setting.steps
        loop.step(self.warm_up[variant])
        for _ in range(min(self.loops.PREFETCH * self.options.workers, steps)):
            loop.step(next(loop.batches))
        laps, cpu = Laps(self.options.device), time.process_time()
        for _ in range(steps):
            before = time.perf_counter()
            batch = next(loop.batches)
            wait += time.perf_counter() - before
            loop.step(batch)
        laps.lap("timed")
        cpu = time.process_time() - cpu
        for _ in range(-(-steps // 3)):
            batch = next(loop.batches)
            laps.lap("data")
            loop.step(batch, laps.lap)
        loop.close()
        return {**laps.seconds, "wait": wait, "cpu": cpu}

    def measure(self) -> list[Row]:
        """A row per variant."""
        about = {"kind": "train", "setting": self.name, **self.setting._asdict(), "threads": torch.get_num_threads()}
        about |= {name: getattr(self.options, name) for name in ("precision", "device", "workers")}
        rows: dict[str, Row] = {name: {**about, "variant": name} for name in self.options.variants}
        cached = [name for name in rows if name.startswith("cached")]
        cache = attempt(self.write_cache) if cached else {}
        for name in rows:
            rows[name] |= cache if name in cached else {}
            rows[name] |= {} if "error" in rows[name] else attempt(partial(self.try_out, name))
        windows: dict[str, list[dict[str, float]]] = {name: [] for name in rows}
        turns = [name for _ in range(self.setting.rounds) for name in rows]
        for name in progress.track(turns, self.name, len(turns)):
            if "error" not in rows[name]:
                rows[name] |= attempt(lambda name=name: windows[name].append(self.window(name)) or {})
            release()
        for name, row in rows.items():
            if "error" not in row:
                row |= self.summarize(windows[name])
                for other in {"plain", "open_clip"} & rows.keys():
                    pairs = zip(windows[other], windows[name], strict=False)  # none, if it failed
                    ratios = [theirs["timed"] / own["timed"] for theirs, own in pairs]
                    row |= {f"of_{other}": statistics.median(ratios)} if "error" not in rows[other] else {}
        return list(rows.values())

    def summarize(self, windows: list[dict[str, float]]) -> Row:
        rounds = [window["timed"] / self.setting.steps for window in windows]
        row = {"seconds_per_step": statistics.median(rounds), "seconds_per_step_min": min(rounds)}
        total = {name: sum(window.get(name, 0.0) for window in windows) for name in (*PARTS, "wait", "timed")}
        parts = sum(total[part] for part in PARTS)
        row |= {"cpu_seconds_per_step": min(window["cpu"] for window in windows) / self.setting.steps}
        row |= {"images_per_second": self.setting.batch / row["seconds_per_step"]}
        row |= {"data_wait": total["wait"] / total["timed"]} | {f"share_{part}": total[part] / parts for part in PARTS}
        return {**row, "seconds_per_step_rounds": rounds}


def attempt(work: Callable[[], Row]) -> Row:
    """What work returns, or the error that it ended with."""
    try:
        return work()
    except (RuntimeError, ValueError, OSError, SystemExit) as error:
        row = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
    release()  # not before the error is gone, whose traceback held the tensors
    return row


def release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def write_files(setting: Setting, folder: Path) -> None:
    """shards/: 256 photos again and again, each with a caption of its own, of 5 to 65 words; teacher/: random weights."""
    from bench_data import draw_photo  # beside this file

    rng = np.random.default_rng(0)
    photos = [draw_photo((setting.side, setting.side), rng) for _ in range(min(256, setting.images))]
    (folder / "shards").mkdir()
    for shard in range(8):
        with TarWriter(str(folder / "shards" / f"{shard:05d}.tar")) as tar:
            for number in range(shard, setting.images, 8):
                words = rng.choice(WORDS, size=min(60, int(rng.lognormal(2, 0.6))))
                text = f"a photo of thing number {number} {' '.join(words)}"
                tar.write({"__key__": f"{number:06d}", "jpg": photos[number % len(photos)], "txt": text})
    torch.manual_seed(1)
    (folder / "teacher").mkdir()
    teacher = create_student(StudentConfig(model=setting.teacher)).eval()
    write_open_clip(teacher, folder / "teacher")


def fit(name: str, setting: Setting, folder: Path, options: argparse.Namespace) -> Setting:
    """With the largest batch at which the hungriest variants take a step, by doubling."""
    while setting.batch < LARGEST_BATCH:
        larger = Bench(name, setting._replace(batch=2 * setting.batch), folder, options)
        if any(attempt(partial(larger.try_out, variant)).get("error") for variant in HUNGRIEST):
            break
        setting = larger.setting
    return setting


def table(results: Path) -> str:
    """Markdown for the README."""
    headings = ["student ← teacher", "batch", "training", "images/s", "× plain", "× open_clip", *PARTS]
    lines = ["| " + " | ".join(headings) + " |", "|---|---:|---|" + "---:|" * (3 + len(PARTS))]
    for row in files.read_rows(results):
        if row["kind"] != "train":
            continue
        cells = [f"{row['student']} ← {row['teacher']}", f"{row['batch']:,}", f"`{row['variant']}`"]
        if "error" in row:
            cells += [row["error"].split(":")[0], *[""] * (2 + len(PARTS))]
        else:
            cells += [f"{row['images_per_second']:,.4g}"]
            cells += [f"{row[key]:.2f}" if key in row else "" for key in ("of_plain", "of_open_clip")]
            cells += [f"{row[f'share_{part}']:.0%}" for part in PARTS]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("eval/results/train.jsonl"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, help=str(DEFAULTS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    for name in Setting._fields[2:]:
        parser.add_argument(f"--{name}", type=int, help="as the setting has it")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="bf16 on a GPU, else fp32")
    parser.add_argument("--workers", type=int, help="loader processes of each; 1, on a GPU half of the cores")
    parser.add_argument("--threads", type=int, help="of torch; on a CPU the cores that the loader leaves")
    parser.add_argument("--views", type=int, default=1, help="augmented views of each pair in the cache")
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights
    on_gpu, cores = options.device == "cuda", bench.count_cores()
    if not on_gpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    options.precision = options.precision or ("bf16" if on_gpu else "fp32")
    options.workers = max(1, cores // 2 if on_gpu else 1) if options.workers is None else options.workers
    torch.set_num_threads(options.threads or (torch.get_num_threads() if on_gpu else max(1, cores - options.workers)))
    commit = subprocess.run("git rev-parse --short HEAD", shell=True, capture_output=True, text=True).stdout.strip()
    header: Row = {"kind": "machine", "commit": commit, "load": os.getloadavg()[0], "cores": cores}
    header |= {"device": torch.cuda.get_device_name() if on_gpu else bench.cpu_name(), "torch": torch.__version__}
    header |= {"open_clip_torch": open_clip.__version__, "wait_policy": os.environ.get("OMP_WAIT_POLICY")}
    options.output.unlink(missing_ok=True)
    files.append_row(options.output, header)
    own = {name: value for name in Setting._fields[2:] if (value := getattr(options, name)) is not None}
    for name in options.setting or DEFAULTS[options.device]:
        setting = SETTINGS[name]._replace(**own)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            write_files(setting, folder)
            if on_gpu and options.batch is None:
                setting = fit(name, setting, folder, options)
            for row in Bench(name, setting, folder, options).measure():
                files.append_row(options.output, row)
    rows = files.read_rows(options.output)[1:]
    from bench_loss import grid_of  # beside this file

    Console(width=None if Console().is_terminal else 1000).print(grid_of(rows, *SHOWN))
    print(f"→ {options.output}")


if __name__ == "__main__":
    main()
