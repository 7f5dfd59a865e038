"""Which pairs a step sees: a function of the seed and the step alone."""

from collections import Counter
from typing import Any

import numpy as np
import pytest

from clipkd.data.loader import BatchOrder, epoch_order

Positions = list[list[tuple[int, int]]]


def batches(num_samples: int, **changes: Any) -> Positions:
    options = {"batch_size": 8, "seed": 5, "start": 0, "stop": 12, "rank": 0, "world_size": 1}
    return list(BatchOrder(num_samples, **(options | changes)))


def test_an_epoch_is_a_permutation_that_seed_and_epoch_determine() -> None:
    orders = {(seed, epoch): tuple(epoch_order(seed, epoch, 50)) for seed in range(3) for epoch in range(3)}
    assert all(sorted(order) == list(range(50)) for order in orders.values())
    assert len(set(orders.values())) == 9
    np.random.default_rng(0).random(10)
    assert orders[1, 2] == tuple(epoch_order(1, 2, 50))


def test_every_sample_comes_at_most_once_per_epoch_and_the_remainder_is_left_out() -> None:
    # 30 samples in batches of 8: three steps per epoch, six samples left out of each.
    steps = batches(30, stop=30)
    assert len(steps) == 30
    for epoch in range(10):
        positions = [position for step in steps[3 * epoch : 3 * epoch + 3] for position in step]
        assert {e for e, _ in positions} == {epoch}
        indices = [index for _, index in positions]
        assert len(indices) == len(set(indices)) == 24
        assert set(indices) <= set(range(30))
    # Another remainder each time: nobody is left out for ever.
    assert len(Counter(index for step in steps for _, index in step)) == 30


def test_an_epoch_that_divides_holds_every_sample_once() -> None:
    indices = [index for step in batches(24, stop=3) for _, index in step]
    assert sorted(indices) == list(range(24))


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_any_number_of_processes_sees_the_same_global_batches(world_size: int) -> None:
    shares = [batches(30, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert all(len(batch) == 8 // world_size for share in shares for batch in share)
    joined = [[position for part in parts for position in part] for parts in zip(*shares, strict=True)]
    assert joined == batches(30)


@pytest.mark.parametrize("start", [1, 3, 4, 11, 12])
def test_starting_at_a_step_gives_the_tail_of_the_whole_run(start: int) -> None:
    assert batches(30, start=start) == batches(30)[start:]
    assert len(BatchOrder(30, batch_size=8, seed=5, start=start, stop=12, rank=0, world_size=1)) == 12 - start


def test_another_seed_gives_another_order() -> None:
    assert batches(30, seed=6) != batches(30)
    assert batches(30, seed=5) == batches(30)


def test_indices_are_plain_integers() -> None:
    assert {type(index) for step in batches(30) for _, index in step} == {int}


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size is 8 but data\.path holds only 7 pairs"):
        batches(7)
    assert len(batches(8)) == 12


def test_a_batch_that_processes_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size 8 .* 3 processes"):
        batches(30, world_size=3)
