"""Number all captions of a data set, equal ones once."""

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np

from clipkd import distributed, progress
from clipkd.data import UNREADABLE_SHARD, BadSample, PairSet
from clipkd.errors import RunStopped
from clipkd.teachers.store.manifest import Shard

DIGEST_BYTES = 16
"""Two of a billion captions share a digest with a probability of 10⁻²¹."""


@dataclass(frozen=True)
class Captions:
    """Captions are numbered in the order of their samples, texts (distinct captions) in the order of first occurrence."""

    starts: np.ndarray
    """[samples + 1] number of each sample's first caption. A sample that cannot be read has no captions."""
    texts: np.ndarray
    """[captions] the text of each caption."""
    firsts: np.ndarray
    """[texts] caption at which each text occurs first, ascending."""

    def starts_of(self, shard: Shard) -> np.ndarray:
        return self.starts[shard.first : shard.first + shard.rows + 1]

    def most(self, shard: Shard) -> int:
        """Largest number of captions of a sample in a shard, at least 1."""
        return max(1, int(np.diff(self.starts_of(shard)).max()))

    def table(self, shard: Shard) -> np.ndarray:
        """[samples, most captions] texts of each sample in a shard, padded with −1."""
        table = np.full((shard.rows, self.most(shard)), -1, np.int64)
        for row, (begin, end) in enumerate(itertools.pairwise(self.starts_of(shard).tolist())):
            table[row, : end - begin] = self.texts[begin:end]
        return table

    def read_texts(self, shard: Shard, pairs: PairSet) -> list[str]:
        """The texts that occur first in a shard. Raises: RunStopped if the data have changed since they were numbered."""
        numbers = self.firsts[shard.first_text : shard.first_text + shard.texts]
        samples = np.searchsorted(self.starts, numbers, "right") - 1
        try:
            return [
                pairs.read(sample, image=False).captions[number - self.starts[sample]]
                for sample, number in zip(samples.tolist(), numbers.tolist(), strict=True)
            ]
        except (BadSample, IndexError) as error:
            raise RunStopped(
                f"captions changed while the cache was made ({error}); run the same command again"
            ) from error


def number_captions(pairs: PairSet, ranges: list[tuple[int, int]]) -> Captions:
    """Read every caption once, without images. Call on every process; needs about 60 bytes of memory per caption.

    ranges: first sample and number of samples. Raises: RunStopped if a shard cannot be read at the moment.
    """
    share = range(distributed.rank(), len(ranges), distributed.world_size())
    own = distributed.together(
        lambda: {
            number: digest_captions(pairs, *ranges[number])
            for number in progress.track_on_main(share, "read captions", len(share))
        }
    )
    found = {number: each for part in distributed.gather_objects(own) for number, each in part.items()}
    counts, digests = (np.concatenate([found[number][part] for number in range(len(ranges))]) for part in range(2))
    # np.unique sorts by digest; number the texts by their first occurrence instead.
    _, first_of, kinds = np.unique(digests, return_index=True, return_inverse=True)
    order = np.argsort(first_of)
    text_of_kind = np.empty_like(order)
    text_of_kind[order] = np.arange(len(order))
    return Captions(np.concatenate([[0], np.cumsum(counts)]), text_of_kind[kinds], first_of[order])


def digest_captions(pairs: PairSet, first: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of captions of each sample, and the digest of each caption."""
    counts, digests = [], []
    for index in range(first, first + rows):
        try:
            captions = pairs.read(index, image=False).captions
        except BadSample as bad:
            require_readable(bad)
            captions = ()
        counts.append(len(captions))
        digests += [hashlib.blake2b(text.encode(), digest_size=DIGEST_BYTES).digest() for text in captions]
    return np.array(counts, np.int64), np.array(digests, f"S{DIGEST_BYTES}")


def require_readable(bad: BadSample) -> None:
    """Raises: RunStopped if the sample may become readable, as on a disk or network that fails."""
    if bad.skip.cause == UNREADABLE_SHARD:
        raise RunStopped(f"{bad}; run the same command again when it can be read") from bad
