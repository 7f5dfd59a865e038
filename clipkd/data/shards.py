"""Local webdataset shards, any sample of which is a read at an offset."""

import hashlib
import os
from collections import Counter, OrderedDict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.shardlists import expand_urls

from clipkd import distributed
from clipkd.config.data import SourceConfig
from clipkd.data.skips import DAMAGED_SHARD, UNREADABLE_SHARD, BadSample, Skip, Skips
from clipkd.data.sources import IMAGE_EXTENSIONS, MOST_SAMPLE_BYTES, Pair, Track, make_pair, member_captions
from clipkd.data.tar_index import DUPLICATE, TarIndex, as_text, index_tar, is_indexed

MANY_SHARDS = 20
"""New ones from which on their indexing shows its progress."""

MOST_ROWS_KEPT = 1 << 20
"""Rows of opened shards that a process keeps in memory: some blocks of the order, about 70 MB."""


def find_shards(paths: tuple[str, ...]) -> list[Path]:
    """Tars of folders, single tars and brace patterns; sorted within each.

    Raises: FileNotFoundError if there is none or one of them is missing.
    """
    found: list[Path] = []
    for path in paths:
        if Path(path).is_dir():
            shards = sorted(Path(path).glob("*.tar"))
            if not shards:
                raise FileNotFoundError(f"no .tar in the folder {path} (data.path)")
        else:
            shards = sorted(Path(shard) for shard in expand_urls(path))
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
    """Where the whole samples of one shard lie."""

    keys: np.ndarray
    """[rows] bytes."""
    spans: np.ndarray
    """[rows, 2 or 3, 2] int64: offset and size of image, caption and, if wanted, label; size −1 where there is none."""
    stamp: tuple[int, int]
    """Size and time of change of the shard that they lie in."""

    def digest(self, *, labels: bool = True) -> str:
        spans = self.spans if labels else np.ascontiguousarray(self.spans[:, :2])
        return hashlib.sha256(self.keys.tobytes() + spans.tobytes()).hexdigest()


