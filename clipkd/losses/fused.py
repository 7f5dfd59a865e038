"""Memory-linear GKL statistics and InfoNCE of queries against keys, in one direction, with their gradient written out.

Logits exist for one panel of queries at a time. With s and u a query's student and teacher logits and d = u − s:

    π = softmax(s/T)   q = softmax(u/T)   w = softmax(γu/T_w)   μ = Σ w d
    KL = Σ q (log q − log π)   Var = Σ w (d − μ)²   InfoNCE = −log softmax(s)[positive]

    ∂KL/∂s = (π − q)/T   ∂Var/∂s = −2 w (d − μ)   ∂InfoNCE/∂s = softmax(s) − one_hot(positive)

The gradient of a query is the product of these three rows with the keys, each times an upstream gradient. A single panel
keeps the rows. Of several panels with constant keys, the forward pass forms the products and keeps these three vectors per
query. A key's gradient sums over queries and needs their upstream gradients first: the backward pass recomputes each panel.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkd.losses.gkl import RowStatistics, require_gkl
from clipkd.losses.panels import compile_tile, panel_height


@dataclass(frozen=True)
class QueryStatistics(RowStatistics):
    """GKL's statistics of each query, and its contrastive loss."""

    info_nce: Float[Tensor, "n"] | None
    """−log softmax(student)[positive], nats, at temperature 1; None without positives."""


class Powers(NamedTuple):
    temperature: float
    weight_temperature: float
    gamma: float


class Options(NamedTuple):
    powers: Powers
    panel_height: int
    matmul_dtype: torch.dtype | None
    compiled: bool
    needs_gradient: bool


