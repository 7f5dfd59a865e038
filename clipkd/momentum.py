"""Exponential moving average of a model."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def copy_for_average(model: M) -> M:
    """A frozen copy in eval mode, where the average starts."""
    average = deepcopy(model).eval()
    average.requires_grad_(False)
    return average


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, momentum: float) -> None:
    """average ← momentum · average + (1 − momentum) · model, over parameters and buffers.

    Buffers too: a BatchNorm student's running statistics belong to the weights they were measured with. Integer
    buffers are copied.
    """
    for mean, current in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(current, 1 - momentum)
        else:
            mean.copy_(current)
