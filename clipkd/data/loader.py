"""Pairs → batches, in an order and with an augmentation that depend on the seed and the position alone.

The global batches are the same for any number of processes and loader processes, and a run can start at any step.
"""

import html
import multiprocessing
import multiprocessing.queues
import os
import shutil
import signal
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from clipkd.config.data import DataConfig
from clipkd.data.crops import Box, decoding_scale, random_crop_box, reduce_scale, render
from clipkd.data.order import Position, Purpose, generator
from clipkd.data.skips import BadSample, Skip
from clipkd.data.sources import Pair, PairSet
from clipkd.errors import RunStopped, leave_signals_to_parent, one_line, short
from clipkd.images import WHITE, BadImage, open_image, to_rgb
from clipkd.progress import mib
from clipkd.views import Batch, Views, ViewSpec

AUGMENTATION_VERSION = 2
"""Raised whenever equal seeds give other crops, pixels or captions than before: older teacher caches then no longer fit."""

MAX_TRIES = 100
"""Samples in a row that may be unusable."""

BATCH_TIMEOUT = 900
"""Seconds after which a loader process without a batch counts as hanging."""

SHARED_MEMORY = Path("/dev/shm")
"""Where loader processes hand over their batches."""

MOST_AHEAD = 4
"""Batches that a loader process may be ahead."""

BYTES_AHEAD = 1 << 30
"""What the loader processes of one training process may hold together, if every one is to be a batch ahead at least."""


class Sample(NamedTuple):
    pixels: list[np.ndarray]
    """One per kind of view, uint8 [h, w, 3]."""
    caption: str
    caption_number: int
    """Position of the caption among the pair's captions."""
    id: int
    label: int
    key: str
    skipped: tuple[Skip, ...] = ()
    features: tuple[np.ndarray, ...] = ()
    """Stored teacher features of this view, if a cache is read."""


class FeatureRows(Protocol):
    """Stored features of frozen models (clipkd.teachers.store)."""

    num_views: int
    """Stored views per sample; later passes repeat them in order."""
    seed: int
    """Of the crops that were stored, which the student sees too."""

    def read(self, pair: Pair, id: int, view: int, caption_number: int) -> tuple[np.ndarray, ...]:
        """One vector per kind of feature. Raises: BadSample if the sample has none; RunStopped."""
        ...


class Augment:
    """Pair → pixels of every view and one caption. Randomness: seed, view index and id alone.

    The pixels of a view depend on no other view: a teacher's are the same beside any student.
    """

    def __init__(self, config: DataConfig, views: Views, seed: int) -> None:
        self.config, self.specs, self.token_specs, self.seed = config, views.pixel_specs, views.token_specs, seed

    def __call__(self, pair: Pair, view: int, id: int, *, stored: FeatureRows | None = None) -> Sample:
        """stored: what the pixels are those of; the caption is drawn for each view. Raises: BadSample."""
        crop, seed = (view, self.seed) if stored is None else (view % stored.num_views, stored.seed)
        pixels = self.pixels(pair, crop, id, seed=seed)
        caption_number = int(generator(Purpose.CAPTION, self.seed, view, id).integers(len(pair.captions)))
        caption = pair.captions[caption_number]
        if self.has_no_tokens(caption):
            raise BadSample(pair.key, "empty caption", f"a tokenizer leaves nothing of its caption {caption[:80]!r}")
        return Sample(pixels, caption, caption_number, id, pair.label, pair.key)

    def has_no_tokens(self, caption: str) -> bool:
        """Whether nothing of a caption can be seen, or a tokenizer takes it for an empty one, as CLIP's does `&nbsp;`."""
        plain = html.unescape(html.unescape(caption))
        if not caption or any(map(str.isalnum, plain)):
            return False  # images alone have no captions, and no tokenizer drops letters and digits
        if all(unicodedata.category(letter)[0] in "CZ" for letter in caption):  # separators, zero-width and control
            return True
        return any(torch.equal(*map(spec.tokenize, ([caption], [""]))) for spec in self.token_specs)

    def pixels(self, pair: Pair, view: int, id: int, *, seed: int) -> list[np.ndarray]:
        """Raises: BadSample."""
        try:
            return self.draw_pixels(pair.image, generator(Purpose.AUGMENTATION, seed, view, id))
        except BadImage as bad:
            raise BadSample(pair.key, bad.cause, str(bad)) from bad

    def draw_pixels(self, data: bytes, rng: np.random.Generator) -> list[np.ndarray]:
        """One crop of an image for every view, decoded once per scale. Raises: BadImage."""
        red, green, blue = rng.integers(0, 256, 3).tolist() if self.config.background == "random" else WHITE
        image = open_image(data)
        box = random_crop_box(*image.size, self.config.min_crop, rng)
        scales = [decoding_scale(image, box, spec) for spec in self.specs]
        decoded: dict[int, tuple[Image.Image, Box]] = {}
        for scale in dict.fromkeys(scales):
            image = open_image(data) if decoded else image
            reduced = reduce_scale(image, box, scale)
            decoded[scale] = (to_rgb(image, background=(red, green, blue)), reduced)
        return [render(*decoded[scale], spec) for scale, spec in zip(scales, self.specs, strict=True)]


