"""The queue of features against a deque, and the running class prior against loops."""

import random
from collections import deque

import pytest
import torch
from torch import Tensor

from clipkd.objective.memory import ClassPrior, FeatureQueue

CPU = torch.device("cpu")
WIDTHS = {"image": 3, "text": 2}
Entry = tuple[float, ...]


def batch(numbers: range) -> tuple[Tensor, dict[str, Tensor]]:
    """Pairs whose every feature tells its number, so that a mixed-up ring shows."""
    ids = 7 * torch.tensor(list(numbers), dtype=torch.int64)
    image = ids[:, None] + torch.tensor([0.0, 0.25, 0.5])
    return ids, {"image": image, "text": -1 - image[:, :2]}


def entries(ids: Tensor, features: dict[str, Tensor]) -> list[Entry]:
    return [tuple(row) for row in torch.cat([ids[:, None], features["image"], features["text"]], dim=1).tolist()]


def held(queue: FeatureQueue) -> list[Entry]:
    """Id and features of every ring, slot by slot."""
    return entries(queue.filled_ids(), {name: queue.filled(name) for name in WIDTHS})


@pytest.mark.parametrize("capacity", [1, 4, 7, 32])
def test_the_queue_holds_what_a_deque_holds_after_any_pushes(capacity: int) -> None:
    sizes = random.Random(capacity)
    queue, oracle = FeatureQueue(capacity, WIDTHS, device=CPU), deque[Entry](maxlen=capacity)
    pushed, larger = 0, 0
    while pushed < 12 * capacity or not larger:
        size = sizes.choice([0, 1, 2, 3, 5, capacity, capacity + 1, 2 * capacity + 3])
        ids, features = batch(range(pushed, pushed + size))
        queue.push(ids, features)
        oracle.extend(entries(ids, features))
        assert len(queue) == len(oracle)
        assert sorted(held(queue)) == sorted(oracle)
        pushed, larger = pushed + size, larger + (size > capacity)


def test_three_slots_by_hand() -> None:
    queue = FeatureQueue(3, {"image": 2}, device=CPU)
    queue.push(torch.tensor([5, 6]), {"image": torch.tensor([[1.0, 2.0], [3.0, 4.0]])})
    assert queue.filled_ids().tolist() == [5, 6]
    assert queue.filled("image").tolist() == [[1.0, 2.0], [3.0, 4.0]]
    queue.push(torch.tensor([7, 8]), {"image": torch.tensor([[5.0, 6.0], [7.0, 8.0]])})
    rows = dict(zip(queue.filled_ids().tolist(), queue.filled("image").tolist(), strict=True))
    assert rows == {6: [3.0, 4.0], 7: [5.0, 6.0], 8: [7.0, 8.0]}


def test_a_batch_larger_than_the_ring_leaves_its_last_pairs() -> None:
    queue = FeatureQueue(4, WIDTHS, device=CPU)
    queue.push(*batch(range(3)))
    queue.push(*batch(range(100, 111)))
    assert sorted(queue.filled_ids().tolist()) == [749, 756, 763, 770]
    assert sorted(held(queue)) == entries(*batch(range(107, 111)))


def test_an_empty_queue_gives_no_rows_of_the_right_width() -> None:
    queue = FeatureQueue(5, WIDTHS, device=CPU)
    assert len(queue) == 0
    assert queue.filled_ids().shape == (0,)
    assert {name: tuple(queue.filled(name).shape) for name in WIDTHS} == {"image": (0, 3), "text": (0, 2)}


def test_half_precision_features_are_kept_in_float32_without_their_graph() -> None:
    queue = FeatureQueue(2, {"image": 2}, device=CPU)
    leaf = torch.tensor([[0.1, 0.2]], dtype=torch.bfloat16, requires_grad=True)
    queue.push(torch.tensor([1]), {"image": 2 * leaf})
    kept = queue.filled("image")
    assert kept.tolist() == (2 * leaf).float().tolist()
    assert kept.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in queue.tensors().values())


def test_a_loaded_queue_goes_on_bit_for_bit_and_leaves_the_checkpoint_as_it_was() -> None:
    queue, loaded = FeatureQueue(5, WIDTHS, device=CPU), FeatureQueue(5, WIDTHS, device=CPU)
    queue.push(*batch(range(7)))
    saved = {name: tensor.clone() for name, tensor in queue.tensors().items()}
    stored = {name: tensor.clone() for name, tensor in saved.items()}
    loaded.push(*batch(range(50, 53)))
    loaded.load(stored)
    assert held(loaded) == held(queue)
    for numbers in (range(7, 10), range(10, 21), range(21, 22)):
        queue.push(*batch(numbers))
        loaded.push(*batch(numbers))
        assert held(loaded) == held(queue)
        assert loaded.tensors().keys() == queue.tensors().keys()
        for name, tensor in queue.tensors().items():
            assert torch.equal(loaded.tensors()[name], tensor), name
    assert all(torch.equal(stored[name], tensor) for name, tensor in saved.items())


