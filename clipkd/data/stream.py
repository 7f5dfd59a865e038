"""Shards behind a URL or a pipe, read from front to back.

Order and batches depend on the number of readers (processes × loader processes). After a resume every reader starts at
the first shard of which it still held samples, so that nothing is lost; what it had given of that shard and of those
after it comes again: some times the shuffle buffer.
"""

import contextlib
import hashlib
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO, cast

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data.loader import MOST_TRIES, Augment, Collate, Feed, Sample, loader_options
from clipkd.data.order import Mixture, Purpose, generator
from clipkd.data.skips import DAMAGED_SHARD, BadSample, Skip
from clipkd.data.sources import IMAGE_EXTENSIONS, Pair, about, make_pair
from clipkd.data.tar_index import DUPLICATE, as_text
from clipkd.data.tar_members import StrictMember, group_members, walk
from clipkd.errors import RunStopped
from clipkd.views import Batch, Views

SHUFFLE_BUFFER = 2000
"""Samples that a reader holds and draws from."""

MOST_EMPTY_SHARDS = 20
"""Shards in a row that may fail to give a sample."""


class StreamedShards:
    """The shards of all configured sources, mixed by their weights shard by shard."""

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        self.configs = list(sources)
        for path in (path for config in sources for path in config.paths):
            known = (gopen_schemes.keys() | {"file"}) - {"__default__"}
            if (scheme := path.split(":")[0]) not in known:
                raise ValueError(
                    f"{path}: nothing opens {scheme}:// here, only {sorted(known)}; e.g. 'pipe:aws s3 cp {path} -'"
                )
        shards = [[url for path in config.paths for url in expand_urls(path)] for config in sources]
        self.sizes = [np.array([len(urls)]) for urls in shards]
        self.shards = [(url, config) for urls, config in zip(shards, sources, strict=True) for url in urls]

    def identity(self) -> list[dict[str, Any]]:
        digest = hashlib.sha256("\n".join(url for url, _ in self.shards).encode()).hexdigest()
        return [{"shards": len(self.shards), "fingerprint": digest}, *(about(config) for config in self.configs)]

    def describe(self) -> str:
        return f"{len(self.shards)} streamed shards"

    def mixture(self, seed: int) -> Mixture:
        """The order of shards, each of them taken for one sample."""
        return Mixture(self.sizes, weights=[config.weight for config in self.configs], seed=seed)


class StreamedPairs(IterableDataset):
    """Endless batches of one process; each loader process is a reader that takes every n-th shard of the order."""

    def __init__(
        self,
        shards: StreamedShards,
        mixture: Mixture,
        augment: Augment,
        collate: Collate,
        *,
        share: int,
        places: Mapping[int, int],
        rank: int,
        world_size: int,
    ) -> None:
        """share: pairs per batch of this process. places: where each reader goes on; empty at the start."""
        self.shards, self.mixture, self.augment, self.collate = shards, mixture, augment, collate
        self.share, self.places, self.rank, self.world_size = share, places, rank, world_size

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        num_workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader, num_readers = self.rank * num_workers + worker, self.world_size * num_workers
        start = self.starts(num_workers)[reader]
        skipped: list[Skip] = []
        samples: list[Sample] = []
        opened: list[int] = []
        for place, sample in self.samples(start, num_readers, skipped, opened):
            samples.append(sample)
            if len(samples) == self.share:
                batch = self.collate(samples)
                yield batch._replace(skipped=tuple(skipped), shards_opened=len(opened), place=(reader, place))
                for part in (skipped, samples, opened):
                    part.clear()

    def starts(self, num_workers: int) -> dict[int, int]:
        """This process's readers → the place in the order of shards where each of them begins."""
        num_readers = self.world_size * num_workers
        readers = range(self.rank * num_workers, (self.rank + 1) * num_workers)
        if len(self.places) == num_readers:
            return {reader: self.places[reader] for reader in readers}
        first = min(self.places.values(), default=0)  # other readers than before: all go back to the last of them
        return {reader: first + reader for reader in readers}

    def samples(self, start: int, stride: int, skipped: list[Skip], opened: list[int]) -> Iterator[tuple[int, Sample]]:
        """Shuffled samples, each with the first shard that is not given whole once it has been taken."""
        rng = generator(Purpose.STREAM, self.augment.seed, start)
        buffer: list[tuple[int, int, Pair]] = []
        waiting: Counter[int] = Counter()
        empty = unusable = 0
        for place in itertools.count(start, stride):
            ((view, number),) = self.mixture.between(place, place + 1)
            opened.append(place)
            empty += 1
            for pair in read_shard(*self.shards.shards[number], skipped):
                empty = 0
                buffer.append((place, view, pair))
                waiting[place] += 1
                if len(buffer) <= SHUFFLE_BUFFER:
                    continue
                chosen = int(rng.integers(len(buffer)))
                buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
                came_from, its_view, chosen_pair = buffer.pop()
                try:
                    sample = self.augment(chosen_pair, its_view, key_id(chosen_pair.key))
                except BadSample as bad:
                    skipped.append(bad.skip)
                    sample, unusable = None, unusable + 1
                    if unusable == MOST_TRIES:
                        message = f"{MOST_TRIES} samples in a row cannot be used, the last of them {bad}"
                        raise RunStopped(message) from bad
                waiting[came_from] -= 1
                if not waiting[came_from]:
                    del waiting[came_from]
                if sample is not None:
                    unusable = 0
                    yield min(waiting, default=place), sample
            if empty == MOST_EMPTY_SHARDS:
                reason = f": {skipped[-1].key} {skipped[-1].message}" if skipped else ""
                raise RunStopped(f"{MOST_EMPTY_SHARDS} streamed shards in a row gave no sample{reason}")


