"""A training run as sections of a page: curves, evaluations, skipped samples, configuration."""

import contextlib
import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from clipkd import files
from clipkd.config.train import TrainConfig, flatten, to_dict
from clipkd.report.figures import (
    Curve,
    Panel,
    Rows,
    escape,
    evaluation_panels,
    loss_panels,
    percentage,
    pick,
    read_curves,
    render_figure,
    show,
    smoothing_window,
    to_pixels,
)
from clipkd.report.page import plain, section, table


@dataclass(frozen=True, kw_only=True)
class Run:
    """The logs of a run folder. Only `metrics` is never empty."""

    folder: Path
    config_text: str
    options: dict[str, Any]
    """The configuration by dotted names."""
    metrics: Rows
    results: dict[tuple[str, str], Rows]
    """(data set, weights) → rows, ordered by step."""
    skipped: Rows


def read_run(folder: Path) -> Run:
    """Raises: ValueError if there is no such folder or no complete line in metrics.jsonl."""
    if not folder.is_dir():
        raise ValueError(f"no run folder {folder}; name the output of a clipkd train")
    metrics, results, skipped = (
        [row for row in files.read_rows(folder / name) if isinstance(row, dict) and isinstance(row.get("step"), int)]
        for name in ("metrics.jsonl", "results.jsonl", "skipped.jsonl")
    )
    if not metrics:
        raise ValueError(f"{folder / 'metrics.jsonl'} has no complete line yet; a run writes one after its first step")
    path, options = folder / "config.yaml", None
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    with contextlib.suppress(yaml.YAMLError):  # truncated by a kill, as log lines can be
        options = yaml.safe_load(text)
    options = flatten(options) if isinstance(options, dict) else {}
    groups: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for row in results:  # the later row of a step that was evaluated twice
        name = (str(row.get("key") or row.get("dataset")), str(row.get("weights") or "student"))
        groups.setdefault(name, {})[row["step"]] = row
    grouped = {name: [rows[step] for step in sorted(rows)] for name, rows in groups.items()}
    return Run(folder=folder, config_text=text, options=options, metrics=metrics, results=grouped, skipped=skipped)


def panels_of(run: Run) -> tuple[dict[str, Curve], dict[str, list[Panel]]]:
    """All series, and the panels of each section."""
    curves = read_curves(run.metrics)
    if "data_wait" in curves:
        curves["data_wait"] = replace(curves["data_wait"], values=100 * curves["data_wait"].values)
    scales, rates = [name for name in curves if name.endswith("logit_scale")], pick(curves, "images_per_second")
    optimisation = [
        Panel("learning rate", pick(curves, "lr"), "learning rate", "from zero"),
        Panel("gradient norm before clipping", pick(curves, "grad_norm"), "L2 norm", "log", noisy=True),
        Panel("logit scales", pick(curves, *scales), "multiplier of cosines"),
        Panel("logit bias", pick(curves, "logit_bias"), "added to logits"),
    ]
    throughput = [
        Panel("images per second", rates, "images/s", "from zero", noisy=True),
        Panel("waiting for data", pick(curves, "data_wait"), "% of the time", "from zero", noisy=True),
    ]
    panels = {"Learning curves": loss_panels(curves, run.options), "Optimisation": optimisation}
    panels |= {"Throughput": throughput, "Evaluation": evaluation_panels(run.results)}
    return curves, {title: [panel for panel in some if panel.curves] for title, some in panels.items()}


