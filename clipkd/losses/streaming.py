"""The same numbers without the matrices: a panel of queries at a time, made again when its gradient is wanted.

What a loss makes of a query depends on no other query, so a panel of queries against all keys is complete in itself, the
plain formulas serve, and nothing has to be merged. Memory is O(B·d + tile²) for B queries of width d.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P")

TILE_SIZE = 2048
"""Square root of the largest number of logits that are formed at once: 16 MB per matrix in float32."""


def panel_height(num_columns: int, *, tile_size: int | None = None) -> int:
    """Rows of num_columns logits that make at most tile_size² of them, at least one.

    Raises: ValueError for a tile_size below 1.
    """
    tile_size = TILE_SIZE if tile_size is None else tile_size
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; it must be 1 or more")
    return max(1, tile_size**2 // max(1, num_columns))


def in_panels(
    compute: Callable[[P], Mapping[str, Float[Tensor, "*ways rows"]]], panels: Sequence[P]
) -> dict[str, Float[Tensor, "*ways b"]]:
    """What compute makes of every panel, put together.

    A panel's intermediate values are forgotten and computed again for its gradient; so compute must be a function of the
    panel alone, without collectives. A single panel is computed as it is.
    """
    if len(panels) == 1:
        return dict(compute(panels[0]))
    found = [checkpoint(compute, panel, use_reentrant=False, preserve_rng_state=False) for panel in panels]
    return {name: torch.cat([each[name] for each in found], dim=-1) for name in found[0]}  # type: ignore[index, union-attr]


@functools.cache
def compile_tile(function: F) -> F:
    """A function of logits whose elementwise work torch.compile fuses: each logit is read a few times, not dozens.

    The first calls compile, for seconds to a minute each.
    """
    return torch.compile(function, dynamic=True)  # type: ignore[return-value]
