"""The only door to webdataset and datasets: shards and data sets in, batches of views and evaluation sets out."""

from clipkd.data.loader import Feed
from clipkd.data.open import Pairs, open_feed, open_pairs
from clipkd.data.skips import DAMAGED_SHARD, FEWEST_SHARDS, Skip, Skips, exceeds
from clipkd.data.sources import PairSet
from clipkd.data.zeroshot_sets import ZeroShotSet, open_zeroshot_set

__all__ = [
    "DAMAGED_SHARD",
    "FEWEST_SHARDS",
    "Feed",
    "PairSet",
    "Pairs",
    "Skip",
    "Skips",
    "ZeroShotSet",
    "exceeds",
    "open_feed",
    "open_pairs",
    "open_zeroshot_set",
]
