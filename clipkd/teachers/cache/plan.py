"""The options of `clipkd cache`, and the plan: shards, files and README of a cache before the first feature is computed."""

import itertools
import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from clipkd import files
from clipkd.config.train import Tower, TrainConfig
from clipkd.data import PairSet
from clipkd.errors import require
from clipkd.models.encoder import Encoder
from clipkd.models.load import weight_files
from clipkd.models.towers import tower_sha256
from clipkd.objective.closed_set import closed_set_fingerprint, read_classes
from clipkd.teachers.cache.captions import Captions, number_captions
from clipkd.teachers.loaded import LoadedTeachers
from clipkd.teachers.store.manifest import (
    DTYPES,
    FileRecord,
    FrozenTower,
    Manifest,
    Shard,
    TeacherRecord,
    augmentation_of,
    sources_of,
)

LARGEST_SHARD = 4096
"""Most samples of a shard, which a kill costs each process."""

VIEWS_OF_A_SHARD = 1 << 14
HEADER_BYTES = 128


@dataclass(frozen=True, kw_only=True)
class CacheConfig(TrainConfig):
    trains: ClassVar[bool] = False
    output: str = ""
    """Folder of the cache, named on the command line: the output in a training's YAML is its run folder."""
    views: int = 1
    """Augmented views per sample: so many passes over the data see new crops, then the crops repeat in the same order."""
    dtype: Literal["float16", "bfloat16", "float32"] = "float16"
    """Type of the stored features. On a CPU, float32 gives the losses of a run without a cache to the bit."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.output), "output is empty; name the folder of the cache: --output DIR")
        require(self.views >= 1, f"views is {self.views}; it must be 1 or more")
        require(
            bool(self.teacher.names or self.student.frozen()),
            "a cache is made with a teacher or with frozen towers: set teacher.models, or student.image or student.text",
        )
        require(self.teacher.cache is None, "teacher.cache is read by training; leave it out to make a cache")


def cut(pairs: PairSet, num_views: int) -> list[tuple[int, int]]:
    """First id and number of samples of each shard of the cache: shards of the data, large ones cut into equal parts."""
    largest = max(1, min(LARGEST_SHARD, VIEWS_OF_A_SHARD // num_views))
    ranges, first = [], 0
    for size in itertools.chain.from_iterable(source.shard_sizes.tolist() for source in pairs.sources):
        parts = -(-size // largest)
        cuts = [first + part * size // parts for part in range(parts + 1)]
        ranges += [(begin, end - begin) for begin, end in itertools.pairwise(cuts)]
        first += size
    return ranges


def make_plan(
    config: CacheConfig,
    teachers: LoadedTeachers,
    student: dict[Tower, FrozenTower],
    pairs: PairSet,
    *,
    precision: str,
) -> tuple[Manifest, Captions]:
    """Everything of the manifest but sizes and hashes. Call on every process.

    student: its frozen towers that are none of the teachers'. precision: autocast of the towers.
    """
    ranges, shards = cut(pairs, config.views), []
    captions = number_captions(pairs, ranges)
    for first, rows in ranges:
        first_text, end = captions.firsts.searchsorted(captions.starts[[first, first + rows]]).tolist()
        shards.append(Shard(first, rows, first_text, end - first_text))
    closed_set, classes = config.objective.closed_set, None
    if closed_set.weight and teachers.encoders:
        shape = (len(read_classes(closed_set)[0]), teachers.encoders[0].dim)
        classes = FileRecord("classes.npy", shape, DTYPES["float32"])
    manifest = Manifest(
        num_views=config.views,
        dtype=config.dtype,
        precision=precision,
        augmentation=augmentation_of(config),
        teachers=record_teachers(config, teachers),
        data=sources_of(pairs),
        num_captions=len(captions.texts),
        student=student,
        classes_fingerprint=classes and closed_set_fingerprint(closed_set),
        classes=classes,
        shards=tuple(shards),
    )
    return manifest, captions


def record_frozen(student: Encoder, teachers: LoadedTeachers) -> dict[Tower, FrozenTower]:
    """The student's frozen towers that are none of the teachers'. Raises: ValueError if one's output is out of reach."""
    texts = [tower_sha256(teacher, "text") for teacher in teachers.encoders]
    examples = {"image": torch.zeros(1, 3, *student.spec.size), "text": student.spec.tokenize(["x"])}
    found = dict[Tower, FrozenTower]()
    with torch.inference_mode():
        for tower in student.frozen:
            if (sha256 := tower_sha256(student, tower)) not in texts:
                try:
                    width = student.encode_frozen(tower, examples[tower]).shape[1]
                except ValueError:
                    if not teachers.encoders:
                        raise
                    continue  # the tower runs at every step, as training says
                found[tower] = FrozenTower(width, sha256)
    return found


