"""GKL's statistics of image-text similarities whose matrices are never formed: tiles serve both directions at once.

A tile of logits, queries × keys, says something of its rows and, where keys are queries of the other direction, of its
columns. Running sums of each query are merged tile by tile (as in a streaming softmax); the gradient is written out, so a
tile is made once more for it and nothing else is kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkd.losses.gkl import RowStatistics, require_gkl
from clipkd.losses.running_sums import Powers, finish, logarithms, merge, no_sums, running_sums, slopes
from clipkd.losses.streaming import compile_tile, panel_height


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


@runtime_checkable
class Exchange(Protocol):
    """Processes that share a batch, each with as many pairs; `clipkd.distributed` is one."""

    def world_size(self) -> int: ...
    def gather_constant(self, rows: Shaped[Tensor, "b *rest"]) -> Shaped[Tensor, "B *rest"]: ...
    def swap(self, parts: Float[Tensor, "world *rest"]) -> Float[Tensor, "world *rest"]: ...
    def sum_of_own_rows(self, rows: Float[Tensor, "B d"]) -> Float[Tensor, "b d"]: ...


class Options(NamedTuple):
    powers: Powers
    tile_size: int | None
    matmul_dtype: torch.dtype | None
    compiled: bool
    exchange: Exchange | None


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
    matmul_dtype: torch.dtype | None = None,
    compiled: bool = False,
    exchange: Exchange | None = None,
) -> SimilarityStatistics:
    """Per-query statistics of a batch of pairs, as `row_statistics` defines them, and their gradients.

    Features are unit-norm, a pair a row, and width t of the teacher's is free; the teacher's, its scale and the queue's
    are constants. The student's logits are logit_scale · image @ textᵀ (and its transpose), the teacher's likewise;
    `queue` adds columns to both. A pair's own key is its positive, all other keys are negatives: there are no ids. At most
    tile_size² logits are formed at once (TILE_SIZE² by default; never less than one row of them), in the forward pass and
    in the backward pass, which computes them again. `teacher_entropy` and `log_weight_mass` carry no gradient.

        rows = similarity_statistics(...).image_to_text
        gkl = ce_weight * rows.ce.mean()
        gkl += mse_weight * weighted_squared_error(rows.variance, row_weights(rows.log_weight_mass, "reference"))

    matmul_dtype: what matrix products round their inputs to, float16 for speed; sums and logits stay float32 at least,
    under autocast too. compiled: see `compile_tile`.

    exchange: the processes that share the batch, `clipkd.distributed`; all call this together, and run backward together.
    Only texts are gathered. Each process gets its own pairs' statistics, and the gradients of its features and its part of
    the scale's for the sum of all processes' losses: with a mean over own pairs, DDP's average makes that the global mean.

    Raises: ValueError as `row_statistics`, for shapes that do not fit, numbers of pairs that differ between processes,
    another matmul_dtype than float16 or float32, and a tile_size below 1.
    """
    require_gkl(temperature=temperature, weight_temperature=weight_temperature, gamma=gamma)
    require_shapes((image, text, teacher_image, teacher_text), queue, exchange)
    if matmul_dtype not in (None, torch.float16, torch.float32):
        raise ValueError(
            f"matmul_dtype is {matmul_dtype}; choose torch.float16 or torch.float32: others have too few digits"
        )
    dtype = torch.promote_types(image.dtype, torch.float32)
    scale = torch.as_tensor(logit_scale, dtype=dtype, device=image.device)
    teacher_scale = torch.as_tensor(teacher_logit_scale, dtype=dtype, device=image.device)
    old = () if queue is None or not len(queue.image) else queue
    constants = [each.detach().to(dtype) for each in (teacher_scale, teacher_image, teacher_text, *old)]
    options = Options(Powers(temperature, weight_temperature, gamma), tile_size, matmul_dtype, compiled, exchange)
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.to(dtype), text.to(dtype)
        found = _Statistics.apply(image, text, scale, options, *constants)
        assert isinstance(found, tuple)
        own = scale * (image * text).sum(dim=-1)
    ways = []
    for ce, entropy, variance, mass, normalizer in (found[:5], found[5:]):
        ways.append(QueryStatistics(ce, ce - entropy, entropy, variance, mass, info_nce=normalizer - own))
    return SimilarityStatistics(*ways)


def require_shapes(features: Sequence[Tensor], queue: Queue | None, exchange: Exchange | None) -> None:
    """features and queue: image, text, teacher's image and text."""
    names = Queue._fields
    for rows, where in ((features, ""), (queue or (), "queue.")):
        wrong = [
            name for name, each in zip(names, rows, strict=False) if each.ndim != 2 or not each.is_floating_point()
        ]
        if wrong:
            raise ValueError(f"{where}{wrong[0]} is no matrix of floating-point features, one pair a row")
        if len({len(each) for each in rows}) > 1:
            counts = ", ".join(f"{name} {len(each)}" for name, each in zip(names, rows, strict=True))
            raise ValueError(f"the rows of {where or 'the batch: '}{counts} differ; each needs one per pair")
    for number, name in enumerate(names):
        partner = names[number ^ 1]
        widths = [each[at].shape[1] for each in (features, queue or features) for at in (number, number ^ 1)]
        if len(set(widths)) > 1:
            raise ValueError(
                f"{name} and {partner}, of batch and queue, are {sorted(set(widths))} wide; they need one width"
            )
    if exchange is not None:
        sizes = torch.tensor([[len(features[0]), 0 if queue is None else len(queue.image)]], device=features[0].device)
        if len(set(map(tuple, everywhere := exchange.gather_constant(sizes).tolist()))) > 1:
            raise ValueError(f"the processes bring {everywhere} pairs and queued pairs; all need the same numbers")


