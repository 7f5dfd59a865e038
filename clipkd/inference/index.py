"""An index file of image features, so that unchanged images are not encoded again."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from clipkd import files

VERSION = 1
"""Increases when the same model and file would give other features."""


class Entry(NamedTuple):
    """An encoded image."""

    stamp: tuple[int, int]
    """Of its file, see `read_stamp`."""
    feature: np.ndarray


def read_stamp(path: str) -> tuple[int, int]:
    """Size in bytes and modification time in ns. Raises: OSError if the file is gone."""
    stat = os.stat(path)
    return stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True)
class Index:
    """Entries of unchanged files by absolute path, all of one model. Without a path it is empty and is not written."""

    path: Path | None = None
    model_sha256: str = ""
    entries: Mapping[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, model_sha256: str) -> "Index":
        """Read an index; a missing file is an empty one.

        Raises: ValueError if the file is no index, is damaged or belongs to another model; it is then not overwritten.
        """
        if not path.exists():
            return cls(path, model_sha256)
        try:
            with np.load(path, allow_pickle=False) as arrays:
                about, features = json.loads(arrays["about"].tobytes()), arrays["features"]
            stored = zip(about["files"], features, strict=True)
            entries = {name: Entry((size, time), row) for (name, size, time), row in stored}
            found = (about["version"], about["model_sha256"])
        except Exception as error:  # numpy, zipfile and json raise anything on a foreign file
            raise ValueError(f"{path} is no index of clipkd predict, or a damaged one; name another --index") from error
        if found != (VERSION, model_sha256):
            raise ValueError(
                f"{path} is the index of another model, format or version; name another --index, or delete it"
            )
        return cls(path, model_sha256, {name: entry for name, entry in entries.items() if is_unchanged(name, entry)})

    def find(self, path: str) -> Entry | None:
        """The entry of a file that is unchanged since it was encoded."""
        return self.entries.get(os.path.abspath(path))

    def write(self, found: Mapping[str, Entry]) -> None:
        """Add entries by path; skip the write if nothing is new."""
        new = {os.path.abspath(path): entry for path, entry in found.items() if entry is not self.find(path)}
        if self.path is None or not new:
            return
        with files.exclusive(self.path):  # read again: another process may have added to it
            entries = {**Index.read(self.path, self.model_sha256).entries, **new}
            stamps = [[path, *entry.stamp] for path, entry in entries.items()]
            about = files.to_json({"version": VERSION, "model_sha256": self.model_sha256, "files": stamps})
            features, description = np.stack([entry.feature for entry in entries.values()]), about.encode()
            arrays = {"about": np.frombuffer(description, np.uint8), "features": features}
            files.write_whole(self.path, lambda file: np.savez(file, **arrays))


def is_unchanged(path: str, entry: Entry) -> bool:
    try:
        return read_stamp(path) == entry.stamp
    except OSError:
        return False
