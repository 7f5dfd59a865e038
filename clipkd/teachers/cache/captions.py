"""All captions of a data set, each distinct one counted once."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from clipkd import distributed, progress
from clipkd.data import UNREADABLE_SHARD, BadSample, PairSet
from clipkd.errors import RunStopped
from clipkd.teachers.store.manifest import Shard

MANY_SAMPLES = 50_000
"""From which on reading their captions shows its progress."""

DIGEST_BYTES = 16
"""Two captions of a billion have the same with a probability of 10⁻²¹."""


@dataclass(frozen=True)
class Captions:
    """Captions are numbered through the samples in order, and distinct ones by where they are first met."""

    starts: np.ndarray
    """[samples + 1] number of each sample's first caption; it has none if it cannot be read."""
    rows: np.ndarray
    """[captions] which of the distinct ones it is."""
    firsts: np.ndarray
    """[distinct] number of the caption that is the first of its kind, rising."""

    @staticmethod
    def none() -> "Captions":
        """For who encodes samples by themselves."""
        empty = np.empty(0, np.int64)
        return Captions(empty, empty, empty)

    def most(self, shard: Shard) -> int:
        """Captions of the sample that has most of them."""
        return max(1, int(np.diff(self.starts[shard.first : shard.first + shard.rows + 1]).max()))

    def table(self, shard: Shard) -> np.ndarray:
        """[rows, most captions] rows of distinct captions; −1 where a sample has no more."""
        starts = self.starts[shard.first : shard.first + shard.rows + 1]
        table = np.full((shard.rows, self.most(shard)), -1, np.int64)
        for row, (begin, end) in enumerate(itertools.pairwise(starts.tolist())):
            table[row, : end - begin] = self.rows[begin:end]
        return table

    def read_texts(self, shard: Shard, pairs: PairSet) -> list[str]:
        """Those that are first met in a shard. Raises: RunStopped if the data has changed since it was surveyed."""
        numbers = self.firsts[shard.first_text : shard.first_text + shard.texts]
        samples = np.searchsorted(self.starts, numbers, "right") - 1
        try:
            return [
                pairs.read_captions(sample)[number - self.starts[sample]]
                for sample, number in zip(samples.tolist(), numbers.tolist(), strict=True)
            ]
        except (BadSample, IndexError) as error:
            raise RunStopped(
                f"captions changed while the cache was made ({error}); give the same command again"
            ) from error


def survey(pairs: PairSet, stretches: list[tuple[int, int]]) -> Captions:
    """Reads every caption once, without images. stretches: first sample and number of samples. Call on every process.

    Takes some 60 bytes of memory per caption. Raises: RunStopped if a shard cannot be read for now.
    """
    own = range(distributed.rank(), len(stretches), distributed.world_size())
    found: dict[int, tuple[np.ndarray, np.ndarray]] = {}
    for part in distributed.gather_objects(distributed.together(lambda: digest_captions(pairs, stretches, own))):
        found |= part
    counts = np.concatenate([found[number][0] for number in range(len(stretches))])
    digests = np.concatenate([found[number][1] for number in range(len(stretches))])
    _, first_of, kinds = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first_of)  # distinct captions sorted by where they are first met, not by their digest
    row_of_kind = np.empty_like(order)
    row_of_kind[order] = np.arange(len(order))
    return Captions(np.concatenate([[0], np.cumsum(counts)]), row_of_kind[kinds], first_of[order])


def digest_captions(
    pairs: PairSet, stretches: list[tuple[int, int]], own: range
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Number of a stretch → captions of each of its samples, and their digests."""
    parts = {}
    visible = distributed.rank() == 0 and sum(rows for _, rows in stretches) >= MANY_SAMPLES
    for number in progress.track(own, "read captions", len(own), visible=visible):
        first, rows = stretches[number]
        counts, digests = [], []
        for index in range(first, first + rows):
            try:
                captions = pairs.read_captions(index)
            except BadSample as bad:
                require_readable(bad)
                captions = ()
            counts.append(len(captions))
            digests += [hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in captions]
        parts[number] = (np.array(counts, np.int64), np.array(digests, f"S{DIGEST_BYTES}"))
    return parts


def require_readable(bad: BadSample) -> None:
    """Raises: RunStopped for a fault that may pass: what is stored stays."""
    if bad.skip.cause == UNREADABLE_SHARD:
        raise RunStopped(f"{bad}; give the same command again when it can be read") from bad
