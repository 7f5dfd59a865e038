"""Which pairs a step sees: a function of the seed and the step alone."""

import itertools
import math
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from clipkd.data import order as order_module
from clipkd.data.order import BatchOrder, Mixture, Position

UNEVEN = (7, 1, 12, 3, 7)
"""Thirty samples in shards of very different sizes."""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> int:
    """Blocks of at most 16 samples, so that a few dozen samples make several."""
    monkeypatch.setattr(order_module, "BLOCK", 16)
    return 16


def mixture(*sources: Sequence[int], weights: Sequence[float] | None = None, seed: int = 5) -> Mixture:
    """Sources given as the sizes of their shards."""
    return Mixture([np.array(sizes) for sizes in sources], weights=weights or [1.0] * len(sources), seed=seed)


def batches(
    *sources: Sequence[int], weights: Sequence[float] | None = None, seed: int = 5, **changes: Any
) -> list[list[Position]]:
    options = {"batch_size": 8, "steps": range(12)} | changes
    return list(BatchOrder(mixture(*(sources or (UNEVEN,)), weights=weights, seed=seed), **options))


def epoch(mixed: Mixture, number: int) -> list[Position]:
    return mixed.between(number * mixed.epoch_size, (number + 1) * mixed.epoch_size)


def blocks(mixed: Mixture, number: int) -> list[list[Position]]:
    """An epoch as the blocks that are shuffled together."""
    places, begin = epoch(mixed, number), [mixed.starts_at(block) for block in range(mixed.num_blocks + 1)]
    assert (begin[0], begin[-1]) == (0, mixed.epoch_size)
    return [places[start:stop] for start, stop in itertools.pairwise(begin)]


@pytest.mark.parametrize("batch_size", [1, 4, 7, 8, 13, 30])
@pytest.mark.parametrize("sizes", [(30,), UNEVEN, (1,) * 30, (29, 1), (1, 29)])
@pytest.mark.parametrize("block", [4, 16, 1 << 18])
def test_every_sample_comes_exactly_once_per_epoch_and_none_is_left_out(
    sizes: tuple[int, ...], batch_size: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order_module, "BLOCK", block)
    steps = batches(sizes, batch_size=batch_size, steps=range(math.ceil(4 * 30 / batch_size)))
    assert {len(step) for step in steps} == {batch_size}
    places = [position for step in steps for position in step]
    for number in range(4):
        assert sorted(places[30 * number : 30 * number + 30]) == [(number, sample) for sample in range(30)]


def test_one_sample_and_two_sources_of_one_sample_by_hand() -> None:
    assert mixture([1]).between(0, 4) == [(0, 0), (1, 0), (2, 0), (3, 0)]
    mixed = mixture([1], [1], weights=[1, 2])
    for number in range(5):
        assert sorted(epoch(mixed, number)) == [(number, 0), (2 * number, 1), (2 * number + 1, 1)]


def test_the_order_is_a_function_of_seed_and_place_whatever_was_asked_before(small_blocks: int) -> None:
    sources, weights = (UNEVEN, (5, 5)), [1.0, 0.7]
    whole = mixture(*sources, weights=weights).between(0, 400)
    used = mixture(*sources, weights=weights)
    np.random.default_rng(0).random(10)
    for start in np.random.default_rng(1).permutation(390).tolist():
        assert used.between(start, start + 10) == whole[start : start + 10]
    assert mixture(*sources, weights=weights).between(377, 400) == whole[377:]
    assert mixture(*sources, weights=weights, seed=6).between(0, 400) != whole


