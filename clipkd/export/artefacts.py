"""The export formats: files, software, whether a student fits, and writing them."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipkd import files
from clipkd.errors import short
from clipkd.export.hugging_face import write_hugging_face
from clipkd.export.onnx import check_preprocessing, write_executorch, write_fp16, write_immich, write_int8, write_onnx
from clipkd.models.encoder import Encoder
from clipkd.models.families import find_family
from clipkd.progress import console

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
PROCESSOR = ("preprocessor_config.json", "processor_config.json", *TOKENIZER)
TRANSFORMERS = ("config.json", *PROCESSOR, *(f"exact/{name}" for name in (*PROCESSOR, "image_processing_exact.py")))
IMMICH = ("config.json", "visual/preprocess_cfg.json", *(f"textual/{name}" for name in TOKENIZER))
ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


@dataclass(frozen=True)
class Format:
    """One export format."""

    title: str
    write: Callable[[Encoder, Path], None]
    weights: dict[str, str]
    """image and text, or both → file."""
    others: tuple[str, ...]
    exact: bool = True
    """Whether its features must equal the student's to float32 rounding; otherwise their difference is reported."""
    packages: tuple[str, ...] = ()
    """Optional packages that writing needs."""


def write_open_clip(encoder: Encoder, folder: Path) -> None:
    """Write a folder that open_clip loads as local-dir:FOLDER or, once uploaded, hf-hub:REPO.

    It holds open_clip_config.json, open_clip_model.safetensors and, for a transformers tokenizer, its files.
    """
    if "hf_tokenizer_name" in (encoder.model_config or {})["text_cfg"]:
        encoder.spec.tokenize.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    config = {"model_cfg": encoder.model_config, "preprocess_cfg": encoder.preprocess_config}
    files.write_json(folder / "open_clip_config.json", config)
    files.write_tensors(folder / "open_clip_model.safetensors", encoder.model.state_dict())


def onnx(title: str, write: Callable[[Encoder, Path], None], suffix: str, *, exact: bool) -> Format:
    weights = {"image": f"onnx/vision_model{suffix}.onnx", "text": f"onnx/text_model{suffix}.onnx"}
    return Format(f"ONNX Runtime, {title}", write, weights, TOKENIZER[:1], exact, ONNX_PACKAGES)


FORMATS = {
    "open_clip": Format(
        "open_clip", write_open_clip, {"both": "open_clip_model.safetensors"}, ("open_clip_config.json",)
    ),
    "hf": Format("transformers", write_hugging_face, {"both": "model.safetensors"}, TRANSFORMERS),
    "onnx": onnx("float32", write_onnx, "", exact=True),
    "onnx-fp16": onnx("float16", write_fp16, "_fp16", exact=False),
    "onnx-int8": onnx("int8", write_int8, "_quantized", exact=False),
    "immich": Format(
        "immich",
        write_immich,
        {"image": "immich/visual/model.onnx", "text": "immich/textual/model.onnx"},
        tuple(f"immich/{name}" for name in IMMICH),
        packages=ONNX_PACKAGES,
    ),
    "executorch": Format(
        "ExecuTorch",
        write_executorch,
        {"image": "executorch/vision_model.pte", "text": "executorch/text_model.pte"},
        ("executorch/about.json", *TOKENIZER[:1]),
        packages=("executorch",),
    ),
}
FROM_ONNX = ("onnx", "onnx-fp16", "onnx-int8", "immich")
"""Formats made from the float32 ONNX files."""


def check_formats(encoder: Encoder, formats: Sequence[str]) -> None:
    """Raises: ValueError if the student does not fit a format, or a package that a format needs is not installed."""
    if encoder.model_config is None:
        raise ValueError(f"{encoder.name} is not an open_clip model; clipkd exports students of open_clip architecture")
    for format in formats:
        for package in FORMATS[format].packages:
            if importlib.util.find_spec(package) is None:
                extra = "onnx" if format in FROM_ONNX else format
                raise ValueError(f"--to {format} needs {package}: pip install 'clipkd[{extra}]'")
        if FORMATS[format].packages:
            check_preprocessing(encoder)
        if format == "hf":
            find_family(encoder)


def write_formats(encoder: Encoder, folder: Path, formats: Iterable[str]) -> dict[str, str]:
    """Write the formats into one folder; returns format → error for those that failed.

    Raises: OSError if the disk is full or not writable.
    """
    wanted, errors = set(formats), {}
    for name in FORMATS:
        if name not in wanted and not (name == "onnx" and wanted & set(FROM_ONNX)):
            continue
        if name in FROM_ONNX and "onnx" in errors:
            errors[name] = errors["onnx"]
            continue
        console.print(f"export: writing {name}")
        try:
            FORMATS[name].write(encoder, folder)
        except OSError:
            raise
        except Exception as error:  # exporters and converters raise anything on an architecture they do not support
            errors[name] = f"{type(error).__name__}: {short(error)}"
    return {name: error for name, error in errors.items() if name in wanted}


def keep_formats(folder: Path, proven: Iterable[str], *, own_tokenizer: bool) -> None:
    """Remove the files that belong only to other formats. own_tokenizer: open_clip's format includes tokenizer files."""
    wanted = {name for format in proven for name in (*FORMATS[format].weights.values(), *FORMATS[format].others)}
    if own_tokenizer and "open_clip" in proven:
        wanted |= set(TOKENIZER)
    known = {name for each in FORMATS.values() for name in (*each.weights.values(), *each.others)}
    for name in known - wanted:
        (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
