"""Pairs → batches, in an order and with an augmentation that depend on nothing but the seed and the epoch.

The same global batches come for any number of processes and loader processes, and a run can start at any step.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipkd.config import DataConfig
from clipkd.data.images import decode, normalize, random_crop_box, render
from clipkd.data.sources import PairSource
from clipkd.views import Batch, View, ViewSpec

Sample = tuple[list[np.ndarray], str, int, int]
"""Pixels per view, caption, index, label."""

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

    def __getitem__(self, position: tuple[int, int]) -> Sample:
        epoch, index = position
        rng = np.random.default_rng((self.seed, epoch, index))
        pair = self.source.read(index)
        red, green, blue = rng.integers(0, 256, 3).tolist() if self.config.background == "random" else WHITE
        image = decode(pair.image, pair.key, background=(red, green, blue))
        box = random_crop_box(*image.size, self.config.min_crop, rng)
        caption = pair.captions[rng.integers(len(pair.captions))]
        return [render(image, box, spec) for spec in self.specs], caption, index, pair.label


class Collate:
    """Samples → Batch, making pixels and tokens once where student and teachers agree."""

    def __init__(self, student: ViewSpec, teachers: Sequence[ViewSpec]) -> None:
        self.specs = [student, *teachers]
        self.pixel_specs: list[ViewSpec] = []
        """The distinct ones among them."""
        for spec in self.specs:
            if not any(spec.same_pixels(other) for other in self.pixel_specs):
                self.pixel_specs.append(spec)

    def __call__(self, samples: list[Sample]) -> Batch:
        pixels, captions, ids, labels = zip(*samples, strict=True)
        images = [
            normalize(list(view), spec) for view, spec in zip(zip(*pixels, strict=True), self.pixel_specs, strict=True)
        ]
        texts: dict[str, Tensor] = {}
        views: list[View] = []
        for spec in self.specs:
            if spec.tokenizer_name not in texts:
                texts[spec.tokenizer_name] = spec.tokenize(list(captions))
            number = next(i for i, other in enumerate(self.pixel_specs) if spec.same_pixels(other))
            views.append(View(images[number], texts[spec.tokenizer_name]))
        return Batch(views[0], tuple(views[1:]), torch.tensor(ids), torch.tensor(labels))


def training_batches(
    source: PairSource,
    config: DataConfig,
    *,
    student: ViewSpec,
    teachers: Sequence[ViewSpec],
    order: BatchOrder,
    pin_memory: bool,
) -> Iterator[Batch]:
    """One batch per step of `order`. Never wrap or `prepare` it: it is already this process's share."""
    collate = Collate(student, teachers)
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
