"""Parity checks: load each artefact with its own software in a subprocess and compare its features with the student's.

A runtime that crashes becomes a row of parity.json, and the remaining formats run in a new subprocess.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils import logging as transformers_logging

from clipkd import files
from clipkd.errors import short
from clipkd.export.artefacts import FORMATS
from clipkd.export.probes import Probes, read_probes
from clipkd.export.snippets import snippet
from clipkd.inference.isolated import describe_exit, run_module
from clipkd.models.onnx_student import OnnxStudent, preprocess
from clipkd.progress import console

TOLERANCE = 1e-5
"""Largest difference of a float32 artefact's unit-norm features from the student's."""

PACKAGES = {
    "open_clip": ("open_clip_torch", "torch"),
    "hf": ("transformers", "torch"),
    "executorch": ("executorch", "torch"),
}
ONNX_PACKAGES = ("onnxruntime", "tokenizers")

Towers = tuple[Callable[[list[Image.Image]], Tensor], Callable[[list[str]], Tensor]]
"""Images → features and captions → features, with the artefact's own preprocessing and tokenizer."""


def check_parity(
    folder: Path, work: Path, formats: list[str], *, sigmoid: bool, tasks: Sequence[str] = (), data: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """Format → its row of parity.json; `error` is the reason if its parity could not be shown.

    work: a temporary folder with the probes in probes/ and, for scores, the student in student/ as open_clip reads it.
    sigmoid: whether the student has a logit bias.
    """
    rows, job = work / "rows.jsonl", work / "job.json"
    options = {"folder": str(folder), "work": str(work), "sigmoid": sigmoid, "tasks": tasks, "data": data}
    files.write_json(job, options)
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["HF_MODULES_CACHE"] = str(work / "modules")  # transformers copies a folder's code there
    remaining = list(formats)
    while remaining:
        code = run_module("clipkd.export.parity", str(job), *remaining, environment=environment).returncode
        finished = [row["format"] for row in files.read_rows(rows)]
        remaining = [format for format in remaining if format not in finished]
        if remaining:  # it crashed on the first of them
            files.append_row(rows, {"format": remaining.pop(0), "error": describe_exit(code)})
    return {row["format"]: row for row in files.read_rows(rows)}


def check_format(
    format: str, folder: Path, work: Path, *, sigmoid: bool, tasks: Sequence[str], data: Sequence[str]
) -> dict[str, Any]:
    probes = read_probes(work / "probes")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES.get(format, ONNX_PACKAGES)}
    row: dict[str, Any] = {"format": format, "error": None, "versions": versions}
    try:
        row |= differences(open_artefact(folder, format), probes)
        if format == "hf":
            row["default_processor"] = differences(open_transformers(folder, exact=False), probes)["image"]
        row["snippet_output"] = run_snippet(folder, snippet(format, sigmoid=sigmoid))
        row["zero_shot"] = score(format, folder, work, tasks, data)
    except Exception as error:  # runtimes raise anything
        return {**row, "error": f"{type(error).__name__}: {short(error)}"}
    worst = max(row["image"]["max_abs_difference"], row["text"]["max_abs_difference"])
    if FORMATS[format].exact and not worst <= TOLERANCE:
        row["error"] = f"features differ from the student's by {worst:.2g}, more than {TOLERANCE:g}"
    return row


def differences(towers: Towers, probes: Probes) -> dict[str, Any]:
    """Compare an artefact's features with the student's; argmax_flips: images whose most similar caption differs."""
    encode_images, encode_texts = towers
    with torch.inference_mode():
        found = {"image": encode_images(probes.images), "text": encode_texts(probes.captions)}
    row: dict[str, Any] = {}
    for name, features in found.items():
        if not features.isfinite().all():
            raise ValueError(f"{name} features are not finite")
        row[name] = {
            "max_abs_difference": (features - probes.features[name]).abs().max().item(),
            "min_cosine": F.cosine_similarity(features, probes.features[name], dim=1).min().item(),
        }
    answers = [(each["image"] @ each["text"].T).argmax(dim=1) for each in (found, probes.features)]
    flips = int((answers[0] != answers[1]).sum())
    return row | {"argmax_flips": flips, "num_images": len(probes.images), "num_captions": len(probes.captions)}


def open_artefact(folder: Path, format: str) -> Towers:
    """Load an artefact as a user of its software would, not through `load_model`."""
    openers = {"open_clip": open_stock_open_clip, "executorch": open_executorch, "immich": open_immich}
    if format in openers:
        return openers[format](folder)
    if format == "hf":
        return open_transformers(folder, exact=True)
    student = OnnxStudent.load(folder, format)
    return (
        lambda images: torch.from_numpy(student.encode_images(images)),
        lambda texts: torch.from_numpy(student.encode_ids(student.tokenize(texts))),
    )


