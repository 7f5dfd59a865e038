"""Index of a webdataset shard: the byte range of each member, so that any sample is one read at an offset.

webdataset 1.x no longer ships `wids`, and streaming a tar can neither be resumed nor shuffled exactly. The index is
cached beside the shard as NAME.tar.clipkd-index.npz, or in ~/.cache/clipkd if that folder is read-only.
"""

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clipkd import files
from clipkd.data.tar import DamagedTar, StrictMember, read_samples

INDEX_VERSION = 3
DUPLICATE = "another sample of the shard has the same key; write a tar sorted by file name, each key once"


@dataclass(frozen=True)
class TarIndex:
    """Members of one shard in file order, as flat arrays."""

    keys: np.ndarray
    """[samples] bytes: member name without its extensions."""
    sample: np.ndarray
    """[members] int32: position in `keys` of a member's sample."""
    extension: np.ndarray
    """[members] bytes, lower case, without the leading dot."""
    offset: np.ndarray
    """[members] int64: first byte of the content in the tar."""
    size: np.ndarray
    """[members] int64: bytes."""
    duplicates: np.ndarray
    """[any] bytes: keys of repeated samples; only the first sample of a key is indexed."""
    hidden: np.ndarray
    """[any] bytes: names of hidden files, which are no samples."""
    damage: np.ndarray
    """Text: why the shard could not be read to its end; empty if it could."""

    def select(self, extensions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size [samples] of each sample's member with one of these extensions; size −1 if it has none."""
        offset = np.zeros(len(self.keys), np.int64)
        size = np.full(len(self.keys), -1, np.int64)
        wanted = np.isin(self.extension, np.array(extensions, "S"))
        offset[self.sample[wanted]] = self.offset[wanted]
        size[self.sample[wanted]] = self.size[wanted]
        return offset, size


def as_text(key: bytes) -> str:
    return key.decode("utf-8", "replace")


def cache_paths(path: Path) -> tuple[Path, Path]:
    """Where a shard's index may be stored: beside it, or in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:32]
    return path.with_name(path.name + ".clipkd-index.npz"), cache / "clipkd" / "shards" / f"{name}.npz"


def index_tar(path: Path) -> TarIndex:
    """Read a shard's index from its cache, or scan the headers of the shard and cache the result.

    Raises: OSError if the shard cannot be read at all; damage inside it is recorded in the index.
    """
    stat = path.stat()
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    caches = cache_paths(path)
    for cache in caches:
        # A cache that is damaged in any way is replaced.
        with contextlib.suppress(Exception), cache.open("rb") as file, np.load(file) as stored:
            if np.array_equal(stored["stamp"], stamp):
                return TarIndex(**{name: stored[name] for name in TarIndex.__dataclass_fields__})
    index = scan_tar(path)
    for cache in caches:
        with contextlib.suppress(OSError):
            files.write_whole(cache, lambda file: np.savez(file, stamp=stamp, **vars(index)))
            break
    return index


def index_whole_tar(path: Path) -> TarIndex:
    """The index of an undamaged shard, since no part of a benchmark may be missing.

    Raises: ValueError if the shard is damaged or repeats a key.
    """
    index = index_tar(path)
    if problem := str(index.damage):
        raise ValueError(f"{path} {problem}; copy or write it again")
    if len(index.duplicates):
        raise ValueError(f"{path} holds {as_text(index.duplicates[0])!r} more than once; write it again")
    return index


def scan_tar(path: Path) -> TarIndex:
    """Read the headers of a shard."""
    length, damage = path.stat().st_size, ""
    keys: list[str] = []
    duplicates: list[str] = []
    hidden: list[str] = []
    places: dict[str, tuple[int, int]] = {}
    members: list[tuple[int, str, int, int]] = []

    def byte_range(_: tarfile.TarFile, member: tarfile.TarInfo) -> tuple[int, int] | None:
        if member.islnk():
            return places.get(member.linkname)
        if member.offset_data + member.size > length:
            raise tarfile.ReadError(f"{member.name} is cut short at byte {length}")
        places[member.name] = member.offset_data, member.size
        return places[member.name]

    def open_tar() -> tarfile.TarFile:
        return tarfile.open(path, "r:", tarinfo=StrictMember)

    try:
        for key, parts, repeated in read_samples(open_tar, byte_range):
            if repeated or not parts:
                (duplicates if parts else hidden).append(key)
                continue
            members += [(len(keys), extension, offset, size) for extension, (offset, size) in parts.items()]
            keys.append(key)
    except DamagedTar as error:
        damage = str(error)
    sample, extension, offset, size = zip(*members, strict=True) if members else ((), (), (), ())
    return TarIndex(
        keys=np.array([os.fsencode(key) for key in keys], "S"),
        sample=np.array(sample, np.int32),
        extension=np.array([os.fsencode(name) for name in extension], "S"),
        offset=np.array(offset, np.int64),
        size=np.array(size, np.int64),
        duplicates=np.array([os.fsencode(key) for key in duplicates], "S"),
        hidden=np.array([os.fsencode(name) for name in hidden], "S"),
        damage=np.array(damage),
    )
