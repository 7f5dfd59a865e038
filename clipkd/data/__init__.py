"""Shards and data sets → batches of views; the only room that imports webdataset and datasets for training."""

from clipkd.data.loader import AUGMENTATION_VERSION, Augment, FeatureRows, Feed, loader_options, pixel_bytes
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
    "pixel_bytes",
]
