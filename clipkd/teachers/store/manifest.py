"""manifest.json: what a cache was made from, and every file of it with its size and SHA-256."""

import dataclasses
import json
import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from clipkd.config.train import TrainConfig, flatten
from clipkd.data import AUGMENTATION_VERSION, Pair, PairSet

FORMAT, VERSION = "clipkd teacher cache", 1
MANIFEST, PLAN, CONFIG = "manifest.json", "plan.json", "config.yaml"

DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""What numpy calls the stored values; it has no bfloat16, whose bits are stored as integers."""


@dataclass(frozen=True)
class FileRecord:
    """One .npy file."""

    name: str
    """Relative to the cache."""
    shape: tuple[int, ...]
    dtype: str
    """As numpy writes it."""
    bytes: int = 0
    sha256: str = ""

    @property
    def row_bytes(self) -> int:
        """Of one vector, the last axis."""
        return self.shape[-1] * int(self.dtype[-1])

    @property
    def header_bytes(self) -> int:
        return self.bytes - math.prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True)
class Shard:
    """A stretch of the samples, and the captions that are first met in it."""

    first: int
    """Id of its first sample; ids count through all sources in order."""
    rows: int
    first_text: int
    """Rows of distinct captions before it."""
    texts: int
    files: dict[str, FileRecord] = field(default_factory=dict)
    """samples, and for each teacher n image.n and text.n; text.student where the student's text tower is frozen."""


@dataclass(frozen=True)
class TeacherRecord:
    model: str
    name: str
    dim: int
    logit_scale: float
    logit_bias: float | None
    text_sha256: str
    """Of its text tower, by which a student that has the same finds its text features here."""
    identity: dict[str, Any]
    """SHA-256 of weights and tokens, dtype, preprocessing and architecture, as a checkpoint keeps them."""
    files: dict[str, str]
    """Weight files of a local model → SHA-256; none for one of a hub."""


@dataclass(frozen=True)
class SourceRecord:
    num_samples: int
    options: dict[str, Any]
    parts: dict[str, str]
    """Files (tars, tables, a data set) → digest of their samples in their order."""


@dataclass(frozen=True)
class Augmentation:
    """All that the crops, backgrounds and captions of a view follow from."""

    version: int
    seed: int
    min_crop: float
    background: str


@dataclass(frozen=True)
class Classes:
    """The first teacher's class vectors, for objective.closed_set."""

    fingerprint: str
    file: FileRecord


@dataclass(frozen=True)
class StudentText:
    """A student's frozen text tower."""

    name: str
    dim: int
    text_sha256: str


@dataclass(frozen=True)
class Manifest:
    num_views: int
    dtype: str
    precision: str
    """Autocast of the towers."""
    augmentation: Augmentation
    teachers: tuple[TeacherRecord, ...]
    data: tuple[SourceRecord, ...]
    num_captions: int
    student: StudentText | None
    """Whose features text.student are."""
    classes: Classes | None
    shards: tuple[Shard, ...]
    num_unusable: int = 0
    """Samples of which a view could not be decoded, or that have no caption: they have no features."""
    format: str = FORMAT
    version: int = VERSION

    @property
    def num_samples(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def num_texts(self) -> int:
        return sum(shard.texts for shard in self.shards)

    def files(self) -> list[FileRecord]:
        found = [] if self.classes is None else [self.classes.file]
        return found + [file for shard in self.shards for file in shard.files.values()]

    def plan(self) -> dict[str, Any]:
        """All but what is known only once files are written."""
        classes = self.classes and dataclasses.replace(self.classes, file=plain(self.classes.file))
        shards = tuple(dataclasses.replace(shard, files={}) for shard in self.shards)
        return to_json(dataclasses.replace(self, classes=classes, shards=shards, num_unusable=0))


def plain(file: FileRecord) -> FileRecord:
    return dataclasses.replace(file, bytes=0, sha256="")


def to_json(record: Any) -> dict[str, Any]:
    found = json.loads(json.dumps(dataclasses.asdict(record)))  # lists for tuples
    assert isinstance(found, dict)
    return found


def read_manifest(folder: Path) -> Manifest:
    """Raises: FileNotFoundError or ValueError if it is no cache, not finished, damaged, or of another version."""
    path = folder / MANIFEST
    if not path.is_file():
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} for a teacher cache")
        unfinished = (folder / PLAN).is_file()
        what = (
            "is not finished; give its clipkd cache command again" if unfinished else f"holds no {MANIFEST} of a cache"
        )
        raise FileNotFoundError(f"{folder} {what}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = (found["format"], found["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} and make the cache again") from error
    if version != (FORMAT, VERSION):
        raise ValueError(f"{path} is version {version[1]} of {version[0]!r}, this clipkd reads {VERSION}; cache again")
    try:
        return parse(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); remove {folder} and make the cache again") from error


