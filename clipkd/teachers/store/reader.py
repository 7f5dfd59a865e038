"""Read a finished cache: one vector at its offset, by sample, view and caption; and find its damaged files."""

import contextlib
import hashlib
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipkd import distributed, files, progress
from clipkd.data import BadSample, Pair
from clipkd.errors import RunStopped
from clipkd.models.encoder import Encoder
from clipkd.models.towers import tower_sha256
from clipkd.teachers.store.manifest import FileRecord, Manifest, Shard, fingerprint

VERIFIED = ".verified.json"
"""Files that were hashed before, with size and times of change. An unchanged file is not hashed at every start."""

MOST_THREADS = 8


class TeacherCache:
    """Stored features of every view and caption of every sample. The loader processes read from it."""

    def __init__(self, folder: Path, manifest: Manifest, *, student: Encoder | None = None) -> None:
        """student: whose frozen towers' outputs are read as well, if they are stored."""
        self.folder, self.manifest = folder, manifest
        self.num_views, self.seed = manifest.num_views, manifest.augmentation["seed"]
        self.first_ids = np.array([shard.first for shard in manifest.shards])
        self.first_texts = np.array([shard.first_text for shard in manifest.shards])
        known = {teacher.text_sha256: f"text.{number}" for number, teacher in enumerate(manifest.teachers)}
        known |= {one.sha256: f"{tower}.student" for tower, one in manifest.student.items()}
        frozen = {} if student is None else student.frozen
        self.student = {tower: known.get(tower_sha256(student, tower)) for tower in frozen if student is not None}
        """Where the output of each of the student's frozen towers is stored; None if it is not."""
        self.heads = {self.student[tower] for tower, mode in frozen.items() if mode == "head"}
        """Those that are the input of a projection, of any norm."""
        self.kinds = [f"{side}.{number}" for number in range(len(manifest.teachers)) for side in ("image", "text")]
        """The kinds of vectors that `read` returns, in this order."""
        self.kinds += [kind for kind in self.student.values() if kind and kind.endswith("student")]

    def read(self, pair: Pair, id: int, view: int, caption_number: int) -> tuple[np.ndarray, ...]:
        """One stored vector per kind, for a view and one of the sample's captions.

        Raises: BadSample if the cache has no features of the sample; RunStopped if it has changed or a file is unreadable.
        """
        shard, row = self.find(self.first_ids, id)
        crc, *texts = self.vector(shard.files["samples"], row).tolist()
        if texts[0] < 0:
            raise BadSample(pair.key, "not cached", f"could not be used when {self.folder} was made")
        if crc != fingerprint(pair):
            raise RunStopped(
                f"{pair.key} is not the sample that {self.folder} was made from: its image or its captions were changed "
                "since; put them back, or make another cache"
            )
        text_shard, text_row = self.find(self.first_texts, texts[caption_number])
        return tuple(
            self.vector(shard.files[kind], row * self.num_views + view)
            if kind.startswith("image")
            else self.vector(text_shard.files[kind], text_row)
            for kind in self.kinds
        )

    def find(self, firsts: np.ndarray, number: int) -> tuple[Shard, int]:
        """The shard of a sample or text, and its row there. firsts: number of the first one of every shard."""
        index = int(np.searchsorted(firsts, number, "right")) - 1
        return self.manifest.shards[index], number - int(firsts[index])

    def vector(self, file: FileRecord, row: int) -> np.ndarray:
        """Raises: RunStopped if the file is gone or too short."""
        try:
            # Not mapped into memory: a mapped file that is truncated would end the process by a signal.
            opened = os.open(f"{self.folder}/{file.name}", os.O_RDONLY)
            try:
                content = os.pread(opened, file.row_bytes, file.header_bytes + row * file.row_bytes)
            finally:
                os.close(opened)
            if len(content) < file.row_bytes:
                raise EOFError(f"it ends before row {row}")
        except (OSError, EOFError) as error:
            path = self.folder / file.name
            raise RunStopped(f"{path} cannot be read ({error}); see clipkd cache verify {self.folder}") from error
        return np.frombuffer(content, file.dtype)

    def as_float(self, stored: Tensor) -> Tensor:
        """Stored values → float32."""
        return (stored.view(torch.bfloat16) if self.manifest.dtype == "bfloat16" else stored).float()

    def classes(self) -> Tensor:
        """The first teacher's class vectors, [classes, width]."""
        assert self.manifest.classes is not None
        return torch.from_numpy(np.load(self.folder / self.manifest.classes.name))

    def identity(self) -> dict[str, Any]:
        """A fingerprint of the stored features, independent of where they lie."""
        digest = hashlib.sha256(json.dumps([[file.name, file.sha256] for file in self.manifest.files()]).encode())
        return {"num_views": self.num_views, "dtype": self.manifest.dtype, "sha256": digest.hexdigest()}

    def describe(self) -> str:
        one = self.manifest
        precision = f" computed in {one.precision}" if one.precision != "no" else ""
        student = "".join(
            f"; the student reads its {tower} features too"
            if kind
            else f"; it lacks the student's frozen {tower} tower, which runs at every step"
            for tower, kind in self.student.items()
        )
        return (
            f"{one.num_samples:,} samples × {one.num_views} views and {one.num_texts:,} captions of "
            f"{one.models}, {one.dtype}{precision}{student}"
        )


def find_faults(folder: Path, manifest: Manifest, *, trust: bool = True) -> dict[str, str]:
    """Damaged or missing files → what is wrong with each. Call on every process; each checks its share.

    trust: skip files that were found intact before and have not been written since.
    """
    share = manifest.files()[distributed.rank() :: distributed.world_size()]
    stamps = {file.name: [*stamp(folder / file.name), file.sha256] for file in share}
    known = (files.read_rows(folder / VERIFIED) or [{}])[0] if trust else {}
    unknown = [file for file in share if known.get(file.name) != stamps[file.name]]
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        checks = pool.map(lambda file: find_fault(folder / file.name, file), unknown)
        if unknown:
            checks = progress.track_on_main(checks, "check the cache", len(unknown))
        faults = {file.name: fault for file, fault in zip(unknown, checks, strict=True) if fault}
    everywhere = distributed.gather_objects((faults, stamps, len(unknown)))
    found = {name: fault for part, _, _ in everywhere for name, fault in part.items()}
    if distributed.rank() == 0 and not found and any(num_hashed for _, _, num_hashed in everywhere):
        with contextlib.suppress(OSError):  # in a folder that cannot be written, files are hashed at every start
            verified = {name: one for _, part, _ in everywhere for name, one in part.items()}
            files.write_text(folder / VERIFIED, files.to_json(verified))
    return {file.name: found[file.name] for file in manifest.files() if file.name in found}


def find_fault(path: Path, file: FileRecord) -> str | None:
    """What is wrong with a file; None if it is intact."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"{path} has {size:,} bytes instead of {file.bytes:,}"
        if files.sha256(path) != file.sha256:
            return f"{path} does not hold what was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"there is no {path}"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def stamp(path: Path) -> list[int]:
    """Size, both times of change (the second cannot be set) and inode number; empty if it is no file."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino] if stat.S_ISREG(found.st_mode) else []
