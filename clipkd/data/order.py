"""The order of samples: a pure function of the seed, for any number of sources, processes and loader processes.

Each pass through a source visits its shards in a new random order. An epoch takes `weight` passes of every source. It is
cut into blocks, each a stretch of every source, and the samples of a block are shuffled together. Only one block and the
order of the shards are in memory at a time, so that a billion pairs cost no more than a million.
"""

from collections.abc import Iterator, Sequence
from enum import IntEnum

import numpy as np

BLOCK = 1 << 18
"""Largest number of samples shuffled together. A source contributes complete shards, except for the two at the ends."""

Position = tuple[int, int]
"""View index (number of earlier uses) and id of a sample."""


class Purpose(IntEnum):
    """First word of every seed, so that no two draws share their randomness."""

    SHARDS, BLOCK, AUGMENTATION, SUBSTITUTE, STREAM, CAPTION = range(6)


def generator(purpose: Purpose, *key: int) -> np.random.Generator:
    return np.random.default_rng((purpose, *key))


class SourceOrder:
    """One source's samples, pass after pass: shards in a random order, the samples of a shard in file order."""

    def __init__(self, shard_sizes: np.ndarray, *, seed: int, number: int) -> None:
        """number: position among the sources."""
        self.sizes, self.seed, self.number = shard_sizes.astype(np.int64), seed, number
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())

    def between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """View index and sample of the places start … stop − 1 in the endless sequence of passes."""
        views, samples = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        while start < stop:
            view, first = divmod(start, self.num_samples)
            last = min(first + stop - start, self.num_samples)
            order = generator(Purpose.SHARDS, self.seed, self.number, view).permutation(len(self.sizes))
            ends = np.cumsum(self.sizes[order])
            for place in range(np.searchsorted(ends, first, "right"), np.searchsorted(ends, last, "left") + 1):
                shard, begin = order[place], ends[place] - self.sizes[order[place]]
                samples.append(self.starts[shard] + np.arange(max(first - begin, 0), min(last, ends[place]) - begin))
            views.append(np.full(last - first, view))
            start += last - first
        return np.concatenate(views), np.concatenate(samples)


class Mixture:
    """Samples of all sources in one endless order. Ids count through the sources one after another."""

    def __init__(self, shard_sizes: Sequence[np.ndarray], *, weights: Sequence[float], seed: int) -> None:
        """shard_sizes: samples per shard of each source. weights: passes of each source per epoch."""
        self.orders = [SourceOrder(sizes, seed=seed, number=number) for number, sizes in enumerate(shard_sizes)]
        counts = [order.num_samples for order in self.orders]
        self.seed = seed
        self.first_ids = (np.cumsum(counts) - counts).tolist()
        self.per_epoch = [max(1, round(weight * count)) for count, weight in zip(counts, weights, strict=True)]
        self.epoch_size = sum(self.per_epoch)
        self.num_blocks = -(-self.epoch_size // BLOCK)
        self.planned: tuple[int, int, np.ndarray] | None = None

    def starts_at(self, block: int) -> int:
        """First place of a block within an epoch; the epoch's length for block `num_blocks`."""
        return sum(block * count // self.num_blocks for count in self.per_epoch)

    def block(self, epoch: int, block: int) -> np.ndarray:
        """[samples, 2] view index and id, shuffled."""
        if self.planned is None or self.planned[:2] != (epoch, block):
            rng = generator(Purpose.BLOCK, self.seed, epoch, block)
            parts = []
            for order, count, first_id in zip(self.orders, self.per_epoch, self.first_ids, strict=True):
                cuts = [epoch * count + number * count // self.num_blocks for number in (block, block + 1)]
                views, samples = order.between(*cuts)
                # Shuffled within each pass: no sample repeats before every sample of its source was used.
                shuffled = np.lexsort((rng.random(len(views)), views))
                parts.append(np.stack([views, samples + first_id], axis=1)[shuffled])
            source = rng.permutation(np.repeat(np.arange(len(parts)), [len(part) for part in parts]))
            positions = np.empty((len(source), 2), np.int64)
            for number, part in enumerate(parts):
                positions[source == number] = part
            self.planned = (epoch, block, positions)
        return self.planned[2]

    def between(self, start: int, stop: int) -> list[Position]:
        """The places start … stop − 1 of the endless sequence of epochs."""
        found: list[Position] = []
        while start < stop:
            epoch, place = divmod(start, self.epoch_size)
            block = place * self.num_blocks // self.epoch_size
            while self.starts_at(block) > place:  # rounding may miss by a block in either direction
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

    Batches are cut from the endless sequence. A batch at the end of an epoch is filled from the next epoch, so that
    every sample is used and all processes take the same number of steps.
    """

    def __init__(self, mixture: Mixture, batch_size: int, steps: range, rank: int = 0, world_size: int = 1) -> None:
        """Raises: ValueError if the processes cannot share a batch or the data does not fill one."""
        self.share = share_of(batch_size, world_size)
        num_samples = sum(order.num_samples for order in mixture.orders)
        if num_samples < batch_size:
            raise ValueError(f"batch_size is {batch_size} but data.path holds only {num_samples} pairs; lower it")
        self.mixture, self.batch_size, self.steps, self.rank = mixture, batch_size, steps, rank

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[list[Position]]:
        for step in self.steps:
            first = step * self.batch_size + self.rank * self.share
            yield self.mixture.between(first, first + self.share)


def share_of(batch_size: int, world_size: int) -> int:
    """Samples of a batch per process. Raises: ValueError if the processes cannot share it."""
    if batch_size % world_size:
        raise ValueError(
            f"batch_size {batch_size} cannot be shared by {world_size} processes; set a multiple of the processes"
        )
    return batch_size // world_size
