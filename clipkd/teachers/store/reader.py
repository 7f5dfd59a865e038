"""A finished cache, opened for training: checked as a whole, then read row by row at offsets."""

import contextlib
import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd import distributed, files
from clipkd.config.train import TrainConfig
from clipkd.data import BadSample, Pair, Pairs, PairSet
from clipkd.errors import RunStopped
from clipkd.teachers.store.manifest import (
    FileRecord,
    Manifest,
    augmentation_of,
    fingerprint,
    read_manifest,
    require_same,
    sources_of,
    to_json,
)
from clipkd.views import Features, View

Track = Callable[[Iterable[Any], str, int], Iterator[Any]]
"""Shows progress: (items, title, their number) → the items."""

VERIFIED = ".verified.json"
"""Files that were hashed before, with size and time of change: an unchanged file is not hashed at every start."""

MOST_THREADS = 8
NOTICEABLE_BYTES = 1 << 30
"""From which on hashing shows its progress: a second's work."""


@dataclass(frozen=True)
class StoredTeacher:
    """What a run needs to know of a teacher beyond its features."""

    name: str
    dim: int
    logit_scale: Tensor
    logit_bias: Tensor | None
    identity: dict[str, Any]


class TeacherCache:
    """Features of every view of every sample, by its id."""

    def __init__(self, folder: Path, manifest: Manifest, *, student_text: str | None = None) -> None:
        """student_text: SHA-256 of the student's text tower, if that is frozen (models.text_tower.text_sha256)."""
        self.folder, self.manifest, self.num_views = folder, manifest, manifest.num_views
        self.first_ids = np.array([shard.first for shard in manifest.shards])
        self.first_texts = np.array([shard.first_text for shard in manifest.shards])
        self.teachers = [
            StoredTeacher(
                teacher.name,
                teacher.dim,
                torch.tensor(teacher.logit_scale),
                None if teacher.logit_bias is None else torch.tensor(teacher.logit_bias),
                teacher.identity,
            )
            for teacher in manifest.teachers
        ]
        sides = [side for number in range(len(self.teachers)) for side in (f"image.{number}", f"text.{number}")]
        known = {teacher.text_sha256: f"text.{number}" for number, teacher in enumerate(manifest.teachers)}
        known |= {} if manifest.student is None else {manifest.student.text_sha256: "text.student"}
        self.student_text = student_text
        self.student_kind = known.get(student_text or "")
        self.kinds = list(dict.fromkeys([*sides, *filter(None, [self.student_kind])]))
        """What `read` gives, in this order."""

    def read(self, pair: Pair, id: int, view: int, caption_number: int) -> tuple[np.ndarray, ...]:
        """One stored vector per kind, of a view and the caption that was drawn for it.

        Raises: BadSample if the sample could not be used when the cache was made; RunStopped if it is another now, or
            a file cannot be read.
        """
        number = int(np.searchsorted(self.first_ids, id, "right")) - 1
        shard = self.manifest.shards[number]
        row = id - shard.first
        crc, *texts = self.vector(shard.files["samples"], row).tolist()
        if texts[0] < 0:
            raise BadSample(pair.key, "not cached", f"could not be used when {self.folder} was made")
        if crc != fingerprint(pair):
            raise RunStopped(
                f"{pair.key} is not the sample that {self.folder} was made from: its image or its captions were changed "
                "since; put them back, or make another cache"
            )
        text = texts[caption_number]
        of_text = int(np.searchsorted(self.first_texts, text, "right")) - 1
        found = []
        for kind in self.kinds:
            if kind.startswith("image"):
                found.append(self.vector(shard.files[kind], row * self.num_views + view))
            else:
                files = self.manifest.shards[of_text].files
                found.append(self.vector(files[kind], text - self.manifest.shards[of_text].first_text))
        return tuple(found)

    def describe_student(self) -> str:
        if self.student_text is None:
            return ""
        if self.student_kind is None:
            return "; it lacks those of the student's frozen text tower, which are computed at every step"
        return "; the student reads its text features too"

    def is_usable(self, id: int) -> bool:
        """Whether a sample has features."""
        number = int(np.searchsorted(self.first_ids, id, "right")) - 1
        shard = self.manifest.shards[number]
        return int(self.vector(shard.files["samples"], id - shard.first)[1]) >= 0

    def vector(self, file: FileRecord, row: int) -> np.ndarray:
        """Raises: RunStopped."""
        try:
            # Not mapped into memory: a file that is cut short meanwhile would end the process by a signal.
            opened = os.open(f"{self.folder}/{file.name}", os.O_RDONLY)
            try:
                content = os.pread(opened, file.row_bytes, file.header_bytes + row * file.row_bytes)
            finally:
                os.close(opened)
            if len(content) < file.row_bytes:
                raise EOFError(f"it ends before row {row}")
        except (OSError, EOFError) as error:
            path = self.folder / file.name
            raise RunStopped(
                f"{path} cannot be read any more ({error}); see clipkd cache verify {self.folder}"
            ) from error
        return np.frombuffer(content, file.dtype)

    def features(self, rows: Sequence[Tensor], device: torch.device) -> tuple[Features, ...]:
        """Rows of a batch, kind by kind as `read` gives them → unit-norm float32 features of every teacher."""
        vectors = [self.widen(part.to(device, non_blocking=True)) for part in rows]
        return tuple(
            Features(
                vectors[2 * number],
                vectors[2 * number + 1],
                teacher.logit_scale.to(device),
                None if teacher.logit_bias is None else teacher.logit_bias.to(device),
            )
            for number, teacher in enumerate(self.teachers)
        )

    def with_student_text(self, view: View, rows: Sequence[Tensor]) -> View:
        """The student's view of a batch; with its text features, if its text tower is frozen and they are here."""
        if self.student_kind is None:
            return view
        stored = rows[self.kinds.index(self.student_kind)].to(view.images.device, non_blocking=True)
        return view._replace(text_features=self.widen(stored))

    def widen(self, stored: Tensor) -> Tensor:
        """float32 as it was stored; half precision back to unit norm, which rounding has left."""
        features = self.as_float(stored)
        return features if self.manifest.dtype == "float32" else F.normalize(features, dim=-1)

    def as_float(self, stored: Tensor) -> Tensor:
        """Values as they are stored → float32."""
        return (stored.view(torch.bfloat16) if self.manifest.dtype == "bfloat16" else stored).float()

    def classes(self) -> Tensor:
        """The first teacher's class vectors, [classes, width]."""
        assert self.manifest.classes is not None
        return torch.from_numpy(np.load(self.folder / self.manifest.classes.file.name))

    def identity(self) -> dict[str, Any]:
        """What a resumed run must find again: the very same features, wherever they lie now."""
        digest = hashlib.sha256(json.dumps([[file.name, file.sha256] for file in self.manifest.files()]).encode())
        return {"num_views": self.num_views, "dtype": self.manifest.dtype, "sha256": digest.hexdigest()}

    def describe(self) -> str:
        one = self.manifest
        return (
            f"{one.num_samples:,} samples × {one.num_views} views and {one.num_texts:,} captions of "
            f"{', '.join(teacher.name for teacher in one.teachers)}, {one.dtype}"
            f"{f' computed in {one.precision}' if one.precision != 'no' else ''}"
            f"{self.describe_student()}"
        )


