"""Run an exported student's ONNX files: preprocessing, tokens, features. Needs onnxruntime and tokenizers, not torch."""

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from clipkd.errors import short
from clipkd.files import sha256

if TYPE_CHECKING:
    import onnxruntime
    import tokenizers

SUFFIXES = {"onnx": "", "onnx-fp16": "_fp16", "onnx-int8": "_quantized"}
"""Format → suffix of vision_model and text_model in onnx/, as in transformers.js."""

NEEDED = {
    *("clipkd_version", "source_sha256", "tokenizer_sha256", "embed_dim", "logit_scale", "logit_bias"),
    *("context_length", "dynamic_sequence", "pad_id", "parameters", "macs"),
    *("image_size", "image_mean", "image_std", "interpolation", "resize_mode"),
}
"""Metadata that the files must have."""


def onnx_file(folder: Path, tower: str, format: str) -> Path:
    """tower: vision or text."""
    return folder / "onnx" / f"{tower}_model{SUFFIXES[format]}.onnx"


def find_formats(folder: Path) -> list[str]:
    """Formats of which a folder has both towers, the most exact first."""
    return [format for format in SUFFIXES if all(onnx_file(folder, t, format).is_file() for t in ("vision", "text"))]


@dataclass(frozen=True)
class OnnxStudent:
    """Two ONNX Runtime sessions with their tokenizer and metadata. Features are unit-norm float32."""

    folder: Path
    format: str
    vision: "onnxruntime.InferenceSession"
    text: "onnxruntime.InferenceSession"
    tokenizer: "tokenizers.Tokenizer"
    about: dict[str, Any]
    """The metadata of the files: sizes, mean and std, logit scale, context length, hashes."""

    @classmethod
    def load(cls, folder: Path, format: str = "onnx", *, threads: int | None = None) -> "OnnxStudent":
        """threads: per session; None takes every core.

        Raises: ValueError if the folder has no such files, they are damaged or not clipkd's, or onnxruntime is not installed.
        """
        try:
            import onnxruntime
            import tokenizers
        except ImportError as error:
            raise ValueError(f"{folder} needs {error.name}: pip install 'clipkd[onnx]'") from error
        if format not in find_formats(folder):
            found = find_formats(folder) or "none"
            raise ValueError(f"{folder} has no {format} files in onnx/ (found: {found}); clipkd export … --to {format}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        sessions = []
        for tower in ("vision", "text"):
            path = onnx_file(folder, tower, format)
            try:
                # CPU kernels only, with which parity.json was measured.
                sessions.append(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))
            except Exception as error:  # onnxruntime's own classes derive from Exception alone
                raise ValueError(f"{path} cannot be loaded: {short(error)}") from error
        vision, text = sessions
        stored = [session.get_modelmeta().custom_metadata_map for session in sessions]
        if missing := NEEDED - {key for each in stored for key in each}:
            lacking = ", ".join(sorted(missing))
            raise ValueError(f"{folder / 'onnx'} was not written by this clipkd, it lacks {lacking}; export it again")
        if stored[0].get("source_sha256") != stored[1].get("source_sha256"):
            raise ValueError(f"{folder / 'onnx'} mixes towers of two models; export it again")
        about = {key: json.loads(value) for key, value in {**stored[1], **stored[0]}.items()}
        return cls(folder, format, vision, text, load_tokenizer(folder, about, tokenizers), about)

    @property
    def logit_scale(self) -> float:
        """Multiplier of the cosines: 1 / temperature."""
        return self.about["logit_scale"]

    @property
    def logit_bias(self) -> float | None:
        """Added to the logits of a sigmoid model; None for softmax models."""
        return self.about["logit_bias"]

    def image_sha256(self) -> str:
        """Hash of everything that determines an image's features."""
        return sha256(onnx_file(self.folder, "vision", self.format))

    def preprocess(self, image: Image.Image) -> np.ndarray:
        """An image → [3, h, w]."""
        return preprocess(image, self.about)

    def tokenize(self, texts: Sequence[str]) -> np.ndarray:
        """Texts → [n, t] token ids, padded to the longest (or the context, where the text tower looks at padding)."""
        return np.array([encoding.ids for encoding in self.tokenizer.encode_batch(list(texts))], np.int64)

    def run(self, tower: str, inputs: np.ndarray) -> np.ndarray:
        """vision: [n, 3, h, w] pixels → [n, d]; text: [n, t] ids → [n, d]. One pass, whatever n is."""
        session, name = (self.vision, "pixel_values") if tower == "vision" else (self.text, "input_ids")
        return session.run(None, {name: inputs})[0]  # type: ignore[return-value]

    def encode_pixels(self, pixels: np.ndarray) -> np.ndarray:
        """[n, 3, h, w] → [n, d]; a row does not depend on the other images of the batch."""
        # int8 activations are scaled by the largest of their batch.
        parts = [pixels] if self.format != "onnx-int8" else [each[None] for each in pixels]
        return np.concatenate([self.run("vision", part) for part in parts])

    def encode_ids(self, ids: np.ndarray) -> np.ndarray:
        """[n, t] → [n, d]; a row does not depend on the other texts of the batch, nor on padding that the tower ignores."""
        parts = [ids] if self.format != "onnx-int8" else [self.without_padding(each)[None] for each in ids]
        return np.concatenate([self.run("text", part) for part in parts])

    def without_padding(self, ids: np.ndarray) -> np.ndarray:
        if not self.about["dynamic_sequence"]:
            return ids
        is_text = ids != self.about["pad_id"]
        return ids[: max(2, int(is_text.nonzero()[0].max(initial=0)) + 2)]  # the end token may be the padding token

    def encode_images(self, images: Sequence[Image.Image]) -> np.ndarray:
        return self.encode_pixels(np.stack([self.preprocess(image) for image in images]))

    def encode_texts(self, texts: Sequence[str]) -> np.ndarray:
        """Texts → [n, d]; warns of those that are longer than the context."""
        encodings = self.tokenizer.encode_batch(list(texts))
        for text in (text for text, encoding in zip(texts, encodings, strict=True) if encoding.overflowing):
            warnings.warn(f"only the first {self.about['context_length']} tokens count of {text!r}", stacklevel=2)
        return self.encode_ids(np.array([encoding.ids for encoding in encodings], np.int64))

    def files(self) -> list[Path]:
        towers = [onnx_file(self.folder, tower, self.format) for tower in ("vision", "text")]
        return [*towers, self.folder / "tokenizer.json"]


