"""Micro-batches whose loss sees the complete batch: the same gradient, with fewer activations."""

import pytest
import torch
from torch import Tensor, nn

from clipkd.models.cost import count_saved
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.training import grad_cache
from clipkd.views import View
from tests.objective.tiny_clip import OBJECTIVES, make_batch, make_distiller, needs, steps

DOUBLE = torch.float64


def take(distiller: Distiller, view: View, targets: Targets, micro_batches: int) -> tuple[Tensor, dict[str, Tensor]]:
    loss, _ = grad_cache.backward(
        distiller, view, targets, step=0, micro_batches=micro_batches, reseed=torch.manual_seed
    )
    return loss, gradients(distiller)


def gradients(distiller: Distiller) -> dict[str, Tensor]:
    return {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batches", [3, 8])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_micro_batches_give_the_series_gradients_and_memory_of_the_whole_batch(name: str, micro_batches: int) -> None:
    """Over three optimizer steps; 3 does not divide the 8 pairs, and a part of the class prompts is empty with 8."""
    whole, parts = (steps(name, DOUBLE, micro_batches=parts) for parts in (1, micro_batches))
    assert parts.keys() == whole.keys()
    for key, expected in whole.items():
        error = (parts[key] - expected).double().norm().item()
        assert error <= 1e-12 * max(expected.double().norm().item(), 1e-1), f"{key}: {error}"


def with_layer(layer: nn.Module) -> Distiller:
    """A student whose image tower has one layer more."""
    distiller = make_distiller(OBJECTIVES["teacher keys"], dtype=DOUBLE)
    visual = distiller.student.model.visual
    assert isinstance(visual, nn.Sequential)
    visual.insert(2, layer.to(DOUBLE))
    return distiller


def one_batch() -> tuple[View, Targets]:
    view, targets = make_batch(dtype=DOUBLE)
    return view, needs("teacher keys", targets)


def test_batchnorm_counts_each_micro_batch_once() -> None:
    distiller, (view, targets) = with_layer(nn.BatchNorm1d(8)), one_batch()
    take(distiller, view, targets, 4)
    found = {name: buffer.clone() for name, buffer in distiller.named_buffers()}
    again = with_layer(nn.BatchNorm1d(8))
    for part in view.split(4):
        again(part)
    expected = dict(again.named_buffers())
    assert len(expected) == 3
    torch.testing.assert_close(found, expected)


def test_a_micro_batch_s_activations_are_gone_before_the_next() -> None:
    class Wide(nn.Module):
        """Keeps 4096 numbers per unit."""

        def forward(self, units: Tensor) -> Tensor:
            return units[:, :, None].expand(-1, -1, 4096).tanh().mean(dim=-1)

    peaks = []
    for micro_batches in (1, 8):
        distiller = with_layer(Wide())
        view, targets = one_batch()
        with count_saved() as saved:
            take(distiller, view, targets, micro_batches)
        assert saved.now == 0
        peaks.append(saved.peak)
    assert peaks[1] < peaks[0] / 4


def test_gradients_are_added_to_those_that_are_there_and_a_frozen_scale_gets_none() -> None:
    distiller, (view, targets) = make_distiller(OBJECTIVES["features alone"], dtype=DOUBLE), one_batch()
    _, found = take(distiller, view, targets, 2)
    once = {name: gradient.clone() for name, gradient in found.items()}
    assert "student.model.logit_scale" not in once
    assert {"image_projection.weight", "student.model.visual.1.weight"} <= once.keys()
    _, twice = take(distiller, view, targets, 2)
    torch.testing.assert_close(twice, {name: 2 * gradient for name, gradient in once.items()})
