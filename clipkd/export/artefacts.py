"""What each format consists of: whether a student fits it, writing it, its files."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from clipkd.export.executorch import executorch_file, require_executorch, write_executorch
from clipkd.export.hugging_face import find_family, write_hugging_face
from clipkd.export.onnx import check_preprocessing, require_onnx, write_fp16, write_immich, write_int8, write_onnx
from clipkd.export.open_clip import write_open_clip
from clipkd.models import Encoder
from clipkd.onnx_student import SUFFIXES, onnx_file

FORMATS = ("open_clip", "hf", "onnx", "onnx-fp16", "onnx-int8", "immich", "executorch")
FROM_ONNX = ("onnx", "onnx-fp16", "onnx-int8", "immich")
"""Made from the float32 ONNX files."""


def check_formats(encoder: Encoder, formats: Sequence[str]) -> None:
    """Before anything is written. Raises: ValueError if the student does not fit a format, or what it needs is not installed."""
    if encoder.model_config is None:
        raise ValueError(f"{encoder.name} is not an open_clip model; clipkd exports students of open_clip architecture")
    if "hf" in formats:
        find_family(encoder)
    if any(format in FROM_ONNX for format in formats):
        require_onnx()
    if "executorch" in formats:
        require_executorch()
    if any(format in (*FROM_ONNX, "executorch") for format in formats):
        check_preprocessing(encoder)


def write_formats(encoder: Encoder, folder: Path, formats: Sequence[str], say: Callable[[str], None]) -> None:
    """All of them into one folder; say is told what is begun."""
    steps: list[tuple[str, Callable[[], None]]] = []
    if "open_clip" in formats:
        steps.append(("open_clip", lambda: write_open_clip(encoder, folder)))
    if "hf" in formats:
        steps.append(("hf", lambda: write_hugging_face(encoder, folder)))
    if any(format in FROM_ONNX for format in formats):
        steps.append(("onnx", lambda: write_onnx(encoder, folder)))
    if "onnx-fp16" in formats:
        steps.append(("onnx-fp16", lambda: write_fp16(folder)))
    if "onnx-int8" in formats:
        steps.append(("onnx-int8", lambda: write_int8(folder)))
    if "immich" in formats:
        steps.append(("immich", lambda: write_immich(encoder, folder)))
    if "executorch" in formats:
        steps.append(("executorch", lambda: write_executorch(encoder, folder)))
    for name, write in steps:
        say(f"writing {name}")
        write()


def weight_files(folder: Path, format: str) -> dict[str, Path]:
    """Tower (or both) → the file with its weights."""
    if format in SUFFIXES:
        return {name: onnx_file(folder, tower, format) for name, tower in (("image", "vision"), ("text", "text"))}
    if format == "executorch":
        return {name: executorch_file(folder, tower) for name, tower in (("image", "vision"), ("text", "text"))}
    if format == "immich":
        return {
            name: folder / "immich" / tower / "model.onnx" for name, tower in (("image", "visual"), ("text", "textual"))
        }
    return {"both": folder / {"open_clip": "open_clip_model.safetensors", "hf": "model.safetensors"}[format]}


def remove_format(folder: Path, format: str) -> None:
    """An artefact that could not be proven."""
    for path in weight_files(folder, format).values():
        path.unlink(missing_ok=True)
    others = {
        "open_clip": ["open_clip_config.json"],
        "hf": ["config.json", "preprocessor_config.json", "processor_config.json", "image_processing_exact.py"],
    }
    for name in others.get(format, []):
        (folder / name).unlink(missing_ok=True)
    if format in ("immich", "executorch"):
        shutil.rmtree(folder / format, ignore_errors=True)
    with_no_files = folder / "onnx"
    if with_no_files.is_dir() and not any(with_no_files.iterdir()):
        with_no_files.rmdir()
