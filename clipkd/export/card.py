"""The student to export and where it comes from, and the model card, which states it with scores, parity and example code."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from clipkd import __version__, files
from clipkd.config.train import split_weights
from clipkd.export.artefacts import FORMATS
from clipkd.export.snippets import snippet
from clipkd.models import run_folder
from clipkd.models.encoder import Encoder
from clipkd.models.load import load_model
from clipkd.models.onnx_student import SUFFIXES
from clipkd.models.students import count_parameters


@dataclass(frozen=True)
class Source:
    """Origin of a student, without paths of this machine; of a bare model folder only its name is known."""

    checkpoint: str
    weights: str
    config: dict[str, Any] | None = None
    """Resolved configuration of the training run."""
    step: int | None = None
    teachers: tuple[str, ...] = ()
    """SHA-256 of each teacher's weights."""
    results: tuple[dict[str, Any], ...] = ()
    """Evaluations of these weights during training."""


def open_student(name: str, *, ema: bool) -> tuple[Encoder, Source]:
    """Raises: ValueError if there is no such run, checkpoint or open_clip folder, or it is damaged."""
    path = Path(name.removeprefix("local-dir:"))
    if not path.is_dir():
        raise ValueError(f"no checkpoint {name}; name a run folder, a checkpoint or a model folder")
    if not run_folder.is_run(path):
        return load_model(name, ema=ema), Source(path.resolve().name, "weights")
    folder = run_folder.resolve(path).resolve()
    encoder = load_model(str(folder), ema=ema)
    state = run_folder.read_state(folder)
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    teachers = state["identity"].get("teachers") or {}
    digest = encoder.weights_sha256()
    return encoder, Source(
        f"{run.name}/{folder.relative_to(run)}",
        "ema" if ema else "student",
        config=publishable(state["config"]),
        step=state["step"],
        teachers=tuple(each["sha256"] for each in teachers.values()),
        results=tuple(row for row in files.read_rows(run / "results.jsonl") if row.get("weights_sha256") == digest),
    )


PARENTS = re.compile(r"^(local-dir:)?(?:~|\.{1,2})?/(?:.*/)?(?=[^/]+/?$)")
"""The parent folders of a path that is absolute or begins with a dot."""


def publishable(value: Any) -> Any:
    """Remove private parts from options: parent folders of paths, commands, credentials and queries of URLs."""
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [publishable(item) for item in value]
    if not isinstance(value, str):
        return value
    if value.startswith("pipe:"):
        return "pipe:…"
    if "://" in value:
        address = urlsplit(value)
        return f"{address.scheme}://{address.hostname or ''}{address.path}"
    name, weights = split_weights(value)
    return PARENTS.sub(r"\1", name) + ("" if weights is None else f"@{publishable(weights)}")


def write_card(
    folder: Path, encoder: Encoder, source: Source, rows: list[dict[str, Any]], *, name: str, license: str | None
) -> None:
    """Write README.md and, beside it, the training configuration as training.yaml."""
    proven, teacher = [row for row in rows if not row["error"]], teacher_name(source.config)
    image, text = (f"{count_parameters(encoder.model)[tower] / 1e6:.2f}M" for tower in ("image", "text"))
    made = f"distilled from {teacher}" if teacher else "trained" if source.config else "exported"
    stated = f"The weights: {license}." if license else "No licence was stated for these weights."
    parts = [
        front_matter(license, [row["format"] for row in proven], teacher),
        f"# {name}\n",
        f"A CLIP with {image} parameters in the image tower and {text} in the text tower, {made} with clipkd {__version__}.\n",
        facts(encoder, source),
        source.config and recipe(folder, source.config, source.step, encoder.model_config or {}),
        evaluation(source, rows),
        parity(rows),
        usage(proven, sigmoid=encoder.logit_bias is not None),
        f"## Licence\n\n{stated} The terms of the teacher and of the training data may apply too. `example.png` is from "
        "Noto Emoji (Apache-2.0).\n",
    ]
    files.write_text(folder / "README.md", "\n".join(filter(None, parts)))


def front_matter(license: str | None, proven: list[str], teacher: str | None) -> str:
    libraries = {"open_clip": "open_clip", "hf": "transformers", "executorch": "executorch"}
    about = {
        **({"license": license} if license else {"license": "other", "license_name": "not-stated"}),
        "library_name": next((name for format, name in libraries.items() if format in proven), "onnx"),
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "clipkd", *(["knowledge-distillation"] if teacher else [])],
    }
    return f"---\n{yaml.safe_dump(about, sort_keys=False)}---\n"


def teacher_name(config: dict[str, Any] | None) -> str | None:
    models = ((config or {}).get("teacher") or {}).get("models") or []
    return " and ".join([models] if isinstance(models, str) else models) or None


def facts(encoder: Encoder, source: Source) -> str:
    counts = count_parameters(encoder.model)
    height, width = encoder.spec.size
    context = encoder.spec.tokenize(["a"]).shape[1]
    data = (source.config or {}).get("data", {})
    sources = [each for each in (data, *data.get("mix", [])) if each.get("path")]
    rows = {
        "architecture": source.config["student"]["model"] if source.config else None,
        "parameters, image + text": f"{counts['image']:,} + {counts['text']:,}",
        "input": f"{height} × {width} pixels, {encoder.spec.interpolation}; up to {context} tokens",
        "features": f"{encoder.dim}, unit norm; logit scale {encoder.logit_scale.item():.2f}",
        "teacher": teacher_name(source.config),
        "teacher's weights": ", ".join(f"sha256 {each[:16]}…" for each in source.teachers),
        "data": ", ".join(f"{each['path']} ({each.get('format', 'webdataset')})" for each in sources),
        "weights": f"{source.weights} of {source.checkpoint}" + (f", step {source.step}" if source.step else ""),
        "weights' hash": f"sha256 {encoder.weights_sha256()}",
    }
    if encoder.logit_bias is not None:
        rows["logit bias"] = f"{encoder.logit_bias.item():.3f} (added to the logits before a sigmoid)"
    return table(("", ""), [(key, value) for key, value in rows.items() if value])


