"""AdamW's parameter groups and the learning rate as a function of the step."""

import math
from collections.abc import Container, Iterable

import torch
from torch import nn

STUDENT = "student.model."


def learning_rate(step: int, *, peak: float, warmup_steps: int, steps: int) -> float:
    """Rate of step 0, 1, …: linear from peak/warmup_steps to peak, then half a cosine that would reach 0 at `steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    logit_scale_lr: float,
    loaded: Container[str] = (),
    fresh_lr: float = 1.0,
) -> list[dict]:
    """Groups of equal weight decay, which matrices have, and equal `lr_factor`, a multiple of the learning rate.

    loaded: parameters of the student's model that started from weights; fresh_lr is the others'.
    """
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        if name.endswith(("logit_scale", "logit_bias")):
            factor = logit_scale_lr
        else:
            factor = 1.0 if name.removeprefix(STUDENT) in loaded else fresh_lr
        groups.setdefault((weight_decay if parameter.ndim >= 2 else 0.0, factor), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": key[0], "lr_factor": key[1]}
        for key in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
