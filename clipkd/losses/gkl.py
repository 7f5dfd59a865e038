"""The GKL family on logits: one row per query, one column per candidate, both sides already times their logit scale.

Everything is taken from five numbers per row, so that a cheaper way to those numbers serves every term.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RowStatistics:
    """What the GKL family needs to know of each query."""

    ce: Float[Tensor, "b"]
    """Soft cross-entropy −Σ q log π, nats; q = softmax(teacher/T), π = softmax(student/T)."""
    kl: Float[Tensor, "b"]
    """KL(q ‖ π), nats."""
    teacher_entropy: Float[Tensor, "b"]
    """Entropy of q, nats."""
    variance: Float[Tensor, "b"]
    """Variance of teacher − student logits under the smoothed pair weights p̂ = softmax(γ·teacher/T_w)."""
    log_weight_mass: Float[Tensor, "b"]
    """log P, P = Σ_j softmax(teacher/T_w)_j^γ: the mass of the row's pair weights before normalisation."""


def require_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}; it must be positive")


def require_same_shape(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student logits {tuple(student_logits.shape)} and teacher logits {tuple(teacher_logits.shape)} differ in "
            "shape; both need one row per query and one column per candidate"
        )


def row_statistics(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    gamma: float = 1.0,
) -> RowStatistics:
    """Per-row statistics of the GKL family in O(b·c), in float32 at least and in log space.

    The soft target and the pair weights are constants; the gradient of `variance` reaches both sides.

    Raises: ValueError if a temperature is not positive, gamma is negative or the shapes differ.
    """
    require_positive(temperature=temperature, weight_temperature=weight_temperature)
    require_same_shape(student_logits, teacher_logits)
    if not gamma >= 0:
        raise ValueError(f"gamma is {gamma}; it must be 0 (uniform pair weights) or more")
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student, teacher = student_logits.to(dtype), teacher_logits.to(dtype)

    log_target = (teacher.detach() / temperature).log_softmax(dim=-1)
    target = log_target.exp()
    log_prediction = (student / temperature).log_softmax(dim=-1)
    teacher_entropy = -(target * log_target).sum(dim=-1)

    # Powers of a softmax underflow at logit scale 100; their logarithms do not.
    weight_logits = teacher.detach() / weight_temperature
    pair_weight = (gamma * weight_logits).softmax(dim=-1)
    log_weight_mass = (gamma * weight_logits).logsumexp(dim=-1) - gamma * weight_logits.logsumexp(dim=-1)

    # Centred before squaring: E[d²] − E[d]² loses the digits of a small variance around a large mean.
    difference = teacher - student
    centred = difference - (pair_weight * difference).sum(dim=-1, keepdim=True)
    return RowStatistics(
        ce=-(target * log_prediction).sum(dim=-1),
        kl=(target * (log_target - log_prediction)).sum(dim=-1),
        teacher_entropy=teacher_entropy,
        variance=(pair_weight * centred.square()).sum(dim=-1),
        log_weight_mass=log_weight_mass,
    )


def row_weights(log_weight_mass: Float[Tensor, "b"], row_weight: Literal["reference", "uniform"]) -> Float[Tensor, "b"]:
    """Shares of the queries in the squared-error half, summing to 1: P²/Σ P² (published code) or 1/b."""
    if row_weight == "uniform":
        return torch.full_like(log_weight_mass, 1 / len(log_weight_mass))
    if row_weight == "reference":
        return (2 * log_weight_mass).softmax(dim=0)
    raise ValueError(f"row_weight is {row_weight!r}; choose 'reference' or 'uniform'")


def weighted_squared_error(rows: RowStatistics, weights: Float[Tensor, "b"]) -> Float[Tensor, ""]:
    """GKL's squared-error half ½ Σ_i ω_i Var_i; weights ω: the rows' shares, from `row_weights`."""
    return 0.5 * (weights * rows.variance).sum()


def gkl(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    ce_weight: float,
    mse_weight: float,
    gamma: float,
    temperature: float = 1.0,
    weight_temperature: float = 1.0,
    row_weight: Literal["reference", "uniform"] = "reference",
    scale_by_temperature_squared: bool = False,
) -> Float[Tensor, ""]:
    """Generalized Kullback-Leibler divergence (arXiv 2503.08038), sample-wise weights, in closed form.

        ce_weight · mean_i CE_i  +  mse_weight · ¼ Σ_i Σ_jk w_ij w_ik ((t_ij − t_ik) − (s_ij − s_ik))² / Σ_ijk w_ij w_ik

    with w = softmax(teacher/T_w)^γ. The double sum over pairs of candidates equals 2 P_i² Var_i, so nothing larger
    than the logits is formed. In the published code alpha is our `ce_weight` and beta our `mse_weight`. As there, the
    soft target and w carry no gradient; the squared error reaches both sides, so detach a frozen teacher. The published
    code has no T² on the cross-entropy half; `scale_by_temperature_squared` puts it there.

    Raises: ValueError as `row_statistics`, or for an unknown row_weight.
    """
    rows = row_statistics(
        student_logits, teacher_logits, temperature=temperature, weight_temperature=weight_temperature, gamma=gamma
    )
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    weighted_mse = weighted_squared_error(rows, row_weights(rows.log_weight_mass, row_weight))
    return ce_weight * factor * rows.ce.mean() + mse_weight * weighted_mse


def kl(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> Float[Tensor, ""]:
    """Mean over rows of KL(softmax(teacher/T) ‖ softmax(student/T)), nats. No gradient reaches the teacher.

    Hinton et al. 2015, who multiply by T²: `scale_by_temperature_squared`.

    Raises: ValueError if the temperature is not positive or the shapes differ.
    """
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    return factor * row_statistics(student_logits, teacher_logits, temperature=temperature).kl.mean()


def soft_cross_entropy(
    student_logits: Float[Tensor, "b c"],
    teacher_logits: Float[Tensor, "b c"],
    *,
    temperature: float = 1.0,
    scale_by_temperature_squared: bool = False,
) -> Float[Tensor, ""]:
    """Mean over rows of −Σ softmax(teacher/T) log softmax(student/T), nats: the gradient of `kl`, larger by the entropy.

    Raises: ValueError if the temperature is not positive or the shapes differ.
    """
    factor = temperature**2 if scale_by_temperature_squared else 1.0
    return factor * row_statistics(student_logits, teacher_logits, temperature=temperature).ce.mean()