@pytest.mark.parametrize(("capacity", "widths"), [(4, WIDTHS), (5, {"image": 3}), (5, {"image": 3, "text": 4})])
def test_a_queue_of_another_capacity_or_other_rings_is_refused(capacity: int, widths: dict[str, int]) -> None:
    queue = FeatureQueue(5, WIDTHS, device=CPU)
    queue.push(*batch(range(3)))
    before = held(queue)
    with pytest.raises(ValueError, match=r"stored queue holds .*'image'"):
        queue.load(FeatureQueue(capacity, widths, device=CPU).tensors())
    assert held(queue) == before


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize(
    "shapes",
    [{"image": (2, 3)}, {"image": (2, 3), "text": (2, 2), "audio": (2, 2)}, {"image": (2, 3), "text": (1, 2)}],
    ids=["missing", "unknown", "too few rows"],
)
def test_a_batch_that_does_not_fit_every_ring_is_refused_and_nothing_is_pushed(shapes: dict[str, tuple]) -> None:
    queue = FeatureQueue(5, WIDTHS, device=CPU)
    with pytest.raises(ValueError, match=r"\['image', 'text'\] was given .* for 2 ids"):
        queue.push(torch.tensor([1, 2]), {name: torch.zeros(shape) for name, shape in shapes.items()})
    assert len(queue) == 0


@pytest.mark.parametrize("capacity", [0, -1])
def test_a_queue_without_a_slot_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity is {capacity}"):
        FeatureQueue(capacity, WIDTHS, device=CPU)


def test_class_prior_of_two_classes_by_hand() -> None:
    prior = ClassPrior(2, device=CPU)
    assert prior.rows(torch.tensor([0, 1])).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    prior.update(torch.tensor([1, -1, 1]), torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.75, 0.25]]))
    prior.update(torch.tensor([1]), torch.tensor([[0.125, 0.875]]))
    # (1/4 + 3/4 + 1/8) / 3 for class 1; class 0 was not seen
    assert prior.rows(torch.tensor([0, 1, 0])).tolist() == [[0.5, 0.5], [0.375, 0.625], [0.5, 0.5]]


def test_class_prior_equals_a_mean_per_class_by_loops() -> None:
    generator = torch.Generator().manual_seed(1)
    prior, seen = ClassPrior(5, device=CPU), {label: [] for label in range(-1, 5)}
    for size in (1, 6, 0, 9, 4):
        labels = torch.randint(-1, 4, (size,), generator=generator)  # class 4 never
        probabilities = torch.randn(size, 5, generator=generator).softmax(dim=1)
        prior.update(labels, probabilities)
        for label, row in zip(labels.tolist(), probabilities.tolist(), strict=True):
            seen[label].append(row)
        for label, row in enumerate(prior.rows(torch.arange(5)).tolist()):
            rows = seen[label] or [[0.2] * 5]
            means = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
            assert row == pytest.approx(means, rel=1e-6)
    assert all(len(seen[label]) > 1 for label in range(-1, 4))


def test_unlabelled_samples_add_nothing_and_ask_for_no_row_out_of_range() -> None:
    prior = ClassPrior(3, device=CPU)
    prior.update(torch.tensor([0, 2]), torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75]]))
    before = {name: tensor.clone() for name, tensor in prior.tensors().items()}
    prior.update(torch.tensor([-1, -1]), torch.full((2, 3), 1 / 3))
    assert all(torch.equal(before[name], tensor) for name, tensor in prior.tensors().items())
    rows = prior.rows(torch.tensor([-1, 2, -1]))
    assert rows[1].tolist() == [0.125, 0.125, 0.75]
    assert rows.isfinite().all()


def test_class_prior_of_many_samples_still_grows() -> None:
    prior = ClassPrior(2, device=CPU)
    many = 2.0**25  # in float32, adding 1 changes nothing
    prior.load({"sums": torch.tensor([[many, 0], [0, 0]]), "counts": torch.tensor([many, 0])})
    prior.update(torch.tensor([0]), torch.tensor([[0.75, 0.25]]))
    assert prior.tensors()["counts"].tolist() == [many + 1, 0]
    assert prior.tensors()["sums"].tolist() == [[many + 0.75, 0.25], [0, 0]]


def test_a_loaded_class_prior_goes_on_bit_for_bit_and_keeps_no_graph() -> None:
    generator = torch.Generator().manual_seed(2)
    prior, loaded = ClassPrior(4, device=CPU), ClassPrior(4, device=CPU)
    labels = torch.tensor([3, 0, 3])
    prior.update(labels, torch.randn(3, 4, generator=generator).softmax(dim=1).requires_grad_())
    loaded.load({name: tensor.clone() for name, tensor in prior.tensors().items()})
    for _ in range(2):
        probabilities = torch.randn(3, 4, generator=generator).softmax(dim=1)
        prior.update(labels, probabilities)
        loaded.update(labels, probabilities)
    assert torch.equal(loaded.rows(torch.arange(4)), prior.rows(torch.arange(4)))
    for name, tensor in prior.tensors().items():
        assert torch.equal(loaded.tensors()[name], tensor), name
        assert not tensor.requires_grad


def test_a_class_prior_of_another_number_of_classes_is_refused() -> None:
    prior = ClassPrior(4, device=CPU)
    with pytest.raises(ValueError, match="not one of 4 classes"):
        prior.load(ClassPrior(5, device=CPU).tensors())
    with pytest.raises(ValueError, match="not one of 4 classes"):
        prior.load({"sums": torch.zeros(4, 4)})
