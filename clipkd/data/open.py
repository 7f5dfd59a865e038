"""Open the configured data: indexed pairs, or streamed shards behind URLs and pipes."""

from collections.abc import Mapping

from clipkd import distributed
from clipkd.config.data import DataConfig, SourceConfig
from clipkd.config.train import TrainConfig
from clipkd.data.loader import FeatureRows, Feed, indexed_batches
from clipkd.data.shards import WebdatasetPairs
from clipkd.data.sources import PairSet, PairSource, configured_sources, is_remote
from clipkd.data.stream import StreamedShards, streamed_batches
from clipkd.data.tables import HuggingFacePairs, TablePairs
from clipkd.views import Batch, Views

Pairs = PairSet | StreamedShards


def open_pairs(config: DataConfig) -> Pairs:
    """Open and index the configured sources. Call on every process.

    Raises: FileNotFoundError or ValueError that name what is missing or damaged.
    """
    sources = configured_sources(config)
    remote = {s.format == "webdataset" and is_remote(path) for s in sources for path in s.paths}
    if remote == {True}:
        return StreamedShards(sources)
    if True in remote:
        raise ValueError(
            "data.path and data.mix name both remote shards (URLs or pipes) and local data; copy the remote shards, or "
            "leave one kind out"
        )
    tables = {"huggingface": HuggingFacePairs, "csv": TablePairs}

    def open_source(source: SourceConfig) -> PairSource:
        if source.format == "webdataset":
            return WebdatasetPairs(source)
        return distributed.together(lambda: tables[source.format](source))

    pairs = PairSet([open_source(source) for source in sources], sources)
    distributed.together(lambda: pairs.require_usable(config.max_skipped))
    return pairs


def open_feed(
    pairs: Pairs,
    config: TrainConfig,
    views: Views,
    *,
    start: int = 0,
    places: Mapping[int, int] | None = None,
    stored: FeatureRows | None = None,
    pin_memory: bool = False,
) -> Feed[Batch]:
    """This process's batches from step `start` on.

    places: positions of a checkpoint's readers in streamed shards. stored: features to add to each indexed sample.
    Raises: ValueError if the processes cannot share a batch or the data does not fill one.
    """
    if isinstance(pairs, StreamedShards):
        assert stored is None
        return streamed_batches(pairs, config, views, places=places or {}, pin_memory=pin_memory)
    return indexed_batches(pairs, config, views, start=start, stored=stored, pin_memory=pin_memory)
