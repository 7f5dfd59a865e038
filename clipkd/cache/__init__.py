"""`clipkd cache`: the teachers' features of every view and caption, computed once and kept."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clipkd import config as configuration
from clipkd import data, distributed, progress
from clipkd.assemble import (
    configured_teachers,
    create_student,
    hold_teachers,
    load_teacher,
    loaded,
    main_process_track,
    make_accelerator,
    open_data,
)
from clipkd.cache.encode import TEXTS_AT_A_TIME, Job, collate, encode_shard
from clipkd.cache.options import CacheConfig
from clipkd.cache.plan import make_plan, planned_files
from clipkd.cache.readme import describe_folder
from clipkd.closed_set import class_vectors
from clipkd.config import LogConfig
from clipkd.distill import require_fitting_teachers
from clipkd.feature_store import (
    CONFIG,
    MANIFEST,
    PLAN,
    Manifest,
    Shard,
    find_faults,
    read_manifest,
    require_same,
    writer,
)
from clipkd.models.text_tower import text_sha256
from clipkd.progress import mib
from clipkd.resume import claim
from clipkd.stops import RunStopped

__all__ = ["CacheConfig", "run"]


def run(config: CacheConfig) -> Path:
    """Make a cache, or what is missing of it; returns its folder. Call on every process that was launched.

    Raises: ValueError or FileNotFoundError before anything is computed if it cannot work, or the folder holds another
        cache; OSError that names the file if one cannot be written; RunStopped if too much of the data is damaged.
        Finished shards stay: the same call goes on.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = make_accelerator(dataclasses.replace(config, log=LogConfig()))
    teachers = [load_teacher(options) for options in configured_teachers(config)]
    hold_teachers(teachers)
    require_fitting_teachers(config.objective, loaded(teachers))
    student = create_student(config) if config.student.text == "frozen" else None
    if student is not None and text_sha256(student) in map(text_sha256, loaded(teachers)):
        student = None  # its text features are that teacher's
    pairs = open_data(config)
    if not isinstance(pairs, data.PairSet):
        raise ValueError(
            "a cache needs data that can be read at any place; data.path names shards behind URLs or pipes: copy them"
        )
    plan, captions = make_plan(config, teachers, student, pairs, precision=accelerator.mixed_precision)
    encoders = [encoder.to(accelerator.device) for encoder in loaded(teachers)]
    job = Job(config, pairs, captions, encoders, student and student.to(accelerator.device), accelerator)
    folder = Path(config.output)
    with contextlib.ExitStack() as stack:
        main = distributed.rank() == 0
        distributed.together(lambda: open_folder(config, folder, plan, stack) if main else None)
        done = distributed.together(lambda: find_done(folder, plan))
        todo = [number for number in range(len(plan.shards)) if number not in done]
        distributed.together(lambda: announce(job, folder, plan, todo) if main else None)
        if todo or not (folder / MANIFEST).is_file():
            make_shards(job, folder, plan, todo)
            distributed.together(lambda: finish(job, folder, plan) if main else None)
        distributed.barrier()
    return folder


def open_folder(config: CacheConfig, folder: Path, plan: Manifest, stack: contextlib.ExitStack) -> None:
    """Claim it, if it is new, empty or holds this cache. Main process only.

    Raises: ValueError if it holds another cache, or anything else, or another process writes it.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; name a folder")
    finished = (folder / MANIFEST).is_file()
    before = read_manifest(folder).plan() if finished else writer.read_plan(folder)
    if before is not None:
        require_same(folder, before, plan.plan())
    elif folder.is_dir() and (others := sorted(path.name for path in folder.iterdir() if path.name != ".lock")):
        raise ValueError(f"{folder} holds {others[0]}, which is of no cache; choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(claim(folder))
    writer.remove_leftovers(folder)
    if not finished:
        configuration.save(config, folder / CONFIG)
        (folder / "README.md").write_text(describe_folder(plan), encoding="utf-8")
        writer.write_json(folder / PLAN, plan.plan())


def find_done(folder: Path, plan: Manifest) -> dict[int, Shard]:
    """Shards that need not be made: whole ones of a cache that was interrupted, and right ones of a finished one."""
    done = {}
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        faults = find_faults(folder, manifest, track=main_process_track(), trust=False)
        for fault in faults.values():
            say(f"made anew: {fault}")
        for number, shard in enumerate(manifest.shards):
            if not any(file.name in faults for file in shard.files.values()):
                done[number] = shard
    recorded = {number: writer.read_record(folder, number) for number in range(len(plan.shards))}
    return {number: shard for number, shard in recorded.items() if shard is not None} | done


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
    say(f"{total / samples:,.0f} bytes per sample, {mib(total)} in all; free there: {mib(free)}")
    if needed > free:
        raise ValueError(
            f"{folder} lacks {mib(needed - free)} of disk for the cache; free space, or choose another --output, fewer "
            "--views or --dtype float16"
        )
    if not todo:
        say("every shard is there already")
        return
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
    """This process's share of them. Raises: RunStopped if more samples cannot be used than data.max_skipped allows."""
    own = todo[distributed.rank() :: distributed.world_size()]
    shards = [plan.shards[number] for number in own]
    skips, seen, allowed = data.Skips(), 0, job.config.data.max_skipped
    with (
        job.feed(shards) as feed,
        progress.Bar(folder.name, sum(map(job.num_batches, shards)), visible=distributed.rank() == 0) as bar,
    ):
        for number, shard in zip(own, shards, strict=True):
            arrays, bad = encode_shard(job, shard, feed, bar.advance)
            planned = planned_files(plan, number, job.captions)
            files = {kind: writer.write_array(folder, planned[kind], array) for kind, array in arrays.items()}
            writer.write_record(folder, number, dataclasses.replace(shard, files=files))
            skips.add(bad)
            seen += shard.rows
            if data.exceeds(skips.counts.total(), seen, allowed):
                first = skips.examples[0]
                raise RunStopped(
                    f"{skips.counts.total()} of the first {seen} samples cannot be used ({skips}), such as {first.key}: "
                    f"{first.message}; more than data.max_skipped allows ({allowed:.1%}). Mend the data, or raise it"
                )


def finish(job: Job, folder: Path, plan: Manifest) -> None:
    """Class vectors, and the manifest that makes a cache of the shards. Main process only."""
    classes = plan.classes
    if classes is not None:
        vectors = class_vectors(job.config.objective.closed_set, job.teachers[0], job.device)
        classes = dataclasses.replace(classes, file=writer.write_array(folder, classes.file, vectors.cpu().numpy()))
    done = find_done(folder, plan)
    shards = tuple(done[number] for number in range(len(plan.shards)))
    unusable = sum(count_unusable(folder, shard) for shard in shards)
    if unusable:
        say(f"{unusable} samples could not be used; training skips them")
    writer.finish(folder, dataclasses.replace(plan, shards=shards, classes=classes, num_unusable=unusable))


def count_unusable(folder: Path, shard: Shard) -> int:
    return int((np.load(folder / shard.files["samples"].name, mmap_mode="r")[:, 1] < 0).sum())
