"""`clipkd cache`: compute the teachers' features of every view and caption once, and store them."""

import contextlib
import dataclasses
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from clipkd import data, distributed, files, progress
from clipkd.config import train as configuration
from clipkd.config.train import MANIFEST
from clipkd.errors import RunStopped
from clipkd.models.initial import initial_student
from clipkd.objective.closed_set import class_vectors
from clipkd.objective.distiller import require_fitting_teachers
from clipkd.progress import mib
from clipkd.teachers.cache.captions import Captions
from clipkd.teachers.cache.encode import FeatureEncoder, ViewBatch
from clipkd.teachers.cache.plan import CacheConfig, describe_folder, make_plan, planned_files, record_frozen
from clipkd.teachers.loaded import load_teachers
from clipkd.teachers.store import manifest as store
from clipkd.teachers.store.compare import require_same
from clipkd.teachers.store.manifest import CONFIG, PLAN, FileRecord, Manifest, Shard
from clipkd.teachers.store.reader import find_faults

TEXTS_AT_A_TIME = 512


def run(config: CacheConfig) -> Path:
    """Make a cache, or its missing and damaged shards; return its folder. Call on every process that was launched.

    Raises: ValueError or FileNotFoundError before anything is computed if the options cannot work or the folder holds
        another cache; OSError that names a file that cannot be written; RunStopped if too many samples are damaged.
        Finished shards stay for the next call.
    """
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    accelerator = distributed.make_accelerator(config.precision)
    student = initial_student(config).prefer_channels_last() if config.student.frozen() else None
    teachers = load_teachers(config, student)
    frozen = {} if student is None else record_frozen(student, teachers)
    require_fitting_teachers(config.objective, teachers.models)
    pairs = data.open_pairs(config.data)
    if not isinstance(pairs, data.PairSet):
        raise ValueError("a cache needs local data; data.path names shards behind URLs or pipes: copy them")
    plan, captions = make_plan(config, teachers, frozen, pairs, precision=accelerator.mixed_precision)
    teachers.to(accelerator.device)
    student = student and student.to(accelerator.device)
    encoder = FeatureEncoder(config, pairs, teachers.encoders, student, tuple(frozen), accelerator)
    job = Job(encoder, Path(config.output), plan, captions)
    with contextlib.ExitStack() as stack:
        if distributed.from_main(lambda: job.open_folder(stack)) and not job.reopen_if_damaged():
            return job.folder
        todo = distributed.from_main(job.find_missing)
        job.make_shards(todo)
        distributed.from_main(job.finish)
    return job.folder


def say(text: str) -> None:
    if distributed.rank() == 0:
        progress.console.print(text, soft_wrap=True, markup=False)


