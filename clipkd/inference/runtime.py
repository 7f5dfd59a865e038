"""Load a student for prediction, from ONNX files or with torch, behind one interface of arrays."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from clipkd.models.onnx_student import SUFFIXES, OnnxStudent, find_formats

if TYPE_CHECKING:
    from clipkd.models.encoder import Encoder


class TorchStudent:
    """A model run by torch. It has the methods of `OnnxStudent` that prediction needs."""

    format = "torch"

    def __init__(self, encoder: "Encoder") -> None:
        self.encoder, self.logit_scale = encoder, encoder.logit_scale.item()
        self.logit_bias = None if encoder.logit_bias is None else encoder.logit_bias.item()

    def preprocess(self, image: Image.Image) -> np.ndarray:
        return self.encoder.preprocess(image).numpy()

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.encoder.encode_image(torch.from_numpy(pixels)).numpy()

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.encoder.encode_prompts(self.encoder.spec.tokenize(list(texts))).numpy()

    def image_sha256(self) -> str:
        import torch

        from clipkd.evaluation.embed import Embedder

        return Embedder(self.encoder, torch.device("cpu")).sha256


Student = OnnxStudent | TorchStudent
"""Encoders to unit-norm float32 features."""


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
        return OnnxStudent.load(Path(rest), named)
    folder = Path(model.removeprefix("local-dir:"))
    formats = find_formats(folder)
    if format == "torch" and formats and not has_weights(folder):
        raise ValueError(
            f"{folder} has no weights for torch, only {', '.join(formats)}; name one of these with --format"
        )
    if format == "torch" or (format == "auto" and not formats):
        return load_torch(model)
    return OnnxStudent.load(folder, formats[0] if format == "auto" else format)


def load_torch(model: str) -> TorchStudent:
    try:
        from clipkd.models.load import load_model
    except ImportError as error:
        raise ValueError(f"{model} has no ONNX files, and torch needs {error.name}, which is not installed") from error
    return TorchStudent(load_model(model))
