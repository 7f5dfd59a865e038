"""`clipkd cache`: the teachers' features of every view and caption, computed once and kept."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipkd import data, distributed, files, progress
from clipkd.config import train as configuration
from clipkd.errors import RunStopped
from clipkd.files import claim
from clipkd.models.create import initial_student
from clipkd.models.encoder import Encoder
from clipkd.models.text_tower import text_sha256
from clipkd.objective.closed_set import class_vectors
from clipkd.objective.distiller import require_fitting_teachers
from clipkd.progress import mib
from clipkd.teachers.cache.encode import TEXTS_AT_A_TIME, EncodedViews, Job, collate, encode_shard
from clipkd.teachers.cache.options import CacheConfig
from clipkd.teachers.cache.plan import make_plan, planned_files
from clipkd.teachers.cache.readme import describe_folder
from clipkd.teachers.loaded import Teacher, configured_teachers, hold_teachers, load_teacher, loaded, share_text_tower
from clipkd.teachers.store import writer
from clipkd.teachers.store.manifest import CONFIG, MANIFEST, PLAN, Manifest, Shard, read_manifest, require_same
from clipkd.teachers.store.reader import find_faults

__all__ = ["CacheConfig", "run"]


def run(config: CacheConfig) -> Path:
    """Make a cache, or what is missing of it; returns its folder. Call on every process that was launched.

    Raises: ValueError or FileNotFoundError before anything is computed if it cannot work, or the folder holds another
        cache; OSError that names the file if one cannot be written; RunStopped if too much of the data is damaged.
        Finished shards stay: the same call goes on.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = distributed.make_accelerator(config.precision)
    teachers = [load_teacher(model, dtype=config.teacher.dtype) for model in configured_teachers(config)]
    student = find_frozen_student(config, teachers)
    require_fitting_teachers(config.objective, loaded(teachers))
    pairs = data.open_pairs(config.data)
    if not isinstance(pairs, data.PairSet):
        raise ValueError(
            "a cache needs data that can be read at any place; data.path names shards behind URLs or pipes: copy them"
        )
    plan, captions = make_plan(config, teachers, student, pairs, precision=accelerator.mixed_precision)
    encoders = [encoder.to(accelerator.device) for encoder in loaded(teachers)]
    job = Job(config, pairs, captions, encoders, student and student.to(accelerator.device), accelerator)
    folder = Path(config.output)
    with contextlib.ExitStack() as stack:
        if distributed.from_main(lambda: open_folder(config, folder, plan, stack)):
            reopen_if_damaged(folder, plan)
        done = distributed.from_main(lambda: read_done(folder, plan))
        todo = [number for number in range(len(plan.shards)) if number not in done]
        distributed.from_main(lambda: announce(job, folder, plan, todo))
        make_shards(job, folder, plan, todo)
        distributed.from_main(lambda: finish(job, folder, plan))
    return folder


def find_frozen_student(config: CacheConfig, teachers: list[Teacher]) -> Encoder | None:
    """A student whose text features are stored beside the teachers': its text tower is frozen, and none of theirs.

    Rounds the teachers to the dtype that they are held in.
    """
    student = initial_student(config) if config.student.text != "trained" else None
    if student is not None:
        share_text_tower(config, student, teachers)
    hold_teachers(teachers)
    known = [text_sha256(teacher) for teacher in loaded(teachers)]
    return None if student is None or text_sha256(student) in known else student


