"""Plan the shards and files of a cache before the first feature is computed."""

import itertools
import math
from dataclasses import replace

from clipkd import files
from clipkd.data import PairSet
from clipkd.models.encoder import Encoder
from clipkd.models.load import weight_files
from clipkd.models.text_tower import text_sha256
from clipkd.objective.closed_set import closed_set_fingerprint, read_classes
from clipkd.teachers.cache.captions import Captions, number_captions
from clipkd.teachers.cache.options import CacheConfig
from clipkd.teachers.loaded import LoadedTeachers
from clipkd.teachers.store.manifest import (
    DTYPES,
    FileRecord,
    Manifest,
    Shard,
    StudentText,
    TeacherRecord,
    augmentation_of,
    sources_of,
)

LARGEST_SHARD = 4096
"""Most samples of a shard, which a kill costs each process."""

VIEWS_OF_A_SHARD = 1 << 14
HEADER_BYTES = 128


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
    config: CacheConfig, teachers: LoadedTeachers, student: Encoder | None, pairs: PairSet, *, precision: str
) -> tuple[Manifest, Captions]:
    """Everything of the manifest but sizes and hashes. Call on every process.

    student: one whose frozen text tower is none of the teachers'. precision: autocast of the towers.
    """
    ranges, shards = cut(pairs, config.views), []
    captions = number_captions(pairs, ranges)
    for first, rows in ranges:
        first_text, end = captions.firsts.searchsorted(captions.starts[[first, first + rows]]).tolist()
        shards.append(Shard(first, rows, first_text, end - first_text))
    closed_set, classes = config.objective.closed_set, None
    if closed_set.weight:
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
        student=student and StudentText(student.dim, text_sha256(student)),
        classes_fingerprint=classes and closed_set_fingerprint(closed_set),
        classes=classes,
        shards=tuple(shards),
    )
    return manifest, captions


def record_teachers(config: CacheConfig, teachers: LoadedTeachers) -> tuple[TeacherRecord, ...]:
    return tuple(
        TeacherRecord(
            model=model,
            name=encoder.name,
            dim=encoder.dim,
            logit_scale=encoder.logit_scale.item(),
            logit_bias=None if encoder.logit_bias is None else encoder.logit_bias.item(),
            text_sha256=text_sha256(encoder),
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
    if manifest.student is not None:
        shapes["text.student"] = ((shard.texts, manifest.student.dim), stored)
    files = {}
    for kind, (shape, dtype) in shapes.items():
        file = FileRecord(f"features/{number:05d}.{kind}.npy", shape, dtype)
        files[kind] = replace(file, bytes=HEADER_BYTES + math.prod(shape[:-1]) * file.row_bytes)
    return files