def record_teachers(config: CacheConfig, teachers: LoadedTeachers) -> tuple[TeacherRecord, ...]:
    return tuple(
        TeacherRecord(
            model=model,
            name=encoder.name,
            dim=encoder.dim,
            logit_scale=encoder.logit_scale.item(),
            logit_bias=None if encoder.logit_bias is None else encoder.logit_bias.item(),
            text_sha256=tower_sha256(encoder, "text"),
            identity=identity,
            files={str(path): files.sha256(path) for path in weight_files(model)},
        )
        for model, encoder, identity in zip(config.teacher.names, teachers.encoders, teachers.identities, strict=True)
    )


def planned_files(manifest: Manifest, number: int, captions: Captions) -> dict[str, FileRecord]:
    """The files of a shard by kind, with estimated sizes and without hashes."""
    shard, stored = manifest.shards[number], DTYPES[manifest.dtype]
    shapes: dict[str, tuple[tuple[int, ...], str]] = {"samples": ((shard.rows, 1 + captions.most(shard)), "<i8")}
    for teacher, record in enumerate(manifest.teachers):
        shapes[f"image.{teacher}"] = ((shard.rows, manifest.num_views, record.dim), stored)
        shapes[f"text.{teacher}"] = ((shard.texts, record.dim), stored)
    for tower, one in manifest.student.items():
        rows = (shard.rows, manifest.num_views) if tower == "image" else (shard.texts,)
        shapes[f"{tower}.student"] = ((*rows, one.width), stored)
    files = {}
    for kind, (shape, dtype) in shapes.items():
        file = FileRecord(f"features/{number:05d}.{kind}.npy", shape, dtype)
        files[kind] = replace(file, bytes=HEADER_BYTES + math.prod(shape[:-1]) * file.row_bytes)
    return files


TEMPLATE = """# Features of {names}

Made by `clipkd cache`: image features of {num_views} augmented views of each of {num_samples:,} samples, and text features of
{num_texts:,} distinct captions. Train from it with `--teacher.cache FOLDER`; check it with `clipkd cache verify FOLDER`.

* `manifest.json`: teachers (SHA-256 of weights, preprocessing, tokens), data, augmentation, and every file with size and SHA-256.
* `config.yaml`: the configuration that made the cache. `plan.json` and `records/`: what the same command needs to rebuild files.

All files are .npy: a header, then rows of one length. Shard NNNNN holds samples `first` to `first + rows - 1` of the data:

| file | shape | content |
|---|---|---|
| `features/NNNNN.samples.npy` | rows, 1 + captions, int64 | see below |
| `features/NNNNN.image.T.npy` | rows, views, width, {dtype} | teacher T's features of each view |
| `features/NNNNN.text.T.npy` | texts, width, {dtype} | teacher T's features of the captions that occur first in this shard |
| `features/NNNNN.image.student.npy`, `….text.student.npy` | likewise | of a frozen tower, before a trained projection |

A row of `samples` holds the CRC-32 of the sample's image and captions, then the row of each of its captions among all texts
(-1 pads; a sample with -1 only could not be used). A shard's texts are rows `first_text` to `first_text + texts - 1`.
Features have norm 1{rounding}; what comes before a projection has any. In Python:

```python
import json
import numpy as np
shards = json.load(open("manifest.json"))["shards"]
load = lambda kind: [np.load(shard["files"][kind]["name"], mmap_mode="r") for shard in shards]
{example}
```
{bfloat16}"""

BFLOAT16 = """
numpy has no bfloat16: the bits are stored as uint16, and `(image.astype(np.uint32) << 16).view(np.float32)` widens them.
"""


def describe_folder(plan: Manifest) -> str:
    half, example = plan.dtype == "bfloat16", []
    who = "0" if plan.teachers else "student"
    if plan.teachers or "image" in plan.student:
        example += [f'image = load("image.{who}")[0][2, 0]  # shard 0, its third sample, its first view']
    if plan.teachers or "text" in plan.student:
        example += [
            f'text = np.concatenate(load("text.{who}"))[load("samples")[0][2, 1]]  # that sample\'s first caption'
        ]
    return TEMPLATE.format(
        names=plan.models,
        num_views=plan.num_views,
        num_samples=plan.num_samples,
        num_texts=plan.num_texts,
        example="\n".join(example),
        dtype="uint16 (bfloat16)" if half else plan.dtype,
        rounding="" if plan.dtype == "float32" else ", up to rounding",
        bfloat16=BFLOAT16 if half else "",
    )
