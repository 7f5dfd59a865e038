"""Open the configured data: indexed pairs, or streamed shards behind URLs and pipes."""

from collections.abc import Mapping

from torch.utils.data import DataLoader

from clipkd import distributed
from clipkd.config.data import DataConfig, SourceConfig
from clipkd.config.train import TrainConfig
from clipkd.data.loader import Augment, AugmentedPairs, Collate, FeatureRows, Feed, loader_options, pixel_bytes
from clipkd.data.order import BatchOrder, share_of
from clipkd.data.shards import WebdatasetPairs
from clipkd.data.sources import PairSet, PairSource
from clipkd.data.stream import StreamedPairs, StreamedShards
from clipkd.data.tables import HuggingFacePairs, TablePairs
from clipkd.views import Batch, Views

Pairs = PairSet | StreamedShards


def open_pairs(config: DataConfig) -> Pairs:
    """Open and index the configured sources. Call on every process.

    Raises: FileNotFoundError or ValueError that name what is missing or damaged.
    """
    sources = [config, *config.mix]
    for number, source in enumerate(sources):
        if not source.paths:
            name = "data.path" if number == 0 else f"data.mix[{number - 1}].path"
            raise ValueError(f"{name} is empty; set it to a folder of shards, a table or a Hugging Face data set")
    remote = {is_remote(path, source) for source in sources for path in source.paths}
    if remote == {True}:
        return StreamedShards(sources)
    if True in remote:
        raise ValueError(
            "data.path and data.mix name both remote shards (URLs or pipes) and local data; copy the remote shards, or "
            "leave one kind out"
        )

    def open_source(source: SourceConfig) -> PairSource:
        if source.format == "webdataset":
            return WebdatasetPairs(source)
        table = HuggingFacePairs if source.format == "huggingface" else TablePairs
        return distributed.together(lambda: table(source))

    pairs = PairSet([open_source(source) for source in sources], sources)
    distributed.together(lambda: pairs.require_usable(config.max_skipped))
    return pairs


def is_remote(path: str, source: SourceConfig) -> bool:
    return source.format == "webdataset" and ("://" in path or path.startswith("pipe:"))


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
    process = (distributed.rank(), distributed.world_size())
    batch_bytes = share_of(config.batch_size, process[1]) * pixel_bytes(views.pixel_specs)
    options = loader_options(config.data.num_workers, batch_bytes, pin_memory=pin_memory)
    if isinstance(pairs, StreamedShards):
        assert stored is None
        streamed = StreamedPairs(pairs, config, views, places or {})
        starts, num_shards = streamed.starts(max(1, config.data.num_workers)), streamed.mixture.epoch_size
        loader = DataLoader(streamed, batch_size=None, **options)
        return Feed(loader, places=starts, epoch=lambda _, places: min(places.values()) / num_shards)
    mixture = pairs.mixture(config.seed)
    loader = DataLoader(
        AugmentedPairs(pairs, Augment(config.data, views, config.seed), stored),
        batch_sampler=BatchOrder(mixture, config.batch_size, range(start, config.steps), *process),
        collate_fn=Collate(views),
        **options,
    )
    return Feed(loader, epoch=lambda step, _: step * config.batch_size / mixture.epoch_size)
