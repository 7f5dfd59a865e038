"""The moving average of a model, parameters and buffers."""

import pytest
import torch
from torch import nn

from clipkd.objective.memory import copy_for_average, update_average


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()


def fill(model: nn.Module, value: float) -> None:
    for tensor in model.state_dict().values():
        tensor.fill_(value)


def test_the_average_starts_as_a_frozen_copy_of_its_own() -> None:
    model = student()
    average = copy_for_average(model)
    assert all(
        torch.equal(a, b) for a, b in zip(average.state_dict().values(), model.state_dict().values(), strict=True)
    )
    assert not average.training
    assert model.training
    assert not any(parameter.requires_grad for parameter in average.parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    fill(model, 5.0)
    assert not (average[0].weight == 5.0).any()


def test_one_update_by_hand() -> None:
    model = student()
    average = copy_for_average(model)
    fill(average, 10.0)
    fill(model, 20.0)
    update_average(average, model, 0.9)
    assert average[0].weight.unique().tolist() == pytest.approx([11.0])
    assert average[1].running_var.unique().tolist() == pytest.approx([11.0])
    assert model[0].weight.unique().tolist() == [20.0]


def test_after_n_steps_towards_a_constant_the_start_has_the_weight_momentum_to_the_n() -> None:
    model = student()
    average = copy_for_average(model)
    start = {name: value.clone() for name, value in average.state_dict().items()}
    for tensor in model.state_dict().values():
        tensor.copy_(torch.full_like(tensor, 3.0))
    for _ in range(17):
        update_average(average, model, 0.8)
    share = 0.8**17
    checked = 0
    for name, value in average.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, share * start[name] + (1 - share) * 3.0, rtol=1e-12, atol=1e-14, msg=name)
            checked += 1
    assert checked == 6  # weight and bias of both layers, running mean and variance


def test_a_moving_student_is_averaged_as_a_loop_over_its_history_would() -> None:
    model = student()
    average = copy_for_average(model)
    start = model[0].weight[1, 2].item()
    history = []
    for step in range(6):
        model[0].weight.data.add_(0.1 * (step + 1))
        history.append(model[0].weight[1, 2].item())
        update_average(average, model, 0.7)
    expected = 0.7**6 * start + sum(0.3 * 0.7 ** (5 - i) * value for i, value in enumerate(history))
    assert average[0].weight[1, 2].item() == pytest.approx(expected, rel=1e-13)


def test_integer_buffers_are_copied() -> None:
    model = student()
    average = copy_for_average(model)
    model[1].num_batches_tracked.fill_(41)
    update_average(average, model, 0.999)
    assert average[1].num_batches_tracked.dtype == torch.long
    assert average[1].num_batches_tracked.item() == 41


def test_momentum_0_follows_and_momentum_1_stays() -> None:
    model = student()
    average, before = copy_for_average(model), copy_for_average(model)
    model[0].weight.data.mul_(-7.3)
    update_average(average, model, 1.0)
    assert torch.equal(average[0].weight, before[0].weight)
    update_average(average, model, 0.0)
    assert torch.equal(average[0].weight, model[0].weight)


def test_no_graph_is_kept() -> None:
    model = student()
    average = copy_for_average(model)
    update_average(average, model, 0.5)
    assert all(tensor.grad_fn is None for tensor in average.parameters())


def test_another_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        update_average(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), 0.5)