def open_folder(config: CacheConfig, folder: Path, plan: Manifest, stack: contextlib.ExitStack) -> bool:
    """Claim it, if it is new, empty or holds this cache; returns whether that is finished. Main process only.

    Raises: ValueError if it holds another cache, or anything else, or another process writes it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; name a folder")
    if folder.is_dir() and not ((folder / MANIFEST).is_file() or (folder / PLAN).is_file()):
        others = sorted(path.name for path in folder.iterdir() if path.name != ".lock" and path.suffix != ".tmp")
        if "features" in others and CONFIG in others:
            raise ValueError(f"{folder} is a cache that has lost its {MANIFEST}; remove it and make the cache again")
        if others:
            raise ValueError(f"{folder} is no cache: it holds {others[0]}; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(claim(folder))
    finished = (folder / MANIFEST).is_file()
    before = read_manifest(folder).plan() if finished else writer.read_plan(folder)
    if before is not None:
        require_same(folder, before, plan.plan())
    writer.remove_leftovers(folder)
    if not finished:
        files.write_json(
            folder / PLAN, plan.plan(), durable=True
        )  # first: by it the next start knows the folder for its own
        files.write_text(folder / CONFIG, configuration.to_yaml(config))
        files.write_text(folder / "README.md", describe_folder(plan))
    return finished


def reopen_if_damaged(folder: Path, plan: Manifest) -> None:
    """A finished cache with damaged files becomes an unfinished one without them. Call on every process."""
    manifest = distributed.from_main(lambda: read_manifest(folder))
    faults = find_faults(folder, manifest, track=progress.track_on_main, trust=False)
    for fault in faults.values():
        say(f"made anew: {fault}")
    shards = enumerate(manifest.shards)
    whole = {n: shard for n, shard in shards if not any(file.name in faults for file in shard.files.values())}
    distributed.from_main(lambda: writer.reopen(folder, plan.plan(), whole if faults else None))


def read_done(folder: Path, plan: Manifest) -> set[int]:
    """Shards that need not be made."""
    if (folder / MANIFEST).is_file():
        return set(range(len(plan.shards)))
    return {number for number in range(len(plan.shards)) if writer.read_record(folder, number) is not None}


def say(text: str) -> None:
    if distributed.rank() == 0:
        progress.console.print(text, soft_wrap=True, markup=False)


def announce(job: Job, folder: Path, plan: Manifest, todo: list[int]) -> None:
    """What will be stored, where, and how long it takes. Main process only. Raises: ValueError if the disk has no room."""
    samples, texts = plan.num_samples, plan.num_texts
    files = {number: planned_files(plan, number, job.captions) for number in range(len(plan.shards))}
    sizes = {number: sum(file.bytes for file in own.values()) for number, own in files.items()}
    total, needed = sum(sizes.values()), sum(sizes[number] for number in todo)
    free = shutil.disk_usage(folder).free
    names = ", ".join(teacher.name for teacher in plan.teachers)
    say(
        f"{folder}: {samples:,} samples × {plan.num_views} views and {plan.num_captions:,} captions ({texts:,} distinct) "
        f"of {names}, {plan.dtype}"
    )
    if not todo:
        say("every shard is there already")
        return
    say(f"{total / samples:,.0f} bytes per sample, {mib(total)} in all; free there: {mib(free)}")
    if needed > free:
        raise ValueError(
            f"{folder} lacks {mib(needed - free)} of disk for the cache; free space, or choose another --output, fewer "
            "--views or --dtype float16"
        )
    rows = sum(plan.shards[number].rows for number in todo)
    texts_todo = sum(plan.shards[number].texts for number in todo)
    needs = estimate_seconds(job, plan.shards[todo[0]], samples=rows, texts=texts_todo) / distributed.world_size()
    say(f"{len(todo)} of {len(plan.shards)} shards to make, in about {timedelta(seconds=round(needs))} (h:min:s)")


def estimate_seconds(job: Job, shard: Shard, *, samples: int, texts: int) -> float:
    """Of one process, from one batch of images and one of texts."""
    dataset, ids = job.dataset(), job.batches(shard)[0]
    words = job.captions.read_texts(shard, job.pairs)[:TEXTS_AT_A_TIME] or ["a"]
    started = time.perf_counter()
    batch = collate([dataset[id] for id in ids])
    read = (time.perf_counter() - started) / len(ids)
    images, per_text = seconds(lambda: job.encode_images(batch)) / len(ids), seconds(lambda: job.encode_texts(words))
    workers = job.config.data.num_workers
    per_sample = max(images, read / workers) if workers else images + read
    return samples * per_sample + texts * per_text / len(words)


def seconds(call: Callable[[], Any]) -> float:
    """Of a second call: the first is slow."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def make_shards(job: Job, folder: Path, plan: Manifest, todo: list[int]) -> None:
    """All of them, a round of one for each process after the other: none waits for long, and all learn of an error.

    Raises: RunStopped if more samples cannot be used than data.max_skipped allows.
    """
    world_size, allowed = distributed.world_size(), job.config.data.max_skipped
    own: list[int | None] = [*todo[distributed.rank() :: world_size]]
    own += [None] * (-(-len(todo) // world_size) - len(own))
    shards = [plan.shards[number] for number in own if number is not None]
    skips, seen = data.Skips(), 0
    with (
        job.feed(shards) as feed,
        progress.Bar(
            f"{folder.name}: batches", sum(map(job.num_batches, shards)), visible=distributed.rank() == 0
        ) as bar,
    ):
        for number in own:
            bad = distributed.together(
                lambda n=number: [] if n is None else make_shard(job, folder, plan, n, feed, bar.advance)
            )
            skips.add(bad)
            seen += 0 if number is None else plan.shards[number].rows
            distributed.together(partial(require_few_skipped, skips.counts.total(), seen, allowed, skips.examples))


def make_shard(
    job: Job, folder: Path, plan: Manifest, number: int, feed: data.Feed[EncodedViews], advance: Callable[[], Any]
) -> list[data.Skip]:
    """Its unusable samples. Raises: OSError that names the file that cannot be written."""
    arrays, bad = encode_shard(job, plan.shards[number], feed, advance)
    planned = planned_files(plan, number, job.captions)
    files = {kind: writer.write_array(folder, planned[kind], array) for kind, array in arrays.items()}
    writer.write_record(folder, number, dataclasses.replace(plan.shards[number], files=files))
    return bad


def require_few_skipped(num_skipped: int, seen: int, allowed: float, examples: Sequence[data.Skip] = ()) -> None:
    """Raises: RunStopped."""
    if data.exceeds(num_skipped, seen, allowed):
        named = f", such as {examples[0].key}: {examples[0].message}" if examples else ""
        raise RunStopped(
            f"{num_skipped} of {seen} samples cannot be used{named}; more than data.max_skipped allows ({allowed:.1%}). Mend "
            "the data and make another cache, or raise it and give the same command again"
        )


def finish(job: Job, folder: Path, plan: Manifest) -> None:
    """Class vectors, and the manifest that makes a cache of the shards. Main process only.

    Raises: RunStopped if more samples cannot be used than data.max_skipped allows.
    """
    if (folder / MANIFEST).is_file():
        return
    shards = tuple(filter(None, (writer.read_record(folder, number) for number in range(len(plan.shards)))))
    assert len(shards) == len(plan.shards)
    unusable = [shard.first + row for shard in shards for row in find_unusable(folder, shard)]
    skips = (job.dataset()[id][2] for id in unusable[:1])
    require_few_skipped(len(unusable), plan.num_samples, job.config.data.max_skipped, [*filter(None, skips)])
    classes = plan.classes
    if classes is not None:
        vectors = class_vectors(job.config.objective.closed_set, job.teachers[0], job.device)
        classes = dataclasses.replace(classes, file=writer.write_array(folder, classes.file, vectors.cpu().numpy()))
    if unusable:
        say(f"{len(unusable)} samples could not be used; training skips them")
    writer.finish(folder, dataclasses.replace(plan, shards=shards, classes=classes, num_unusable=len(unusable)))


def find_unusable(folder: Path, shard: Shard) -> list[int]:
    """Rows."""
    return np.flatnonzero(np.load(folder / shard.files["samples"].name)[:, 1] < 0).tolist()
