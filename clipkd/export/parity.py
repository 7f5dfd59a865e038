"""Proof of an export: each artefact, as its own software loads it, beside the student.

A process of its own: a runtime that crashes becomes a row of parity.json, and the formats after it get another process.
"""

import contextlib
import importlib.metadata
import io
import json
import logging
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers.utils import logging as quiet

from clipkd import files
from clipkd.export.artefacts import FORMATS
from clipkd.export.executorch import executorch_file
from clipkd.export.hugging_face import TOLERANCE
from clipkd.export.probes import Probes
from clipkd.export.snippets import snippet
from clipkd.inference import isolated as apart
from clipkd.models.onnx_student import OnnxStudent, preprocess
from clipkd.progress import console

PACKAGES = {
    "open_clip": ("open_clip_torch", "torch"),
    "hf": ("transformers", "torch"),
    "executorch": ("executorch", "torch"),
    "onnx": ("onnxruntime", "tokenizers"),
}

Towers = tuple[Callable[[list[Image.Image]], Tensor], Callable[[list[str]], Tensor]]
"""Images → features, captions → features, by an artefact's own preprocessing and tokenizer."""


@dataclass(frozen=True)
class Job:
    """What a process is told."""

    folder: str
    """The export, under its temporary name."""
    probes: str
    rows: str
    """Where rows go, one line each, as they are finished."""
    student: str
    """An open_clip folder of the student, that scores are paired with."""
    sigmoid: bool = False
    """Whether the student has a logit bias."""
    tasks: Sequence[str] = ()
    data: Sequence[str] = ()
    results: str = ""


def prove(job: Job, formats: list[str]) -> list[dict[str, Any]]:
    """A row of each format; `error` says why where there is nothing to show."""
    path = Path(job.rows).with_name("job.json")
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    environment["HF_MODULES_CACHE"] = str(path.parent / "modules")  # where transformers copies a folder's code to
    remaining = list(formats)
    while remaining:
        command = apart.command("clipkd.export.parity", str(path), *remaining)
        code = subprocess.run(command, env=environment, check=False).returncode
        finished = [row["format"] for row in files.read_rows(Path(job.rows))]
        remaining = [format for format in remaining if format not in finished]
        if code in (-signal.SIGINT, 128 + signal.SIGINT):
            raise KeyboardInterrupt
        if remaining:  # it has ended before its time
            files.append_row(Path(job.rows), {"format": remaining.pop(0), "error": apart.describe_end(code)})
    rows = {row["format"]: row for row in files.read_rows(Path(job.rows))}
    return [rows[format] for format in formats]


def prove_one(job: Job, format: str) -> dict[str, Any]:
    folder, probes = Path(job.folder), Probes(Path(job.probes))
    family = "onnx" if format.startswith("onnx") or format == "immich" else format
    versions = {package: importlib.metadata.version(package) for package in PACKAGES[family]}
    row: dict[str, Any] = {"format": format, "error": None, "versions": versions}
    try:
        row |= differences(open_artefact(job, format), probes)
        if format == "hf":
            row["default_processor"] = differences(open_transformers(folder, exact=False), probes)["image"]
        row["snippet_output"] = run_snippet(folder, snippet(format, sigmoid=job.sigmoid))
        row["zero_shot"] = score(job, format)
    except Exception as error:  # whatever a runtime throws is what there is to say of this artefact
        return {**row, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
    worst = max(row["image"]["max_abs_difference"], row["text"]["max_abs_difference"])
    if FORMATS[format].exact and not worst <= TOLERANCE:
        row["error"] = f"features differ from the student's by {worst:.2g}, more than {TOLERANCE:g}"
    return row


def differences(towers: Towers, probes: Probes) -> dict[str, Any]:
    """Between an artefact's features and the student's; flips: images whose most similar caption is another."""
    encode_images, encode_texts = towers
    images = [Image.open(path).convert("RGB") for path in probes.images]
    with torch.inference_mode():
        found = {"image": encode_images(images), "text": encode_texts(probes.captions)}
    expected = probes.features()
    row: dict[str, Any] = {}
    for name, features in found.items():
        if not features.isfinite().all():
            raise ValueError(f"{name} features are not finite")
        row[name] = {
            "max_abs_difference": (features - expected[name]).abs().max().item(),
            "min_cosine": F.cosine_similarity(features, expected[name], dim=1).min().item(),
        }
    answers = [(each["image"] @ each["text"].T).argmax(dim=1) for each in (found, expected)]
    flips = int((answers[0] != answers[1]).sum())
    return row | {"argmax_flips": flips, "num_images": len(images), "num_captions": len(probes.captions)}


def open_artefact(job: Job, format: str) -> Towers:
    """As a user of that software would, without clipkd's own loaders (ONNX has none but ours)."""
    folder = Path(job.folder)
    if format == "open_clip":
        return open_stock_open_clip(folder)
    if format == "hf":
        return open_transformers(folder, exact=True)
    if format == "executorch":
        return open_executorch(folder)
    if format == "immich":
        return open_immich(folder)
    student = OnnxStudent.load(folder, format)
    return (
        lambda images: torch.from_numpy(student.encode_images(images)),
        lambda texts: torch.from_numpy(student.encode_texts(texts)),
    )


def open_stock_open_clip(folder: Path) -> Towers:
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    clip: Any = model.eval()
    transform: Any = preprocess
    return (
        lambda images: clip.encode_image(torch.stack([transform(each) for each in images]), normalize=True),
        lambda texts: clip.encode_text(tokenize(texts), normalize=True),
    )


def open_transformers(folder: Path, *, exact: bool) -> Towers:
    """exact: with the folder's own image processor, which crops as torchvision does."""
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder / "exact" if exact else folder, trust_remote_code=exact)
    length = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}

    def encode_images(images: list[Image.Image]) -> Tensor:
        return F.normalize(
            model.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output, dim=-1
        )

    def encode_texts(texts: list[str]) -> Tensor:
        ids = processor(text=texts, **length)["input_ids"]
        return F.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)

    return encode_images, encode_texts


