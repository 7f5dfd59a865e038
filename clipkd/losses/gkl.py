"""The GKL family on logits: one row per query, one column per candidate, both sides already times their logit scale.

Everything is computed from five numbers per row, so that `query_statistics` serves every term.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from clipkd.losses.soft_targets import (
    SoftTargetStatistics,
    require_positive,
    require_same_shape,
    soft_target_statistics,
)


@dataclass(frozen=True)
class RowStatistics(SoftTargetStatistics):
    """Statistics of each query from which the GKL family is computed."""

    variance: Float[Tensor, "b"]
    """Variance of teacher − student logits under the smoothed pair weights p̂ = softmax(γ·teacher)."""
    log_weight_mass: Float[Tensor, "b"]
    """log P, P = Σ_j softmax(teacher)_j^γ: the mass of the row's pair weights before normalisation."""


def row_statistics(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
    gamma: float = 1.0,
    pair_prior: Float[Tensor, "b c"] | None = None,
) -> RowStatistics:
    """Per-row statistics of the GKL family in O(b·c), in float32 at least and in log space.

    The soft target and the pair weights are constants; the gradient of `variance` reaches both sides. pair_prior:
    log-probabilities whose power gamma weighs the pairs, in place of log softmax(teacher): the class prior of a
    labelled sample.

    Raises: ValueError if the temperature is not positive, gamma is negative or the shapes differ.
    """
    require_gkl(temperature=temperature, gamma=gamma)
    require_same_shape(student_logits, teacher_logits)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)
    log_target = (teacher.detach() / temperature).log_softmax(dim=-1)
    soft = soft_target_statistics(student, log_target, temperature=temperature)

    # Powers of a softmax underflow at logit scale 100; their logarithms do not.
    weight_logits = teacher.detach() if pair_prior is None else pair_prior.detach().to(dtype)
    pair_weight = (gamma * weight_logits).softmax(dim=-1)
    log_weight_mass = (gamma * weight_logits).logsumexp(dim=-1) - gamma * weight_logits.logsumexp(dim=-1)

    # Centred before squaring: E[d²] − E[d]² loses the digits of a small variance around a large mean.
    difference = teacher - student
    centred = difference - (pair_weight * difference).sum(dim=-1, keepdim=True)
    variance = (pair_weight * centred.square()).sum(dim=-1)
    return RowStatistics(**vars(soft), variance=variance, log_weight_mass=log_weight_mass)


def require_gkl(*, temperature: float, gamma: float) -> None:
    require_positive(temperature=temperature)
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must be 0 (uniform pair weights) or more")


def row_weights(log_weight_mass: Float[Tensor, "b"]) -> Float[Tensor, "b"]:
    """Shares P²/Σ P² of the queries in the squared-error half, as in the published code; they sum to 1."""
    return (2 * log_weight_mass).softmax(dim=0)


def gkl(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    ce_weight: float,
    mse_weight: float,
    gamma: float,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Generalized Kullback-Leibler divergence (arXiv 2503.08038), sample-wise weights, in closed form.

        ce_weight · mean_i CE_i  +  mse_weight · ¼ Σ_i Σ_jk w_ij w_ik ((t_ij − t_ik) − (s_ij − s_ik))² / Σ_ijk w_ij w_ik

    with w = softmax(teacher)^γ. The double sum over pairs of candidates equals 2 P_i² Var_i, so nothing larger
    than the logits is formed. In the published code alpha is our `ce_weight` and beta our `mse_weight`. As there, the
    soft target and w carry no gradient, the squared error reaches both sides, and no T² multiplies the cross-entropy.

    Raises: ValueError as `row_statistics`.
    """
    rows = row_statistics(student_logits, teacher_logits, temperature=temperature, gamma=gamma)
    wmse = 0.5 * (row_weights(rows.log_weight_mass) * rows.variance).sum()
    return ce_weight * rows.ce.mean() + mse_weight * wmse
