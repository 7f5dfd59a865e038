"""The only door to webdataset and datasets: shards and data sets in, batches of views and evaluation sets out."""

from clipkd.data.evaluation_layouts import open_evaluation_set
from clipkd.data.evaluation_sets import (
    CLASS_KINDS,
    EvaluationSet,
    Images,
    Kind,
    Layout,
    check_label,
    check_vector,
)
from clipkd.data.loader import AUGMENTATION_VERSION, Augment, FeatureRows, Feed, loader_options
from clipkd.data.open import Pairs, open_feed, open_pairs
from clipkd.data.skips import DAMAGED_SHARD, FEWEST_SHARDS, UNREADABLE_SHARD, BadSample, Skip, Skips, exceeds
from clipkd.data.sources import Pair, PairSet

__all__ = [
    "AUGMENTATION_VERSION",
    "CLASS_KINDS",
    "DAMAGED_SHARD",
    "FEWEST_SHARDS",
    "UNREADABLE_SHARD",
    "Augment",
    "BadSample",
    "EvaluationSet",
    "FeatureRows",
    "Feed",
    "Images",
    "Kind",
    "Layout",
    "Pair",
    "PairSet",
    "Pairs",
    "Skip",
    "Skips",
    "check_label",
    "check_vector",
    "exceeds",
    "loader_options",
    "open_evaluation_set",
    "open_feed",
    "open_pairs",
]