def open_executorch(folder: Path) -> Towers:
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    runtime = Runtime.get()
    programs = [runtime.load_program(executorch_file(folder, tower)) for tower in ("vision", "text")]
    vision, text = (program.load_method("forward") for program in programs)
    about = json.loads((folder / "executorch" / "about.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding(length=about["context_length"], pad_id=about["pad_id"])
    # Copied, as the next run writes into the same memory.
    return (
        lambda images: torch.cat(
            [vision.execute([torch.from_numpy(preprocess(each, about))[None]])[0].clone() for each in images]  # type: ignore[union-attr]
        ),
        lambda texts: torch.cat(
            [text.execute([torch.tensor([tokenizer.encode(each).ids])])[0].clone() for each in texts]  # type: ignore[union-attr]
        ),
    )


def open_immich(folder: Path) -> Towers:
    """As immich does: one at a time, its names, tokens as int32 padded to the context."""
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
    """What the card's snippet prints, run in the folder; None without one."""
    if code is None:
        return None
    with contextlib.chdir(folder), contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {"__name__": "__main__"})
    return out.getvalue()


def score(job: Job, format: str) -> list[dict[str, Any]] | None:
    """The artefact's zero-shot results by `clipkd eval`, paired with the student's; None without tasks or for other software."""
    if not job.data or format in ("executorch", "immich"):
        return None
    from clipkd.evaluation.command import EvalConfig, run

    name = f"{'local-dir' if format == 'open_clip' else format}:{job.folder}"
    config = EvalConfig(
        model=name,
        teacher=f"local-dir:{job.student}",
        task=tuple(job.tasks),
        data=tuple(job.data),
        output=job.results,
        num_workers=0,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        rows = run(config)
    return [summary(row, rows) for row in rows if row["model"] == name]


def summary(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fields that a card shows: the artefact's score, the student's, and the paired difference."""
    (student,) = [each for each in rows if each["key"] == row["key"] and each["model"] != row["model"]]
    beside = row["teacher"]["paired"]
    return {
        "task": row["key"],
        "n": row["n"],
        "metric": row["main_metric_name"],
        "metrics": row["metrics"],
        "student_metrics": student["metrics"],
        "difference": beside["difference"],
        "ci95": beside["ci95"],
        "same_answer": row["teacher"].get("agreement"),
    }


def main() -> None:
    logging.getLogger().setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    quiet.disable_progress_bar()
    job_path, *formats = sys.argv[1:]
    job = Job(**json.loads(Path(job_path).read_text(encoding="utf-8")))
    for format in formats:
        console.print(f"export: verifying {format}")
        files.append_row(Path(job.rows), prove_one(job, format))
