"""Index of a webdataset shard: where each member lies, so that any sample is one read at an offset.

Our own because webdataset 1.x no longer ships `wids`, and streaming a tar can neither be resumed nor shuffled exactly.
The index is cached beside the shard as NAME.tar.clipkd-index.npz where the folder can be written.
"""

import contextlib
import os
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from webdataset.tariterators import base_plus_ext

INDEX_VERSION = 1


@dataclass(frozen=True)
class TarIndex:
    """Members of one shard in file order, as flat arrays (a data set of 10⁷ samples must fit in memory)."""

    keys: np.ndarray
    """[samples] bytes: member name without its extensions."""
    sample: np.ndarray
    """[members] int32: which sample a member belongs to."""
    extension: np.ndarray
    """[members] bytes, lower case, without the leading dot."""
    offset: np.ndarray
    """[members] int64: first byte of the content in the tar."""
    size: np.ndarray
    """[members] int64: bytes."""

    def select(self, extensions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Offset and size [samples] of each sample's member with one of these extensions; size −1 where it has none."""
        offset = np.zeros(len(self.keys), np.int64)
        size = np.full(len(self.keys), -1, np.int64)
        wanted = np.isin(self.extension, np.array(extensions, "S"))
        offset[self.sample[wanted]] = self.offset[wanted]
        size[self.sample[wanted]] = self.size[wanted]
        return offset, size


def index_tar(path: Path) -> TarIndex:
    """Read a shard's index from its cache, or scan the shard's headers once and cache what they say.

    Raises: FileNotFoundError; ValueError if the tar is empty, truncated or not a tar.
    """
    stat = path.stat()
    stamp = np.array([INDEX_VERSION, stat.st_size, stat.st_mtime_ns], np.int64)
    cache = path.with_name(path.name + ".clipkd-index.npz")
    damaged = (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile)
    with contextlib.suppress(*damaged), cache.open("rb") as file, np.load(file) as stored:
        if np.array_equal(stored["stamp"], stamp):
            return TarIndex(**{name: stored[name] for name in TarIndex.__dataclass_fields__})
    index = scan_tar(path)
    with contextlib.suppress(OSError):  # a read-only data set is indexed on every start
        temporary = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
        with temporary.open("wb") as file:
            np.savez(file, stamp=stamp, **vars(index))
        os.replace(temporary, cache)
    return index


def scan_tar(path: Path) -> TarIndex:
    keys: list[str] = []
    members: list[tuple[int, str, int, int]] = []
    length = path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile():
                    continue
                key, extension = base_plus_ext(member.name)
                if key is None or extension is None:
                    continue
                if member.offset_data + member.size > length:
                    raise tarfile.ReadError("unexpected end of data")
                if not keys or key != keys[-1]:
                    keys.append(key)
                members.append((len(keys) - 1, extension.lower(), member.offset_data, member.size))
            # tarfile takes a cut or damaged header for the end; the true end is a block of zeros.
            with path.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError(f"no end of archive at byte {tar.offset}")
    except tarfile.TarError as error:
        raise ValueError(
            f"{path} is not a whole uncompressed tar ({error}, after {len(keys)} samples of {length} bytes); "
            "copy or write it again"
        ) from error
    if not keys:
        raise ValueError(f"{path} holds no samples; remove it or write it again")
    sample, extension, offset, size = zip(*members, strict=True)
    return TarIndex(
        keys=np.array([key.encode() for key in keys]),
        sample=np.array(sample, np.int32),
        extension=np.array([name.encode() for name in extension]),
        offset=np.array(offset, np.int64),
        size=np.array(size, np.int64),
    )
