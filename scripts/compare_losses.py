"""Every loss on the demo's data, several seeds each → eval/results/losses.jsonl, one line per loss.

python scripts/compare_losses.py --output runs/compare       all of them, 1 to 1½ hours on 2 cores; goes on where it stopped
python scripts/compare_losses.py --output runs/compare --only gkl   those whose name contains the text
python scripts/compare_losses.py --table eval/results/losses.jsonl  the table of the README

One teacher (seed 0), one student per loss and seed: the recipes configs/tiny_teacher.yaml and configs/tiny.yaml. Students of
one seed train side by side on the same batches. Among the settings of a loss the held-out style Fluent chooses (top-5), the
other one, Noto, reports.
"""

import argparse
import itertools
import json
import multiprocessing
import statistics
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from clipkd import files
from clipkd.config.parse import parse
from clipkd.config.train import TrainConfig
from clipkd.demo import pairs
from clipkd.export.command import ExportConfig, export
from clipkd.teachers.cached import Teachers
from clipkd.training.loop import train
from clipkd.training.run import open_run
from clipkd.views import Batch, Features, View

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "eval" / "results" / "losses.jsonl"
CHOOSE, REPORT = "fluent", "noto"

BATCH = 128  # of configs/tiny.yaml
PEERS = {
    "CLIP-KD": "--config configs/losses/clip_kd.yaml",
    "CLIP-RD": "--config configs/losses/clip_rd.yaml",
    "TinyCLIP": "--config configs/losses/tinyclip.yaml",
    "ALBEF": "--config configs/losses/albef.yaml --objective.warmup_steps 20 --objective.queue 8 "
    "--optim.ema_momentum 0.99",
}


def term(name: str, keys: str = "", capacity: int = 0, **options: object) -> str:
    """Command-line options that switch a term on, with weight 1 unless they say otherwise."""
    options = {"weight": 1} | options
    words = [f"--objective.{name}.{option} {value}" for option, value in options.items()]
    words += [f"--objective.keys {keys}"] if keys else []
    words += [f"--objective.queue {capacity // BATCH}"] if capacity else []
    words += ["--optim.ema_momentum 0.99"] if capacity and keys == "student" else []
    return " ".join(words)


def place(keys: str, capacity: int) -> str:
    return f"{keys} keys" + (f", queue {capacity}" if capacity else "")


def gkl(keys: str, capacity: int, gamma: float = 0.3, mse_weight: float = 1, **options: object) -> str:
    return term("gkl", keys, capacity, gamma=gamma, mse_weight=mse_weight, **options)


def rows() -> dict[str, tuple[str, str]]:
    """Name → (family, options that are added to configs/tiny.yaml). Members of a family are settings of one loss."""
    table = {"task alone": ("task alone", "")}
    for keys, capacity in itertools.product(("student", "teacher"), (0, 1024)):
        where = place(keys, capacity)
        table[f"KL, T 1, {where}"] = (f"KL, {where}", term("kl", keys, capacity))
        table[f"KL, T 4, {where}"] = (f"KL, {where}", term("kl", keys, capacity, weight=16, temperature=4))
        table[f"affinity, {where}"] = (f"affinity, {where}", term("affinity", keys, capacity))
        family = f"GKL, {keys} keys{', queue' if capacity else ''}"
        table[f"GKL, γ 0.3, mse 1, {where}"] = (family, gkl(keys, capacity))
    grid = [(1, 1, 0), (0.3, 0.1, 0), (0.3, 3, 0), (0, 0.1, 0), (0, 1, 0)]
    grid += [(0.3, 0.1, 1024), (1, 0.1, 1024), (0, 0.1, 1024), (0.3, 3, 1024)]
    grid += [(0.3, 1, 512), (0.3, 0.1, 512), (0.3, 1, 2048)]
    for gamma, mse_weight, capacity in grid:
        family = f"GKL, teacher keys{', queue' if capacity else ''}"
        name = f"GKL, γ {gamma}, mse {mse_weight}, {place('teacher', capacity)}"
        table[name] = (family, gkl("teacher", capacity, gamma, mse_weight))
    base = "GKL, γ 0.3, mse 1, teacher keys, queue 1024"
    for note, options in {
        "T 2": gkl("teacher", 1024, temperature=2, weight=4, mse_weight=0.25),
        "weight 3": gkl("teacher", 1024, weight=3),
        "with features": f"{gkl('teacher', 1024)} {term('features', weight=1280)}",
    }.items():
        table[f"{base}, {note}"] = ("GKL, teacher keys, queue", options)
    table["features"] = ("features", term("features", weight=1280))
    table["ICL"], table["ICL, queue 1024"] = ("ICL", term("icl")), ("ICL", term("icl", capacity=1024))
    table |= {name: (name, options) for name, options in PEERS.items()}
    for note, mse_weight, options in (
        ("teacher's scale the student's", 1, "--objective.logit_scale.teacher student"),
        ("scale fixed at 1/0.07", 1, "--objective.logit_scale.learned false"),
        ("scale fixed at 1/0.07", 0.1, "--objective.logit_scale.learned false"),
    ):
        name = f"GKL, γ 0.3, mse {mse_weight}, teacher keys, queue 1024: {note}"
        table[name] = ("logit scale", f"{gkl('teacher', 1024, mse_weight=mse_weight)} {options}")
    return table


def run_folder(output: Path, name: str, seed: int) -> Path:
    return output / "runs" / "".join(c if c.isalnum() else "_" for c in name) / str(seed)


