"""What each format consists of: whether a student fits it, writing it, its files."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkd.export.executorch import require_executorch, write_executorch
from clipkd.export.hugging_face import find_family, write_hugging_face
from clipkd.export.onnx import check_preprocessing, require_onnx, write_fp16, write_immich, write_int8, write_onnx
from clipkd.export.open_clip import write_open_clip
from clipkd.models.encoder import Encoder

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json", *TOKENIZER)
TRANSFORMERS = ("config.json", *PROCESSOR, *(f"exact/{name}" for name in (*PROCESSOR, "image_processing_exact.py")))


@dataclass(frozen=True)
class Format:
    """A format as it lies in the folder."""

    title: str
    weights: dict[str, str]
    """Tower, or both → file."""
    others: tuple[str, ...]
    exact: bool = True
    """Whether its features must be the student's to float32 rounding; the others' differences are stated."""


def towers(pattern: str, image: str = "vision", text: str = "text") -> dict[str, str]:
    return {"image": pattern.format(image), "text": pattern.format(text)}


def onnx(title: str, suffix: str, *, exact: bool) -> Format:
    return Format(f"ONNX Runtime, {title}", towers(f"onnx/{{}}_model{suffix}.onnx"), TOKENIZER[:1], exact=exact)


FORMATS = {
    "open_clip": Format("open_clip", {"both": "open_clip_model.safetensors"}, ("open_clip_config.json",)),
    "hf": Format("transformers", {"both": "model.safetensors"}, TRANSFORMERS),
    "onnx": onnx("float32", "", exact=True),
    "onnx-fp16": onnx("float16", "_fp16", exact=False),
    "onnx-int8": onnx("int8", "_quantized", exact=False),
    "immich": Format(
        "immich",
        towers("immich/{}/model.onnx", "visual", "textual"),
        (
            *("immich/config.json", "immich/visual/preprocess_cfg.json"),
            *(f"immich/textual/{name}" for name in TOKENIZER),
        ),
    ),
    "executorch": Format("ExecuTorch", towers("executorch/{}_model.pte"), ("executorch/about.json", *TOKENIZER[:1])),
}
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


def write_formats(encoder: Encoder, folder: Path, formats: Iterable[str], say: Callable[[str], None]) -> dict[str, str]:
    """All of them into one folder; say is told what is begun. Returns those that could not be written, and why.

    Raises: OSError if the disk does not take them.
    """
    asked = set(formats)
    steps: list[tuple[str, bool, Callable[[], None]]] = [
        ("open_clip", "open_clip" in asked, lambda: write_open_clip(encoder, folder)),
        ("hf", "hf" in asked, lambda: write_hugging_face(encoder, folder)),
        ("onnx", bool(asked & set(FROM_ONNX)), lambda: write_onnx(encoder, folder)),
        ("onnx-fp16", "onnx-fp16" in asked, lambda: write_fp16(folder)),
        ("onnx-int8", "onnx-int8" in asked, lambda: write_int8(folder)),
        ("immich", "immich" in asked, lambda: write_immich(encoder, folder)),
        ("executorch", "executorch" in asked, lambda: write_executorch(encoder, folder)),
    ]
    errors: dict[str, str] = {}
    for name, wanted, write in steps:
        if not wanted:
            continue
        if name in FROM_ONNX and "onnx" in errors:
            errors[name] = errors["onnx"]
            continue
        say(f"writing {name}")
        try:
            write()
        except OSError:
            raise
        except Exception as error:  # what exporters and converters throw at an architecture is their own affair
            errors[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
    return {name: errors[name] for name in FORMATS if name in errors and name in asked}


def file_sizes(folder: Path, format: str) -> dict[str, int]:
    """Tower (or both) → bytes of its file."""
    return {tower: (folder / name).stat().st_size for tower, name in FORMATS[format].weights.items()}


def keep_formats(folder: Path, proven: Iterable[str], *, own_tokenizer: bool) -> None:
    """Remove the files that belong to other formats alone. own_tokenizer: open_clip's folder has one, too."""
    wanted = {name for format in proven for name in (*FORMATS[format].weights.values(), *FORMATS[format].others)}
    if own_tokenizer and "open_clip" in proven:
        wanted |= set(TOKENIZER)
    known = {name for each in FORMATS.values() for name in (*each.weights.values(), *each.others)}
    for name in known - wanted:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
