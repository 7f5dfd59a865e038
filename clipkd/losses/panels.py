"""Memory-linear losses: process some queries at a time and recompute each panel of logits in the backward pass.

The loss of a query depends on no other query, so nothing has to be merged. Memory is O(B·d + tile²) for B queries of
width d.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

F = TypeVar("F", bound=Callable[..., Any])

TILE_SIZE, LARGEST_TILE_SIZE = 2048, 8192
"""Square root of the largest number of logits that are formed at once: 16 MB per matrix in float32, and 268 MB."""


@functools.cache
def default_tile_size(device: torch.device) -> int:
    """TILE_SIZE on a CPU. On a GPU, where small panels take longer to launch than to compute, a power of two whose matrix
    takes at most 1/200 of the memory: 4,096 from 14 GB, 8,192 from 54 GB."""
    if device.type != "cuda":
        return TILE_SIZE
    side = math.sqrt(torch.cuda.get_device_properties(device).total_memory / (200 * 4))
    return min(max(TILE_SIZE, 2 ** int(math.log2(side))), LARGEST_TILE_SIZE)


def panel_height(num_columns: int, device: torch.device, tile_size: int | None = None) -> int:
    """Rows of num_columns logits that make at most tile_size² of them (by default what suits the device), at least one.

    Raises: ValueError for a tile_size below 1.
    """
    tile_size = default_tile_size(device) if tile_size is None else tile_size
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; it must be 1 or more")
    return max(1, tile_size**2 // max(1, num_columns))


def in_panels(
    compute: Callable[..., Mapping[str, Float[Tensor, "*ways rows"]]], rows: Sequence[Tensor], *, height: int
) -> dict[str, Float[Tensor, "*ways b"]]:
    """Apply compute to `height` rows of all tensors at a time and concatenate the results along their last axis.

    The backward pass calls compute again, so it must be a pure function without collectives. One panel is not recomputed.
    """
    if len(rows[0]) <= height:
        return dict(compute(*rows))
    panels = zip(*(each.split(height) for each in rows), strict=True)
    found = [checkpoint(compute, *panel, use_reentrant=False, preserve_rng_state=False) for panel in panels]
    return {name: torch.cat([each[name] for each in found], dim=-1) for name in found[0]}  # type: ignore[index, union-attr]


@functools.cache
def compile_tile(function: F) -> F:
    """Fuse the elementwise work of a function of logits with torch.compile, so that each logit is read a few times.

    The first calls compile, for seconds to a minute each.
    """
    return torch.compile(function, dynamic=True)  # type: ignore[return-value]
