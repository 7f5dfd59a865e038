"""Memory-linear statistics of queries against keys for KL and GKL, in one direction, with their gradient written out.

Logits exist for one panel of queries at a time. With s and u a query's student and teacher logits and d = u − s:

    π = softmax(s/T)   q = softmax(u/T)   w = softmax(γu)   μ = Σ w d
    KL = Σ q (log q − log π)   Var = Σ w (d − μ)²   ∂KL/∂s = (π − q)/T   ∂Var/∂s = −2 w (d − μ)

The gradient of a query is the product of these rows with the keys, each times an upstream gradient. A single panel keeps
the rows. Of several panels with constant keys, the forward pass forms the products and keeps these vectors of each query. A
key's gradient sums over queries and needs their upstream gradients first: the backward pass recomputes each panel.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from clipkd.losses.gkl import RowStatistics, require_gkl
from clipkd.losses.panels import compile_tile, panel_height
from clipkd.losses.soft_targets import SoftTargetStatistics


class Options(NamedTuple):
    temperature: float
    gamma: float | None
    panel_height: int
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
    temperature: float = 1.0,
    gamma: float | None = None,
    tile_size: int | None = None,
    compiled: bool = False,
) -> SoftTargetStatistics:
    """Statistics of the logits logit_scale · queries @ keysᵀ per query; `RowStatistics` as of `row_statistics` with a gamma.

    Gradients reach queries, keys and logit_scale if they require one; the teacher's side is constant. `teacher_entropy`
    and `log_weight_mass` carry no gradient.

        rows = query_statistics(image, text_keys, t_image, t_text_keys, logit_scale=s, teacher_logit_scale=t, gamma=0.3)
        wmse = 0.5 * (row_weights(rows.log_weight_mass) * rows.variance).sum()
        gkl = ce_weight * rows.ce.mean() + mse_weight * wmse

    At most tile_size² logits are formed at once (by default 2,048² on a CPU, more on a GPU), but at least the m logits of
    one query: a row is never split, so no running sums are merged. Gather the keys of other processes before the call.
    Sums and logits are float32 at least, under autocast too. compiled: see `compile_tile`.

    Raises: ValueError as `row_statistics`, for shapes that do not fit, and for a tile_size below 1.
    """
    require_gkl(temperature=temperature, gamma=gamma or 0.0)
    require_shapes(queries, keys, teacher_queries, teacher_keys)
    dtype = torch.promote_types(queries.dtype, torch.float32)

    def scalar(value: Tensor | float) -> Tensor:
        if isinstance(value, Tensor):
            return value.to(queries.device, dtype)
        return torch.full((), value, dtype=dtype, device=queries.device)  # torch.tensor would wait for the device

    student = queries.to(dtype), keys.to(dtype), scalar(logit_scale)
    teacher = teacher_queries.to(dtype), teacher_keys.to(dtype), scalar(teacher_logit_scale)
    options = Options(
        temperature,
        gamma,
        panel_height=panel_height(len(keys), queries.device, tile_size),
        compiled=compiled,
        needs_gradient=torch.is_grad_enabled() and any(each.requires_grad for each in student),
    )
    with torch.autocast(queries.device.type, enabled=False):
        found: Any = _Statistics.apply(options, *student, *(each.detach() for each in teacher))
    (divergence, *half_variance), (entropy, *log_mass) = (each.unbind() for each in found)
    kl = divergence / temperature
    soft = {"ce": kl + entropy, "kl": kl, "teacher_entropy": entropy}
    if gamma is None:
        return SoftTargetStatistics(**soft)
    return RowStatistics(**soft, variance=2 * half_variance[0], log_weight_mass=log_mass[0])


def require_shapes(queries: Tensor, keys: Tensor, teacher_queries: Tensor, teacher_keys: Tensor) -> None:
    given = [tuple(each.shape) for each in (queries, keys, teacher_queries, teacher_keys)]
    (n, *d), (m, *_), (_, *t), _ = given
    if given != [(n, *d), (m, *d), (n, *t), (m, *t)] or len(d) != 1 or len(t) != 1:
        raise ValueError(
            f"queries and keys of student and teacher are of shapes {given}; they need n × d, m × d, n × t and m × t"
        )


class Panel(NamedTuple):
    """Statistics of a panel of queries: KL's, and with a gamma the variance's (k = 2)."""

    moving: Float[Tensor, "k h"]
    """T · KL and ½ Var."""
    constant: Float[Tensor, "k h"]
    """Teacher entropy and log weight mass."""
    derivatives: list[Float[Tensor, "h m"]]
    """Of `moving` by the student's logits: π − q and −w (d − μ)."""


