"""Ranges of samples and numbers of captions, against literal loops."""

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clipkd.data import BadSample, Pair
from clipkd.teachers.cache.captions import Captions, number_captions
from clipkd.teachers.cache.plan import cut
from clipkd.teachers.store.manifest import Shard


@pytest.mark.parametrize(
    ("sizes", "num_views", "expected"),
    [
        ([4096, 4097], 1, [4096, 2048, 2049]),
        ([10_000], 4, [3333, 3333, 3334]),
        ([10_000], 8, [2000] * 5),
        ([3, 2], 1 << 15, [1] * 5),
    ],
)
def test_shards_of_the_data_are_cut_into_equal_parts(sizes: list[int], num_views: int, expected: list[int]) -> None:
    ranges = cut(sized([sizes]), num_views)
    assert [rows for _, rows in ranges] == expected
    assert [first for first, _ in ranges] == [0, *itertools.accumulate(expected)][:-1]


def sized(sources: list[list[int]]) -> Any:
    return SimpleNamespace(sources=[SimpleNamespace(shard_sizes=np.array(sizes)) for sizes in sources])


def test_ranges_cover_every_id_once_and_none_lies_in_two_shards_of_the_data() -> None:
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


def numbered(captions: list[list[str] | None], sizes: list[int]) -> tuple[Any, Captions, list[Shard]]:
    """Pairs, their numbered captions, and shards of these sizes, whose texts are counted here by a dictionary."""
    pairs: Any = FakePairs(captions)
    starts = [0, *itertools.accumulate(sizes)][:-1]
    found, shards = number_captions(pairs, list(zip(starts, sizes, strict=True))), []
    known: dict[str, int] = {}
    for first, rows in zip(starts, sizes, strict=True):
        before = len(known)
        for text in itertools.chain.from_iterable(part or [] for part in captions[first : first + rows]):
            known.setdefault(text, len(known))
        shards.append(Shard(first, rows, before, len(known) - before))
    return pairs, found, shards


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
        pairs, found, shards = numbered(captions, sizes)
        known: dict[str, int] = {}
        for text in itertools.chain.from_iterable(part or [] for part in captions):
            known.setdefault(text, len(known))
        assert (len(found.firsts), len(found.texts)) == (len(known), sum(len(part or []) for part in captions))
        assert [text for shard in shards for text in found.read_texts(shard, pairs)] == list(known)
        for shard in shards:
            own = captions[shard.first : shard.first + shard.rows]
            most = max(1, *(len(part or []) for part in own))
            rows = [[*(known[text] for text in part or []), *[-1] * (most - len(part or []))] for part in own]
            assert found.table(shard).tolist() == rows


def test_captions_that_are_all_equal_are_one_text() -> None:
    pairs, found, shards = numbered([["same", "same"], ["same"], None, ["same"]], [2, 2])
    assert found.texts.tolist() == [0, 0, 0, 0]
    assert found.firsts.tolist() == [0]
    assert found.starts.tolist() == [0, 2, 3, 3, 4]
    assert found.table(shards[0]).tolist() == [[0, 0], [0, -1]]
    assert found.table(shards[1]).tolist() == [[-1], [0]]
    assert [found.read_texts(shard, pairs) for shard in shards] == [["same"], []]