def configure(output: Path, name: str, options: str, seed: int, recipe: str = "tiny") -> TrainConfig:
    """The run as `clipkd train` would make it from these arguments."""
    held_out = ",".join(str(output / "data" / style) for style in pairs.HELD_OUT_STYLES)
    arguments = [
        "--config",
        str(ROOT / "configs" / f"{recipe}.yaml"),
        *options.replace("configs/", f"{ROOT}/configs/").split(),
    ]
    arguments += ["--data.path", str(output / "data" / "pairs"), "--evaluation.data", f"[{held_out}]"]
    arguments += ["--seed", str(seed), "--output", str(run_folder(output, name, seed)), "--data.num_workers", "0"]
    if options and options != PEERS["ALBEF"]:
        arguments += ["--teacher.models", f"local-dir:{output / 'teacher'}"]
    return parse(arguments)


class AskedOnce:
    """The teachers' features, computed for the first of several students that see the same batch."""

    def __init__(self, teachers: Teachers) -> None:
        self.compute, self.batch, self.answer = teachers.features, None, ()

    def features(self, batch: Batch, views: Sequence[View]) -> tuple[Features, ...]:
        if self.batch is not batch:
            self.batch, self.answer = batch, self.compute(batch, views)
        return self.answer


def train_side_by_side(output: Path, table: dict[str, str], seed: int) -> None:
    """One student per loss, all on the same batches: the steps of `clipkd train`, the data and the teacher paid once."""
    runs = [open_run(configure(output, name, options, seed)) for name, options in table.items()]
    asked: AskedOnce | None = None
    for run in runs:
        if run.learner.teachers.models:
            asked = asked or AskedOnce(run.learner.teachers)
            run.learner.teachers.features = asked.features
    leader = next(run for run in runs if run.learner.teachers.models or run is runs[-1])
    start, metrics = time.perf_counter(), {}
    for step, batch in enumerate(leader.batches()):  # the student's view comes first in it, and all students are alike
        for number, run in enumerate(runs):
            metrics[number] = run.step(batch)
        if step % 20 == 19:
            print(f"seed {seed}: step {step + 1}, {time.perf_counter() - start:.0f} s", flush=True)
    for number, run in enumerate(runs):
        run.evaluator.evaluate(run.done)
        (run.folder / "last.json").write_text(json.dumps({key: value.item() for key, value in metrics[number].items()}))


def make_teacher(output: Path) -> None:
    if not (output / "data").exists():
        pairs.write_pairs(output / "data" / "pairs")
        for style in pairs.HELD_OUT_STYLES:
            pairs.write_held_out(output / "data" / style, style)
    if not (output / "teacher").exists():
        folder = train(configure(output, "teacher", "", 0, "tiny_teacher"))
        export(ExportConfig(checkpoint=str(folder), output=str(output / "teacher")))


def summarise(name: str, family: str, options: str, folders: list[Path], seeds: list[int]) -> dict:
    """One line: shares of every seed, in order, for both styles."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    row: dict = {"loss": name, "family": family, "options": options, "seeds": seeds, "teacher_seed": 0}
    row |= {"torch": torch.__version__, "commit": commit.stdout.strip()}
    for style in (CHOOSE, REPORT):
        results = [row for folder in folders for row in files.read_rows(folder / "results.jsonl")]
        results = [r for r in results if r["dataset"] == style and r["weights"] == "student"]
        assert len(results) == len(seeds), (name, style, len(results))
        row |= {f"{style}_{key}": [r["metrics"][key] for r in results] for key in ("acc1", "acc5")}
        row["n"], row["step"] = results[0]["n"], results[0]["step"]
    row["logit_scale"] = [json.loads((folder / "last.json").read_text())["logit_scale"] for folder in folders]
    return row


def table(path: Path) -> str:
    """Markdown: mean ± standard deviation over seeds; of each family the setting that Fluent's top-5 chooses is bold."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def cell(values: list[float]) -> str:
        spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{100 * statistics.mean(values):.1f}{spread}"

    chosen = {}
    for line in lines:
        value = statistics.mean(line[f"{CHOOSE}_acc5"])
        if value > chosen.get(line["family"], (-1.0, ""))[0]:
            chosen[line["family"]] = (value, line["loss"])
    names = {name for _, name in chosen.values()}
    text = [
        f"| loss | {CHOOSE} top-1 | {CHOOSE} top-5 | {REPORT} top-1 | {REPORT} top-5 |",
        "|---|---:|---:|---:|---:|",
    ]
    for line in lines:
        name = f"**{line['loss']}**" if line["loss"] in names else line["loss"]
        cells = [cell(line[f"{style}_{key}"]) for style in (CHOOSE, REPORT) for key in ("acc1", "acc5")]
        text.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/compare"), help="data, teacher and runs")
    parser.add_argument("--seeds", type=int, default=3, help="students per loss")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--only", default="", help="losses whose name contains this text")
    parser.add_argument("--table", type=Path, help="print the table of a results file and stop")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.table))
        return
    output, seeds = arguments.output.resolve(), list(range(arguments.seeds))
    make_teacher(output)
    wanted = {name: row for name, row in rows().items() if arguments.only in name}
    with ProcessPoolExecutor(arguments.jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = []
        for seed in seeds:
            left = [name for name in wanted if not (run_folder(output, name, seed) / "last.json").exists()]
            for part in (left[0::2], left[1::2]):
                table_part = {name: wanted[name][1] for name in part}
                jobs += [pool.submit(train_side_by_side, output, table_part, seed)] if part else []
        for number, job in enumerate(jobs, start=1):
            job.result()
            print(f"{number} of {len(jobs)} groups of students are trained", flush=True)

    lines = [
        summarise(name, family, options, [run_folder(output, name, seed) for seed in seeds], seeds)
        for name, (family, options) in wanted.items()
    ]

    path = RESULTS if not arguments.only else output / "losses.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(table(path))


if __name__ == "__main__":
    main()
