"""Shards behind a URL or a pipe, read from front to back.

Order and batches depend on the number of readers (processes × loader processes). After a resume each reader starts at
the first shard of which it still held samples: no sample is lost, and samples already given of that shard and of later
ones are repeated, up to a few shuffle buffers per reader.
"""

import contextlib
import hashlib
import itertools
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info
from webdataset.gopen import gopen, gopen_schemes
from webdataset.shardlists import expand_urls

from clipkd import distributed
from clipkd.config.data import SourceConfig
from clipkd.config.train import TrainConfig
from clipkd.data.loader import MAX_TRIES, Augment, Collate, Sample, no_sample
from clipkd.data.order import Mixture, Purpose, generator, share_of
from clipkd.data.skips import DAMAGED_SHARD, HIDDEN_FILE, NO_SAMPLES, BadSample, Skip
from clipkd.data.sources import Pair, dotted_pairs, identity_of, make_pair, member_extensions, several_dots
from clipkd.data.tar import DamagedTar, StrictMember, read_samples
from clipkd.data.tar_index import DUPLICATE, as_text
from clipkd.errors import RunStopped
from clipkd.views import Batch, Views

SHUFFLE_BUFFER = 2000
"""Samples that a reader holds and draws from."""

MAX_EMPTY_SHARDS = 20
"""Shards in a row that may give no sample."""


class StreamedShards:
    """The shards of all configured sources, mixed by their weights shard by shard."""

    def __init__(self, sources: Sequence[SourceConfig]) -> None:
        """Raises: ValueError if webdataset cannot open a URL's scheme."""
        known = (gopen_schemes.keys() | {"file"}) - {"__default__"}
        for path in (path for config in sources for path in config.paths):
            if (scheme := path.split(":")[0]) not in known:
                raise ValueError(
                    f"{path}: {scheme}:// cannot be opened, only {sorted(known)}; use e.g. 'pipe:aws s3 cp {path} -'"
                )
        self.configs = list(sources)
        shards = [[url for path in config.paths for url in expand_urls(path)] for config in sources]
        self.sizes = [np.array([len(urls)]) for urls in shards]
        self.shards = [(url, config) for urls, config in zip(shards, sources, strict=True) for url in urls]

    def identity(self) -> list[dict[str, Any]]:
        digest = hashlib.sha256("\n".join(url for url, _ in self.shards).encode()).hexdigest()
        return [{"shards": len(self.shards), "fingerprint": digest}, *map(identity_of, self.configs)]

    def describe(self) -> str:
        return f"{len(self.shards)} streamed shards"

    def mixture(self, seed: int) -> Mixture:
        """The order of the shards: each counts as one sample."""
        return Mixture(self.sizes, weights=[config.weight for config in self.configs], seed=seed)


@dataclass
class Taken:
    """What a reader took from its shards since its last batch; it reads ahead of its batches."""

    samples: int = 0
    """Read, usable or not."""
    shards: int = 0
    skipped: list[Skip] = field(default_factory=list)

    def give(self) -> dict[str, Any]:
        """The fields of a batch; the counts start again."""
        given = {"num_read": self.samples, "shards_opened": self.shards, "skipped": tuple(self.skipped)}
        self.samples, self.shards, self.skipped = 0, 0, []
        return given


