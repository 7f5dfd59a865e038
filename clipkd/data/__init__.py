"""The only door to webdataset and datasets: shards and data sets in, batches of views and evaluation sets out."""

from clipkd.data.loader import BatchOrder, training_batches
from clipkd.data.sources import PairSource, open_source
from clipkd.data.zeroshot_sets import ZeroShotSet, open_zeroshot_set

__all__ = ["BatchOrder", "PairSource", "ZeroShotSet", "open_source", "open_zeroshot_set", "training_batches"]
