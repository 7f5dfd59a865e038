"""Which samples come when: a pure function of the seed, for any number of sources, processes and loader processes.

A source is passed through again and again, its shards in another order each time. An epoch takes `weight` passes of every
source; it is cut into blocks, each a stretch of every source, and a block's samples are shuffled together. What is
planned at a time is one block and the order of the shards, so that a billion pairs cost no more than a million.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np

BLOCK = 1 << 18
"""Samples that are shuffled together, at most; what a source contributes are whole shards but for the two at the ends."""

Position = tuple[int, int]
"""View index (how often the sample was taken before) and id of a sample."""


class Purpose(IntEnum):
    """First word of every seed, so that no two draws share their randomness."""

    SHARDS, BLOCK, AUGMENTATION, SUBSTITUTE, STREAM, CAPTION = range(6)


def generator(purpose: Purpose, *key: int) -> np.random.Generator:
    return np.random.default_rng((purpose, *key))


class SourceOrder:
    """One source's samples, pass after pass: shards in a random order, the samples of a shard in their own."""

    def __init__(self, shard_sizes: np.ndarray, *, seed: int, number: int) -> None:
        """number: which of the sources it is."""
        self.sizes, self.seed, self.number = shard_sizes.astype(np.int64), seed, number
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())
        self.planned: tuple[int, np.ndarray, np.ndarray] | None = None

    def shards(self, view: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of a pass, and where each of them ends in it."""
        if self.planned is None or self.planned[0] != view:
            order = generator(Purpose.SHARDS, self.seed, self.number, view).permutation(len(self.sizes))
            self.planned = (view, order, np.cumsum(self.sizes[order]))
        return self.planned[1:]

    def between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """View index and sample of the places start … stop − 1 in the endless sequence of passes."""
        views, samples = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            view, first = divmod(start, self.num_samples)
            last = min(first + stop - start, self.num_samples)
            order, ends = self.shards(view)
            for place in range(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1):
                shard, begin = order[place], ends[place] - self.sizes[order[place]]
                samples.append(self.starts[shard] + np.arange(max(first - begin, 0), min(last, ends[place]) - begin))
            views.append(np.full(last - first, view))
            start += last - first
        return np.concatenate(views), np.concatenate(samples)


def pairs_per_epoch(num_samples: int, weight: float) -> int:
    return max(1, round(weight * num_samples))


class Mixture:
    """Samples of all sources in one endless order. Ids count through the sources one after another."""

    def __init__(self, shard_sizes: Sequence[np.ndarray], *, weights: Sequence[float], seed: int) -> None:
        """shard_sizes: samples per shard of each source. weights: passes of each source per epoch."""
        self.orders = [SourceOrder(sizes, seed=seed, number=number) for number, sizes in enumerate(shard_sizes)]
        counts = [order.num_samples for order in self.orders]
        self.seed = seed
        self.first_ids = (np.cumsum(counts) - counts).tolist()
        self.per_epoch = [pairs_per_epoch(count, weight) for count, weight in zip(counts, weights, strict=True)]
        self.epoch_size = sum(self.per_epoch)
        self.num_blocks = -(-self.epoch_size // BLOCK)
        self.planned: tuple[int, int, np.ndarray] | None = None

    def starts_at(self, block: int) -> int:
        """Where a block of an epoch begins; that of number `num_blocks` is the epoch's end."""
        return sum(block * count // self.num_blocks for count in self.per_epoch)

    def block(self, epoch: int, block: int) -> np.ndarray:
        """[samples, 2] view index and id, shuffled."""
        if self.planned is None or self.planned[:2] != (epoch, block):
            rng = generator(Purpose.BLOCK, self.seed, epoch, block)
            parts = []
            for order, count, first_id in zip(self.orders, self.per_epoch, self.first_ids, strict=True):
                cuts = [epoch * count + number * count // self.num_blocks for number in (block, block + 1)]
                views, samples = order.between(*cuts)
                # Each pass by itself: no sample comes again before all of its source have come.
                shuffled = np.lexsort((rng.random(len(views)), views))
                parts.append(np.stack([views, samples + first_id], axis=1)[shuffled])
            whose = rng.permutation(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
            positions = np.empty((len(whose), 2), np.int64)
            for number, part in enumerate(parts):
                positions[whose == number] = part
            self.planned = (epoch, block, positions)
        return self.planned[2]

    def between(self, start: int, stop: int) -> list[Position]:
        """The places start … stop − 1 of the endless sequence of epochs."""
        found: list[Position] = []
        while start < stop:
            epoch, place = divmod(start, self.epoch_size)
            block = place * self.num_blocks // self.epoch_size
            while self.starts_at(block) > place:  # rounding may have led one block too far, or not far enough
                block -= 1
            while self.starts_at(block + 1) <= place:
                block += 1
            begin = self.starts_at(block)
            rows = self.block(epoch, block)[place - begin : place - begin + stop - start]
            found += [(view, sample) for view, sample in rows.tolist()]
            start += len(rows)
        return found


class BatchOrder:
    """For each step, this process's positions: a contiguous share of the global batch.

    Batches are cut from the endless sequence: one that an epoch's end would leave short is filled from the next epoch,
    so that every sample is seen and every process takes as many steps.
    """

    def __init__(
        self, mixture: Mixture, *, batch_size: int, start: int, stop: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Raises: ValueError if the processes cannot share a batch or the data does not fill one."""
        require_share(batch_size, world_size)
        num_samples = sum(order.num_samples for order in mixture.orders)
        if num_samples < batch_size:
            raise ValueError(f"batch_size is {batch_size} but data.path holds only {num_samples} pairs; lower it")
        self.mixture, self.batch_size, self.start, self.stop = mixture, batch_size, start, stop
        self.rank, self.share = rank, batch_size // world_size

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Position]]:
        for step in range(self.start, self.stop):
            first = step * self.batch_size + self.rank * self.share
            yield self.mixture.between(first, first + self.share)


def require_share(batch_size: int, world_size: int) -> None:
    if batch_size % world_size:
        raise ValueError(f"batch_size {batch_size} cannot be shared equally by {world_size} processes")
