"""A student to predict with, from its ONNX files or by torch, behind one interface of arrays."""

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipkd.models.onnx_student import SUFFIXES, OnnxStudent, find_formats, onnx_file

TORCH_CONFIGS = ("open_clip_config.json", "config.json")
"""Beside weights of open_clip and transformers."""


@dataclass(frozen=True)
class Student:
    """Features are unit-norm float32."""

    runtime: str
    preprocess: Callable[[Image.Image], np.ndarray]
    """An RGB image → [3, h, w]."""
    encode_pixels: Callable[[np.ndarray], np.ndarray]
    encode_texts: Callable[[Sequence[str]], np.ndarray]
    logit_scale: float
    logit_bias: float | None
    """What a sigmoid model adds to its logits; None for the others."""
    image_sha256: Callable[[], str]
    """Of all that the features of an image depend on."""


def load_student(model: str, format: str) -> Student:
    """Raises: ValueError if there is no such model or format, or what it needs is not installed."""
    named, _, rest = model.partition(":")
    if named in SUFFIXES:  # onnx-int8:FOLDER, as clipkd eval takes it
        if format not in ("auto", named):
            raise ValueError(f"{model} names its format itself; leave --format {format} out")
        return load_onnx(Path(rest), named)
    folder = Path(model.removeprefix("local-dir:"))
    formats = find_formats(folder)
    if format == "torch" and formats and not any((folder / name).is_file() for name in TORCH_CONFIGS):
        raise ValueError(
            f"{folder} has no weights for torch, only {', '.join(formats)}; name one of these with --format"
        )
    if format == "torch" or (format == "auto" and not formats):
        return load_torch(model)
    return load_onnx(folder, formats[0] if format == "auto" else format)


def load_onnx(folder: Path, format: str) -> Student:
    student = OnnxStudent.load(folder, format)

    def encode_texts(texts: Sequence[str]) -> np.ndarray:
        for text, encoding in zip(texts, student.tokenizer.encode_batch(list(texts)), strict=True):
            if encoding.overflowing:
                length = student.about["context_length"]
                warnings.warn(f"only the first {length} tokens count of {text!r}", stacklevel=2)
        return student.encode_texts(texts)

    return Student(
        runtime=format,
        preprocess=student.preprocess,
        encode_pixels=student.encode_pixels,
        encode_texts=encode_texts,
        logit_scale=student.logit_scale,
        logit_bias=student.about["logit_bias"],
        image_sha256=lambda: hashlib.sha256(onnx_file(folder, "vision", format).read_bytes()).hexdigest(),
    )


def load_torch(model: str) -> Student:
    try:
        import torch

        from clipkd.evaluation.embed import Embedder
        from clipkd.models.load import load_model
    except ImportError as error:
        raise ValueError(
            f"{model} has no ONNX files, and without these it needs {error.name}, which is missing"
        ) from error

    encoder = load_model(model)

    @torch.inference_mode()
    def encode_pixels(pixels: np.ndarray) -> np.ndarray:
        return encoder.encode_image(torch.from_numpy(pixels)).numpy()

    @torch.inference_mode()
    def encode_texts(texts: Sequence[str]) -> np.ndarray:
        return encoder.encode_prompts(encoder.spec.tokenize(list(texts))).numpy()

    return Student(
        runtime="torch",
        preprocess=lambda image: encoder.preprocess(image).numpy(),
        encode_pixels=encode_pixels,
        encode_texts=encode_texts,
        logit_scale=encoder.logit_scale.item(),
        logit_bias=None if encoder.logit_bias is None else encoder.logit_bias.item(),
        image_sha256=lambda: Embedder(encoder, torch.device("cpu")).sha256,
    )
