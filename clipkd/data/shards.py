"""Local webdataset shards, read at the byte ranges of their indexes."""

import hashlib
import os
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from clipkd import distributed, progress
from clipkd.config.data import SourceConfig
from clipkd.data.skips import DAMAGED_SHARD, HIDDEN_FILE, UNREADABLE_SHARD, BadSample, Skip, Skips
from clipkd.data.sources import (
    MAX_SAMPLE_BYTES,
    Pair,
    dotted_pairs,
    locate,
    make_pair,
    member_extensions,
    missing_member,
    several_dots,
)
from clipkd.data.tar_index import DUPLICATE, TarIndex, as_text, index_tar
from clipkd.files import is_hidden

MANY_SHARDS = 20
"""Shards of a process from which on a progress bar is shown."""

MAX_ROWS_KEPT = 1 << 20
"""Rows of opened shards that a process keeps in memory: several blocks of the order, about 70 MB."""


def find_shards(paths: tuple[str, ...]) -> list[Path]:
    """Tars in folders, single tars and brace patterns, in the order of `paths` and sorted within each.

    Raises: FileNotFoundError if a shard is missing; ValueError if one is named twice.
    """
    found: list[Path] = []
    for path in paths:
        if Path(path).is_dir():
            shards = sorted(shard for shard in Path(path).glob("*.tar") if not is_hidden(shard.name))
            if not shards:
                raise FileNotFoundError(f"no .tar in the folder {path} (data.path)")
        else:
            shards = [Path(path)] if Path(path).is_file() else sorted(Path(shard) for shard in expand_urls(path))
        found += shards
    missing = [shard for shard in found if not shard.is_file()]
    if missing:
        odd = any(sign in str(missing[0]) for sign in "*?,")
        hint = "; write a folder, a brace pattern such as shards/{00000..00099}.tar or a list [a.tar, b.tar]" * odd
        raise FileNotFoundError(f"no shard {missing[0]} ({len(missing)} of {len(found)} missing); see data.path{hint}")
    real = [shard.resolve() for shard in found]
    if len(set(real)) < len(real):
        twice = next(shard for shard, times in Counter(real).items() if times > 1)
        raise ValueError(f"data.path names {twice} more than once; weigh a source instead (data.weight)")
    return found


@dataclass(frozen=True)
class Rows:
    """Byte ranges of the complete samples of one shard."""

    keys: np.ndarray
    """[rows] bytes."""
    spans: np.ndarray
    """[rows, 2 or 3, 2] int64: offset and size of image, caption and, if configured, label; size −1 without a label."""
    stamp: tuple[int, int]
    """Size and modification time of the shard."""

    def digest(self) -> str:
        """Of keys, images and captions."""
        return hashlib.sha256(self.keys.tobytes() + self.spans[:, :2].tobytes()).hexdigest()


@dataclass(frozen=True)
class Survey:
    """Summary of one shard, sent to the other processes."""

    num_rows: int
    digest: str
    labelled: bool
    left_out: Skips
    damaged: list[Skip]


