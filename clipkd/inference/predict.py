"""`clipkd predict`: label images, or rank images by a text query; runs ONNX files without torch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from clipkd import files
from clipkd.errors import require, require_least
from clipkd.inference import images
from clipkd.inference.runtime import Student, load_student


@dataclass(frozen=True, kw_only=True)
class PredictConfig:
    model: str
    """An exported folder, or anything that clipkd eval --model takes."""
    images: tuple[str, ...]
    """Image files, and folders to search for them recursively. EXIF orientation is ignored, as in training."""
    labels: tuple[str, ...] = ()
    """Labels to choose from: prints the likeliest of each image. Give either labels or a query."""
    query: str | None = None
    """Text to search for: prints the nearest images. Give either a query or labels."""
    format: Literal["auto", "onnx", "onnx-fp16", "onnx-int8", "torch"] = "auto"
    """Weights to load from the folder; auto takes the most exact ONNX files, or torch if there are none."""
    template: str = "{c}"
    """Text around every label or the query, such as 'a photo of a {c}'."""
    top: int = 5
    """Labels per image, or images per query, to print."""
    batch_size: int = 32
    """Images or texts per batch."""
    index: str | None = None
    """File (.npz) of image features: later calls encode only new and changed images."""
    json: bool = False
    """Print one line of JSON per image instead of text."""

    def __post_init__(self) -> None:
        require(
            bool(self.labels) != (self.query is not None),
            "give either --labels 'a cat' 'a dog' to choose from, or one --query 'a red car' to look for",
        )
        require(all(text.strip() for text in self.texts), "a label or the query is empty; give words")
        twice = sorted({label for label in self.labels if self.labels.count(label) > 1})
        require(not twice, f"labels has {', '.join(map(repr, twice))} more than once; give each label once")
        require("{c}" in self.template, f"template is {self.template!r}; it must contain {{c}}, where the label goes")
        require_least(self, top=1, batch_size=1)

    @property
    def texts(self) -> tuple[str, ...]:
        return self.labels if self.query is None else (self.query,)


def predict(config: PredictConfig) -> Iterator[str]:
    """Lines to print: a headline unless config.json, then one per image. Images that are left out are named on stderr.

    Raises: ValueError if the model, the index, a named image or folder, or every image cannot be used.
    """
    named = images.find_images(config.images)
    student = load_student(config.model, config.format)
    if len(config.labels) == 1 and student.logit_bias is None:
        raise ValueError(
            f"labels has only {config.labels[0]!r}, whose share among all labels is 100 %; give two or more, or a --query"
        )
    prompts = [config.template.replace("{c}", text) for text in config.texts]
    texts = np.concatenate([student.encode_texts(part) for part in images.batches(prompts, config.batch_size)])
    images.require_finite(texts, prompts)
    found = images.encode_images(student, named, index=config.index, batch_size=config.batch_size)
    cosines = np.stack(list(found.values())) @ texts.T
    if config.labels:
        return name_images(config, student, list(found), cosines)
    return rank_images(config, student, list(found), cosines[:, 0])


def name_images(config: PredictConfig, student: Student, paths: Sequence[str], cosines: np.ndarray) -> Iterator[str]:
    kind = "softmax" if student.logit_bias is None else "sigmoid"
    if not config.json:
        meaning = {"softmax": f"among these {len(config.labels)} labels", "sigmoid": "of each label on its own"}[kind]
        yield f"{student.format}: probability {meaning} ({kind})"
    width = max(map(len, paths))
    for path, row in zip(paths, probabilities(cosines, student.logit_scale, student.logit_bias), strict=True):
        best = [(config.labels[place], float(row[place])) for place in np.argsort(-row, kind="stable")[: config.top]]
        if config.json:
            labels = [{"label": label, "probability": probability} for label, probability in best]
            yield files.to_json({"image": path, "runtime": student.format, "probabilities": kind, "labels": labels})
        else:
            shown = (f"{label} {100 * probability:.3g} %" for label, probability in best)
            yield "  ".join([images.printable(path).ljust(width), *shown])


def rank_images(config: PredictConfig, student: Student, paths: Sequence[str], cosines: np.ndarray) -> Iterator[str]:
    best = np.argsort(-cosines, kind="stable")[: config.top]
    if not config.json:
        yield f"{student.format}: cosines of the nearest {len(best)} of {len(paths)} images"
    for rank, place in enumerate(map(int, best), start=1):
        path, cosine = paths[place], float(cosines[place])
        found = {"rank": rank, "image": path, "runtime": student.format, "cosine": cosine}
        yield files.to_json(found) if config.json else f"{cosine:.4f}  {images.printable(path)}"


def probabilities(cosines: np.ndarray, logit_scale: float, logit_bias: float | None) -> np.ndarray:
    """[n, k] cosines → [n, k] float64: softmax per row, or sigmoid per label for a model with a logit bias."""
    logits = logit_scale * cosines.astype(np.float64)
    if logit_bias is not None:
        return 1 / (1 + np.exp(-(logits + logit_bias)))
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return exponentials / exponentials.sum(axis=1, keepdims=True)