def open_cache(config: TrainConfig, pairs: Pairs, *, student_text: str | None, track: Track) -> TeacherCache:
    """The cache of a run, if it is whole and was made from these pairs, this augmentation and these teachers. Call on
    every process. student_text: as TeacherCache takes it.

    Raises: FileNotFoundError or ValueError naming the file or option.
    """
    assert config.teacher.cache is not None
    folder = Path(config.teacher.cache)
    manifest = distributed.together(lambda: read_manifest(folder))
    if not isinstance(pairs, PairSet):
        raise ValueError("teacher.cache works with local data; data.path names shards behind URLs or pipes: copy them")
    now = {
        "augmentation": to_json(augmentation_of(config)),
        "data": [to_json(source) for source in sources_of(pairs)],
    }
    plan = manifest.plan()
    require_same(folder, {name: plan[name] for name in now}, now)
    faults = find_faults(folder, manifest, track=track)
    if faults:
        raise ValueError(
            f"{next(iter(faults.values()))}; {len(faults)} of {len(manifest.files())} files of the cache are damaged: "
            "give its clipkd cache command again, which makes them anew"
        )
    return TeacherCache(folder, manifest, student_text=student_text)


def find_faults(folder: Path, manifest: Manifest, *, track: Track, trust: bool = True) -> dict[str, str]:
    """Files that are missing, of another size or, by their SHA-256, of other content, each with what is wrong with it.
    Call on every process.

    trust: take a file that was found right before, and has not been written since, for right.
    """
    files = manifest.files()[distributed.rank() :: distributed.world_size()]
    known = read_verified(folder) if trust else {}
    stamps = {file.name: stamp(folder / file.name) for file in files}
    faults = {file.name: fault for file in files if (fault := find_wrong_size(folder, file, stamps[file.name]))}
    own = [f for f in files if f.name not in faults and known.get(f.name) != [*stamps[f.name], f.sha256]]
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        digests = pool.map(lambda file: try_sha256(folder / file.name), own)
        if sum(file.bytes for file in own) >= NOTICEABLE_BYTES:
            digests = track(digests, "check the cache", len(own))
        for file, digest in zip(own, digests, strict=True):
            if digest != file.sha256:
                faults[file.name] = f"{folder / file.name} is not what was written (its SHA-256 is another)"
    verified = {file.name: [*stamps[file.name], file.sha256] for file in files}
    found: dict[str, str] = {}
    hashed: dict[str, list[Any]] = {}
    any_fresh = False
    for part, right, fresh in distributed.gather_objects((faults, verified, bool(own))):
        found, hashed, any_fresh = found | part, hashed | right, any_fresh or fresh
    if any_fresh and not found and distributed.rank() == 0:
        write_verified(folder, hashed)
    return {file.name: found[file.name] for file in manifest.files() if file.name in found}


def find_wrong_size(folder: Path, file: FileRecord, found: list[int]) -> str | None:
    path = folder / file.name
    if not found:
        return f"there is no {path}"
    return f"{path} has {found[0]:,} bytes instead of {file.bytes:,}" if found[0] != file.bytes else None


def try_sha256(path: Path) -> str:
    try:
        return files.sha256(path)
    except OSError:
        return ""


def stamp(path: Path) -> list[int]:
    """Size, times of change (the second cannot be set) and number on its disk; empty if there is no such file."""
    try:
        found = path.stat()
    except OSError:
        return []
    if not stat.S_ISREG(found.st_mode):
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino]


def read_verified(folder: Path) -> dict[str, list[Any]]:
    try:
        found = json.loads((folder / VERIFIED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def write_verified(folder: Path, digests: dict[str, list[Any]]) -> None:
    """Where it cannot be kept, files are hashed at the next start again."""
    with contextlib.suppress(OSError):
        files.write_json(folder / VERIFIED, digests)