def stamp_of(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_size, stat.st_mtime_ns


class WebdatasetPairs:
    """Tar shards in the img2dataset layout: KEY.jpg (png, webp) with KEY.txt or a key of KEY.json, maybe KEY.cls.

    Only the count of each shard stays in memory; where its samples lie is read from its index when one is asked for.
    """

    def __init__(self, config: SourceConfig, *, track: Track) -> None:
        """Call on every process: each indexes its share of the shards."""
        self.config = config
        self.caption_extension = "txt" if config.caption_key == "txt" else "json"
        self.label_extension = "cls" if config.label_key == "cls" else "json"
        self.opened: OrderedDict[int, Rows] = OrderedDict()
        shards = distributed.together(lambda: find_shards(config.paths))
        share = [
            (number, shards[number]) for number in range(distributed.rank(), len(shards), distributed.world_size())
        ]
        new = [shard for _, shard in share if not is_indexed(shard)]
        for shard in track(new, "index shards", len(new)) if len(new) >= MANY_SHARDS else new:
            try:
                index_tar(shard)
            except OSError:
                continue  # told of below
        own = distributed.together(lambda: [(number, self.survey(shard)) for number, shard in share])
        parts = distributed.gather_objects(own)
        surveys = [survey for _, survey in sorted((item for part in parts for item in part), key=lambda item: item[0])]
        self.left_out, self.damaged = Skips(), []
        for survey in surveys:
            self.left_out.merge(survey.left_out)
            self.damaged += survey.damaged
        used = [number for number, survey in enumerate(surveys) if survey.num_rows]
        self.num_shards = len(shards)
        self.shards = [shards[number] for number in used]
        self.digests = [surveys[number].digest for number in used]
        self.unlabelled_digests = [surveys[number].unlabelled_digest for number in used]
        self.shard_sizes = np.array([surveys[number].num_rows for number in used], np.int64)
        self.starts = np.cumsum(self.shard_sizes) - self.shard_sizes
        self.require_pairs(any(survey.labelled for survey in surveys))

    def require_pairs(self, labelled: bool) -> None:
        where = " ".join(self.config.paths)
        if not self.shards:
            if self.damaged and not self.left_out:
                raise ValueError(f"{self.damaged[0].key} {self.damaged[0].message}; no shard of {where} can be read")
            apart = f"; {DUPLICATE}" if self.left_out.counts["duplicate key"] else ""
            raise ValueError(
                f"{where}: none of {self.left_out.counts.total()} samples has both an image "
                f"({', '.join(IMAGE_EXTENSIONS)}) and a .{self.caption_extension}; see data.caption_key{apart}"
            )
        if self.config.label_key and not labelled:
            raise ValueError(f"{where}: no sample has a .{self.label_extension} for its label; see data.label_key")

    def survey(self, shard: Path) -> "Survey":
        try:
            index, stamp = index_tar(shard), stamp_of(shard.stat())
        except OSError as error:
            return Survey(0, "", "", Skips(), [Skip(str(shard), UNREADABLE_SHARD, f"cannot be read ({error})")], False)
        rows, left_out = self.whole_rows(index, shard, stamp)
        message = str(index.damage)
        damaged = [Skip(str(shard), DAMAGED_SHARD, message)] if message else []
        labelled = bool((rows.spans[:, -1, 1] >= 0).any())
        return Survey(len(rows.keys), rows.digest(), rows.digest(labels=False), left_out, damaged, labelled)

    def whole_rows(self, index: TarIndex, shard: Path, stamp: tuple[int, int]) -> tuple[Rows, Skips]:
        extensions = [IMAGE_EXTENSIONS, (self.caption_extension,)]
        if self.config.label_key:
            extensions.append((self.label_extension,))
        spans = np.stack([np.stack(index.select(names), axis=1) for names in extensions], axis=1)
        has_image, has_caption = spans[:, 0, 1] >= 0, spans[:, 1, 1] >= 0
        left_out = Skips()
        for missing, cause, member in (
            (~has_image, "no image", "no " + ", ".join(f".{name}" for name in IMAGE_EXTENSIONS)),
            (has_image & ~has_caption, "no caption", f"no .{self.caption_extension}"),
        ):
            left_out.add(Skip(f"{shard}/{as_text(key)}", cause, f"has {member}") for key in index.keys[missing])
        left_out.add(Skip(f"{shard}/{as_text(key)}", "duplicate key", DUPLICATE) for key in index.duplicates)
        whole = has_image & has_caption
        return Rows(index.keys[whole], spans[whole], stamp), left_out

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(self.digests).encode()).hexdigest()

    def rows(self, shard: int) -> Rows:
        """Raises: OSError if the shard is gone; ValueError if it has changed since the run began."""
        if shard in self.opened:
            self.opened.move_to_end(shard)
            return self.opened[shard]
        path = self.shards[shard]
        stamp = stamp_of(path.stat())
        rows, _ = self.whole_rows(index_tar(path), path, stamp)
        if rows.digest() != self.digests[shard]:
            raise ValueError("it holds other samples than when the run began")
        self.opened[shard] = rows
        while len(self.opened) > 1 and sum(len(kept.keys) for kept in self.opened.values()) > MOST_ROWS_KEPT:
            self.opened.popitem(last=False)
        return rows

    def parts(self) -> list[tuple[str, str]]:
        return [(str(path), digest) for path, digest in zip(self.shards, self.unlabelled_digests, strict=True)]

    def read(self, index: int) -> Pair:
        key, (image, caption, *label) = self.read_members(index, slice(None))
        assert image is not None
        assert caption is not None
        return make_pair(key, image, caption, label[0] if label else None, self.config)

    def read_captions(self, index: int) -> tuple[str, ...]:
        key, (caption,) = self.read_members(index, slice(1, 2))
        assert caption is not None
        return member_captions(key, caption, self.config)

    def read_members(self, index: int, wanted: slice) -> tuple[str, list[bytes | None]]:
        """Key and contents of image, caption and label, or those of them that are wanted. Raises: BadSample."""
        shard = int(np.searchsorted(self.starts, index, "right")) - 1
        path, row = self.shards[shard], index - int(self.starts[shard])
        key = str(path)
        try:
            rows = self.rows(shard)
            key = f"{path}/{as_text(rows.keys[row])}"
            # Opened anew each time: an epoch visits every shard, and there may be more of them than open files allowed.
            with path.open("rb", buffering=0) as file:
                if stamp_of(os.fstat(file.fileno())) != rows.stamp:
                    raise ValueError("it was written again since")
                return key, [read_span(file.fileno(), *span) for span in rows.spans[row, wanted].tolist()]
        except (OSError, ValueError, EOFError) as error:
            message = f"the shard cannot be read any more ({error})"
            raise BadSample(key, UNREADABLE_SHARD, message) from error


def read_span(file: int, offset: int, size: int) -> bytes | None:
    if size < 0:
        return None
    if size > MOST_SAMPLE_BYTES:
        raise ValueError(f"a member of {size} bytes, more than {MOST_SAMPLE_BYTES}")
    content = os.pread(file, size, offset)
    if len(content) < size:
        raise EOFError(f"it ends before byte {offset + size}")
    return content


@dataclass(frozen=True)
class Survey:
    """What one process tells the others of a shard."""

    num_rows: int
    digest: str
    unlabelled_digest: str
    """Of keys, images and captions alone."""
    left_out: Skips
    damaged: list[Skip]
    labelled: bool
