"""Cross-entropy and KL divergence against soft targets: one row per query, logits already times their logit scale."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class SoftTargetStatistics:
    """Cross-entropy and divergence of each query from its soft target q."""

    ce: Float[Tensor, "b"]
    """Soft cross-entropy −Σ q log π, nats; q = softmax(teacher/T), π = softmax(student/T)."""
    kl: Float[Tensor, "b"]
    """KL(q ‖ π), nats."""
    teacher_entropy: Float[Tensor, "b"]
    """Entropy of q, nats."""


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


def soft_target_statistics(
    student_logits: Float[Tensor, "b c"], log_target: Float[Tensor, "b c"], *, temperature: float = 1.0
) -> SoftTargetStatistics:
    """Per-row statistics of a target given by its log-probabilities, which carry no gradient; float32 at least.

    Raises: ValueError if the temperature is not positive or the shapes differ.
    """
    require_positive(temperature=temperature)
    require_same_shape(student_logits, log_target)
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    log_target = log_target.detach().to(dtype)
    target = log_target.exp()
    log_prediction = (student_logits.to(dtype) / temperature).log_softmax(dim=-1)
    return SoftTargetStatistics(
        ce=-(target * log_prediction).sum(dim=-1),
        kl=(target * (log_target - log_prediction)).sum(dim=-1),
        teacher_entropy=-(target * log_target).sum(dim=-1),
    )


def log_mean_softmax(
    teacher_logits: Sequence[Float[Tensor, "b c"]], *, temperature: float = 1.0
) -> Float[Tensor, "b c"]:
    """Logarithm of the mean over teachers of softmax(logits/T): an ensemble's soft target (MobileCLIP, arXiv 2311.17049).

    Each teacher's logits come with its own scale. Raises: ValueError if there is no teacher or T is not positive.
    """
    require_positive(temperature=temperature)
    if not teacher_logits:
        raise ValueError("no teacher's logits were given")
    single = [
        (logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature).log_softmax(dim=-1)
        for logits in teacher_logits
    ]
    return torch.stack(single).logsumexp(dim=0) - math.log(len(single))


def mixed_target(
    positives: Bool[Tensor, "b c"], softened: Sequence[tuple[float, Float[Tensor, "b c"]]]
) -> Float[Tensor, "b c"]:
    """(1 − Σ α)·positives/#positives + Σ α·softmax(logits): targets of ALBEF (arXiv 2107.07651) and their mixtures.

    softened: (share α, logits) of each source, such as the momentum encoder and a teacher. No gradient. Every row needs
    at least one positive. Raises: ValueError if the shares are negative or more than 1 together.
    """
    shares = [share for share, _ in softened]
    if not (min(shares, default=0.0) >= 0 and sum(shares) <= 1 + 1e-9):
        raise ValueError(f"shares of a mixed target are {shares}; each must be 0 or more, their sum 1 at most")
    dtype = softened[0][1].dtype if softened else torch.float32
    hard = positives.to(torch.promote_types(dtype, torch.float32))
    target = (1 - sum(shares)) * hard / hard.sum(dim=-1, keepdim=True)
    for share, logits in softened:
        target = target + share * logits.detach().to(target.dtype).softmax(dim=-1)
    return target
