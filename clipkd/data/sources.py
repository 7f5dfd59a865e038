"""Sources of image-text pairs: one interface over webdataset shards and Hugging Face data sets."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from webdataset.shardlists import expand_urls

from clipkd.config import DataConfig
from clipkd.data.tar_index import index_tar

UNLABELLED = -1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")


@dataclass(frozen=True)
class Pair:
    """One sample, still encoded."""

    key: str
    """Where it came from, for error messages."""
    image: bytes
    captions: tuple[str, ...]
    label: int = UNLABELLED


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


def as_label(value: Any, where: str) -> int:
    """A class number; −1 for a sample without one."""
    if value is None:
        return UNLABELLED
    if isinstance(value, str | int) and re.fullmatch(r"-1|\d+", str(value).strip()):
        return int(value)
    raise ValueError(
        f"{where}: its label is {value!r}; it must be a class number from 0 on, or null; see data.label_key"
    )


class WebdatasetPairs:
    """Tar shards in the img2dataset layout: KEY.jpg (png, webp) with KEY.txt or a key of KEY.json, maybe KEY.cls.

    Samples that lack either are left out when the shards are indexed, and counted in `num_incomplete`.
    """

    def __init__(self, config: DataConfig) -> None:
        self.caption_key, self.label_key = config.caption_key, config.label_key
        self.shards = find_shards(config.path)
        caption_extension = "txt" if config.caption_key == "txt" else "json"
        label_extension = "cls" if config.label_key == "cls" else "json"
        columns: list[tuple[np.ndarray, ...]] = []
        self.num_incomplete = 0
        for number, shard in enumerate(self.shards):
            index = index_tar(shard)
            members = [index.select(IMAGE_EXTENSIONS), index.select((caption_extension,))]
            whole = (members[0][1] >= 0) & (members[1][1] >= 0)
            if config.label_key:
                members.append(index.select((label_extension,)))
            self.num_incomplete += int((~whole).sum())
            arrays = [array[whole] for member in members for array in member]
            columns.append((np.full(whole.sum(), number), *arrays))
        self.locations = np.stack([np.concatenate(column) for column in zip(*columns, strict=True)], axis=1)
        if config.label_key and len(self) and not (self.locations[:, -1] >= 0).any():
            raise ValueError(f"{config.path}: no sample has a .{label_extension} for its label; see data.label_key")
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
        shard, image_offset, image_size, caption_offset, caption_size, *label_place = self.locations[index].tolist()
        key = f"{self.shards[shard]} at byte {image_offset}"
        # Opened anew each time: a shuffled epoch visits every shard, and there may be more of them than open files allowed.
        with self.shards[shard].open("rb", buffering=0) as file:
            image = os.pread(file.fileno(), image_size, image_offset)
            caption = os.pread(file.fileno(), caption_size, caption_offset)
            labelled = bool(label_place) and label_place[1] >= 0
            label = os.pread(file.fileno(), label_place[1], label_place[0]) if labelled else b""
        captions = as_captions(read_member(caption, self.caption_key, "txt", key, "data.caption_key"), key)
        if not (labelled and self.label_key):
            return Pair(key, image, captions)
        value = read_member(label, self.label_key, "cls", key, "data.label_key")
        return Pair(key, image, captions, as_label(value, key))


def read_member(content: bytes, key: str, extension: str, where: str, option: str) -> Any:
    """The text of a member, if the key is its extension, else that key of its json. `option` set the key."""
    try:
        return content.decode("utf-8") if key == extension else json.loads(content)[key]
    except (KeyError, TypeError, IndexError):
        raise ValueError(f"{where}: its json has no key {key!r}; see {option}") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: its {option.split('.')[1][:-4]} cannot be read ({error})") from error


class HuggingFacePairs:
    """A Hugging Face data set with an image column, a caption column (a string or a list of strings), maybe a label's."""

    num_incomplete = 0

    def __init__(self, config: DataConfig) -> None:
        import datasets

        self.path, self.image_column, self.caption_column = config.path, config.image_column, config.caption_key
        self.label_column = config.label_key
        self.rows = load_rows(config.path, config.split)
        columns = {"data.image_column": self.image_column, "data.caption_key": self.caption_column}
        if self.label_column:
            columns["data.label_key"] = self.label_column
        for option, column in columns.items():
            if column not in self.rows.column_names:
                raise ValueError(f"{config.path} has no column {column!r}, only {self.rows.column_names}; set {option}")
        self.rows = self.rows.select_columns(list(columns.values()))
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
        label = as_label(row[self.label_column], key) if self.label_column else UNLABELLED
        return Pair(key, data, as_captions(row[self.caption_column], key), label)


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
