"""The configured data → what a run reads: indexed pairs, or streamed shards where they lie behind a URL or a pipe."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from clipkd import distributed
from clipkd.config.data import DataConfig, SourceConfig
from clipkd.config.train import TrainConfig
from clipkd.data.loader import FeatureRows, Feed, indexed_batches
from clipkd.data.order import BatchOrder, require_share
from clipkd.data.shards import WebdatasetPairs
from clipkd.data.sources import PairSet, PairSource, Track, configured_sources, is_remote
from clipkd.data.stream import StreamedShards, streamed_batches
from clipkd.data.tables import HuggingFacePairs, TablePairs
from clipkd.views import Batch, Views

Pairs = PairSet | StreamedShards


def silent(items: Iterable[Any], _title: str, _total: int) -> Iterator[Any]:
    return iter(items)


def open_pairs(config: DataConfig, *, track: Track = silent) -> Pairs:
    """Open and index what is configured. Call on every process.

    Raises: FileNotFoundError or ValueError that name what is missing or damaged, before anything is read in earnest.
    """
    sources = configured_sources(config)
    remote = [is_remote(path) for source in sources if source.format == "webdataset" for path in source.paths] + [
        False for source in sources if source.format != "webdataset"
    ]
    if all(remote):
        return StreamedShards(sources)
    if any(remote):
        raise ValueError(
            "data.path and data.mix name shards behind URLs or pipes and local data; a run streams all or indexes all: "
            "copy the remote shards, or leave one kind out"
        )
    pairs = PairSet([open_source(source, track) for source in sources], sources)
    distributed.together(lambda: pairs.require_usable(config.max_skipped))
    return pairs


def open_source(config: SourceConfig, track: Track) -> PairSource:
    if config.format == "webdataset":
        return WebdatasetPairs(config, track=track)
    kind = HuggingFacePairs if config.format == "huggingface" else TablePairs
    return distributed.together(lambda: kind(config))


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
    """This process's batches from a step on. places: of streamed shards, where a checkpoint's readers were. stored: features
    that come with every sample, of indexed pairs only.

    Raises: ValueError if the processes cannot share a batch or the data does not fill one.
    """
    rank, world_size = distributed.rank(), distributed.world_size()
    if isinstance(pairs, StreamedShards):
        assert stored is None
        require_share(config.batch_size, world_size)
        return streamed_batches(
            pairs,
            config.data,
            views,
            batch_size=config.batch_size,
            seed=config.seed,
            places=places or {},
            rank=rank,
            world_size=world_size,
            pin_memory=pin_memory,
        )
    order = BatchOrder(
        pairs.mixture(config.seed),
        batch_size=config.batch_size,
        start=start,
        stop=config.steps,
        rank=rank,
        world_size=world_size,
    )
    return indexed_batches(pairs, config.data, views, order, stored=stored, pin_memory=pin_memory)
