"""`clipkd demo`: run the commands of a complete distillation on generated data."""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from clipkd import files
from clipkd.config.parse import parse, parse_into
from clipkd.config.shipped import recipe
from clipkd.demo import pairs
from clipkd.demo.contact_sheet import draw_contact_sheet
from clipkd.evaluation.command import EvalConfig
from clipkd.evaluation.command import run as evaluate_models
from clipkd.evaluation.results import read_samples
from clipkd.export.command import ExportConfig, describe_artefact, export
from clipkd.progress import console
from clipkd.report import ReportConfig, write_report
from clipkd.teachers.cache import command as cache
from clipkd.training.loop import train

CHOOSE, REPORT = "fluent", "noto"
SCRATCH = "alone, from scratch"
STUDENTS: dict[str, tuple[str, ...]] = {
    SCRATCH: ("--config", str(recipe("tiny")), "--steps", "200", "--batch_size", "256", "--student.image", "trained"),
    "alone": (),
    "task + features": ("--objective.features.weight", "2560"),
    "task + KL": ("--objective.kl.weight", "1"),
    "task + GKL": ("--config", str(recipe("losses/gkl"))),
}
"""Options that each student adds to configs/demo.yaml; 2560 = 10 · the feature width of 256. The one from scratch is small
enough to be trained in the same time.
"""

QUICK_CONCEPTS = 200
QUICK = ("--batch_size", "64", "--optim.warmup_steps", "5", "--steps")
NUM_VIEWS = 4
"""Augmented views per pair in the caches; a student sees each pair 19 times."""


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    output: str = "runs/demo"
    """Folder for all results. An interrupted demo continues where it stopped."""
    seed: int = 0
    """Seed of captions, weights and order."""
    quick: bool = False
    """Run in two to three minutes: 200 things, few steps. A test of the installation, not of accuracy."""


def run(config: DemoConfig) -> Path:
    """Build data, train a teacher and students, evaluate, export the best student; returns config.output.

    Image towers start from ImageNet weights and stay frozen, so that each runs once (`clipkd cache`); projections and text
    towers are trained from what they gave.
    """
    output = Path(config.output)
    require_same_demo(config, output)
    write_data(config, output / "data")
    run_once(config, output / "cache" / "teacher", "demo_teacher")
    teacher_run = train_model(config, "teacher", "demo_teacher", "--teacher.cache", str(output / "cache" / "teacher"))
    export_again(teacher_run, output / "teacher", "open_clip")
    run_once(config, output / "cache" / "alone", "demo")
    run_once(config, output / "cache" / "distilled", "demo", "--teacher.models", f"local-dir:{output / 'teacher'}")
    runs = {"teacher": teacher_run}
    for name, options in STUDENTS.items():
        folder = output / "cache" / ("alone" if name == "alone" else "distilled")
        stored = () if name == SCRATCH else ("--teacher.cache", str(folder))
        runs[name] = train_model(config, name, "demo", *options, *stored)

    rows = evaluate_runs(output, runs, teacher_run)
    scores = {row["model"]: row["metrics"]["acc5"] for row in rows if row["dataset"] == CHOOSE}
    best = max((name for name in STUDENTS if name.startswith("task")), key=lambda name: scores[name])
    artefacts = export_again(runs[best], output / "student", "open_clip,onnx,onnx-int8", held_out(output))
    student = f"local-dir:{output / 'student'}"
    beside = evaluate_models(eval_config(output, (student,), str(runs["teacher"])))
    exported = [row for row in beside if row["model"] == student]
    require_equal_counts(exported, rows, best)
    (output / "results.jsonl").unlink(missing_ok=True)
    for row in (*rows, *exported):  # the README's table is made from this file
        files.append_row(output / "results.jsonl", row)
    draw_samples(output, rows, best)
    for folder in (*runs.values(), output / "results"):
        write_report(ReportConfig(run=str(folder)))
    print_table(rows, best, config)
    print_summary(artefacts, output)
    return output


def held_out(output: Path) -> tuple[str, ...]:
    return tuple(str(output / "data" / style) for style in pairs.HELD_OUT_STYLES)


def eval_config(output: Path, models: tuple[str, ...], teacher: str) -> EvalConfig:
    return EvalConfig(
        model=models, teacher=teacher, data=held_out(output), output=str(output / "results"), num_workers=0
    )


def evaluate_runs(output: Path, runs: dict[str, Path], teacher: Path) -> list[dict[str, Any]]:
    """`clipkd eval` of every run against the teacher's; adds step, parameters and training time to each row."""
    names = {str(folder): name for name, folder in runs.items()}
    rows = evaluate_models(eval_config(output, tuple(names), str(teacher)))
    last = {name: files.read_rows(folder / "metrics.jsonl")[-1] for name, folder in runs.items()}
    found = []
    for row in [row for row in rows if row["model"] in names]:
        name, cost = names[row["model"]], row["cost"]
        about = {"model": name, "run": row["model"], "step": last[name]["step"], "parameters": cost["parameters"]}
        found.append(row | about | {"training_seconds": round(last[name]["seconds"], 1)})
    return found