def recipe(folder: Path, config: dict[str, Any], step: int | None, model_config: dict[str, Any]) -> str:
    """Write training.yaml (and the student's architecture, if it is a file) and describe the run."""
    own = {key: value for key, value in config.items() if key not in ("output", "resume")}
    architecture, weights = split_weights(own["student"]["model"])
    if architecture.endswith(".json"):
        own["student"] = {**own["student"], "model": "@".join(filter(None, ("student.json", weights)))}
        files.write_json(folder / "student.json", model_config)
    files.write_text(folder / "training.yaml", yaml.safe_dump(own, sort_keys=False))
    terms = [
        f"{name} × {term['weight']:g}"
        for name, term in own["objective"].items()
        if isinstance(term, dict) and term.get("weight")
    ]
    return (
        f"## Recipe\n\n{step or own['steps']} of {own['steps']} steps, batch {own['batch_size']} over all processes, seed "
        f"{own['seed']}; objective: {', '.join(terms)}. [training.yaml](training.yaml) has all options; paths are cut to "
        "their last part.\n\n    accelerate launch -m clipkd train --config training.yaml --output runs/again\n"
    )


def evaluation(source: Source, rows: list[dict[str, Any]]) -> str | None:
    """Scores of the checkpoint during training and of the exported files."""
    lines: list[tuple[Any, ...]] = []
    for result in source.results:
        shown = scores(result["main_metric_name"], result["metrics"])
        lines.append((result["key"], "checkpoint, in training", *shown, result["n"], ""))
    for row in rows:
        for result in row.get("zero_shot") or []:
            paired = f"{100 * result['difference']:+.2f}"
            if result["ci95"]:
                paired += " [{:.2f}, {:.2f}]".format(*(100 * bound for bound in result["ci95"]))
            shown = scores(result["metric"], result["metrics"])
            lines.append((result["task"], FORMATS[row["format"]].title, *shown, result["n"], paired))
    heading = ("task", "of", "metric", "%", "others, %", "n", "points from the student, paired [95 %]")
    return "## Evaluation, zero-shot\n\n" + table(heading, lines) if lines else None


def scores(main: str, metrics: dict[str, Any]) -> tuple[str, str, str]:
    others = {k: v for k, v in metrics.items() if k not in (main, "main_metric") and v is not None}
    return main, f"{100 * metrics[main]:.2f}", ", ".join(f"{name} {100 * value:.2f}" for name, value in others.items())


def parity(rows: list[dict[str, Any]]) -> str:
    lines: list[tuple[Any, ...]] = []
    for row in rows:
        title = FORMATS[row["format"]].title
        versions = ", ".join(f"{name} {version}" for name, version in row.get("versions", {}).items())
        if row["error"]:
            lines.append((title, "left out: " + row["error"], "", "", "", "", versions))
            continue
        size = " + ".join(f"{size / 1e6:.1f}" for size in row["files"].values())
        cosine = min(row[tower]["min_cosine"] for tower in ("image", "text"))
        differences = [f"{row[tower]['max_abs_difference']:.1e}" for tower in ("image", "text")]
        flips = f"{row['argmax_flips']} of {row['num_images']}"
        lines.append((title, *differences, f"{cosine:.6f}", flips, size, versions))
    heading = ("format", "images, max abs", "texts, max abs", "min cosine", "best caption changed", "MB", "with")
    return (
        "## Parity\n\nDifference of each format's features from the checkpoint's, for images of odd sizes and odd captions, "
        "with the format's own\npreprocessing and tokenizer. MB: image tower + text tower, or both. "
        "[parity.json](parity.json) has more.\n\n" + table(heading, lines)
    )


def usage(proven: list[dict[str, Any]], *, sigmoid: bool) -> str | None:
    """Example code per format with its output; the ONNX formats share one listing."""
    parts: list[str] = []
    first_onnx = next((row["format"] for row in proven if row["format"] in SUFFIXES), None)
    for row in proven:
        format, code = row["format"], snippet(row["format"], sigmoid=sigmoid)
        if code is None:
            continue
        listing = f"```python\n{code}```\n"
        if format in SUFFIXES and format != first_onnx:
            weights = " and ".join(f"`{name}`" for name in FORMATS[format].weights.values())
            listing = f"The code above with {weights} prints\n"
        parts.append(f"### {FORMATS[format].title}\n\n{listing}\n```text\n{row['snippet_output']}```\n")
        if format == "hf":
            default = row["default_processor"]
            parts.append(
                "`exact/` holds a processor of 40 lines that gives open_clip's pixels; as code, it must be trusted. "
                '`AutoProcessor.from_pretrained(".")` and `pipeline("zero-shot-image-classification", model=".")` use '
                "transformers' own, which rounds differently and crops up to a pixel off: features then differ by up to "
                f"{default['max_abs_difference']:.1e} (cosine ≥ {default['min_cosine']:.4f}).\n"
            )
    about = "Run the code in this folder. Put transparent images on a background first: conversion to RGB makes them black.\n\n"
    return f"## Use\n\n{about}" + "\n".join(parts) if parts else None


def table(heading: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    cells = [heading, ("---",) * len(heading), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in cells) + "\n"