def read_shard(url: str, config: SourceConfig, skipped: list[Skip]) -> Iterator[Pair]:
    """The whole pairs of a shard; what is wrong with it is added to `skipped`."""
    damage: list[str] = []
    seen: set[str] = set()
    for name, parts in group_members(walk(lambda: open_stream(url), read_content, damage)):
        key = f"{url}/{as_text(os.fsencode(name))}"
        try:
            if name in seen:
                raise BadSample(key, "duplicate key", DUPLICATE)
            seen.add(name)
            yield pair_of(key, parts, config)
        except BadSample as bad:
            skipped.append(bad.skip)
    if not damage and not seen:
        damage = ["holds no samples"]
    skipped += [Skip(url, DAMAGED_SHARD, message) for message in damage]


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[tarfile.TarFile]:
    try:
        with (
            gopen(url) as stream,
            tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|", tarinfo=StrictMember) as tar,
        ):
            yield tar
    except OSError as error:  # webdataset words the end of a program as the tuple of its arguments
        if status := re.search(r": exit (-?\d+) \(", str(error)):
            raise OSError(f"the program behind it ended with status {status[1]}") from error
        raise


def read_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) < member.size:
        raise EOFError(f"{member.name} is cut short")
    return content


def pair_of(key: str, parts: dict[str, bytes], config: SourceConfig) -> Pair:
    """Raises: BadSample."""
    image = next((parts[extension] for extension in reversed(parts) if extension in IMAGE_EXTENSIONS), None)
    if image is None:
        raise BadSample(key, "no image", f"has no {', '.join(f'.{name}' for name in IMAGE_EXTENSIONS)}")
    extension = "txt" if config.caption_key == "txt" else "json"
    if extension not in parts:
        raise BadSample(key, "no caption", f"has no .{extension}; see data.caption_key")
    return make_pair(key, image, parts[extension], parts.get("cls" if config.label_key == "cls" else "json"), config)


def key_id(key: str) -> int:
    """A streamed sample's id: 63 bits of its key's hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1


def streamed_batches(
    shards: StreamedShards,
    config: DataConfig,
    views: Views,
    *,
    batch_size: int,
    seed: int,
    places: Mapping[int, int],
    rank: int,
    world_size: int,
    pin_memory: bool,
) -> Feed[Batch]:
    mixture = shards.mixture(seed)
    pairs = StreamedPairs(
        shards,
        mixture,
        Augment(config, views, seed),
        Collate(views),
        share=batch_size // world_size,
        places=places,
        rank=rank,
        world_size=world_size,
    )
    loader = DataLoader(pairs, batch_size=None, **loader_options(config, pin_memory))
    places_now = pairs.starts(max(1, config.num_workers))
    return Feed(loader, places=places_now, epoch=lambda _, now: min(now.values()) / mixture.epoch_size)