def require_same_demo(config: DemoConfig, output: Path) -> None:
    """Raises: ValueError if the output holds a demo of another seed or size, or several processes were launched."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("the demo runs on one process; start it without a launcher")
    settings = {"seed": config.seed, "quick": config.quick}
    stamp = output / "demo.json"
    if stamp.is_file() and (found := json.loads(stamp.read_text())) != settings:
        raise ValueError(f"{output} holds a demo with {found}, not {settings}; choose another --output or remove it")
    output.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps(settings))


def write_data(config: DemoConfig, folder: Path) -> None:
    num_concepts = QUICK_CONCEPTS if config.quick else None
    num_pairs = pairs.write_pairs(folder / "pairs", num_concepts=num_concepts, seed=config.seed)
    drawn = {
        style: pairs.write_held_out(folder / style, style, num_concepts=num_concepts) for style in pairs.HELD_OUT_STYLES
    }
    counts = ", ".join(f"{number} {style} drawings held out" for style, number in drawn.items())
    console.print(f"data: {num_pairs} pairs in {', '.join(pairs.TRAINING_STYLES)} styles; {counts}")


def run_once(config: DemoConfig, folder: Path, recipe_name: str, *options: str) -> None:
    """`clipkd cache` of a recipe's frozen image tower and of a teacher, if there is one; continues an interrupted one."""
    arguments = (*arguments_of(config, recipe_name), *options, "--views", "1" if config.quick else str(NUM_VIEWS))
    arguments += ("--threads", str(min(4, os.cpu_count() or 1)), "--output", str(folder))
    cache.run(parse_into(cache.CacheConfig, list(arguments), "cache", "Compute the features of frozen towers once."))


def train_model(config: DemoConfig, name: str, recipe_name: str, *options: str) -> Path:
    """`clipkd train` with a recipe of configs/; resumes an interrupted run."""
    folder = Path(config.output) / "runs" / re.sub(r"\W+", "_", name).lower()
    steps = (*QUICK, "60") if config.quick else ()
    folders = ("--output", str(folder), "--resume", "latest")
    weights = ("--student.image_weights", "null") if name == SCRATCH else ()
    return train(parse([*arguments_of(config, recipe_name), *options, *weights, *steps, *folders]))


def arguments_of(config: DemoConfig, recipe_name: str) -> list[str]:
    """What the demo's commands with a recipe share."""
    given = (
        "--student.image_weights",
        str(pairs.image_weights()),
        "--data.path",
        str(Path(config.output) / "data" / "pairs"),
    )
    return ["--config", str(recipe(recipe_name)), *given, "--seed", str(config.seed)]


def export_again(run_folder: Path, output: Path, to: str, data: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """`clipkd export`. Raises: RuntimeError if an artefact was left out."""
    shutil.rmtree(output, ignore_errors=True)
    rows = export(ExportConfig(checkpoint=str(run_folder), output=str(output), to=to, data=data))
    if wrong := [describe_artefact(row) for row in rows if row["error"]]:
        raise RuntimeError("; ".join(wrong))
    return rows


def require_equal_counts(exported: list[dict[str, Any]], rows: list[dict[str, Any]], best: str) -> None:
    trained = {row["dataset"]: row for row in rows if row["model"] == best}
    for row in exported:
        for count in ("num_correct1", "num_correct5", "n"):
            if row[count] != (expected := trained[row["dataset"]][count]):
                raise RuntimeError(f"the exported student scores {row[count]}, trained {expected} ({count})")


def draw_samples(output: Path, rows: list[dict[str, Any]], best: str) -> None:
    row = next(row for row in rows if (row["model"], row["dataset"]) == (best, REPORT))
    draw_contact_sheet(
        output / "samples.png",
        pairs=output / "data" / "pairs",
        held_out=output / "data" / REPORT,
        samples=read_samples(output / "results" / row["samples"]),
        student=output / "student",
    )


def print_table(rows: list[dict[str, Any]], best: str, config: DemoConfig) -> None:
    title = f"zero-shot in two unseen styles, % (seed {config.seed}; {CHOOSE} chooses the student, {REPORT} reports)"
    table = Table(title=title)
    table.add_column("model", no_wrap=True)
    headings = ("image MACs", "text params", *(f"{style} top-{k}" for style in (REPORT, CHOOSE) for k in (1, 5)))
    for heading in (*headings, "n", "steps", "seconds"):
        table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True)
    for name in ("teacher", *STUDENTS):
        by_style = {row["dataset"]: row for row in rows if row["model"] == name}
        row = by_style[REPORT]
        shares = [
            f"{by_style[style]['metrics'][key]:.1%}"[:-1] for style in (REPORT, CHOOSE) for key in ("acc1", "acc5")
        ]
        sizes = [f"{row['cost']['macs']['image'] / 1e6:.0f}M", f"{row['cost']['parameters']['text'] / 1e6:.1f}M"]
        label = f"{name} → student/" if name == best else name
        table.add_row(label, *sizes, *shares, str(row["n"]), str(row["step"]), f"{row['training_seconds']:.0f}")
    Console(width=max(100, Console().width)).print(table)


def print_summary(artefacts: list[dict[str, Any]], output: Path) -> None:
    for row in artefacts:
        print(f"student/ as {describe_artefact(row)}")
    print(
        f"results {output / 'results'}/report.html   curves {output / 'runs'}/*/report.html   pictures {output / 'samples.png'}"
    )
    print(
        f"teacher {output / 'teacher'}   student {output / 'student'}: loads with open_clip as local-dir:{output / 'student'}"
    )