class AugmentedPairs(Dataset):
    """(view index, id) → sample. A substitute, drawn from the position alone, replaces a sample that cannot be used."""

    def __init__(self, pairs: PairSet, augment: Augment, stored: FeatureRows | None = None) -> None:
        self.pairs, self.augment, self.stored = pairs, augment, stored

    def __getitem__(self, position: Position) -> Sample:
        view, id = position
        substitutes = generator(Purpose.SUBSTITUTE, self.augment.seed, *position)
        skipped: list[Skip] = []
        while len(skipped) < MAX_TRIES:
            try:
                return self.make(view, id)._replace(skipped=tuple(skipped))
            except BadSample as bad:
                skipped.append(bad.skip)
            id = int(substitutes.integers(len(self.pairs)))
        raise no_sample(skipped[-1])

    def make(self, view: int, id: int) -> Sample:
        """Raises: BadSample."""
        pair = self.pairs.read(id)
        sample = self.augment(pair, view, id, stored=self.stored)
        if self.stored is None:
            return sample
        return sample._replace(features=self.stored.read(pair, id, view % self.stored.num_views, sample.caption_number))


def no_sample(last: Skip) -> RunStopped:
    return RunStopped(f"{MAX_TRIES} samples in a row cannot be used, the last of them {last.key}: {last.message}")


