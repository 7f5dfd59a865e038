"""The same numbers without the matrices: a panel of rows at a time, made again when its gradient is wanted.

Every statistic of the GKL family belongs to one query, so a panel of queries against all keys is complete in itself: the
plain formulas serve, and nothing has to be merged. Memory is O(B·d + tile²) for B queries of width d.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from clipkd.losses.contrastive import info_nce
from clipkd.losses.gkl import RowStatistics, row_statistics

F = TypeVar("F", bound=Callable[..., Any])

TILE_SIZE = 2048
"""Square root of the largest number of logits that are formed at once: 16 MB per matrix in float32."""


class Queue(NamedTuple):
    """Further keys, from earlier batches: the filled slices of four aligned rings. No gradient reaches them."""

    image: Float[Tensor, "q d"]
    text: Float[Tensor, "q d"]
    teacher_image: Float[Tensor, "q t"]
    teacher_text: Float[Tensor, "q t"]


@dataclass(frozen=True)
class QueryStatistics(RowStatistics):
    """What one direction's queries give: GKL's statistics, and the contrastive loss."""

    info_nce: Float[Tensor, "b"]
    """−log softmax(student)[own pair], nats, at temperature 1."""


@dataclass(frozen=True)
class SimilarityStatistics:
    """Of both directions."""

    image_to_text: QueryStatistics
    text_to_image: QueryStatistics


def similarity_statistics(
    image: Float[Tensor, "b d"],
    text: Float[Tensor, "b d"],
    teacher_image: Float[Tensor, "b t"],
    teacher_text: Float[Tensor, "b t"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    teacher_logit_scale: Float[Tensor, ""] | float,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    queue: Queue | None = None,
    tile_size: int | None = None,
    compiled: bool = False,
) -> SimilarityStatistics:
    """Per-query statistics of a batch of pairs whose logits are never formed whole; gradients included.

    Features are unit-norm, a pair a row, and width t of the teacher's is free. The student's logits are
    logit_scale · image @ textᵀ (and its transpose), the teacher's likewise; `queue` adds columns to both. Other
    arguments and what carries a gradient are as in `row_statistics`. At most tile_size² logits are formed at once
    (TILE_SIZE² by default), in the forward pass and in the backward pass, which computes them again. compiled: see
    `compile_tile`.

    Raises: ValueError as `row_statistics`, for rows that do not pair up, and for a tile_size below 1.
    """
    if not len(image) == len(text) == len(teacher_image) == len(teacher_text):
        counts = [len(each) for each in (image, text, teacher_image, teacher_text)]
        raise ValueError(f"images, texts and the teacher's have {counts} rows; each needs one per pair")
    keys = (image, text, teacher_image, teacher_text)
    if queue is not None:
        keys = tuple(torch.cat([own, old.detach().to(own)]) for own, old in zip(keys, queue, strict=True))
    key_image, key_text, key_teacher_image, key_teacher_text = keys
    statistics = compile_tile(row_statistics) if compiled else row_statistics
    contrast = compile_tile(info_nce) if compiled else info_nce

    def direction(
        queries: Tensor, columns: Tensor, teacher_queries: Tensor, teacher_columns: Tensor
    ) -> QueryStatistics:
        def of(rows: slice) -> dict[str, Tensor]:
            student = logit_scale * queries[rows] @ columns.T
            teacher = teacher_logit_scale * teacher_queries[rows] @ teacher_columns.T
            found = statistics(
                student, teacher, temperature=temperature, weight_temperature=weight_temperature, gamma=gamma
            )
            own = torch.arange(rows.start, rows.stop, device=student.device)
            return {**vars(found), "info_nce": contrast(student, own, reduction="none")}

        height = panel_height(len(columns), tile_size=tile_size)
        return QueryStatistics(**in_panels(of, len(queries), height=height))

    return SimilarityStatistics(
        direction(image, key_text, teacher_image, key_teacher_text),
        direction(text, key_image, teacher_text, key_teacher_image),
    )


def panel_height(num_columns: int, *, tile_size: int | None = None) -> int:
    """Rows of num_columns logits that make at most tile_size² of them, at least one.

    Raises: ValueError for a tile_size below 1.
    """
    tile_size = TILE_SIZE if tile_size is None else tile_size
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; it must be 1 or more")
    return max(1, tile_size**2 // max(1, num_columns))


def in_panels(
    compute: Callable[[slice], Mapping[str, Float[Tensor, "*ways rows"]]], num_rows: int, *, height: int
) -> dict[str, Float[Tensor, "*ways b"]]:
    """compute(all rows), put together from panels of at most `height` rows.

    What a panel computes is forgotten and computed again for its gradient; so compute must be a function of its rows
    alone, without collectives. One panel is computed as it is.
    """
    if height >= num_rows:
        return dict(compute(slice(0, num_rows)))
    panels = [
        checkpoint(compute, slice(start, min(start + height, num_rows)), use_reentrant=False, preserve_rng_state=False)
        for start in range(0, num_rows, height)
    ]
    return {name: torch.cat([panel[name] for panel in panels], dim=-1) for name in panels[0]}  # type: ignore[index, union-attr]


@functools.cache
def compile_tile(function: F) -> F:
    """A function of logits whose elementwise work torch.compile fuses: each logit is read a few times, not dozens.

    Every new number of rows or columns may take seconds to compile, the first time any.
    """
    return torch.compile(function)  # type: ignore[return-value]
