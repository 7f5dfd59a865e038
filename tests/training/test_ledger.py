"""Skipped samples and damaged shards: each counted once, written down, and too many of them named."""

from pathlib import Path

import torch

from clipkd import files
from clipkd.data import DAMAGED_SHARD
from clipkd.training.ledger import Ledger
from clipkd.views import Batch

EMPTY = Batch(pixels=(), texts=(), ids=torch.tensor([]), labels=torch.tensor([]), keys=())
BAD, HALF = ("0.tar/7", "undecodable image", "no image"), ("1.tar", DAMAGED_SHARD, "cut short")


def test_counts_by_hand_and_over_a_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "skipped.jsonl"
    ledger = Ledger(path, {})
    ledger.add(EMPTY._replace(skipped=(BAD, BAD), num_read=1500, shards_opened=3))
    ledger.add(EMPTY._replace(skipped=(BAD, HALF), num_read=500, shards_opened=1))
    assert not path.exists()
    ledger.share(5)
    ledger.share(6)  # nothing new
    (row,) = files.read_rows(path)
    assert (row["step"], row["counts"]) == (5, {"undecodable image": 3, DAMAGED_SHARD: 1})
    assert ledger.state() == {"num_skipped": 3, "num_read": 2000, "streamed_shards": [4, 1]}
    # Shares are of at least 1,000 samples and 100 shards: one among the first must not stop a run.
    assert ledger.describe_damage(0.01) == ""
    assert ledger.describe_damage(0.001) == "3 samples could not be used among the first 2000"
    assert ledger.describe_damage(0.0015) == "1 of 4 streamed shards could not be read to their end"
    resumed = Ledger(None, ledger.state())  # None: steps are only tried
    resumed.add(EMPTY._replace(skipped=(BAD,)))
    resumed.share(7)
    assert resumed.num_skipped == 4
    assert len(files.read_rows(path)) == 1