def test_shards_come_in_another_order_in_every_pass_and_for_every_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # With blocks as large as a shard, a block is a shard, and the epoch shows in what order they come.
    monkeypatch.setattr(order_module, "BLOCK", 6)
    orders = []
    for seed in range(3):
        mixed = mixture((6,) * 20, seed=seed)
        for number in range(3):
            shards = [{sample // 6 for _, sample in block} for block in blocks(mixed, number)]
            assert {len(shard) for shard in shards} == {1}
            orders.append(tuple(shard.pop() for shard in shards))
    assert len(set(orders)) == 9
    assert all(sorted(order) == list(range(20)) for order in orders)


def test_within_a_block_any_sample_may_come_anywhere(small_blocks: int) -> None:
    # Sixteen samples in two shards, one block: over 4000 epochs each place sees each sample 250 times, give or take.
    mixed = mixture((8, 8))
    seen = Counter(place for place in enumerate([s for n in range(4000) for _, s in epoch(mixed, n)]))
    table = np.zeros((16, 16), int)
    for place, sample in seen:
        table[place % 16, sample] += 1
    # Of 225 degrees of freedom; chi² exceeds 300 with a probability of 0.0006, and the seed is fixed.
    assert ((table - 250) ** 2 / 250).sum() < 300


def rounded(weight: float, count: int) -> int:
    """Places of a source in an epoch; a small weight of a small source still gives one."""
    return max(1, round(weight * count))


MIXTURES = {
    "half of an odd number": (((7, 6),), (0.5,)),
    "two and a half": ((UNEVEN,), (2.5,)),
    "several": ((UNEVEN, (5, 6), (1,) * 9, (40,)), (1.0, 2.5, 0.01, 0.5)),
    "a large one and small ones": (((50,) * 6, (4,), (1,)), (0.2, 2.0, 7.0)),
}


@pytest.mark.parametrize(("sources", "weights"), MIXTURES.values(), ids=MIXTURES)
@pytest.mark.parametrize("block", [16, 1 << 18])
def test_every_pass_through_a_source_is_complete_before_the_next_whatever_its_weight(
    sources: tuple[tuple[int, ...], ...],
    weights: tuple[float, ...],
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(order_module, "BLOCK", block)
    mixed, num_epochs = mixture(*sources, weights=weights), 60
    epochs = [epoch(mixed, number) for number in range(num_epochs)]
    first = 0
    for sizes, weight in zip(sources, weights, strict=True):
        count = sum(sizes)
        ids, per_epoch = range(first, first + count), rounded(weight, count)
        own = [[position for position in places if position[1] in ids] for places in epochs]
        assert {len(places) for places in own} == {per_epoch}
        for number in range(num_epochs):
            # After so many places of a source, as many passes are whole as fit, and the next is begun.
            taken = Counter(position for places in own[: number + 1] for position in places)
            assert set(taken.values()) == {1}
            whole, rest = divmod((number + 1) * per_epoch, count)
            assert {position for position in taken if position[0] < whole} == {
                (view, sample) for view in range(whole) for sample in ids
            }
            assert Counter(view for view, _ in taken)[whole] == rest
            times = Counter(sample for _, sample in taken)
            assert {times[sample] for sample in ids} <= {whole, whole + 1}
        first += count
    assert {sample for places in epochs for _, sample in places} <= set(range(first))
    assert all(len(places) == mixed.epoch_size for places in epochs)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.5, 3.0, 1.3), (0.01, 1.0, 2.0)])
def test_every_block_holds_every_source_in_its_share(weights: tuple[float, ...], small_blocks: int) -> None:
    sources = ((100,) * 2, UNEVEN, (3,) * 5)
    mixed = mixture(*sources, weights=weights)
    source_of = np.repeat([0, 1, 2], [200, 30, 15])
    shares = [rounded(weight, sum(sizes)) / mixed.num_blocks for sizes, weight in zip(sources, weights, strict=True)]
    assert mixed.num_blocks == math.ceil(sum(shares) * mixed.num_blocks / small_blocks) > 2
    for number in range(5):
        for block in blocks(mixed, number):
            counts = Counter(source_of[sample] for _, sample in block)
            for source, share in enumerate(shares):
                assert abs(counts[source] - share) < 1


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 8 but data\.path holds only 7 pairs"):
        batches((7,))
    with pytest.raises(ValueError, match=r"batch_size is 8 but data\.path holds only 7 pairs"):
        batches((3,), (4,), weights=[10, 10])
    assert len(batches((8,))) == 12


def test_a_billion_samples_in_a_hundred_thousand_shards_are_planned_in_less_than_200_megabytes() -> None:
    num_samples, batch_size = 10**9, 4096
    steps_per_epoch = num_samples // batch_size
    tracemalloc.start()
    try:
        mixed = mixture(np.full(100_000, 10_000))  # type: ignore[arg-type]
        taken = [
            next(iter(BatchOrder(mixed, batch_size, range(step, step + 1), 3, 8)))
            for step in (0, steps_per_epoch // 2, steps_per_epoch - 1)
        ]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 200e6
    assert [len(batch) for batch in taken] == [512] * 3
    positions = [position for batch in taken for position in batch]
    assert {view for view, _ in positions} == {0}
    ids = {sample for _, sample in positions}
    assert len(ids) == 3 * 512
    assert 0 <= min(ids) <= max(ids) < num_samples
    # A block of 2^18 samples holds 27 to 28 shards; 512 of its samples miss none of the whole ones.
    for batch in taken:
        assert 26 <= len({sample // 10_000 for _, sample in batch}) <= 29