@dataclass
class Job:
    """A cache in the making."""

    encoder: FeatureEncoder
    folder: Path
    plan: Manifest
    captions: Captions
    made: list[Shard] = field(default_factory=list)
    """Shards that this process has made."""

    def open_folder(self, stack: contextlib.ExitStack) -> bool:
        """Lock the folder if it is new, empty or holds this cache; return whether the cache is finished. Main process only.

        Raises: ValueError if the folder holds another cache or other files, or another process writes it.
        """
        folder, plan = self.folder, self.plan.plan()
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"output {folder} is a file; name a folder")
        before = store.read_plan(folder)
        others = [path.name for path in folder.glob("*") if path.name != ".lock" and path.suffix != ".tmp"]
        if before is None and others:
            raise ValueError(f"{folder} holds {min(others)} and no {PLAN} of a cache; choose another --output")
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(files.claim(folder))
        if before is not None:
            require_same(folder, before, plan)
        files.remove_leftovers(folder)
        if (folder / MANIFEST).is_file():
            return True
        files.write_json(folder / PLAN, plan, durable=True)  # first: the next start recognises the folder by it
        files.write_text(folder / CONFIG, configuration.to_yaml(self.encoder.config))
        files.write_text(folder / "README.md", describe_folder(self.plan))
        return False

    def reopen_if_damaged(self) -> bool:
        """If files of a finished cache are damaged, make it an unfinished one without their shards and return True."""
        manifest = distributed.from_main(lambda: store.read_manifest(self.folder))
        faults = find_faults(self.folder, manifest, trust=False)

        def reopen() -> None:
            for number, shard in enumerate(manifest.shards):
                if any(file.name in faults for file in shard.files.values()):
                    store.record_path(self.folder, number).unlink(missing_ok=True)
            (self.folder / MANIFEST).unlink()
            files.sync(self.folder)
            say("\n".join(f"rebuilding: {fault}" for fault in faults.values()))

        if faults:
            distributed.from_main(reopen)
        return bool(faults)

    def find_missing(self) -> list[int]:
        """Numbers of the shards that are not complete; prints what will be stored. Main process only.

        Raises: ValueError if the disk has too little space.
        """
        plan, numbers = self.plan, range(len(self.plan.shards))
        todo = [number for number in numbers if store.read_record(self.folder, number) is None]
        sizes = [sum(file.bytes for file in planned_files(plan, n, self.captions).values()) for n in numbers]
        needed, free = sum(sizes[number] for number in todo), shutil.disk_usage(self.folder).free
        say(
            f"{self.folder}: {plan.num_samples:,} samples × {plan.num_views} views and {plan.num_captions:,} captions "
            f"({plan.num_texts:,} distinct) of {plan.models}, {plan.dtype}"
        )
        say(f"{sum(sizes) / plan.num_samples:,.0f} bytes per sample, {mib(sum(sizes))} in all; free there: {mib(free)}")
        if needed > free:
            raise ValueError(
                f"{self.folder} lacks {mib(needed - free)} of disk for the cache; free space, or choose another --output, "
                "fewer --views or --dtype float16"
            )
        say(f"{len(todo)} of {len(sizes)} shards to make")
        return todo

    def make_shards(self, todo: list[int]) -> None:
        """Make shards in rounds of one per process; after each round all processes learn of an error."""
        world_size = distributed.world_size()
        shards = [self.plan.shards[number] for number in todo[distributed.rank() :: world_size]]
        num_batches = sum(len(self.encoder.batches(shard)) for shard in shards)
        with (
            self.encoder.feed(shards) as feed,
            progress.Bar(f"{self.folder.name}: batches", num_batches, visible=distributed.rank() == 0) as bar,
        ):
            for turn in range(0, len(todo), world_size):
                own = todo[turn : turn + world_size][distributed.rank() :][:1]
                distributed.together(lambda own=own: [self.make_shard(number, feed, bar) for number in own])

    def make_shard(self, number: int, feed: data.Feed[ViewBatch], bar: progress.Bar) -> None:
        """Compute and write a shard. Raises: OSError that names the file; ValueError or RunStopped with the reason."""
        shard, planned = self.plan.shards[number], planned_files(self.plan, number, self.captions)
        texts = self.captions.read_texts(shard, self.encoder.pairs)
        parts = [
            self.encoder.encode_texts(texts[n : n + TEXTS_AT_A_TIME]) for n in range(0, len(texts), TEXTS_AT_A_TIME)
        ]
        fingerprints: list[int] = []
        skips: list[data.Skip | None] = []
        for _ in self.encoder.batches(shard):
            batch = next(feed)
            parts.append(self.encoder.encode_images(batch))
            fingerprints += batch.fingerprints
            skips += batch.skips
            bar.advance()
        usable = np.array([skip is None for skip in skips])
        table = np.where(usable[:, None], self.captions.table(shard), -1)
        parts.append({"samples": np.concatenate([np.array(fingerprints, np.int64)[:, None], table], axis=1)})
        written = {}
        for kind, file in planned.items():
            array = np.concatenate([np.empty((0, *file.shape[1:]), file.dtype), *(p[kind] for p in parts if kind in p)])
            if kind.startswith("image"):
                array[~usable] = 0
            written[kind] = write_array(self.folder, file, array)
        made = dataclasses.replace(shard, files=written, unusable=int((~usable).sum()))
        store.write_record(self.folder, number, made)
        self.made.append(made)
        self.require_few_unusable(self.made, next(filter(None, skips), None))

    def require_few_unusable(self, shards: Sequence[Shard], example: data.Skip | None = None) -> None:
        """Raises: RunStopped if more samples of these shards cannot be used than data.max_skipped allows."""
        allowed, unusable = self.encoder.config.data.max_skipped, sum(shard.unusable for shard in shards)
        if data.exceeds(unusable, seen := sum(shard.rows for shard in shards), allowed):
            named = "" if example is None else f", such as {example.key}: {example.message}"
            raise RunStopped(
                f"{unusable} of {seen} samples cannot be used{named}; more than data.max_skipped allows ({allowed:.1%}). "
                "Mend the data and make another cache, or raise it and run the same command again"
            )

    def finish(self) -> None:
        """Write the class vectors, and the manifest that makes the cache usable. Main process only. Raises: RunStopped."""
        records = (store.read_record(self.folder, number) for number in range(len(self.plan.shards)))
        shards = tuple(shard for shard in records if shard is not None)
        assert len(shards) == len(self.plan.shards)
        self.require_few_unusable(shards)
        classes = self.plan.classes
        if classes is not None:
            closed_set, device = self.encoder.config.objective.closed_set, self.encoder.accelerator.device
            vectors = class_vectors(closed_set, self.encoder.teachers[0], device)
            classes = write_array(self.folder, classes, vectors.cpu().numpy())
        manifest = dataclasses.replace(self.plan, shards=shards, classes=classes)
        if manifest.num_unusable:
            say(f"{manifest.num_unusable} samples could not be used; training skips them")
        files.sync(self.folder / "features")
        files.write_json(self.folder / MANIFEST, store.to_json(manifest), durable=True)
        files.sync(self.folder)


def write_array(folder: Path, planned: FileRecord, array: np.ndarray) -> FileRecord:
    """Write a planned .npy file; return its record with size and SHA-256. Raises: OSError that names the file."""
    assert (array.shape, array.dtype.str) == (planned.shape, planned.dtype), (array.shape, array.dtype.str, planned)
    path = folder / planned.name

    def write(file: BinaryIO) -> None:
        # numpy.save raises errors without a number when the disk is full.
        header: Any = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)

    files.write_whole(path, write, durable=True)
    return dataclasses.replace(planned, bytes=path.stat().st_size, sha256=files.sha256(path))
