"""What a cache will hold, before the first of it is computed."""

import itertools
import math
from dataclasses import replace

from clipkd import files
from clipkd.data import PairSet
from clipkd.models.encoder import Encoder
from clipkd.models.load import weight_files
from clipkd.models.text_tower import text_sha256
from clipkd.objective.closed_set import closed_set_fingerprint, read_classes
from clipkd.teachers.cache.captions import Captions, survey
from clipkd.teachers.cache.options import CacheConfig
from clipkd.teachers.loaded import Teacher, configured_teachers, loaded
from clipkd.teachers.store.manifest import (
    DTYPES,
    Classes,
    FileRecord,
    Manifest,
    Shard,
    StudentText,
    TeacherRecord,
    augmentation_of,
    sources_of,
)

LARGEST_SHARD = 4096
"""Samples whose features are written together: what a kill may cost each process."""

VIEWS_OF_A_SHARD = 1 << 14
HEADER_BYTES = 128


def cut(pairs: PairSet, num_views: int) -> list[tuple[int, int]]:
    """First id and number of samples of each stretch: shards of the data, large ones in equal parts."""
    largest = max(1, min(LARGEST_SHARD, VIEWS_OF_A_SHARD // num_views))
    stretches, first = [], 0
    for size in itertools.chain.from_iterable(source.shard_sizes.tolist() for source in pairs.sources):
        parts = -(-size // largest)
        cuts = [first + part * size // parts for part in range(parts + 1)]
        stretches += [(begin, end - begin) for begin, end in itertools.pairwise(cuts)]
        first += size
    return stretches


def make_plan(
    config: CacheConfig, teachers: list[Teacher], student: Encoder | None, pairs: PairSet, *, precision: str
) -> tuple[Manifest, Captions]:
    """student: one whose frozen text tower is no teacher's. Call on every process."""
    stretches = cut(pairs, config.views)
    captions = survey(pairs, stretches)
    shards = []
    for first, rows in stretches:
        numbers = captions.starts[[first, first + rows]]
        first_text, end = captions.firsts.searchsorted(numbers).tolist()
        shards.append(Shard(first, rows, first_text, end - first_text))
    encoders, closed_set = loaded(teachers), config.objective.closed_set
    records = []
    for model, teacher, encoder in zip(configured_teachers(config), teachers, encoders, strict=True):
        records.append(
            TeacherRecord(
                model=model,
                name=encoder.name,
                dim=encoder.dim,
                logit_scale=encoder.logit_scale.item(),
                logit_bias=None if encoder.logit_bias is None else encoder.logit_bias.item(),
                text_sha256=text_sha256(encoder),
                identity=teacher.identity,
                files={str(path): files.sha256(path) for path in weight_files(model)},
            )
        )
    classes = None
    if closed_set.weight:
        shape = (len(read_classes(closed_set)[0]), encoders[0].dim)
        classes = Classes(closed_set_fingerprint(closed_set), FileRecord("classes.npy", shape, DTYPES["float32"]))
    manifest = Manifest(
        num_views=config.views,
        dtype=config.dtype,
        precision=precision,
        augmentation=augmentation_of(config),
        teachers=tuple(records),
        data=sources_of(pairs),
        num_captions=len(captions.rows),
        student=student and StudentText(student.name, student.dim, text_sha256(student)),
        classes=classes,
        shards=tuple(shards),
    )
    return manifest, captions


def planned_files(manifest: Manifest, number: int, captions: Captions) -> dict[str, FileRecord]:
    """The files of a shard, without their checksums; their sizes but for a header of more than usual length."""
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
