"""Sources of image-text pairs: one interface over webdataset shards and Hugging Face data sets."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from webdataset.shardlists import expand_urls

from clipkd.config import DataConfig
from clipkd.data.tar_index import index_tar

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Pair:
    """One sample, still encoded."""

    key: str
    """Where it came from, for error messages."""
    image: bytes
    captions: tuple[str, ...]


class PairSource(Protocol):
    num_incomplete: int
    """Samples left out because they lack an image or a caption."""

    def __len__(self) -> int: ...

    def fingerprint(self) -> str:
        """Changes when samples are added, removed or put in another order."""
        ...

    def read(self, index: int) -> Pair: ...


def open_source(config: DataConfig) -> PairSource:
    """Raises: FileNotFoundError or ValueError that name what is missing, before anything is read in earnest."""
    if not config.path:
        raise ValueError("data.path is empty; set it to a folder of shards or a Hugging Face data set")
    source = HuggingFacePairs(config) if config.format == "huggingface" else WebdatasetPairs(config)
    source.read(0)  # a wrong caption key shows here, not in a loader process after the run has begun
    return source


def find_shards(path: str) -> list[Path]:
    """Local tars of a folder, a single tar or a brace pattern, sorted.

    Raises: FileNotFoundError if there is none or one of them is missing.
    """
    if "://" in path or path.startswith("pipe:"):
        raise ValueError(f"{path!r} is not local; clipkd reads local shards by offset, so copy or mount it first")
    if Path(path).is_dir():
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            raise FileNotFoundError(f"no .tar in the folder {path}")
        return shards
    shards = sorted(Path(shard) for shard in expand_urls(path))
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise FileNotFoundError(f"no shard {missing[0]} ({len(missing)} of {len(shards)} missing)")
    return shards


def as_captions(value: Any, where: str) -> tuple[str, ...]:
    captions = (value,) if isinstance(value, str) else value
    if not isinstance(captions, list | tuple) or not all(isinstance(caption, str) for caption in captions):
        raise ValueError(f"{where}: expected a caption or a list of captions, got {type(value).__name__}")
    captions = tuple(caption.strip() for caption in captions if caption.strip())
    if not captions:
        raise ValueError(f"{where}: every caption is empty")
    return captions


class WebdatasetPairs:
    """Tar shards in the img2dataset layout: KEY.jpg (png, webp) with KEY.txt or a key of KEY.json.

    Samples that lack either are left out when the shards are indexed, and counted in `num_incomplete`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.caption_key = config.caption_key
        self.shards = find_shards(config.path)
        caption_extension = "txt" if config.caption_key == "txt" else "json"
        columns: list[tuple[np.ndarray, ...]] = []
        self.num_incomplete = 0
        for number, shard in enumerate(self.shards):
            index = index_tar(shard)
            image, caption = index.select(IMAGE_EXTENSIONS), index.select((caption_extension,))
            whole = (image[1] >= 0) & (caption[1] >= 0)
            self.num_incomplete += int((~whole).sum())
            columns.append((np.full(whole.sum(), number), *(array[whole] for array in (*image, *caption))))
        self.locations = np.stack([np.concatenate(column) for column in zip(*columns, strict=True)], axis=1)
        if not len(self):
            raise ValueError(
                f"{config.path}: none of {self.num_incomplete} samples has both an image "
                f"({', '.join(IMAGE_EXTENSIONS)}) and a .{caption_extension}; see data.caption_key"
            )

    def __len__(self) -> int:
        return len(self.locations)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.locations.tobytes()).hexdigest()

    def read(self, index: int) -> Pair:
        shard, image_offset, image_size, caption_offset, caption_size = self.locations[index].tolist()
        key = f"{self.shards[shard]} at byte {image_offset}"
        # Opened anew each time: a shuffled epoch visits every shard, and there may be more of them than open files allowed.
        with self.shards[shard].open("rb", buffering=0) as file:
            image = os.pread(file.fileno(), image_size, image_offset)
            caption = os.pread(file.fileno(), caption_size, caption_offset)
        try:
            value: Any = caption.decode("utf-8") if self.caption_key == "txt" else json.loads(caption)[self.caption_key]
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"{key}: its json has no key {self.caption_key!r}; see data.caption_key") from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{key}: its caption cannot be read ({error})") from error
        return Pair(key, image, as_captions(value, key))


class HuggingFacePairs:
    """A Hugging Face data set with an image column and a caption column (a string or a list of strings)."""

    num_incomplete = 0

    def __init__(self, config: DataConfig) -> None:
        import datasets

        self.path, self.image_column, self.caption_column = config.path, config.image_column, config.caption_key
        self.rows = load_rows(config.path, config.split)
        for option, column in (("data.image_column", self.image_column), ("data.caption_key", self.caption_column)):
            if column not in self.rows.column_names:
                raise ValueError(f"{config.path} has no column {column!r}, only {self.rows.column_names}; set {option}")
        self.rows = self.rows.select_columns([self.image_column, self.caption_column])
        self.rows = self.rows.cast_column(self.image_column, datasets.Image(decode=False))
        if not len(self.rows):
            raise ValueError(f"{config.path} holds no rows in split {config.split!r}")

    def __len__(self) -> int:
        return len(self.rows)

    def fingerprint(self) -> str:
        return self.rows._fingerprint

    def read(self, index: int) -> Pair:
        row = self.rows[index]
        key = f"{self.path} row {index}"
        image: Mapping[str, Any] | None = row[self.image_column]
        if image is None:
            raise ValueError(f"{key} has no image in column {self.image_column!r}")
        data = image["bytes"] if image["bytes"] is not None else Path(image["path"]).read_bytes()
        return Pair(key, data, as_captions(row[self.caption_column], key))


def load_rows(path: str, split: str) -> Any:
    """A map-style split of a hub data set, of a save_to_disk folder, or of a folder of parquet, arrow or image files."""
    import datasets

    try:
        if Path(path).is_dir() and any((Path(path) / name).is_file() for name in ("state.json", "dataset_dict.json")):
            stored = datasets.load_from_disk(path)
            return stored[split] if isinstance(stored, datasets.DatasetDict) else stored
        return datasets.load_dataset(path, split=split)
    except (KeyError, ValueError, IndexError, FileNotFoundError, ConnectionError) as error:
        raise ValueError(f"cannot open the Hugging Face data set {path!r}, split {split!r}: {error}") from error
