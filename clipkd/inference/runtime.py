"""Load a student for prediction, from ONNX files or with torch, behind one interface of arrays."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from clipkd import files
from clipkd.models.onnx_student import SUFFIXES, OnnxStudent, find_formats, onnx_file


@dataclass(frozen=True)
class Student:
    """Encoders to unit-norm float32 features."""

    runtime: str
    preprocess: Callable[[Image.Image], np.ndarray]
    """An RGB image → [3, h, w]."""
    encode_pixels: Callable[[np.ndarray], np.ndarray]
    """[n, 3, h, w] → [n, d]."""
    encode_texts: Callable[[Sequence[str]], np.ndarray]
    """n texts → [n, d]."""
    logit_scale: float
    logit_bias: float | None
    """Added to the logits of a sigmoid model; None for softmax models."""
    image_sha256: Callable[[], str]
    """Hash of everything that determines an image's features."""


def has_weights(folder: Path) -> bool:
    """Whether torch can load the folder as a model of open_clip or transformers."""
    return any((folder / name).is_file() for name in ("open_clip_config.json", "config.json"))


def load_student(model: str, format: str) -> Student:
    """Load a model folder by format, or as FORMAT:FOLDER; "auto" prefers ONNX.

    Raises: ValueError if there is no such model or format, or its software is not installed.
    """
    named, _, rest = model.partition(":")
    if named in SUFFIXES:  # onnx-int8:FOLDER, as clipkd eval takes it
        if format not in ("auto", named):
            raise ValueError(f"{model} names its format itself; leave --format {format} out")
        return load_onnx(Path(rest), named)
    folder = Path(model.removeprefix("local-dir:"))
    formats = find_formats(folder)
    if format == "torch" and formats and not has_weights(folder):
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
        image_sha256=lambda: files.sha256(onnx_file(folder, "vision", format)),
    )


def load_torch(model: str) -> Student:
    try:
        import torch

        from clipkd.evaluation.embed import Embedder
        from clipkd.models.load import load_model
    except ImportError as error:
        raise ValueError(f"{model} has no ONNX files, and torch needs {error.name}, which is not installed") from error

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