class Collate:
    """Samples → Batch; pixels and tokens are made once for models that share them."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels, captions, _, ids, labels, keys, skipped, features = zip(*samples, strict=True)
        skips = tuple(skip for part in skipped for skip in part)
        return Batch(
            pixels=tuple(
                torch.from_numpy(np.stack(kind)).permute(0, 3, 1, 2).contiguous() for kind in zip(*pixels, strict=True)
            ),
            texts=tuple(spec.tokenize(list(captions)) for spec in self.views.token_specs),
            ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            keys=keys,
            skipped=skips,
            num_read=len(samples) + len(skips),
            features=tuple(torch.from_numpy(np.stack(kind)) for kind in zip(*features, strict=True)),
        )


def death(error: BaseException | None) -> RunStopped | None:
    """What to raise if torch reports that a loader process died; errors raised inside one have other messages."""
    signs = ("DataLoader", "unable to allocate shared memory", "unable to open shared memory")
    if not isinstance(error, RuntimeError) or not (one_line(error).startswith(signs)):
        return None
    return RunStopped(
        f"a loader process died or hangs ({short(error)}); memory or {SHARED_MEMORY} may have run out: lower "
        "num_workers and run the same command again (train: from the last checkpoint, with --resume latest)"
    )


B = TypeVar("B", bound=NamedTuple)


class Feed(Generic[B]):
    """One process's batches, one per step. Never `prepare` it: it is already this process's share."""

    def __init__(
        self,
        loader: DataLoader,
        *,
        epoch: Callable[[int, Mapping[int, int]], float] = lambda *_: 0.0,
        places: Mapping[int, int] | None = None,
    ) -> None:
        """epoch: (steps done, `places`) → passes through the data so far."""
        self.loader, self.epoch_of = loader, epoch
        self.batches: Iterator[B] | None = None
        self.processes: list[BaseProcess] = []
        self.places = dict(places or {})
        """Of streamed shards: reader → position of the first shard that it has not given completely."""

    def __next__(self) -> B:
        if self.batches is None:  # started here, when `close` is sure to be called
            before = multiprocessing.active_children()
            try:
                self.batches = iter(self.loader)
            except BaseException:  # `close` must end the processes that an interrupted start leaves
                self.processes = [child for child in multiprocessing.active_children() if child not in before]
                raise
            # Not active_children: it would reap a process that died at once, and torch would miss the death.
            self.processes = getattr(self.batches, "_workers", [])
        try:
            batch = next(self.batches)
        except RuntimeError as error:
            if stop := death(error):
                raise stop from error
            raise
        if (place := getattr(batch, "place", None)) is not None:
            self.places[place[0]] = place[1]
        return batch

    def epoch(self, step: int) -> float:
        return self.epoch_of(step, self.places)

    def __enter__(self) -> "Feed[B]":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        if stop := death(value):  # torch's SIGCHLD handler raises anywhere in the step
            raise stop from value

    def close(self) -> None:
        """End the loader processes, which ignore signals that end a run."""
        batches, self.batches = self.batches, iter(())
        if shut_down := getattr(batches, "_shutdown_workers", None):
            shut_down()  # a traceback may keep the iterator alive, and torch would report the kills below as failures
        for process in self.processes:
            process.kill()
            process.join()


def pixel_bytes(specs: Sequence[ViewSpec]) -> int:
    """Of one image in the views of these specs, 8 bits per value."""
    return sum(3 * spec.size[0] * spec.size[1] for spec in specs)


def loader_options(num_workers: int, batch_bytes: int, *, pin_memory: bool) -> dict[str, Any]:
    """Options of every DataLoader of this package: as many batches ahead as BYTES_AHEAD and the shared memory allow.

    Raises: ValueError if the shared memory is too small for one batch per loader process.
    """
    options = {"num_workers": num_workers, "pin_memory": pin_memory, "worker_init_fn": start_worker}
    if not num_workers:
        return options
    allowed, round_bytes = BYTES_AHEAD, num_workers * batch_bytes
    if SHARED_MEMORY.is_dir():
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        free = shutil.disk_usage(SHARED_MEMORY).free // processes
        # Two more: the batch of the current step, and the one that is on its way into pinned memory.
        if (needed := round_bytes + 2 * batch_bytes) > free:
            raise ValueError(
                f"{SHARED_MEMORY} has {mib(free)} free per process, {num_workers} loader processes hold {mib(needed)} of "
                "batches there; give the container more (docker run --shm-size=8g), or lower num_workers (0 needs none)"
            )
        allowed = min(allowed, free - 2 * batch_bytes)
    ahead = max(1, min(MOST_AHEAD, allowed // max(1, round_bytes)))
    return options | {"prefetch_factor": ahead, "timeout": BATCH_TIMEOUT}


def start_worker(_: int) -> None:
    torch.set_num_threads(1)  # more threads would take cores from the training step
    leave_signals_to_parent()
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(end_worker)  # type: ignore[attr-defined]


def end_worker(error: Exception, _: object) -> None:
    """End a loader process that cannot hand over a batch: Python would drop the batch, and training wait for it."""
    print(f"a loader process cannot hand over a batch: {short(error)}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
