"""Samples that cannot be used: each is named with its cause and counted."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

MAX_EXAMPLES = 10
FEWEST_SEEN = 1000
"""Least denominator of the share of skipped samples, so that one bad sample at the start does not stop a run."""

FEWEST_SHARDS = 100
"""The same for streamed shards."""

DAMAGED_SHARD = "damaged shard"
UNREADABLE_SHARD = "unreadable shard"
"""Possibly for the moment: a disk or network fails, or the shard is being written."""


HIDDEN_FILE = "hidden file"
NO_SAMPLES = (DAMAGED_SHARD, HIDDEN_FILE)
"""Causes that are no loss of a sample: they do not count in the share of skipped samples."""


class Skip(NamedTuple):
    key: str
    """Shard and key, file or row."""
    cause: str
    """One of a few words, to be counted."""
    message: str


class BadSample(ValueError):
    """A sample that cannot be used. A run skips and counts it; reading it directly raises the error."""

    def __init__(self, key: str, cause: str, message: str) -> None:
        super().__init__(f"{key}: {message}")
        self.skip = Skip(key, cause, message)

    def __reduce__(self) -> tuple[type, tuple[str, ...]]:
        return BadSample, tuple(self.skip)  # loader processes send it to the training process


class Skips:
    """Counts by cause, and examples: the first few skips, and the first of each cause."""

    def __init__(self, skips: Iterable[Skip] = ()) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: list[Skip] = []
        self.add(skips)

    def add(self, skips: Iterable[Skip]) -> None:
        for skip in skips:
            self.keep(skip)
            self.counts[skip.cause] += 1

    def merge(self, other: "Skips") -> None:
        for skip in other.examples:
            self.keep(skip)
        self.counts += other.counts

    def keep(self, skip: Skip) -> None:
        if len(self.examples) < MAX_EXAMPLES or skip.cause not in {example.cause for example in self.examples}:
            self.examples.append(skip)

    @property
    def num_samples(self) -> int:
        return sum(count for cause, count in self.counts.items() if cause not in NO_SAMPLES)

    def __bool__(self) -> bool:
        return bool(self.counts)

    def __str__(self) -> str:
        return ", ".join(f"{count} × {cause}" for cause, count in self.counts.most_common())

    def row(self, step: int) -> dict[str, object]:
        """A line of skipped.jsonl."""
        return {"step": step, "counts": dict(self.counts), "examples": [skip._asdict() for skip in self.examples]}


def exceeds(num_skipped: int, num_seen: int, max_share: float, *, fewest: int = FEWEST_SEEN) -> bool:
    return num_skipped > max_share * max(num_seen, fewest)
