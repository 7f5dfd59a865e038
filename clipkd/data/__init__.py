"""The only door to webdataset and datasets: shards and data sets in, batches of views out."""

from clipkd.data.loader import AUGMENTATION_VERSION, Augment, FeatureRows, Feed, loader_options
from clipkd.data.open import Pairs, open_feed, open_pairs
from clipkd.data.skips import DAMAGED_SHARD, FEWEST_SHARDS, UNREADABLE_SHARD, BadSample, Skip, Skips, exceeds
from clipkd.data.sources import Pair, PairSet

__all__ = [
    "AUGMENTATION_VERSION",
    "DAMAGED_SHARD",
    "FEWEST_SHARDS",
    "UNREADABLE_SHARD",
    "Augment",
    "BadSample",
    "FeatureRows",
    "Feed",
    "Pair",
    "PairSet",
    "Pairs",
    "Skip",
    "Skips",
    "exceeds",
    "loader_options",
    "open_feed",
    "open_pairs",
]
