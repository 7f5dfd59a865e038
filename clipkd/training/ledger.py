"""Counts of the samples and streamed shards that a run could not use."""

from pathlib import Path
from typing import Any

from clipkd import data, distributed, files
from clipkd.views import Batch


class Ledger:
    """Skipped samples and damaged shards: collected per process, then added up over all processes."""

    def __init__(self, path: Path | None, state: dict[str, Any]) -> None:
        """path: skipped.jsonl; None writes nothing. state: as `state` returned it, empty for a new run."""
        self.path = path
        self.num_skipped: int = state.get("num_skipped", 0)
        """Samples of all processes that could not be used."""
        self.num_read: int = state.get("num_read", 0)
        """Samples that all processes have read, with these."""
        self.num_opened, self.num_damaged = state.get("streamed_shards", (0, 0))
        """Streamed shards that all processes opened, and how many of them were damaged."""
        self.skips, self.read, self.opened = data.Skips(), 0, 0
        """What this process found since `share` was last called."""

    def state(self) -> dict[str, Any]:
        """The counts, for a checkpoint."""
        counts = {"num_skipped": self.num_skipped, "num_read": self.num_read}
        return counts | {"streamed_shards": [self.num_opened, self.num_damaged]}

    def add(self, batch: Batch) -> None:
        """Note what this process had to skip for a batch."""
        self.skips.add(data.Skip(*skip) for skip in batch.skipped)
        self.read += batch.num_read
        self.opened += batch.shards_opened

    def share(self, step: int) -> data.Skips:
        """Add up what all processes noted since the last call, and append it to skipped.jsonl. Call on every process."""
        together = data.Skips()
        for skips, read, opened in distributed.gather_objects((self.skips, self.read, self.opened)):
            together.merge(skips)
            self.num_read += read
            self.num_opened += opened
        self.skips, self.read, self.opened = data.Skips(), 0, 0
        self.num_damaged += together.counts[data.DAMAGED_SHARD]
        self.num_skipped += together.num_samples
        if together and (path := self.path) is not None:
            distributed.together(
                lambda: files.append_row(path, together.row(step)) if distributed.rank() == 0 else None
            )
        return together

    def describe_damage(self, max_skipped: float) -> str:
        """The damage in words if it is more than data.max_skipped allows; empty otherwise."""
        if data.exceeds(self.num_skipped, self.num_read, max_skipped):
            return f"{self.num_skipped} samples could not be used among the first {self.num_read}"
        if data.exceeds(self.num_damaged, self.num_opened, max_skipped, fewest=data.FEWEST_SHARDS):
            return f"{self.num_damaged} of {self.num_opened} streamed shards could not be read to their end"
        return ""
