"""What training remembers: the moving average, the queue against a deque, the running class prior against loops."""

import random
from collections import deque

import pytest
import torch
from torch import Tensor, nn

from clipkd.objective.memory import ClassPrior, FeatureQueue, MovingAverage

CPU = torch.device("cpu")
WIDTHS = {"image": 3, "text": 2}
Entry = tuple[float, ...]


# The moving average


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def test_the_average_starts_as_a_frozen_copy() -> None:
    model = student()
    average = MovingAverage(model, 0.9).model
    for mean, current in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(mean, current)
        assert mean.data_ptr() != current.data_ptr()
    assert (average.training, model.training) == (False, True)
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_one_update_by_hand_over_parameters_and_buffers() -> None:
    model = student()
    moving = MovingAverage(model, 0.9)
    average = moving.model
    for each, value in ((average, 10.0), (model, 20.0)):
        for tensor in each.state_dict().values():
            tensor.fill_(value)
    moving.update()
    assert average[0].weight.unique().tolist() == pytest.approx([11.0])
    assert average[1].running_var.unique().tolist() == pytest.approx([11.0])
    assert average[1].num_batches_tracked.item() == 20  # integers are copied
    assert model[0].weight.unique().tolist() == [20.0]
    assert all(tensor.grad_fn is None for tensor in average.parameters())
    moving.momentum = 1.0
    moving.update()
    assert average[0].weight.unique().tolist() == pytest.approx([11.0])
    moving.momentum = 0.0
    moving.update()
    assert average[0].weight.unique().tolist() == [20.0]


# The queue


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
    assert {name: tuple(queue.filled(name).shape) for name in WIDTHS} == {"image": (0, 3), "text": (0, 2)}
    pushed, larger = 0, 0
    while pushed < 12 * capacity or not larger:
        size = sizes.choice([0, 1, 2, 3, 5, capacity, capacity + 1, 2 * capacity + 3])
        ids, features = batch(range(pushed, pushed + size))
        queue.push(ids, features)
        oracle.extend(entries(ids, features))
        assert len(queue) == len(oracle)
        assert sorted(held(queue)) == sorted(oracle)
        pushed, larger = pushed + size, larger + (size > capacity)


def test_half_precision_features_are_kept_in_float32_without_their_graph() -> None:
    queue = FeatureQueue(2, {"image": 2}, device=CPU)
    leaf = torch.tensor([[0.1, 0.2]], dtype=torch.bfloat16, requires_grad=True)
    queue.push(torch.tensor([1]), {"image": 2 * leaf})
    kept = queue.filled("image")
    assert kept.tolist() == (2 * leaf).float().tolist()
    assert kept.dtype == torch.float32
    assert not any(tensor.requires_grad for tensor in queue.tensors().values())


@pytest.mark.parametrize(("capacity", "widths"), [(4, WIDTHS), (5, {"image": 3}), (5, {"image": 3, "text": 4})])
def test_a_queue_of_another_capacity_or_other_rings_is_refused(capacity: int, widths: dict[str, int]) -> None:
    queue = FeatureQueue(5, WIDTHS, device=CPU)
    queue.push(*batch(range(3)))
    before = held(queue)
    with pytest.raises(ValueError, match=r"stored queue holds .*'image'"):
        queue.load(FeatureQueue(capacity, widths, device=CPU).tensors())
    assert held(queue) == before


@pytest.mark.usefixtures("unchecked_shapes")
@pytest.mark.parametrize("shapes", [{"image": (2, 3)}, {"image": (2, 3), "text": (1, 2)}], ids=["missing", "few rows"])
def test_a_batch_that_does_not_fit_every_ring_is_refused_and_nothing_is_pushed(shapes: dict[str, tuple]) -> None:
    queue = FeatureQueue(5, WIDTHS, device=CPU)
    with pytest.raises(ValueError, match=r"\['image', 'text'\] was given .* for 2 ids"):
        queue.push(torch.tensor([1, 2]), {name: torch.zeros(shape) for name, shape in shapes.items()})
    assert len(queue) == 0
    with pytest.raises(ValueError, match="capacity is 0"):
        FeatureQueue(0, WIDTHS, device=CPU)


# The class prior


def test_class_prior_of_two_classes_by_hand() -> None:
    prior = ClassPrior(2, device=CPU)
    assert prior.rows(torch.tensor([0, 1])).tolist() == [[0.5, 0.5], [0.5, 0.5]]
    prior.update(torch.tensor([1, -1, 1]), torch.tensor([[0.25, 0.75], [0.9, 0.1], [0.75, 0.25]]))
    prior.update(torch.tensor([1]), torch.tensor([[0.125, 0.875]]))
    # (1/4 + 3/4 + 1/8) / 3 for class 1; class 0 was not seen
    assert prior.rows(torch.tensor([0, 1, 0])).tolist() == [[0.5, 0.5], [0.375, 0.625], [0.5, 0.5]]
    rows = prior.rows(torch.tensor([-1, 1]))  # unlabelled: a row that means nothing
    assert rows[1].tolist() == [0.375, 0.625]
    assert rows.isfinite().all()


def test_class_prior_of_many_samples_still_grows() -> None:
    prior = ClassPrior(2, device=CPU)
    many = 2.0**25  # in float32, adding 1 changes nothing
    prior.load({"sums": torch.tensor([[many, 0], [0, 0]]), "counts": torch.tensor([many, 0])})
    prior.update(torch.tensor([0]), torch.tensor([[0.75, 0.25]]))
    assert prior.tensors()["counts"].tolist() == [many + 1, 0]
    assert prior.tensors()["sums"].tolist() == [[many + 0.75, 0.25], [0, 0]]


def test_a_class_prior_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="not one of 4 classes"):
        ClassPrior(4, device=CPU).load(ClassPrior(5, device=CPU).tensors())