def parse(found: dict[str, Any]) -> Manifest:
    classes = found["classes"]
    parts: dict[str, Any] = {
        "augmentation": Augmentation(**found["augmentation"]),
        "teachers": tuple(TeacherRecord(**teacher) for teacher in found["teachers"]),
        "data": tuple(SourceRecord(**source) for source in found["data"]),
        "student": found["student"] and StudentText(**found["student"]),
        "classes": classes and Classes(classes["fingerprint"], parse_file(classes["file"])),
        "shards": tuple(parse_shard(shard) for shard in found["shards"]),
    }
    return Manifest(**(found | parts))


def parse_shard(shard: dict[str, Any]) -> Shard:
    files = {kind: parse_file(file) for kind, file in shard["files"].items()}
    return Shard(**{name: value for name, value in shard.items() if name != "files"}, files=files)


def parse_file(file: dict[str, Any]) -> FileRecord:
    path = PurePosixPath(file["name"])
    if path.is_absolute() or ".." in path.parts:
        raise TypeError(f"a file outside of the cache: {path}")
    return FileRecord(**{name: value for name, value in file.items() if name != "shape"}, shape=tuple(file["shape"]))


def augmentation_of(config: TrainConfig) -> Augmentation:
    return Augmentation(AUGMENTATION_VERSION, config.seed, config.data.min_crop, config.data.background)


def sources_of(pairs: PairSet) -> tuple[SourceRecord, ...]:
    """Of their options those on which images and captions depend."""
    found = []
    for source, config in zip(pairs.sources, pairs.configs, strict=True):
        options = {"format": config.format, "caption_key": config.caption_key}
        options |= {} if config.format == "webdataset" else {"image_column": config.image_column}
        found.append(SourceRecord(int(source.shard_sizes.sum()), options, dict(source.parts())))
    return tuple(found)


def fingerprint(pair: Pair) -> int:
    """CRC-32 of a sample's image and captions, by which a data set that was changed in place is noticed."""
    return zlib.crc32("\0".join(pair.captions).encode(), zlib.crc32(pair.image))


def require_same(folder: Path, made_with: dict[str, Any], now: dict[str, Any]) -> None:
    """Parts of two plans. Raises: ValueError naming the first thing, and the file, in which they differ."""
    for name, what in (("data", "data sources (data, data.mix)"), ("teachers", "teachers (teacher.models)")):
        before, after = made_with.get(name, []), now.get(name, [])
        if len(before) != len(after):
            raise ValueError(
                f"{folder} was made with {len(before)} {what}, now there are {len(after)}; make another cache"
            )
    for number, (before, after) in enumerate(zip(made_with.get("data", []), now.get("data", []), strict=True)):
        require_same_parts(folder, number, before, after)
    for before, after in zip(made_with.get("teachers", []), now.get("teachers", []), strict=True):
        if before["identity"]["sha256"] != after["identity"]["sha256"]:
            where = ", ".join(after["files"]) or after["model"]
            raise ValueError(
                f"{folder} was made with other weights than those of {where}; put them back, or make another cache"
            )
    before, after = (flatten(numbered(plan)) for plan in (made_with, now))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not PATHS.search(key):
            raise ValueError(
                f"{folder} was made with {option_name(key)} = {before.get(key)}, now it is {after.get(key)}; change it back, "
                "or make another cache"
            )


PATHS = re.compile(r"^data\.\d+\.parts\.|^teachers\.\d+\.(model|name|files\..*)$")
"""Where things lie: data and teachers are compared by what they hold."""

OPTIONS = {
    r"augmentation\.version": "augmentation version",
    r"augmentation\.seed": "seed",
    r"augmentation\.": "data.",
    r"num_views": "--views",
    r"dtype": "--dtype",
    r"data\.0\.(options\.)?": "data.",
    r"data\.(\d+)\.(options\.)?": r"data.mix (source \1).",
    r"teachers\.(\d+)\.(identity\.)?": r"teacher.models[\1]: ",
}


def option_name(key: str) -> str:
    """What a user calls a part of a plan."""
    for pattern, name in OPTIONS.items():
        if re.match(pattern, key):
            return re.sub(rf"^{pattern}", name, key)
    return key


def numbered(value: Any) -> Any:
    """Lists as dictionaries, to be flattened with them."""
    if isinstance(value, dict):
        return {key: numbered(item) for key, item in value.items()}
    return {str(i): numbered(item) for i, item in enumerate(value)} if isinstance(value, list) else value


def require_same_parts(folder: Path, number: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises: ValueError naming the file of a source that holds other samples than it did, or that came or went."""
    option = f"data.mix[{number - 1}].path" if number else "data.path"
    old, new = before["parts"], after["parts"]
    if len(old) != len(new):
        missing = [path for path, digest in old.items() if digest not in new.values()]
        added = [path for path, digest in new.items() if digest not in old.values()]
        named = (f"; {missing[0]} is missing" if missing else "") + (f"; {added[0]} is new" if added else "")
        raise ValueError(
            f"{option} holds {len(new)} files, {folder} was made from {len(old)}{named}; put them back, or make another cache"
        )
    for (was, old_digest), (now, new_digest) in zip(old.items(), new.items(), strict=True):
        if old_digest != new_digest:
            raise ValueError(
                f"{now} does not hold the samples that {was} held when {folder} was made, in that order; put the file back, "
                "or make another cache"
            )
