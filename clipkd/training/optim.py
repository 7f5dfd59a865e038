"""AdamW's parameter groups and the learning rate as a function of the step."""

import math
import re
from collections.abc import Container, Iterable

import torch
from torch import nn

STUDENT = "student.model."
BLOCK = re.compile(r"(?:resblocks|blocks|layers?|stages)\.(\d+)\.")
BEFORE_BLOCKS = re.compile(r"embed|stem|conv1|bn1\b|ln_pre")


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
    layer_decay: float = 1.0,
) -> list[dict]:
    """Groups of equal weight decay, which matrices have, and equal `lr_factor`, a multiple of the learning rate.

    loaded: parameters of the student's model that started from weights; layer_decay is theirs, fresh_lr the others'.
    """
    trained = [(name, parameter) for name, parameter in parameters if parameter.requires_grad]
    depths = block_depths(name.removeprefix(STUDENT) for name, _ in trained)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained:
        own = name.removeprefix(STUDENT)
        if name.endswith(("logit_scale", "logit_bias")):
            factor = logit_scale_lr
        else:
            factor = layer_decay ** depths[own] if own in loaded else fresh_lr
        groups.setdefault((weight_decay if parameter.ndim >= 2 else 0.0, factor), []).append(parameter)
    return [
        {"params": groups[key], "weight_decay": key[0], "lr_factor": key[1]}
        for key in sorted(groups, key=lambda key: (-key[0], key[1]))
    ]


def block_depths(names: Iterable[str]) -> dict[str, int]:
    """Parameter → blocks of its tower from there to the top: 0 behind the last block, all of them and 1 before the first."""
    names = list(names)
    blocks = {name: int(found[1]) for name in names if (found := BLOCK.search(name))}

    def top(name: str) -> int:
        """Blocks of its tower."""
        return 1 + max((n for other, n in blocks.items() if is_visual(other) == is_visual(name)), default=-1)

    return {name: top(name) - blocks.get(name, -1 if BEFORE_BLOCKS.search(name) else top(name)) for name in names}


def is_visual(name: str) -> bool:
    return name.startswith("visual.")


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_factor"]