def query_statistics(
    queries: Float[Tensor, "n d"],
    keys: Float[Tensor, "m d"],
    teacher_queries: Float[Tensor, "n t"],
    teacher_keys: Float[Tensor, "m t"],
    *,
    logit_scale: Float[Tensor, ""] | float,
    teacher_logit_scale: Float[Tensor, ""] | float,
    positives: Int[Tensor, "n"] | None = None,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
    tile_size: int | None = None,
    matmul_dtype: torch.dtype | None = None,
    compiled: bool = False,
) -> QueryStatistics:
    """Statistics of the logits logit_scale · queries @ keysᵀ per query, as `row_statistics` and `info_nce` define them.

    Gradients reach queries, keys and logit_scale if they require one; the teacher's side is constant. `teacher_entropy`
    and `log_weight_mass` carry no gradient. positives: the column of each query's own pair, for InfoNCE.

        rows = query_statistics(image, text_keys, t_image, t_text_keys, logit_scale=s, teacher_logit_scale=t, gamma=0.3)
        wmse = 0.5 * (row_weights(rows.log_weight_mass) * rows.variance).sum()
        gkl = ce_weight * rows.ce.mean() + mse_weight * wmse

    At most tile_size² logits are formed at once (by default 2,048² on a CPU, more on a GPU), but at least the m logits of
    one query: a row is never split, so no running sums are merged. Gather the keys of other processes before the call.

    matmul_dtype: the type to which matrix products round their inputs, float16 for speed; sums and logits stay float32
    at least, under autocast too. compiled: see `compile_tile`.

    Raises: ValueError as `row_statistics`, for shapes that do not fit, for another matmul_dtype than float16 or float32,
    and for a tile_size below 1.
    """
    require_gkl(temperature=temperature, weight_temperature=weight_temperature, gamma=gamma)
    require_shapes(queries, keys, teacher_queries, teacher_keys, positives)
    if matmul_dtype not in (None, torch.float16, torch.float32):
        raise ValueError(
            f"matmul_dtype is {matmul_dtype}; choose torch.float16 or torch.float32: others have too few digits"
        )
    dtype = torch.promote_types(queries.dtype, torch.float32)

    def scalar(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(queries.device, dtype)
        return torch.full((), value, dtype=dtype, device=queries.device)  # torch.tensor would wait for the device

    student = queries.to(dtype), keys.to(dtype), scalar(logit_scale)
    teacher = teacher_queries.to(dtype), teacher_keys.to(dtype), scalar(teacher_logit_scale)
    options = Options(
        powers=Powers(temperature, weight_temperature, gamma),
        panel_height=panel_height(len(keys), queries.device, tile_size),
        matmul_dtype=matmul_dtype,
        compiled=compiled,
        needs_gradient=torch.is_grad_enabled() and any(each.requires_grad for each in student),
    )
    with torch.autocast(queries.device.type, enabled=False):
        found = _Statistics.apply(options, *student, *(each.detach() for each in teacher), positives)
    assert isinstance(found, Tensor)
    kl, variance, contrastive, entropy, log_weight_mass = found.unbind()
    return QueryStatistics(
        ce=kl + entropy.detach(),
        kl=kl,
        teacher_entropy=entropy.detach(),
        variance=variance,
        log_weight_mass=log_weight_mass.detach(),
        info_nce=None if positives is None else contrastive,
    )


def require_shapes(
    queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, positives: Tensor | None
) -> None:
    given = [tuple(each.shape) for each in (queries, keys, teacher_queries, teacher_keys)]
    (n, *d), (m, *_), (_, *t), _ = given
    if given != [(n, *d), (m, *d), (n, *t), (m, *t)] or len(d) != 1 or len(t) != 1:
        raise ValueError(
            f"queries and keys of student and teacher are of shapes {given}; they need n × d, m × d, n × t and m × t"
        )
    if positives is not None and positives.shape != (n,):
        raise ValueError(f"positives is of shape {tuple(positives.shape)}; it needs one column per query: {n}")


class Panel(NamedTuple):
    """Statistics of a panel of queries, and the matrices of which their derivatives by the student's logits consist."""

    statistics: Float[Tensor, "5 h"]
    """KL, variance, InfoNCE (0 without positives), teacher entropy, log weight mass."""
    error: Float[Tensor, "h m"]
    """q − π = −T · ∂KL/∂s."""
    spread: Float[Tensor, "h m"]
    """−w (d − μ) = ½ · ∂Var/∂s."""
    prediction: Float[Tensor, "h m"] | None
    """softmax(s) = ∂InfoNCE/∂s + one_hot(positive); None without positives."""


def compute_panel(
    student: Float[Tensor, "h m"], teacher: Float[Tensor, "h m"], positives: Int[Tensor, "h"] | None, powers: Powers
) -> Panel:
    """Overwrites the logits: on a CPU, a pass over fresh memory costs several times one over memory in the cache.

    Exponentials come from `softmax`, twice as fast as `exp` there; its largest value is e^{max − logsumexp}.
    """
    temperature, weight_temperature, gamma = powers
    # Relative to the largest logit, so that sums of products keep their digits.
    s, u = (logits.sub_(logits.amax(dim=1, keepdim=True)) for logits in (student, teacher))
    target, softened = soften(u, temperature), soften(s, temperature)
    log_target, log_softened = log_largest(target), log_largest(softened)
    prediction, info_nce = None, torch.zeros_like(log_target)
    if positives is not None:
        prediction = softened if temperature == 1 else soften(s, 1.0)
        info_nce = -log_largest(prediction) - s.gather(1, positives[:, None])[:, 0]
    entropy = -log_target - (target * u).sum(dim=1) / temperature
    difference = s.sub_(u)  # −d: the sign of the variance's derivative
    kl = log_target - log_softened - (target * difference).sum(dim=1) / temperature

    if weight_temperature == temperature:
        log_mass = gamma * log_largest(target)
    else:
        log_mass = gamma * log_largest(soften(u, weight_temperature))
    weight = target if gamma * temperature == weight_temperature else u.mul_(gamma / weight_temperature).softmax(dim=1)
    log_mass -= log_largest(weight)
    difference -= (weight * difference).sum(dim=1, keepdim=True)
    spread = weight * difference
    variance = difference.mul_(spread).sum(dim=1)
    statistics = torch.stack([kl, variance, info_nce, entropy, log_mass])
    return Panel(statistics, error=target.sub_(softened), spread=spread, prediction=prediction)


def soften(logits: Float[Tensor, "h m"], temperature: float) -> Float[Tensor, "h m"]:
    return (logits if temperature == 1 else logits / temperature).softmax(dim=1)


def log_largest(probabilities: Float[Tensor, "h m"]) -> Float[Tensor, "h"]:
    return probabilities.amax(dim=1).log()


class Inputs(NamedTuple):
    queries: Float[Tensor, "n d"]
    keys: Float[Tensor, "m d"]
    scale: Float[Tensor, ""]
    teacher_queries: Float[Tensor, "n t"]
    teacher_keys: Float[Tensor, "m t"]
    teacher_scale: Float[Tensor, ""]
    positives: Int[Tensor, "n"] | None

    def panels(self, options: Options) -> Iterator[tuple[slice, Panel]]:
        """Compute each panel when it is asked for."""
        compute = compile_tile(compute_panel) if options.compiled else compute_panel
        keys, teacher_keys = (rounded(each, options.matmul_dtype).T for each in (self.keys, self.teacher_keys))
        for start in range(0, len(self.queries), options.panel_height):
            rows = slice(start, start + options.panel_height)
            queries, teacher_queries = self.scale * self.queries[rows], self.teacher_scale * self.teacher_queries[rows]
            yield (
                rows,
                compute(
                    product(rounded(queries, options.matmul_dtype), keys),
                    product(rounded(teacher_queries, options.matmul_dtype), teacher_keys),
                    None if self.positives is None else self.positives[rows],
                    options.powers,
                ),
            )


def rounded(matrix: Float[Tensor, "n k"], dtype: torch.dtype | None) -> Float[Tensor, "n k"]:
    """To the digits of dtype; on a CPU in the type it has, since half-precision products are slow there."""
    if dtype is None:
        return matrix
    half = matrix.to(dtype)
    return half if half.is_cuda and dtype.itemsize == 2 else half.to(matrix.dtype)


def product(left: Float[Tensor, "n k"], right: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Summed in float32 at least."""
    return torch.mm(left, right, out_dtype=torch.float32) if left.dtype == torch.float16 else left @ right


class _Statistics(torch.autograd.Function):
    """`Panel.statistics` of all queries; the last two rows carry no gradient."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor | None) -> Tensor:  # type: ignore[override]
        inputs, ctx.options = Inputs(*tensors), options  # type: ignore[arg-type]
        queries, keys = inputs.queries, rounded(inputs.keys, options.matmul_dtype)
        if len(queries) <= options.panel_height:
            ((_, panel),) = inputs.panels(options)
            ctx.save_for_backward(*inputs, *panel[1:])
            return panel.statistics
        keeps_derivatives = options.needs_gradient and not ctx.needs_input_grad[2]
        num_derivatives = 2 if inputs.positives is None else 3
        derivatives = queries.new_empty(num_derivatives, *queries.shape) if keeps_derivatives else None
        statistics = queries.new_empty(5, len(queries))
        for rows, panel in inputs.panels(options):
            statistics[:, rows] = panel.statistics
            if derivatives is not None:
                for derivative, matrix in zip(derivatives, panel[1:], strict=False):
                    assert matrix is not None
                    derivative[rows] = product(rounded(matrix, options.matmul_dtype), keys)
        if derivatives is not None and inputs.positives is not None:
            derivatives[2] -= inputs.keys[inputs.positives]
        ctx.save_for_backward(*(inputs if derivatives is None else (queries, inputs.scale, derivatives)))
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        kl, variance, info_nce = upstream[:3, :, None]
        factors = torch.stack([-kl / ctx.options.powers.temperature, 2 * variance, info_nce])
        queries, *others = ctx.saved_tensors
        with torch.autocast(upstream.device.type, enabled=False):
            if len(others) == 2:
                scale, derivatives = others
                along_queries, along_keys = (factors[: len(derivatives)] * derivatives).sum(dim=0), None
            else:
                inputs, kept, scale = Inputs(queries, *others[:6]), others[6:], others[1]
                panels = [(slice(None), Panel(upstream, *kept))] if kept else inputs.panels(ctx.options)
                along_queries, along_keys = backpropagate(
                    inputs, panels, factors, ctx.options.matmul_dtype, keys=ctx.needs_input_grad[2]
                )
            return None, scale * along_queries, along_keys, (along_queries * queries).sum(), None, None, None, None


def backpropagate(
    inputs: Inputs,
    panels: Iterable[tuple[slice, Panel]],
    factors: Float[Tensor, "3 n 1"],
    dtype: torch.dtype | None,
    *,
    keys: bool,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"] | None]:
    """Gradients of queries, divided by logit_scale, and of keys if wanted."""
    # Half precision would lose the small factors of a mean over thousands of queries: the largest becomes 1 for the products.
    unit = factors.new_ones(()) if dtype is None else factors.abs().amax().clamp(min=1e-30)
    factors, candidates = factors / unit, rounded(inputs.keys, dtype)
    along_queries, along_keys = torch.empty_like(inputs.queries), torch.zeros_like(inputs.keys) if keys else None
    for rows, panel in panels:
        error, spread, prediction = factors[:, rows]
        gradient = (panel.error * error).addcmul_(panel.spread, spread)
        if panel.prediction is not None:
            assert inputs.positives is not None
            gradient.addcmul_(panel.prediction, prediction)
            gradient.scatter_add_(1, inputs.positives[rows, None], -prediction)
        gradient = rounded(gradient, dtype)
        along_queries[rows] = product(gradient, candidates)
        if along_keys is not None:
            along_keys += product(gradient.T, rounded(inputs.queries[rows], dtype))
    return along_queries * unit, None if along_keys is None else along_keys * (inputs.scale * unit)