def stamp_of(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


class WebdatasetPairs:
    """Tar shards in the img2dataset layout: KEY.jpg (png, webp), KEY.txt or a key of KEY.json, optionally KEY.cls.

    Only the sizes of the shards stay in memory; the byte ranges of a shard are read from its index when needed.
    """

    def __init__(self, config: SourceConfig) -> None:
        """Index the shards. Call on every process: each indexes its share."""
        self.config, self.extensions = config, member_extensions(config)
        self.opened: OrderedDict[int, Rows] = OrderedDict()
        self.shards = distributed.together(lambda: find_shards(config.paths))
        self.surveys = self.survey_all()
        self.left_out, self.damaged = Skips(), list[Skip]()
        for survey in self.surveys:
            self.left_out.merge(survey.left_out)
            self.damaged += survey.damaged
        self.shard_sizes = np.array([survey.num_rows for survey in self.surveys], np.int64)
        self.ends = np.cumsum(self.shard_sizes)
        self.require_pairs()

    def survey_all(self) -> list[Survey]:
        """Summaries of all shards, in order, on every process."""
        share = self.shards[distributed.rank() :: distributed.world_size()]
        tracked = progress.track_on_main(share, "index shards", len(share)) if len(share) >= MANY_SHARDS else share
        parts = distributed.gather_objects(distributed.together(lambda: [self.survey(shard) for shard in tracked]))
        return [parts[number % len(parts)][number // len(parts)] for number in range(len(self.shards))]

    def survey(self, shard: Path) -> Survey:
        try:
            index, stamp = index_tar(shard), stamp_of(shard.stat())
        except OSError as error:
            skip = Skip(str(shard), UNREADABLE_SHARD, f"cannot be read ({error})")
            return Survey(0, "", False, Skips(), [skip])
        rows, left_out = self.complete_rows(index, shard, stamp)
        damaged = [Skip(str(shard), DAMAGED_SHARD, message)] if (message := str(index.damage)) else []
        labelled = bool((rows.spans[:, -1, 1] >= 0).any())
        return Survey(len(rows.keys), rows.digest(), labelled, left_out, damaged)

    def require_pairs(self) -> None:
        where = " ".join(self.config.paths)
        if not self.shard_sizes.any():
            if self.damaged and not self.left_out:
                raise ValueError(f"{self.damaged[0].key} {self.damaged[0].message}; no shard of {where} can be read")
            image, caption, *_ = (", ".join(f".{name}" for name in names) for names in self.extensions)
            hint = f"; {DUPLICATE}" if self.left_out.counts["duplicate key"] else ""
            raise ValueError(
                f"{where}: none of {self.left_out.num_samples} samples has both an image "
                f"({image}) and a {caption}; see data.caption_key{hint}"
            )
        if self.config.label_key and not any(survey.labelled for survey in self.surveys):
            raise ValueError(f"{where}: no sample has a .{self.extensions[2][0]} for its label; see data.label_key")

    def complete_rows(self, index: TarIndex, shard: Path, stamp: tuple[int, int]) -> tuple[Rows, Skips]:
        """Rows with an image and a caption, and skips for the other samples."""
        spans = np.stack([np.stack(index.select(names), axis=1) for names in self.extensions], axis=1)
        has_image, has_caption = spans[:, 0, 1] >= 0, spans[:, 1, 1] >= 0
        left_out = Skips()
        for missing, names in zip((~has_image, has_image & ~has_caption), self.extensions, strict=False):
            left_out.add(missing_member(f"{shard}/{as_text(key)}", names) for key in index.keys[missing])
        left_out.add(Skip(f"{shard}/{as_text(key)}", "duplicate key", DUPLICATE) for key in index.duplicates)
        left_out.add(Skip(f"{shard}/{as_text(name)}", HIDDEN_FILE, "is hidden") for name in index.hidden)
        dotted: dict[int, list[str]] = {}
        for place in np.flatnonzero(np.char.find(index.extension, b".") >= 0):
            dotted.setdefault(index.sample[place], []).append(as_text(index.extension[place]))
        for sample, extensions in dotted.items():
            key = f"{shard}/{as_text(index.keys[sample])}"
            left_out.add(several_dots(key, stem) for stem in dotted_pairs(extensions, self.extensions))
        complete = has_image & has_caption
        return Rows(index.keys[complete], spans[complete], stamp), left_out

    def parts(self) -> list[tuple[str, str]]:
        return [(str(shard), survey.digest) for shard, survey in zip(self.shards, self.surveys, strict=True)]

    def read(self, index: int, *, image: bool = True) -> Pair:
        shard, row = locate(self.ends, index)
        path = self.shards[shard]
        key = str(path)
        try:
            rows = self.rows(shard)
            key = f"{path}/{as_text(rows.keys[row])}"
            # Opened for each read: an epoch visits every shard, and there may be more of them than open files allowed.
            with path.open("rb", buffering=0) as file:
                if stamp_of(os.fstat(file.fileno())) != rows.stamp:
                    raise ValueError("it has been written again")
                first, *others = rows.spans[row].tolist()
                if self.config.caption_key is None:
                    others[0] = (0, 0)  # the image once more
                members = [read_span(file.fileno(), *span) for span in (first if image else (0, 0), *others)]
        except (OSError, ValueError, EOFError) as error:
            message = f"the shard can no longer be read ({error})"
            raise BadSample(key, UNREADABLE_SHARD, message) from error
        return make_pair(key, members, self.config)

    def rows(self, shard: int) -> Rows:
        """Raises: OSError if the shard is gone; ValueError if it has changed since the run began."""
        if shard in self.opened:
            self.opened.move_to_end(shard)
            return self.opened[shard]
        path = self.shards[shard]
        stamp = stamp_of(path.stat())
        rows, _ = self.complete_rows(index_tar(path), path, stamp)
        if rows.digest() != self.surveys[shard].digest:
            raise ValueError("it holds other samples than when the run began")
        self.opened[shard] = rows
        while len(self.opened) > 1 and sum(len(kept.keys) for kept in self.opened.values()) > MAX_ROWS_KEPT:
            self.opened.popitem(last=False)
        return rows


def read_span(file: int, offset: int, size: int) -> bytes | None:
    if size < 0:
        return None
    if size > MAX_SAMPLE_BYTES:
        raise ValueError(f"a member of {size} bytes, more than {MAX_SAMPLE_BYTES}")
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise EOFError(f"it ends before byte {offset + size}")
    return content
