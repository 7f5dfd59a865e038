"""Labelled images for zero-shot classification: CLIP_benchmark's webdataset layout and ImageNet as folders."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from clipkd.data.images import open_image
from clipkd.data.sources import IMAGE_EXTENSIONS
from clipkd.data.tar_index import as_text, index_whole_tar


@dataclass(frozen=True)
class Location:
    """Where one evaluation image lies: a file, or a span of a tar."""

    key: str
    path: Path
    offset: int = 0
    size: int = -1
    """Bytes; −1 reads to the end of the file."""

    def read(self) -> bytes:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


class ZeroShotSet(Dataset):
    """Every labelled image exactly once, in a fixed order; item = (preprocessed image, label, position)."""

    def __init__(
        self,
        locations: list[Location],
        labels: list[int],
        classnames: list[str] | None,
        templates: list[str] | None,
        preprocess: Callable[[Image.Image], Any],
        *,
        num_classes: int,
    ) -> None:
        self.locations, self.labels, self.preprocess, self.num_classes = locations, labels, preprocess, num_classes
        self.classnames: Sequence[str] | None = classnames
        self.templates: Sequence[str] | None = templates
        """As the data set's folder gives them; None where the task names them."""

    def __len__(self) -> int:
        return len(self.locations)

    def __getitem__(self, position: int) -> tuple[Any, int, int]:
        location = self.locations[position]
        try:
            image = self.preprocess(open_image(location.read(), location.key))
        except (OSError, ValueError, SyntaxError) as error:
            raise ValueError(f"{location.path}, sample {location.key}: cannot be decoded ({error})") from error
        return image, self.labels[position], position


def open_zeroshot_set(
    layout: str, root: str | Path, split: str, preprocess: Callable[[Image.Image], Any]
) -> ZeroShotSet:
    """Raises: FileNotFoundError or ValueError naming the file that is missing or wrong."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"no data folder {root}")
    opener = {"webdataset": open_webdataset_layout, "imagefolder": open_imagefolder_layout}[layout]
    return opener(root, split, preprocess)


def read_lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no {path}; the CLIP_benchmark layout needs it (eval/README.md)")
    lines = path.read_text(encoding="utf-8").rstrip().splitlines()
    if blank := [number for number, line in enumerate(lines, start=1) if not line.strip()]:
        raise ValueError(f"{path}: line {blank[0]} is blank; every line stands for one class, template or number")
    return lines


def open_webdataset_layout(root: Path, split: str, preprocess: Callable[[Image.Image], Any]) -> ZeroShotSet:
    """classnames.txt, zeroshot_classification_templates.txt, SPLIT/nshards.txt, SPLIT/0.tar… with KEY.webp + KEY.cls."""
    classnames = read_lines(root / "classnames.txt")
    templates = read_lines(root / "zeroshot_classification_templates.txt")
    counted = read_lines(root / split / "nshards.txt")
    if len(counted) != 1 or not counted[0].strip().isdigit():
        raise ValueError(f"{root / split / 'nshards.txt'} must hold one number, the count of shards")
    shards = [root / split / f"{number}.tar" for number in range(int(counted[0]))]
    if missing := [shard for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"no {missing[0]}, though {root / split / 'nshards.txt'} counts {len(shards)} shards")

    locations: list[Location] = []
    labels: list[int] = []
    for shard in shards:
        index = index_whole_tar(shard)
        keys = [as_text(key) for key in index.keys]
        image_offset, image_size = index.select(IMAGE_EXTENSIONS)
        label_offset, label_size = index.select(("cls",))
        if (incomplete := np.flatnonzero((image_size < 0) | (label_size < 0))).size:
            raise ValueError(
                f"{shard}: sample {keys[incomplete[0]]} has no image or no .cls ({incomplete.size} such samples)"
            )
        with shard.open("rb") as file:
            for row, key in enumerate(keys):
                file.seek(int(label_offset[row]))
                labels.append(parse_label(file.read(int(label_size[row])), len(classnames), f"{shard}: sample {key}"))
                locations.append(Location(f"{shard.stem}/{key}", shard, int(image_offset[row]), int(image_size[row])))
    return ZeroShotSet(locations, labels, classnames, templates, preprocess, num_classes=len(classnames))


def parse_label(text: bytes, num_classes: int, where: str) -> int:
    try:
        label = int(text)
    except ValueError:
        raise ValueError(f"{where} has the label {text[:20]!r}, not a number") from None
    if not 0 <= label < num_classes:
        raise ValueError(f"{where} has label {label}, outside the {num_classes} lines of classnames.txt")
    return label


def open_imagefolder_layout(root: Path, split: str, preprocess: Callable[[Image.Image], Any]) -> ZeroShotSet:
    """ROOT/SPLIT/CLASS/*.jpg, class index = order of the sorted folder names (ImageNet: synset ids); SPLIT may be ROOT."""
    folder = root / split if (root / split).is_dir() else root
    classes = sorted(path for path in folder.iterdir() if path.is_dir())
    if not classes:
        raise ValueError(f"{folder} has no class folders; sort the images into one folder per class (synset id)")
    locations, labels = [], []
    for label, class_folder in enumerate(classes):
        for path in sorted(class_folder.rglob("*")):
            if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
                locations.append(Location(str(path.relative_to(folder)), path))
                labels.append(label)
    if not locations:
        raise ValueError(f"{folder}: no image ({', '.join(IMAGE_EXTENSIONS)}) in its {len(classes)} class folders")
    return ZeroShotSet(locations, labels, None, None, preprocess, num_classes=len(classes))