class StreamedPairs(IterableDataset):
    """Endless batches of one process; each loader process is a reader that takes every n-th shard of the order."""

    def __init__(self, shards: StreamedShards, config: TrainConfig, views: Views, places: Mapping[int, int]) -> None:
        """places: reader → position at which it resumes; empty at the start."""
        self.shards, self.mixture, self.places = shards, shards.mixture(config.seed), places
        self.augment, self.collate = Augment(config.data, views, config.seed), Collate(views)
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.share = share_of(config.batch_size, self.world_size)

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        num_workers, worker = (info.num_workers, info.id) if info else (1, 0)
        reader = self.rank * num_workers + worker
        start, stride = self.starts(num_workers)[reader], self.world_size * num_workers
        taken, samples, unusable = Taken(), list[Sample](), 0
        for place, view, pair in self.shuffled(start, stride, taken):
            try:
                samples.append(self.augment(pair, view, key_id(pair.key)))
                unusable = 0
            except BadSample as bad:
                taken.skipped.append(bad.skip)
                unusable += 1
                if unusable == MAX_TRIES:
                    raise no_sample(bad.skip) from bad
            if len(samples) == self.share:
                yield self.collate(samples)._replace(**taken.give(), place=(reader, place))
                samples.clear()

    def starts(self, num_workers: int) -> dict[int, int]:
        """This process's readers → the position in the order of shards at which each begins."""
        num_readers = self.world_size * num_workers
        readers = range(self.rank * num_workers, (self.rank + 1) * num_workers)
        if len(self.places) == num_readers:
            return {reader: self.places[reader] for reader in readers}
        first = min(self.places.values(), default=0)  # another number of readers: all return to the earliest position
        return {reader: first + reader for reader in readers}

    def shuffled(self, start: int, stride: int, taken: "Taken") -> Iterator[tuple[int, int, Pair]]:
        """Shuffled pairs: position of the first shard of which pairs are still held, view index, pair."""
        rng = generator(Purpose.STREAM, self.augment.seed, start)
        buffer: list[tuple[int, int, Pair]] = []
        held: Counter[int] = Counter()
        empty = 0
        for place in itertools.count(start, stride):
            ((view, number),) = self.mixture.between(place, place + 1)
            taken.shards += 1
            empty += 1
            for found in read_shard(*self.shards.shards[number]):
                if isinstance(found, Skip):
                    taken.skipped.append(found)
                    taken.samples += found.cause not in NO_SAMPLES
                    continue
                empty = 0
                taken.samples += 1
                buffer.append((place, view, found))
                held[place] += 1
                if len(buffer) > SHUFFLE_BUFFER:
                    chosen = int(rng.integers(len(buffer)))
                    buffer[chosen], buffer[-1] = buffer[-1], buffer[chosen]
                    came_from, its_view, drawn = buffer.pop()
                    held -= Counter([came_from])  # keeps positive counts only
                    yield min(held, default=place), its_view, drawn
            if empty == MAX_EMPTY_SHARDS:
                reason = f": {taken.skipped[-1].key} {taken.skipped[-1].message}" if taken.skipped else ""
                raise RunStopped(f"{MAX_EMPTY_SHARDS} streamed shards in a row gave no sample{reason}")


def read_shard(url: str, config: SourceConfig) -> Iterator[Pair | Skip]:
    """The samples of a shard, and skips for what cannot be used."""
    try:
        for name, parts, repeated in read_samples(lambda: open_stream(url), read_content):
            key = f"{url}/{as_text(os.fsencode(name))}"
            if not parts:
                yield Skip(key, HIDDEN_FILE, "is hidden")
                continue
            yield from (several_dots(key, stem) for stem in dotted_pairs(parts, member_extensions(config)))
            try:
                if repeated:
                    raise BadSample(key, "duplicate key", DUPLICATE)
                # Of several images the last one in the tar, as in TarIndex.select.
                found = ([parts[name] for name in parts if name in names] for names in member_extensions(config))
                yield make_pair(key, [contents[-1] if contents else None for contents in found], config)
            except BadSample as bad:
                yield bad.skip
    except DamagedTar as error:
        yield Skip(url, DAMAGED_SHARD, str(error))


@contextlib.contextmanager
def open_stream(url: str) -> Iterator[tarfile.TarFile]:
    try:
        with (
            gopen(url) as stream,
            tarfile.open(fileobj=cast("BinaryIO", stream), mode="r|", tarinfo=StrictMember) as tar,
        ):
            yield tar
    except OSError as error:  # webdataset describes a program's failure by the tuple of its arguments
        if status := re.search(r": exit (-?\d+) \(", str(error)):
            raise OSError(f"the program behind it ended with status {status[1]}") from error
        raise


def read_content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if member.islnk():
        return None  # the bytes it stands for have passed
    file = tar.extractfile(member)
    assert file is not None
    content = file.read()
    if len(content) < member.size:
        raise EOFError(f"{member.name} is cut short")
    return content


def key_id(key: str) -> int:
    """A streamed sample's id: 63 bits of its key's hash."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") >> 1