def draw_run(folder: Path) -> dict[str, np.ndarray]:
    """Title → pixels of every panel of a run so far that has a finite value."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        panels = [panel for some in panels_of(read_run(folder))[1].values() for panel in some]
        return {panel.title: to_pixels(panel) for panel in panels if any(curve.finite() for curve in panel.curves)}


def render_run(run: Run, number: Iterator[int]) -> str:
    """number: counts the figures of the page."""
    curves, panels = panels_of(run)
    window = smoothing_window(len(run.metrics))
    smoothed = f" Faint: every logged step. Line: running mean over {window} of them." if window > 1 else ""
    texts = {
        "Learning curves": f"<p>A term is shown before its weight.{smoothed}</p>",
        "Evaluation": evaluation_table(run.results),
        "Skipped samples": skipped_table(run.skipped),
        "Configuration": configuration(run),
    }
    body = "".join(
        section(title, texts.get(title, ""), "".join(render_figure(p, next(number)) for p in panels.get(title, ())))
        for title in dict.fromkeys([*panels, *texts])
    )
    last_step, stops = run.metrics[-1]["step"], sorted(run.folder.glob("nonfinite_step_*.json"))
    return f"{''.join(stop_banner(path, last_step) for path in stops)}{facts(run, curves)}\n{body}"


def stop_banner(path: Path, last_step: int) -> str:
    """A stop on a non-finite loss; the file may be truncated, its name holds the step."""
    stop: dict[str, Any] = {}
    with contextlib.suppress(ValueError, TypeError):
        stop |= json.loads(path.read_text(encoding="utf-8"))
    step, keys = int("0" + re.sub(r"\D", "", path.stem)), stop.get("keys") or []
    text = f"(loss {plain(stop.get('loss'))}, gradient norm {plain(stop.get('grad_norm'))})."
    if last_step > step:
        text += f" The run was continued to step {last_step:,}."
    if keys:
        text += (
            f" Samples of that batch: {', '.join(map(str, keys[:8]))}{f' and {len(keys) - 8} more' * (len(keys) > 8)}."
        )
    return f'<p class="banner"><b>Stopped at step {step:,}: the loss was not finite</b> {escape(text)}</p>'


def facts(run: Run, curves: dict[str, Curve]) -> str:
    """The run at a glance; a dash where the files lack a value."""
    options, last = run.options, run.metrics[-1]
    medians = {name: statistics.median(curve.finite()) for name, curve in curves.items() if curve.finite()}
    teachers = options.get("teacher.models") or []
    teachers = teachers if isinstance(teachers, list) else [teachers]
    replaced, indexed = (sum(counts) for counts in zip((0, 0), *count_skipped(run.skipped).values(), strict=True))
    if not run.skipped:
        replaced = last.get("skipped") or 0
    checkpoints = sorted(path.name for path in run.folder.glob("checkpoints/step_*") if path.name[5:].isdigit())
    top1 = {name: show(percentage(rows[-1], "acc1"), "%") for name, rows in run.results.items()}
    sources = [options.get("data.path"), *(source.get("path") for source in options.get("data.mix") or ())]
    paths = [path for source in sources for path in (source if isinstance(source, list) else [source])]
    seconds = curves["seconds"].finite() if "seconds" in curves else []
    planned = f" of {options['steps']:,}" if isinstance(options.get("steps"), int) else ""
    pairs = {
        "student": options.get("student.model"),
        "teacher": "\n".join(teachers) or ("none" if options else ""),
        "training data": "\n".join(str(path) for path in paths if path),
        "steps": f"{last['step']:,}{planned}",
        "batch size, processes": f"{options.get('batch_size', '–')}, {last.get('world_size', '–')}",
        "training time (h:min:s)": str(timedelta(seconds=round(seconds[-1]))) if seconds else "",
        "images per second, median": show(medians.get("images_per_second")),
        "waiting for data, median": show(medians.get("data_wait"), "%"),
        "samples skipped": f"{replaced:,} while training, {indexed:,} at indexing",
        "newest checkpoint": checkpoints[-1] if checkpoints else "none",
        "last top-1": "\n".join(f"{name} ({weights}) {value}" for (name, weights), value in top1.items()),
    }
    cells = (f"<div><dt>{name}</dt><dd>{escape(value or '–')}</dd></div>" for name, value in pairs.items())
    return f'<dl class="facts">{"".join(cells)}</dl>'


def evaluation_table(results: dict[tuple[str, str], Rows]) -> str:
    rows = []
    for name, group in results.items():
        last, best = group[-1], max(group, key=lambda row: percentage(row, "acc1") or 0)
        scores = [show(percentage(last, metric), "%") for metric in ("acc1", "acc5", "mean_per_class_recall")]
        best_text = f"{show(percentage(best, 'acc1'), '%')} at step {best['step']:,}"
        rows.append((*name, f"{last['step']:,}", *scores, f"{last.get('n', 0):,}", best_text))
    header = ("data set", "weights", "step", "top-1", "top-5", "mean per class", "images", "best top-1")
    return table(header, rows, "numbers") if rows else "<p>No evaluation yet.</p>"


def count_skipped(skipped: Rows) -> dict[str, tuple[int, int]]:
    """Cause → samples replaced during training, and samples left out when the data was indexed (step 0)."""
    causes: dict[str, tuple[int, int]] = {}
    for row in skipped:
        for cause, count in (row.get("counts") or {}).items():
            trained, indexed = causes.get(cause, (0, 0))
            causes[cause] = (trained + count, indexed) if row["step"] else (trained, indexed + count)
    return dict(sorted(causes.items(), key=lambda item: -sum(item[1])))


def skipped_table(skipped: Rows) -> str:
    rows = []
    for cause, counts in count_skipped(skipped).items():
        found = [example for row in skipped for example in row.get("examples") or () if example.get("cause") == cause]
        text = "\n".join(f"{example.get('key')}: {example.get('message')}" for example in found[:3])
        rows.append((cause, *(f"{count:,}" for count in counts), text))
    return table(("cause", "while training", "at indexing", "examples"), rows) if rows else "<p>None recorded.</p>"


def configuration(run: Run) -> str:
    """The options that differ from their defaults, then the complete file."""
    if not run.options:
        return "<p>No readable config.yaml.</p>"
    changed = ""
    with contextlib.suppress(ValueError):  # defaults that are invalid without other options
        defaults = {name: plain(value) for name, value in flatten(to_dict(TrainConfig())).items()}
        rows = [(name, plain(value), defaults.get(name, "no such option")) for name, value in run.options.items()]
        differing = [row for row in rows if row[1] != row[2]]
        changed = "<p>Options that differ from the defaults:</p>" + table(("option", "this run", "default"), differing)
    return f"{changed}<details><summary>Complete configuration</summary><pre>{escape(run.config_text)}</pre></details>"
