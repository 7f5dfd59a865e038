"""Pairs → batches, in an order and with an augmentation that depend on nothing but the seed and the position.

The same global batches come for any number of processes and loader processes, and a run can start at any step.
"""

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.process import BaseProcess
from types import MappingProxyType, TracebackType
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkd.config.data import DataConfig
from clipkd.data.images import Box, decode, decoding_scale, open_image, random_crop_box, reduce_scale, render
from clipkd.data.order import BatchOrder, Position, Purpose, generator
from clipkd.data.skips import BadSample, Skip
from clipkd.data.sources import Pair, PairSet
from clipkd.errors import RunStopped
from clipkd.views import Batch, Views

AUGMENTATION_VERSION = 2
"""Counts up when equal seeds give other crops, pixels or captions than before: what was made of them no longer fits."""

WHITE = (255, 255, 255)
MOST_TRIES = 100
"""Samples in a row that may be unusable."""

SECONDS_FOR_A_BATCH = 900
"""A loader process that takes longer hangs, and is reported."""


class Sample(NamedTuple):
    pixels: list[np.ndarray]
    """One per kind of view, uint8 [h, w, 3]."""
    caption: str
    caption_number: int
    """Which of the pair's captions it is."""
    id: int
    label: int
    key: str
    skipped: tuple[Skip, ...] = ()
    features: tuple[np.ndarray, ...] = ()
    """Stored ones of this view, where the teachers' are read instead of computed."""


@runtime_checkable
class FeatureRows(Protocol):
    """Where features of frozen models are stored (clipkd.teachers.store)."""

    num_views: int
    """Of each sample; later passes see them again in the same order."""

    def read(self, pair: Pair, id: int, view: int, caption_number: int) -> tuple[np.ndarray, ...]:
        """One vector per kind of feature. Raises: BadSample if the sample has none; RunStopped."""
        ...


class Augment:
    """Pair → pixels of every view and one caption. Randomness: seed, view index and id alone.

    The pixels of a view depend on no other view, so that a teacher's are the same beside any student.
    """

    def __init__(self, config: DataConfig, views: Views, seed: int) -> None:
        self.config, self.specs, self.seed = config, views.pixel_specs, seed

    def __call__(self, pair: Pair, view: int, id: int, *, num_views: int | None = None) -> Sample:
        """num_views: after so many the pixels come again; captions are drawn anew all the same. Raises: BadSample."""
        rng = generator(Purpose.AUGMENTATION, self.seed, view if num_views is None else view % num_views, id)
        red, green, blue = rng.integers(0, 256, 3).tolist() if self.config.background == "random" else WHITE
        image = open_image(pair.image, pair.key)
        box = random_crop_box(*image.size, self.config.min_crop, rng)
        caption_number = int(generator(Purpose.CAPTION, self.seed, view, id).integers(len(pair.captions)))
        scales = [decoding_scale(image, box, spec) for spec in self.specs]
        decoded: dict[int, tuple[Image.Image, Box]] = {}
        for scale in dict.fromkeys(scales):
            image = image if not decoded else open_image(pair.image, pair.key)
            smaller = reduce_scale(image, box, scale)
            decoded[scale] = (decode(image, pair.key, background=(red, green, blue)), smaller)
        pixels = [render(*decoded[scale], spec) for scale, spec in zip(scales, self.specs, strict=True)]
        return Sample(pixels, pair.captions[caption_number], caption_number, id, pair.label, pair.key)


class AugmentedPairs(Dataset):
    """(view index, id) → sample; in place of one that cannot be used another, which depends on the position alone."""

    def __init__(self, pairs: PairSet, augment: Augment, stored: FeatureRows | None = None) -> None:
        self.pairs, self.augment, self.stored = pairs, augment, stored

    def __getitem__(self, position: Position) -> Sample:
        view, id = position
        substitutes: np.random.Generator | None = None
        skipped: list[Skip] = []
        while len(skipped) < MOST_TRIES:
            try:
                return self.make(view, id)._replace(skipped=tuple(skipped))
            except BadSample as bad:
                skipped.append(bad.skip)
            substitutes = substitutes or generator(Purpose.SUBSTITUTE, self.augment.seed, *position)
            id = int(substitutes.integers(len(self.pairs)))
        key, _, message = skipped[-1]
        raise RunStopped(f"{MOST_TRIES} samples in a row cannot be used, the last of them {key}: {message}")

    def make(self, view: int, id: int) -> Sample:
        """Raises: BadSample."""
        pair = self.pairs.read(id)
        if self.stored is None:
            return self.augment(pair, view, id)
        num_views = self.stored.num_views
        sample = self.augment(pair, view, id, num_views=num_views)
        return sample._replace(features=self.stored.read(pair, id, view % num_views, sample.caption_number))


