"""manifest.json: from what a cache was made, and every file of it with its size and SHA-256.

Before it is written, last, plan.json and a record of each complete shard say the same of an unfinished cache.
"""

import dataclasses
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clipkd import files
from clipkd.config.train import MANIFEST, Tower, TrainConfig
from clipkd.data import AUGMENTATION_VERSION, Pair, PairSet

VERSION = 3
PLAN, CONFIG = "plan.json", "config.yaml"

DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""numpy types of the stored values. numpy has no bfloat16: its bits are stored as unsigned integers."""


@dataclass(frozen=True)
class FileRecord:
    """One .npy file."""

    name: str
    """Path relative to the cache."""
    shape: tuple[int, ...]
    dtype: str
    """numpy's notation, such as <f4."""
    bytes: int = 0
    sha256: str = ""

    @property
    def row_bytes(self) -> int:
        """Bytes of one vector, which is the last axis."""
        return self.shape[-1] * int(self.dtype[-1])

    @property
    def header_bytes(self) -> int:
        return self.bytes - math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Shard:
    """A range of samples, and the captions whose first occurrence lies in it."""

    first: int
    """Id of the first sample. Ids count through all data sources in order."""
    rows: int
    """Number of samples."""
    first_text: int
    """Number of distinct captions in earlier shards."""
    texts: int
    unusable: int = 0
    """Samples without features: an image that cannot be decoded, or no caption."""
    files: dict[str, FileRecord] = field(default_factory=dict)
    """Keys: samples; image.N and text.N per teacher N; image.student and text.student of a student's frozen towers."""


@dataclass(frozen=True)
class TeacherRecord:
    model: str
    """NAME@WEIGHTS or folder, as teacher.models names it."""
    name: str
    dim: int
    logit_scale: float
    logit_bias: float | None
    text_sha256: str
    """Hash of the text tower, by which a student with the same tower finds its text features."""
    identity: dict[str, Any]
    """SHA-256 of weights and tokens, dtype, preprocessing and architecture, as in a checkpoint."""
    files: dict[str, str]
    """Local weight files → SHA-256; empty for a model from a hub."""


@dataclass(frozen=True)
class FrozenTower:
    """A student's frozen tower, whose features, or the input of whose projection, are stored as image.student or text.student."""

    width: int
    sha256: str
    """`tower_sha256`, by which a student finds them."""


@dataclass(frozen=True)
class Manifest:
    num_views: int
    dtype: str
    precision: str
    """Autocast of the towers."""
    augmentation: dict[str, Any]
    """Everything that determines crops, backgrounds and captions of a view."""
    teachers: tuple[TeacherRecord, ...]
    data: list[dict[str, Any]]
    """Per source: number of samples, options, and files → digest of their samples in order."""
    num_captions: int
    student: dict[Tower, FrozenTower]
    classes_fingerprint: str | None
    """Hash of class names and templates, whose class vectors by the first teacher are stored for objective.closed_set."""
    classes: FileRecord | None
    shards: tuple[Shard, ...]
    version: int = VERSION

    @property
    def num_samples(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_unusable(self) -> int:
        return sum(shard.unusable for shard in self.shards)

    @property
    def num_texts(self) -> int:
        return sum(shard.texts for shard in self.shards)

    @property
    def models(self) -> str:
        """Whose features these are, for the terminal."""
        towers = (
            [f"the student's {' and '.join(self.student)} tower{'s' * (len(self.student) - 1)}"] if self.student else []
        )
        return ", ".join([teacher.name for teacher in self.teachers] + towers)

    def files(self) -> list[FileRecord]:
        found = [] if self.classes is None else [self.classes]
        return found + [file for shard in self.shards for file in shard.files.values()]

    def plan(self) -> dict[str, Any]:
        """Everything that is known before the first file is written."""
        shards = tuple(dataclasses.replace(shard, files={}, unusable=0) for shard in self.shards)
        return to_json(dataclasses.replace(self, classes=None, shards=shards))


def to_json(record: Any) -> dict[str, Any]:
    """A record as it reads from a file: lists for tuples."""
    return json.loads(json.dumps(dataclasses.asdict(record)))


def read_manifest(folder: Path) -> Manifest:
    """Raises: FileNotFoundError or ValueError if there is no finished cache, or it is damaged or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} for a teacher cache")
        if (folder / PLAN).is_file():
            raise FileNotFoundError(f"{folder} is not finished; run the same clipkd cache command again")
        raise FileNotFoundError(f"{folder} holds no {MANIFEST} of a cache")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] == VERSION:
            return parse(found)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove {folder} and make the cache again") from error
    raise ValueError(f"{path} has version {found['version']}, this clipkd reads {VERSION}; make the cache again")


def parse(found: dict[str, Any]) -> Manifest:
    parts: dict[str, Any] = {
        "augmentation": found["augmentation"] | {"seed": int(found["augmentation"]["seed"])},
        "teachers": tuple(TeacherRecord(**teacher) for teacher in found["teachers"]),
        "student": {tower: FrozenTower(**one) for tower, one in found["student"].items()},
        "classes": found["classes"] and parse_file(found["classes"]),
        "shards": tuple(parse_shard(shard) for shard in found["shards"]),
    }
    return Manifest(**(found | parts))


def parse_shard(shard: dict[str, Any]) -> Shard:
    found: Any = {kind: parse_file(file) for kind, file in shard["files"].items()}
    return Shard(**(shard | {"files": found}))


def parse_file(file: dict[str, Any]) -> FileRecord:
    path = PurePosixPath(file["name"])
    if path.is_absolute() or ".." in path.parts:
        raise TypeError(f"a file outside of the cache: {path}")
    shape: Any = tuple(file["shape"])
    return FileRecord(**(file | {"shape": shape}))


def augmentation_of(config: TrainConfig) -> dict[str, Any]:
    """`Manifest.augmentation` of a run."""
    options = {"min_crop": config.data.min_crop, "background": config.data.background}
    return {"version": AUGMENTATION_VERSION, "seed": config.seed, **options}


def sources_of(pairs: PairSet) -> list[dict[str, Any]]:
    """`Manifest.data` of these pairs."""
    found = []
    for source, config in zip(pairs.sources, pairs.configs, strict=True):
        options = {"format": config.format, "caption_key": config.caption_key}
        options |= {} if config.format == "webdataset" else {"image_column": config.image_column}
        found.append({"num_samples": int(source.shard_sizes.sum()), **options, "parts": dict(source.parts())})
    return found


def fingerprint(pair: Pair) -> int:
    """CRC-32 of a sample's image and captions, which reveals data that were changed in place."""
    return zlib.crc32("\0".join(pair.captions).encode(), zlib.crc32(pair.image))


def record_path(folder: Path, number: int) -> Path:
    return folder / "records" / f"{number:05d}.json"


def write_record(folder: Path, number: int, shard: Shard) -> None:
    """Mark a shard as complete."""
    files.write_json(record_path(folder, number), to_json(shard), durable=True)


def read_record(folder: Path, number: int) -> Shard | None:
    """The record of a complete shard; None unless all its files exist with their size."""
    try:
        shard = parse_shard(json.loads(record_path(folder, number).read_text(encoding="utf-8")))
        complete = all((folder / file.name).stat().st_size == file.bytes for file in shard.files.values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if complete else None


def read_plan(folder: Path) -> dict[str, Any] | None:
    """plan.json; None if there is none. Raises: ValueError if it is damaged."""
    try:
        return json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / PLAN} is damaged ({error}); remove {folder} and make the cache again") from error
