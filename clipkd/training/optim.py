"""AdamW's parameter groups and the learning rate as a function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Rate of step 0, 1, …: linear from peak/warmup_steps to peak, then half a cosine that would reach 0 at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float, logit_scale_lr: float
) -> list[dict]:
    """Matrices decay; vectors, biases and scales do not. `lr_factor` multiplies the rate of a group."""
    decayed, plain, scales = [], [], []
    for name, parameter in parameters:
        if not parameter.requires_grad:
            continue
        if name.endswith(("logit_scale", "logit_bias")):
            scales.append(parameter)
        else:
            (decayed if parameter.ndim >= 2 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay, "lr_factor": 1.0},
        {"params": plain, "weight_decay": 0.0, "lr_factor": 1.0},
        {"params": scales, "weight_decay": 0.0, "lr_factor": logit_scale_lr},
    ]
    return [group for group in groups if group["params"]]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
