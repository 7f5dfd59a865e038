"""manifest.json: what a cache was made from, and every file of it with its size and SHA-256."""

import dataclasses
import json
import math
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clipkd import checkpoint
from clipkd.config import TrainConfig, flatten
from clipkd.data import AUGMENTATION_VERSION, Pair, PairSet

FORMAT, VERSION = "clipkd teacher cache", 1
MANIFEST, PLAN, CONFIG = "manifest.json", "plan.json", "config.yaml"

DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4"}
"""What numpy calls the stored values; it has no bfloat16, whose bits are stored as integers."""

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")


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
    pretrained: str | None
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
    """Samples that could not be read, decoded or captioned: they have no features."""
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
        unfinished = (folder / PLAN).is_file()
        what = "is not finished; give its clipkd cache command again" if unfinished else f"holds no {MANIFEST}"
        raise FileNotFoundError(f"teacher.cache: {folder} {what}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = (found["format"], found["version"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no manifest of a teacher cache ({error}); make the cache again") from error
    if version != (FORMAT, VERSION):
        raise ValueError(f"{path} is version {version[1]} of {version[0]!r}, this clipkd reads {VERSION}; cache again")
    try:
        return parse(found)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}); make the cache again") from error


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
    return FileRecord(**{name: value for name, value in file.items() if name != "shape"}, shape=tuple(file["shape"]))


def augmentation_of(config: TrainConfig) -> Augmentation:
    return Augmentation(AUGMENTATION_VERSION, config.seed, config.data.min_crop, config.data.background)


def sources_of(pairs: PairSet) -> tuple[SourceRecord, ...]:
    """How often an epoch passes through a source is left out: that changes no sample."""
    found = []
    for source, identity in zip(pairs.sources, pairs.identity(), strict=True):
        options = {name: value for name, value in identity.items() if name not in ("pairs", "fingerprint", "weight")}
        found.append(SourceRecord(identity["pairs"], options, dict(source.parts())))
    return tuple(found)


def weight_files(model: str, pretrained: str | None) -> list[Path]:
    """The files on this machine that hold a teacher's weights; none for a name that a hub resolves, or a folder that is gone."""
    folder = Path(model.removeprefix("local-dir:"))
    if pretrained is not None:
        return [Path(pretrained)] if Path(pretrained).is_file() else []
    if not folder.is_dir():
        return []
    if checkpoint.is_run(folder):
        return [checkpoint.resolve(folder) / "model.safetensors"]
    return sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES)


def fingerprint(pair: Pair) -> int:
    """CRC-32 of a sample's image and captions, by which a data set that was changed in place is noticed."""
    return zlib.crc32("\0".join(pair.captions).encode(), zlib.crc32(pair.image))


def require_same(folder: Path, made_with: dict[str, Any], now: dict[str, Any]) -> None:
    """Parts of two plans. Raises: ValueError naming the first thing, and the file, in which they differ."""
    for number, (before, after) in enumerate(zip(made_with.get("data", []), now.get("data", []), strict=False)):
        require_same_parts(folder, number, before, after)
    before, after = (flatten(numbered(plan)) for plan in (made_with, now))
    weights = next((key for key in after if key.endswith("identity.sha256") and before.get(key) != after[key]), None)
    if weights is not None:
        teacher = now["teachers"][int(weights.split(".")[1])]
        where = ", ".join(teacher["files"]) or " ".join(filter(None, (teacher["model"], teacher["pretrained"])))
        raise ValueError(f"{folder} was made with other weights than those of {where}; set another --output")
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and ".files." not in key:
            option = OPTIONS.get(key, key)
            raise ValueError(
                f"{folder} was made with {option} = {before.get(key)}, now it is {after.get(key)}; change it back, or "
                "make another cache"
            )


OPTIONS = {
    "augmentation.version": "augmentation version",
    "augmentation.seed": "seed",
    "augmentation.min_crop": "data.min_crop",
    "augmentation.background": "data.background",
    "num_views": "--views",
    "dtype": "--dtype",
}


def numbered(value: Any) -> Any:
    """Lists as dictionaries, to be flattened with them."""
    if isinstance(value, dict):
        return {key: numbered(item) for key, item in value.items()}
    return {str(i): numbered(item) for i, item in enumerate(value)} if isinstance(value, list) else value


def require_same_parts(folder: Path, number: int, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raises: ValueError naming the file of a source that holds other samples than it did, or that came or went."""
    option = f"data.mix[{number - 1}].path" if number else "data.path"
    for (old, old_digest), (new, new_digest) in zip(before["parts"].items(), after["parts"].items(), strict=False):
        if old_digest != new_digest:
            raise ValueError(
                f"{new} does not hold the samples that {old} held when {folder} was made, in that order; put the file "
                "back, or make another cache"
            )
    if len(before["parts"]) != len(after["parts"]):
        raise ValueError(
            f"{option} holds {len(after['parts'])} files, {folder} was made from {len(before['parts'])}; make another cache"
        )