def compute_panel(
    student: Float[Tensor, "h m"], teacher: Float[Tensor, "h m"], temperature: float, gamma: float | None
) -> Panel:
    """Overwrites the logits: on a CPU, a pass over fresh memory costs several times one over memory in the cache.

    Exponentials come from `softmax`, twice as fast as `exp` there; its largest value is e^{max − logsumexp}.
    """
    # Relative to the largest logit, so that sums of products keep their digits.
    s, u = (logits.sub_(logits.amax(dim=1, keepdim=True)) for logits in (student, teacher))
    target, prediction = soften(u, temperature), soften(s, temperature)
    log_target, log_prediction = log_largest(target), log_largest(prediction)
    constant = [-log_target - (target * u).sum(dim=1) / temperature]
    difference = s.sub_(u)  # −d: the sign of the variance's derivative
    moving = [temperature * (log_target - log_prediction) - (target * difference).sum(dim=1)]
    derivatives = [prediction]
    if gamma is not None:
        log_mass = gamma * log_largest(soften(u, 1.0) if temperature != 1 else target)
        weight = target if gamma * temperature == 1 else u.mul_(gamma).softmax(dim=1)
        constant.append(log_mass - log_largest(weight))
        difference -= (weight * difference).sum(dim=1, keepdim=True)
        derivatives.append(weight * difference)
        moving.append(difference.mul_(derivatives[1]).sum(dim=1) / 2)
    prediction -= target
    return Panel(torch.stack(moving), torch.stack(constant), derivatives)


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

    def panels(self, options: Options) -> Iterator[tuple[slice, Panel]]:
        """Compute each panel when it is asked for."""
        compute = compile_tile(compute_panel) if options.compiled else compute_panel
        for start in range(0, len(self.queries), options.panel_height):
            rows = slice(start, start + options.panel_height)
            yield (
                rows,
                compute(  # names for the logits would keep them until the next panel
                    self.scale * self.queries[rows] @ self.keys.T,
                    self.teacher_scale * self.teacher_queries[rows] @ self.teacher_keys.T,
                    options.temperature,
                    options.gamma,
                ),
            )


class _Statistics(torch.autograd.Function):
    """`Panel.moving` and `Panel.constant` of all queries."""

    @staticmethod
    def forward(ctx: Any, options: Options, *tensors: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        inputs, ctx.options = Inputs(*tensors), options
        queries, num = inputs.queries, 1 if options.gamma is None else 2
        one_panel = len(queries) <= options.panel_height
        keeps_products = options.needs_gradient and not one_panel and not ctx.needs_input_grad[2]
        products = queries.new_empty(num if keeps_products else 0, *queries.shape)
        moving, constant = (queries.new_empty(num, len(queries)) for _ in range(2))
        kept: list[Tensor] = []
        for rows, panel in inputs.panels(options):
            moving[:, rows], constant[:, rows] = panel.moving, panel.constant
            for product, derivative in zip(products, panel.derivatives, strict=False):
                product[rows] = derivative @ inputs.keys
            kept = panel.derivatives if one_panel else []
        ctx.save_for_backward(*((queries, inputs.scale, products) if keeps_products else (*inputs, *kept)))
        ctx.mark_non_differentiable(constant)
        return moving, constant

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        queries, *others = ctx.saved_tensors
        with torch.autocast(upstream.device.type, enabled=False):
            if len(others) == 2:
                scale, products = others
                along_queries, along_keys = (upstream[:, :, None] * products).sum(dim=0), None
            else:
                inputs, kept, scale = Inputs(queries, *others[:5]), others[5:], others[1]
                panels = [(slice(None), Panel(upstream, upstream, kept))] if kept else inputs.panels(ctx.options)
                along_queries, along_keys = backpropagate(inputs, panels, upstream, keys=ctx.needs_input_grad[2])
            return None, scale * along_queries, along_keys, (along_queries * queries).sum(), None, None, None


def backpropagate(
    inputs: Inputs, panels: Iterable[tuple[slice, Panel]], upstream: Float[Tensor, "k n"], *, keys: bool
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "m d"] | None]:
    """Gradients of queries, divided by logit_scale, and of keys if wanted."""
    along_queries, along_keys = torch.empty_like(inputs.queries), torch.zeros_like(inputs.keys) if keys else None
    for rows, panel in panels:
        error, *spread = panel.derivatives
        gradient = error * upstream[0, rows, None]
        if spread:
            gradient.addcmul_(spread[0], upstream[1, rows, None])
        along_queries[rows] = gradient @ inputs.keys
        if along_keys is not None:
            along_keys += gradient.T @ inputs.queries[rows]
    return along_queries, None if along_keys is None else along_keys * inputs.scale
