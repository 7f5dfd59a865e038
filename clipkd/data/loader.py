"""Pairs → batches, in an order and with an augmentation that depend on nothing but the seed and the epoch.

The same global batches come for any number of processes and loader processes, and a run can start at any step.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from clipkd.config import DataConfig
from clipkd.data.images import decode, normalize, random_crop_box, render
from clipkd.data.sources import PairSource
from clipkd.views import Batch, View, ViewSpec

WHITE = (255, 255, 255)


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Order of all samples in one epoch: a pure function of seed and epoch."""
    return np.random.default_rng((seed, epoch)).permutation(num_samples)


class BatchOrder:
    """For each step, this process's (epoch, sample) pairs: a contiguous share of the global batch.

    The remainder of an epoch that does not fill a global batch is left out; another remainder falls to each epoch.
    """

    def __init__(
        self, num_samples: int, *, batch_size: int, seed: int, start: int, stop: int, rank: int, world_size: int
    ) -> None:
        if batch_size % world_size:
            raise ValueError(f"batch_size {batch_size} cannot be shared equally by {world_size} processes")
        if num_samples < batch_size:
            raise ValueError(f"batch_size is {batch_size} but data.path holds only {num_samples} pairs; lower it")
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self.start, self.stop, self.rank, self.world_size = start, stop, rank, world_size
        self.steps_per_epoch = num_samples // batch_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = np.empty(0, np.int64), -1
        share = self.batch_size // self.world_size
        for step in range(self.start, self.stop):
            epoch, position = divmod(step, self.steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.seed, epoch, self.num_samples), epoch
            first = position * self.batch_size + self.rank * share
            yield [(epoch, index) for index in order[first : first + share].tolist()]


class AugmentedPairs(Dataset):
    """(epoch, index) → one sample's pixels per view and its caption. Randomness: (seed, epoch, index) alone."""

    def __init__(self, source: PairSource, config: DataConfig, specs: list[ViewSpec], seed: int) -> None:
        self.source, self.config, self.specs, self.seed = source, config, specs, seed

    def __getitem__(self, position: tuple[int, int]) -> tuple[list[np.ndarray], str, int]:
        epoch, index = position
        rng = np.random.default_rng((self.seed, epoch, index))
        pair = self.source.read(index)
        red, green, blue = rng.integers(0, 256, 3).tolist() if self.config.background == "random" else WHITE
        image = decode(pair.image, pair.key, background=(red, green, blue))
        box = random_crop_box(*image.size, self.config.min_crop, rng)
        caption = pair.captions[rng.integers(len(pair.captions))]
        return [render(image, box, spec) for spec in self.specs], caption, index


class Collate:
    """Samples → Batch, making pixels and tokens once where student and teacher agree."""

    def __init__(self, student: ViewSpec, teacher: ViewSpec | None) -> None:
        self.student, self.teacher = student, teacher

    @property
    def pixel_specs(self) -> list[ViewSpec]:
        if self.teacher is None or self.teacher.same_pixels(self.student):
            return [self.student]
        return [self.student, self.teacher]

    def __call__(self, samples: list[tuple[list[np.ndarray], str, int]]) -> Batch:
        pixels, captions, ids = zip(*samples, strict=True)
        images = [
            normalize(list(view), spec) for view, spec in zip(zip(*pixels, strict=True), self.pixel_specs, strict=True)
        ]
        student = View(images[0], self.student.tokenize(list(captions)))
        teacher = None
        if self.teacher is not None:
            shared = self.teacher.tokenizer_name == self.student.tokenizer_name
            teacher = View(images[-1], student.texts if shared else self.teacher.tokenize(list(captions)))
        return Batch(student, teacher, torch.tensor(ids))


def training_batches(
    source: PairSource,
    config: DataConfig,
    *,
    student: ViewSpec,
    teacher: ViewSpec | None,
    order: BatchOrder,
    pin_memory: bool,
) -> Iterator[Batch]:
    """One batch per step of `order`. Never wrap or `prepare` it: it is already this process's share."""
    collate = Collate(student, teacher)
    loader = DataLoader(
        AugmentedPairs(source, config, collate.pixel_specs, order.seed),
        batch_sampler=order,
        collate_fn=collate,
        num_workers=config.num_workers,
        pin_memory=pin_memory,
        prefetch_factor=4 if config.num_workers else None,
        worker_init_fn=single_thread,
    )
    return iter(loader)


def single_thread(_: int) -> None:
    # Loader processes that each use every core take them from the training step.
    torch.set_num_threads(1)
