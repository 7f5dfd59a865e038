"""Ranges of samples and numbers of captions, against literal loops."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np

from clipkd.data import BadSample, Pair
from clipkd.teachers.cache.captions import number_captions
from clipkd.teachers.cache.plan import cut
from clipkd.teachers.store.manifest import Shard


def sized(sources: list[list[int]]) -> Any:
    return SimpleNamespace(sources=[SimpleNamespace(shard_sizes=np.array(sizes)) for sizes in sources])


def test_shards_of_the_data_are_cut_into_equal_parts() -> None:
    assert cut(sized([[4096, 4097]]), 1) == [(0, 4096), (4096, 2048), (6144, 2049)]
    assert cut(sized([[10_000]]), 4) == [(0, 3333), (3333, 3333), (6666, 3334)]
    rng = np.random.default_rng(0)
    for _ in range(100):
        sources = [rng.integers(1, 20_000, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 4))]
        num_views = int(rng.integers(1, 40))
        ranges = cut(sized(sources), num_views)
        assert [first for first, _ in ranges] == [0, *itertools.accumulate(rows for _, rows in ranges)][:-1]
        place = iter(ranges)
        for size in itertools.chain(*sources):
            parts: list[int] = []
            while sum(parts) < size:
                parts.append(next(place)[1])
            assert sum(parts) == size
            assert max(parts) - min(parts) <= 1
            assert max(parts) <= min(4096, (1 << 14) // num_views)
        assert list(place) == []


class FakePairs:
    """Captions by index; None cannot be read."""

    def __init__(self, captions: list[list[str] | None]) -> None:
        self.captions = captions

    def read(self, index: int, *, image: bool) -> Pair:
        assert not image
        found = self.captions[index]
        if found is None:
            raise BadSample(str(index), "no caption", "has none")
        return Pair(str(index), b"", tuple(found))


def test_captions_are_numbered_as_a_dictionary_would_number_them() -> None:
    """Several per sample, repeated in samples, in shards and across, and samples without any that can be read."""
    rng = np.random.default_rng(1)
    for trial in range(60):
        sizes = rng.integers(1, 7, rng.integers(1, 6)).tolist()
        words = [f"word {number}" for number in range(rng.integers(1, 30))]
        captions: list[list[str] | None] = [
            None if trial == 0 or rng.random() < 0.2 else rng.choice(words, rng.integers(1, 5)).tolist()
            for _ in range(sum(sizes))
        ]
        pairs: Any = FakePairs(captions)
        ranges = list(zip(itertools.accumulate(sizes, initial=0), sizes, strict=False))
        found, known, shards = number_captions(pairs, ranges), dict[str, int](), []
        for first, rows in ranges:
            before = len(known)
            for text in itertools.chain.from_iterable(part or [] for part in captions[first : first + rows]):
                known.setdefault(text, len(known))
            shards.append(Shard(first, rows, before, len(known) - before))
        assert (len(found.firsts), len(found.texts)) == (len(known), sum(len(part or []) for part in captions))
        assert [text for shard in shards for text in found.read_texts(shard, pairs)] == list(known)
        for shard in shards:
            own = captions[shard.first : shard.first + shard.rows]
            most = max(1, *(len(part or []) for part in own))
            rows = [[*(known[text] for text in part or []), *[-1] * (most - len(part or []))] for part in own]
            assert found.table(shard).tolist() == rows