class Collate:
    """Samples → Batch, making pixels and tokens once where models agree."""

    def __init__(self, views: Views) -> None:
        self.views = views

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels, captions, _, ids, labels, keys, skipped, features = zip(*samples, strict=True)
        return Batch(
            pixels=tuple(stack(list(kind)) for kind in zip(*pixels, strict=True)),
            texts=tuple(spec.tokenize(list(captions)) for spec in self.views.token_specs),
            ids=torch.tensor(ids),
            labels=torch.tensor(labels),
            keys=keys,
            skipped=tuple(skip for part in skipped for skip in part),
            features=tuple(torch.from_numpy(np.stack(kind)) for kind in zip(*features, strict=True)),
        )


def stack(images: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def is_death(error: BaseException | None) -> bool:
    """Whether torch says that a loader process is gone; what was raised in one it words otherwise."""
    return isinstance(error, RuntimeError) and str(error).startswith("DataLoader")


def died(error: RuntimeError) -> RunStopped:
    return RunStopped(
        f"a loader process died or hangs ({' '.join(str(error).split())[:200]}); often memory ran out: lower "
        "data.num_workers. The run goes on from its last checkpoint with --resume latest"
    )


B = TypeVar("B", bound=NamedTuple)


class Feed(Generic[B]):
    """One process's batches, one per step. Never `prepare` it: it is already this process's share."""

    def __init__(
        self,
        loader: DataLoader,
        *,
        epoch: Callable[[int, Mapping[int, int]], float],
        places: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """epoch: (steps done, places of this process's readers) → passes through the data so far."""
        self.loader = loader
        self.batches: Iterator[B] | None = None
        self.processes: list[BaseProcess] = []
        self.places = dict(places)
        """Of streamed shards: reader → the first shard that it has not given whole."""
        self.epoch_of = epoch

    def __next__(self) -> B:
        if self.batches is None:  # not before somebody is there to close it
            before = multiprocessing.active_children()
            try:
                self.batches = iter(self.loader)
            finally:  # interrupted half way, those that run must still be ended
                self.processes = [child for child in multiprocessing.active_children() if child not in before]
        try:
            batch = next(self.batches)
        except RuntimeError as error:
            if not is_death(error):
                raise
            raise died(error) from error
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
        if isinstance(value, RuntimeError) and is_death(value):  # torch's handler raises wherever this process was
            raise died(value) from value

    def close(self) -> None:
        """End the loader processes: they ignore the signals that a terminal or a scheduler sends to everyone."""
        batches, self.batches = self.batches, iter(())
        if shut_down := getattr(batches, "_shutdown_workers", None):
            shut_down()  # an error's traceback may keep the iterator, and torch would take what follows for a failure
        for process in self.processes:
            process.kill()
            process.join()


def indexed_batches(
    pairs: PairSet,
    config: DataConfig,
    views: Views,
    order: BatchOrder,
    *,
    stored: FeatureRows | None = None,
    pin_memory: bool,
) -> Feed[Batch]:
    """The batches of `order`."""
    augment = Augment(config, views, order.mixture.seed)
    loader = DataLoader(
        AugmentedPairs(pairs, augment, stored),
        batch_sampler=order,
        collate_fn=Collate(views),
        **loader_options(config, pin_memory),
    )
    return Feed(loader, epoch=lambda step, _: step * order.batch_size / order.mixture.epoch_size)


def loader_options(config: DataConfig, pin_memory: bool) -> dict[str, Any]:
    """What every DataLoader here is given."""
    parallel = {"prefetch_factor": 4, "timeout": SECONDS_FOR_A_BATCH} if config.num_workers else {}
    return {
        "num_workers": config.num_workers,
        "pin_memory": pin_memory,
        "worker_init_fn": start_worker,
        **parallel,
    }


def start_worker(_: int) -> None:
    # Loader processes that each use every core take them from the training step.
    torch.set_num_threads(1)
    # Ctrl-C and a scheduler's SIGTERM reach every process; the training process has to finish its step first.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the programs behind pipes would inherit