class Block(NamedTuple):
    """Queries against keys, the student's and the teacher's."""

    queries: Float[Tensor, "n d"]
    keys: Float[Tensor, "m d"]
    teacher_queries: Float[Tensor, "n t"]
    teacher_keys: Float[Tensor, "m t"]

    def logits(self, rows: slice, scales: tuple[Tensor, Tensor], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
        """Student's and teacher's, of a panel of queries."""
        student = product(scales[0] * self.queries[rows], self.keys.T, dtype)
        return student, product(scales[1] * self.teacher_queries[rows], self.teacher_keys.T, dtype)

    def panels(self, tile_size: int | None) -> list[slice]:
        height = panel_height(len(self.keys), tile_size=tile_size)
        return [slice(start, start + height) for start in range(0, len(self.queries), height)]


def make_blocks(
    image: Tensor,
    text: Tensor,
    texts: Tensor,
    teacher_texts: Tensor,
    teacher_image: Tensor,
    teacher_text: Tensor,
    *queue: Tensor,
) -> tuple[Block, list[Block]]:
    """Images against all processes' texts, whose columns are the other direction's rows; each direction against the queue."""
    pairs = Block(image, texts, teacher_image, teacher_texts)
    if not queue:
        return pairs, []
    old_image, old_text, old_teacher_image, old_teacher_text = queue
    return pairs, [
        Block(image, old_text, teacher_image, old_teacher_text),
        Block(text, old_image, teacher_text, old_teacher_image),
    ]


def product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"], dtype: torch.dtype | None) -> Float[Tensor, "n m"]:
    """Of inputs rounded to dtype, summed in float32 at least."""
    if dtype is None:
        return left @ right
    rounded = left.to(dtype), right.to(dtype)
    if left.is_cuda and dtype.itemsize == 2:
        return torch.mm(*rounded, out_dtype=torch.float32)
    return rounded[0].to(left.dtype) @ rounded[1].to(left.dtype)


class _Statistics(torch.autograd.Function):
    """(CE, teacher entropy, variance, log weight mass, log normalizer) of image→text, then of text→image.

    Process r holds its rows of the matrix of pairs: what its columns say of other processes' texts is exchanged as
    running sums, what is asked of them as upstream gradients, and the texts' gradients are summed where they belong.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        options: Options,
        teacher_scale: Tensor,
        *constants: Tensor,
    ) -> tuple[Tensor, ...]:
        own_texts = text.detach(), constants[1]
        gather = (lambda rows: rows) if options.exchange is None else options.exchange.gather_constant
        constants = (*(gather(each) for each in own_texts), *constants)
        pairs, queued = make_blocks(image, text, *constants)
        scales, dtype, powers = (scale, teacher_scale), options.matmul_dtype, options.powers
        tile_sums = compile_tile(running_sums) if options.compiled else running_sums
        states, columns = no_sums(len(image), image), no_sums(len(pairs.keys), image)
        for rows in pairs.panels(options.tile_size):
            student, teacher = pairs.logits(rows, scales, dtype)
            states[:, rows] = tile_sums(student, teacher, powers)
            columns = merge(columns, tile_sums(student.T, teacher.T, powers), powers)
        both = [states, own_columns(columns, options)]
        for state, block in zip(both, queued, strict=False):
            for rows in block.panels(options.tile_size):
                more = tile_sums(*block.logits(rows, scales, dtype), powers)
                state[:, rows] = merge(state[:, rows], more, powers)
        logs = [logarithms(state, powers) for state in both]
        found = [value for state, log in zip(both, logs, strict=True) for value in finish(state, log, powers)]
        ctx.options = options
        ctx.save_for_backward(image, text, scale, *logs, teacher_scale, *constants)
        ctx.mark_non_differentiable(found[1], found[3], found[6], found[8])
        return tuple(found)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(upstream[0].device.type, enabled=False):
            return _Statistics.slope(ctx, *upstream)

    @staticmethod
    def slope(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, log_image, log_text, teacher_scale, *constants = ctx.saved_tensors
        options, scales = ctx.options, (scale, teacher_scale)
        dtype, powers = options.matmul_dtype, options.powers
        pairs, queued = make_blocks(image, text, *constants)
        tile_slopes = compile_tile(slopes) if options.compiled else slopes
        asked = [torch.stack([ce, v, norm]) for ce, _, v, _, norm in (upstream[:5], upstream[5:])]
        # Products in half precision would lose what is asked of one query among thousands: brought to 1 and back.
        unit = torch.stack(asked).abs().amax().clamp(min=1e-30) if dtype is not None else torch.ones_like(scale)
        if options.exchange is not None:
            unit = options.exchange.gather_constant(unit[None]).amax()
        of_rows, of_texts = (torch.cat([a / unit, log]) for a, log in zip(asked, (log_image, log_text), strict=True))
        of_columns = of_texts if options.exchange is None else options.exchange.gather_constant(of_texts.T).T
        along_scale, of_keys = torch.zeros_like(scale), torch.zeros_like(pairs.keys)
        gradients = [torch.zeros_like(image), torch.zeros_like(text)]
        for rows in pairs.panels(options.tile_size):
            student, teacher = pairs.logits(rows, scales, dtype)
            tile = tile_slopes(student, teacher, of_rows[:, rows, None], powers)
            tile += tile_slopes(student, teacher, of_columns[:, None], powers)
            gradients[0][rows] = product(tile, pairs.keys, dtype)
            of_keys += product(tile.T, image[rows], dtype)
        along_scale += (gradients[0] * image).sum()
        gradients[1] += of_keys if options.exchange is None else options.exchange.sum_of_own_rows(of_keys)
        for gradient, block, said in zip(gradients, queued, (of_rows, of_texts), strict=False):
            for rows in block.panels(options.tile_size):
                tile = tile_slopes(*block.logits(rows, scales, dtype), said[:, rows, None], powers)
                more = product(tile, block.keys, dtype)
                along_scale += (more * block.queries[rows]).sum()
                gradient[rows] += more
        image_gradient, text_gradient = (unit * scale * gradient for gradient in gradients)
        return image_gradient, text_gradient, unit * along_scale, *([None] * len(constants))


def own_columns(columns: Float[Tensor, "11 B"], options: Options) -> Float[Tensor, "11 b"]:
    """Running sums of this process's texts over the images of all processes."""
    if options.exchange is None:
        return columns
    parts = columns.unflatten(1, (options.exchange.world_size(), -1)).transpose(0, 1)
    state, *others = options.exchange.swap(parts)
    for other in others:
        state = merge(state, other, options.powers)
    return state
