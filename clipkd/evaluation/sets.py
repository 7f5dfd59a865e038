"""Evaluation sets: where every image is stored, with its label, labels or captions."""

import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from clipkd import files
from clipkd.data.tables import stored_image
from clipkd.evaluation.tasks import Kind
from clipkd.images import open_image, to_rgb

CLASS_KINDS = ("classification", "multilabel")


@dataclass(frozen=True)
class Span:
    """An image as a file, or as a range of bytes in a tar."""

    key: str
    path: Path
    offset: int = 0
    size: int = -1
    """Bytes; −1 reads to the end of the file."""

    @property
    def where(self) -> str:
        """The file that an error names."""
        return str(self.path)

    @property
    def name(self) -> str:
        return f"{self.where}: sample {self.key}"

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)

    def stamp(self, stat: Callable[[Path], os.stat_result]) -> tuple[int, int | str]:
        """Length in bytes, and a time that changes when the content does."""
        found = stat(self.path)
        return self.size if self.size >= 0 else found.st_size, found.st_mtime_ns


@dataclass(frozen=True)
class Row:
    """An image as a row of a Hugging Face data set; the same interface as Span."""

    key: str
    where: str
    rows: Any
    number: int
    folders: list[tuple[int, Path]]
    """As `load_rows` gives them."""

    @property
    def name(self) -> str:
        return f"{self.where}: sample {self.key}"

    def read(self) -> bytes:
        return stored_image(self.rows[self.number]["image"], self.folders, self.number, self.key)

    def stamp(self, stat: Callable[[Path], os.stat_result]) -> tuple[int, int | str]:
        return -1, str(self.rows._fingerprint)  # lengths would need a pass over the images


Picture = Span | Row


@dataclass(frozen=True)
class EvaluationSet:
    """Every image exactly once, in a fixed order, with its label, labels or captions."""

    root: str
    kind: Kind
    pictures: Sequence[Picture]
    labels: Sequence[int] = ()
    """classification: class of each image."""
    targets: np.ndarray | None = None
    """multilabel: [images, classes] bool."""
    captions: Sequence[tuple[str, ...]] = ()
    """retrieval: each image's captions; pairs: the true caption, then the false one."""
    classnames: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    """With the placeholder {c}. None if the data folder has none and the task must give them."""
    folders: Sequence[str] = ()
    """imagefolder: name of each class's folder."""

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def keys(self) -> list[str]:
        return [picture.key for picture in self.pictures]

    @property
    def num_classes(self) -> int:
        return len(self.folders or self.classnames or ())

    @functools.cached_property
    def stamps(self) -> list[tuple[str, int, int | str]]:
        stat = functools.cache(os.stat)  # of a tar once, not once per image
        return [(picture.key, *picture.stamp(stat)) for picture in self.pictures]

    @functools.cached_property
    def sha256(self) -> str:
        """Of keys, lengths and labels or captions: the same wherever the data is stored."""
        found: Any = self.labels or self.captions
        if self.targets is not None:
            found = self.targets.astype(int).tolist()
        about = [self.kind, [(key, size) for key, size, _ in self.stamps], found]
        return files.sha256_of(about)

    @functools.cached_property
    def stamps_sha256(self) -> str:
        """Of the content, its place and the files' times: differs when a file is rewritten."""
        return files.sha256_of([self.root, self.stamps, self.sha256])


class Images(Dataset):
    """(preprocessed image, position) of every picture; converted to RGB first, as a palette cannot be interpolated."""

    def __init__(self, pictures: Sequence[Picture], preprocess: Callable[[Image.Image], Any]) -> None:
        self.pictures, self.preprocess = pictures, preprocess

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, position: int) -> tuple[Any, int]:
        picture = self.pictures[position]
        try:
            return self.preprocess(to_rgb(open_image(picture.read()))), position
        except Exception as error:  # Pillow raises anything on damaged files
            raise ValueError(f"{picture.name}: cannot be decoded ({error})") from error


def check_label(label: Any, num_classes: int, where: str) -> int:
    if not isinstance(label, int) or not 0 <= label < num_classes:
        raise ValueError(f"{where} has label {label}, outside the {num_classes} class names")
    return label


def check_vector(vector: Any, num_classes: int, where: str) -> np.ndarray:
    vector = np.asarray(vector)
    if vector.shape != (num_classes,) or not np.isin(vector, (0, 1)).all():
        raise ValueError(f"{where}: its labels must be {num_classes} zeros and ones, one per class name")
    return vector.astype(bool)


def check_captions(kind: Kind, captions: Any, where: str) -> tuple[str, ...]:
    if not isinstance(captions, list) or not captions or not all(isinstance(text, str) for text in captions):
        raise ValueError(f"{where} has no captions")
    if kind == "pairs" and len(captions) != 2:
        raise ValueError(f"{where} has {len(captions)} captions; a pair is the true one and a false one")
    return tuple(captions)


def with_labels(data: EvaluationSet, found: list[Any]) -> EvaluationSet:
    """The set with a label, a vector of zeros and ones, or captions for each image, according to its kind.

    Raises: ValueError naming a wrong sample. Labels are checked with the class names, which the task may give.
    """
    if not found:
        raise ValueError(f"{data.root} holds no samples")
    if data.kind == "classification":
        return replace(data, labels=found)
    pairs = list(zip(found, (picture.name for picture in data.pictures), strict=True))
    if data.kind == "multilabel":
        width = data.num_classes or np.size(found[0])
        return replace(data, targets=np.stack([check_vector(value, width, name) for value, name in pairs]))
    return replace(data, captions=[check_captions(data.kind, value, name) for value, name in pairs])
