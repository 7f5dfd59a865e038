"""Hold torch.distributed's collectives to a rule of NCCL that gloo does not have: tensors must be contiguous."""

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_reduce", "all_to_all_single", "broadcast"),
    *("gather", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter"),
)


def enforce() -> None:
    """Replace the collectives of `torch.distributed` in this process by versions that check their tensors.

    They raise ValueError with NCCL's words for an input or an output that is not contiguous.
    """
    for name in COLLECTIVES:
        setattr(dist, name, checked(getattr(dist, name)))


def checked(collective: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(collective)
    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in pytree.tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if not all(tensor.is_contiguous() for tensor in tensors):
            raise ValueError(f"{collective.__name__}: Tensors must be contiguous")
        return collective(*args, **kwargs)

    return call