def open_stock_open_clip(folder: Path) -> Towers:
    import open_clip

    found: tuple[Any, ...] = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip, transform = found[0].eval(), found[2]
    return (
        lambda images: clip.encode_image(torch.stack([transform(each) for each in images]), normalize=True),
        lambda texts: clip.encode_text(tokenize(texts), normalize=True),
    )


def open_transformers(folder: Path, *, exact: bool) -> Towers:
    """exact: with the image processor in exact/ in place of transformers' own."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder / "exact" if exact else folder, trust_remote_code=exact)
    length = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

    def encode_images(images: list[Image.Image]) -> Tensor:
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return F.normalize(model.get_image_features(pixels).pooler_output, dim=-1)

    def encode_texts(texts: list[str]) -> Tensor:
        ids = processor(text=texts, **length)["input_ids"]
        return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)

    return encode_images, encode_texts


def open_executorch(folder: Path) -> Towers:
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    runtime = Runtime.get()
    paths = FORMATS["executorch"].weights
    programs = {tower: runtime.load_program(folder / path) for tower, path in paths.items()}
    vision, text = (programs[tower].load_method("forward") for tower in ("image", "text"))
    about = json.loads((folder / "executorch" / "about.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=about["context_length"], pad_id=about["pad_id"])

    def run(method: Any, inputs: list[Tensor]) -> Tensor:
        # Cloned, because the next run reuses the output's memory.
        return torch.cat([method.execute([each])[0].clone() for each in inputs])

    return (
        lambda images: run(vision, [torch.from_numpy(preprocess(each, about))[None] for each in images]),
        lambda texts: run(text, [torch.tensor([tokenizer.encode(each).ids]) for each in texts]),
    )


def open_immich(folder: Path) -> Towers:
    """Run the files as immich does: one input at a time, tokens as int32 padded to the context."""
    import onnxruntime

    student, own = OnnxStudent.load(folder), folder / "immich"
    visual, textual = (onnxruntime.InferenceSession(own / tower / "model.onnx") for tower in ("visual", "textual"))
    tokenizer = Tokenizer.from_file(str(own / "textual" / "tokenizer.json"))
    pad = json.loads((own / "textual" / "tokenizer_config.json").read_text())["pad_token"]
    length = student.about["context_length"]
    tokenizer.enable_padding(length=length, pad_token=pad, pad_id=tokenizer.token_to_id(pad))
    tokenizer.enable_truncation(max_length=length)

    def encode_texts(texts: list[str]) -> Tensor:
        ids = [np.array([tokenizer.encode(each).ids], np.int32) for each in texts]
        return torch.cat([torch.from_numpy(textual.run(None, {"text": each})[0]) for each in ids])

    def encode_images(images: list[Image.Image]) -> Tensor:
        pixels = [student.preprocess(each)[None] for each in images]
        return torch.cat([torch.from_numpy(visual.run(None, {"image": each})[0]) for each in pixels])

    return encode_images, encode_texts


def run_snippet(folder: Path, code: str | None) -> str | None:
    """The output of the card's snippet, run in the folder; None without a snippet."""
    if code is None:
        return None
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {"__name__": "__main__"})
    return out.getvalue()


def score(
    format: str, folder: Path, work: Path, tasks: Sequence[str], data: Sequence[str]
) -> list[dict[str, Any]] | None:
    """The artefact's zero-shot results from `clipkd eval`, paired with the student's; None without data or for other software."""
    if not data or format in ("executorch", "immich"):
        return None
    from clipkd.evaluation.command import EvalConfig, run

    name, student = f"{'local-dir' if format == 'open_clip' else format}:{folder}", f"local-dir:{work / 'student'}"
    output = str(work / "results")
    config = EvalConfig(model=name, teacher=student, task=tuple(tasks), data=tuple(data), output=output, num_workers=0)
    with contextlib.redirect_stdout(io.StringIO()):
        rows = run(config)
    student_metrics = {row["key"]: row["metrics"] for row in rows if row["model"] == student}
    return [
        {
            "task": row["key"],
            "n": row["n"],
            "metric": row["main_metric_name"],
            "metrics": row["metrics"],
            "student_metrics": student_metrics[row["key"]],
            "difference": row["teacher"]["paired"]["difference"],
            "ci95": row["teacher"]["paired"]["ci95"],
            "same_answer": row["teacher"].get("agreement"),
        }
        for row in rows
        if row["model"] == name
    ]


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    transformers_logging.disable_progress_bar()
    path, *formats = sys.argv[1:]
    job = json.loads(Path(path).read_text(encoding="utf-8"))
    folder, work = Path(job.pop("folder")), Path(job.pop("work"))
    for format in formats:
        console.print(f"export: verifying {format}")
        files.append_row(work / "rows.jsonl", check_format(format, folder, work, **job))