def preprocess(image: Image.Image, about: Mapping[str, Any]) -> np.ndarray:
    """An image → [3, h, w], as torchvision makes it of an RGB image, to float rounding; others become RGB first.

    Resize by Pillow, crop the middle, normalise; about: the metadata of the files.
    """
    height, width = about["image_size"]
    how = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}[about["interpolation"]]
    image = image.convert("RGB")
    if about["resize_mode"] == "squash":
        image = image.resize((width, height), how)
    else:
        shorter = min(image.size)
        image = image.resize((int(height * image.width / shorter), int(height * image.height / shorter)), how)
        left, top = round((image.width - width) / 2), round((image.height - height) / 2)
        image = image.crop((left, top, left + width, top + height))
    mean, std = (np.array(about[name], np.float32) for name in ("image_mean", "image_std"))
    pixels = (np.asarray(image, np.float32) / np.float32(255) - mean) / std
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def load_tokenizer(folder: Path, about: dict[str, Any], tokenizers: Any) -> Any:
    """Raises: ValueError if it is not the one that the towers were exported with."""
    path = folder / "tokenizer.json"
    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != about["tokenizer_sha256"]:
            raise ValueError("it is not the one that the towers were exported with")
        return tokenizers.Tokenizer.from_str(content.decode())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used: {error}") from error
