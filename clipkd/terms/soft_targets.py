"""Terms against a teacher's distribution: GKL and its neighbours, on batch logits and on class logits."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from clipkd import distributed, losses
from clipkd.comparison import Comparison, Direction
from clipkd.losses import RowStatistics, SoftTargetStatistics
from clipkd.term_options import AffinityTerm, ClosedSetTerm, GKLOptions, GKLTerm, SoftTargetTerm

Value = tuple[Tensor, dict[str, Tensor]]
"""A term and the series that explain it."""


def gkl(term: GKLTerm, comparison: Comparison) -> Value:
    """Mean of both directions; the series tell the halves apart, and KL from the teacher's entropy."""
    scale = comparison.student.logit_scale.detach()
    return mean_of(
        gkl_rows(term, way, way.student_logits if comparison.policy.mse_moves_scale else scale * way.cosines)
        for way in comparison.directions(term.keys, queue=term.queue, num_teachers=1)
    )


def dkl(term: GKLTerm, comparison: Comparison) -> Value:
    """GKL whose squared error does not reach the student: kept for comparison, its curve shows what GKL adds."""
    return mean_of(
        gkl_rows(term, way, way.student_logits.detach())
        for way in comparison.directions(term.keys, queue=term.queue, num_teachers=1)
    )


def gkl_rows(term: GKLTerm, way: Direction, squared_error_logits: Tensor) -> Value:
    """One direction; the student's logits once more as the squared error may move them."""
    rows = losses.row_statistics(
        way.student_logits,
        way.teacher_logits[0],
        temperature=term.temperature,
        weight_temperature=term.weight_temperature,
        gamma=term.gamma,
        squared_error_logits=squared_error_logits,
    )
    return weigh_halves(term, rows)


def weigh_halves(term: GKLOptions, rows: RowStatistics) -> Value:
    weighted_mse = losses.weighted_squared_error(rows, local_row_weights(rows.log_weight_mass, term))
    factor = term.temperature**2 if term.scale_by_temperature_squared else 1.0
    value = term.ce_weight * factor * rows.ce.mean() + term.mse_weight * weighted_mse
    return value, {"wmse": weighted_mse, **series(rows)}


def local_row_weights(log_weight_mass: Float[Tensor, "b"], term: GKLOptions) -> Float[Tensor, "b"]:
    """This process's rows' weights, normalised over all processes, times their number since losses are averaged over them."""
    weights = losses.row_weights(distributed.gather_constant(log_weight_mass), term.row_weight)
    return weights.chunk(distributed.world_size())[distributed.rank()] * distributed.world_size()


def series(rows: SoftTargetStatistics) -> dict[str, Tensor]:
    """A soft cross-entropy is KL plus the teacher's entropy, which hides its decrease: three curves."""
    return {"kl": rows.kl.mean(), "soft_ce": rows.ce.mean(), "teacher_entropy": rows.teacher_entropy.mean()}


def kl(term: SoftTargetTerm, comparison: Comparison) -> Value:
    return soft_target(term, comparison, "kl")


def soft_ce(term: SoftTargetTerm, comparison: Comparison) -> Value:
    return soft_target(term, comparison, "ce")


def soft_target(term: SoftTargetTerm, comparison: Comparison, which: str) -> Value:
    """Against the mean of all teachers' softmaxes, which of one teacher is its softmax."""
    factor = term.temperature**2 if term.scale_by_temperature_squared else 1.0

    def value(way: Direction) -> Value:
        target = losses.log_mean_softmax(way.teacher_logits, temperature=term.temperature)
        rows = losses.soft_target_statistics(way.student_logits, target, temperature=term.temperature)
        return factor * getattr(rows, which).mean(), series(rows)

    return mean_of(value(way) for way in comparison.directions(term.keys, queue=term.queue))


def affinity(term: AffinityTerm, comparison: Comparison) -> Value:
    """Soft cross-entropy of both models' affinities at one fixed scale (TinyCLIP, arXiv 2309.12314)."""

    def value(way: Direction) -> Value:
        target = (term.scale * way.teacher_cosines[0]).log_softmax(dim=-1)
        rows = losses.soft_target_statistics(term.scale * way.cosines, target)
        return rows.ce.mean(), series(rows)

    return mean_of(value(way) for way in comparison.directions(term.keys, queue=term.queue, num_teachers=1))


def closed_set(term: ClosedSetTerm, comparison: Comparison) -> Value:
    """GKL of images against class prompts; a labelled image's pairs weigh by its class's prior (arXiv 2503.08038 §4)."""
    bank, student = comparison.closed_set, comparison.student
    assert bank is not None
    assert comparison.class_features is not None
    cosines = student.image @ comparison.class_features.T
    teacher_logits = comparison.teacher_scale(0) * comparison.teacher.image @ bank.teacher_classes.T
    rows = losses.row_statistics(
        student.logit_scale * cosines,
        teacher_logits,
        temperature=term.temperature,
        weight_temperature=term.weight_temperature,
        gamma=term.gamma,
        pair_prior=pair_prior(term, comparison, teacher_logits),
        squared_error_logits=None if comparison.policy.mse_moves_scale else student.logit_scale.detach() * cosines,
    )
    return weigh_halves(term, rows)


def pair_prior(term: ClosedSetTerm, comparison: Comparison, teacher_logits: Tensor) -> Tensor | None:
    """Log-probabilities that weigh the pairs: the class's prior where an image is labelled, else its own."""
    labels, bank = comparison.targets.labels, comparison.closed_set
    if bank is None or bank.prior is None or labels is None:
        return None
    own = (teacher_logits / term.weight_temperature).log_softmax(dim=-1)
    # A probability that underflowed has weight 0 at any gamma but 0; its logarithm must stay a number.
    prior = bank.prior.rows(labels).to(own.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where((labels >= 0)[:, None], prior.log(), own)


def mean_of(values: Iterable[Value]) -> Value:
    """Mean over directions of values and series."""
    numbers, parts = zip(*values, strict=True)
    return torch.stack(numbers).mean(), {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}
