"""The student alone, and distilled online and from a cache, at equal steps and at equal seconds, on the demo's data.

    clipkd demo --output runs/demo        first: the data, then the teacher
    clipkd train tiny_teacher --data.path runs/demo/data/pairs --output runs/demo/tiny_teacher
    python scripts/equal_seconds.py --demo runs/demo --output runs/equal_seconds --results eval/results/equal_seconds.jsonl

Each seed gets a cache with crops of its own. Then the three kinds of training take turns, some steps each, in
one process with one thread and no loader processes, so that other work on the machine slows all alike; the medians of their
seconds per step say how many steps of each take as long as all steps of the cached one. Then all are trained, by
`clipkd train` with the recipe configs/tiny.yaml (GKL: configs/losses/gkl.yaml), and evaluated on the two unseen styles.
"""

import argparse
import json
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from clipkd import files
from clipkd.config.parse import parse, parse_into
from clipkd.config.shipped import recipe
from clipkd.config.train import TrainConfig
from clipkd.demo import pairs
from clipkd.teachers.cache import command as cache
from clipkd.training.assemble import assemble
from clipkd.training.loop import train
from clipkd.training.run import build_run

NUM_VIEWS, ROUNDS, STEPS_OF_A_ROUND = 8, 12, 5
STYLES = ("noto", "fluent")
KINDS = ("alone", "online", "cached")


def arguments_of(kind: str, demo: Path, output: Path, seed: int) -> list[str]:
    gkl = [] if kind == "alone" else ["--config", str(recipe("losses/gkl"))]
    teacher = {
        "alone": [],
        "online": ["--teacher.models", str(demo / "tiny_teacher")],
        "cached": ["--teacher.cache", str(output / f"cache_{seed}")],
    }
    words = ["--config", str(recipe("tiny")), *gkl, *teacher[kind], "--data.path", str(demo / "data" / "pairs")]
    return [*words, "--seed", str(seed), "--data.num_workers", "0"]


def configure(kind: str, demo: Path, output: Path, seed: int, name: str, steps: int | None = None) -> TrainConfig:
    held_out = ",".join(str(demo / "data" / style) for style in pairs.HELD_OUT_STYLES)
    words = [*arguments_of(kind, demo, output, seed), "--evaluation.data", f"[{held_out}]", "--resume", "latest"]
    words += ["--steps", str(steps)] if steps else []
    return parse([*words, "--output", str(output / "runs" / name / str(seed))])


def make_cache(demo: Path, output: Path, seed: int) -> float:
    """Its seconds."""
    words = [*arguments_of("online", demo, output, seed), "--output", str(output / f"cache_{seed}")]
    config = parse_into(cache.CacheConfig, [*words, "--views", str(NUM_VIEWS)], "cache", "")
    started = time.perf_counter()
    cache.run(config)
    return time.perf_counter() - started


def seconds_per_step(demo: Path, output: Path, seed: int) -> dict[str, float]:
    """Data included; medians over rounds in which all kinds take turns."""
    runs = {}
    for kind in KINDS:
        config = configure(kind, demo, output, seed, f"timing {kind}")
        runs[kind] = build_run(config, assemble(config), dry=True)
    took: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS + 1):
        for kind, run in runs.items():
            started = time.perf_counter()
            for _ in range(STEPS_OF_A_ROUND):
                run.step(next(run.feed))
            took[kind].append((time.perf_counter() - started) / STEPS_OF_A_ROUND)
    return {kind: statistics.median(seconds[1:]) for kind, seconds in took.items()}  # the first warms up


def prepare(demo: Path, output: Path, seed: int) -> dict[str, Any]:
    """What a seed's trainings need to know: the cache's seconds, seconds per step, and steps of each training."""
    path = output / f"timing_{seed}.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    if not found:
        found["cache_seconds"] = make_cache(demo, output, seed)
        path.write_text(json.dumps(found), encoding="utf-8")  # made a second time it takes none
    if "seconds_per_step" not in found:
        found["seconds_per_step"] = seconds_per_step(demo, output, seed)
        path.write_text(json.dumps(found), encoding="utf-8")
    timing, steps = found["seconds_per_step"], configure("alone", demo, output, seed, "plan").steps
    budget = steps * timing["cached"]
    return found | {
        "trainings": {
            "alone": ("alone", steps),
            "online": ("online", steps),
            "cached": ("cached", steps),
            "alone, as long as cached": ("alone", round(budget / timing["alone"])),
            "alone, as long as cached and its cache": (
                "alone",
                round((budget + found["cache_seconds"]) / timing["alone"]),
            ),
            "online, as long as cached": ("online", round(budget / timing["online"])),
        }
    }


def train_one(demo: Path, output: Path, seed: int, name: str, kind: str, steps: int) -> dict[str, float]:
    """Shares of the two styles."""
    folder = train(configure(kind, demo, output, seed, name.replace(", ", " "), steps))
    rows = [row for row in files.read_rows(folder / "results.jsonl") if row["step"] == steps]
    return {f"{row['dataset']}_{key}": row["metrics"][key] for row in rows for key in ("acc1", "acc5")}


def table(path: Path) -> str:
    """Markdown: mean ± standard deviation over seeds, %."""
    lines = [
        "| student | steps | seconds per step | seconds | "
        + " | ".join(f"{s} top-{k}" for s in STYLES for k in (1, 5))
        + " |"
    ]
    lines.append("|---|" + "---:|" * 7)
    for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
        cells = [
            row["student"],
            f"{statistics.mean(row['steps']):.0f}",
            f"{statistics.mean(row['seconds_per_step']):.3f}",
        ]
        cells.append(f"{statistics.mean(row['seconds']):.0f}")
        for name in (f"{style}_{key}" for style in STYLES for key in ("acc1", "acc5")):
            values = [100 * value for value in row[name]]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), help="folder of clipkd demo: data and teacher")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/equal_seconds"), help="caches and runs; goes on there"
    )
    parser.add_argument(
        "--results", type=Path, default=Path("eval/results/equal_seconds.jsonl"), help="one line per student"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at the same time, one thread each")
    arguments = parser.parse_args()
    demo, output, seeds = arguments.demo.resolve(), arguments.output.resolve(), range(arguments.seeds)
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    plans = [prepare(demo, output, seed) for seed in seeds]
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        jobs = {
            (name, seed): pool.submit(train_one, demo, output, seed, name, kind, steps)
            for seed, plan in zip(seeds, plans, strict=True)
            for name, (kind, steps) in plan["trainings"].items()
        }
        found = {key: job.result() for key, job in jobs.items()}
    rows = []
    for name, (kind, _) in plans[0]["trainings"].items():
        steps = [plan["trainings"][name][1] for plan in plans]
        timing = [plan["seconds_per_step"][kind] for plan in plans]
        row = {"student": name, "steps": steps, "seconds_per_step": timing, "num_views": NUM_VIEWS}
        row |= {"seconds": [s * t for s, t in zip(steps, timing, strict=True)], "seeds": list(seeds)}
        row |= {"cache_seconds": [plan["cache_seconds"] for plan in plans], "torch": torch.__version__}
        row |= {key: [found[name, seed][key] for seed in seeds] for key in found[name, 0]}
        rows.append(row)
    arguments.results.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(table(arguments.results))


if __name__ == "__main__":
    main()
