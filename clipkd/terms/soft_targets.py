"""Terms against a teacher's distribution: GKL and its neighbours, on batch logits and on class logits."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from clipkd import distributed, losses
from clipkd.comparison import Comparison, Pair, Value
from clipkd.losses import RowStatistics, SoftTargetStatistics
from clipkd.term_options import AffinityTerm, ClosedSetTerm, DKLTerm, GKLOptions, GKLTerm, SoftTargetTerm


def gkl(term: GKLTerm, comparison: Comparison) -> Value:
    """Mean of both directions; the series tell the halves apart, and KL from the teacher's entropy."""
    logits = comparison.student_logits(term.keys, queue=term.queue)
    movable = logits
    if not comparison.policy.mse_moves_scale:
        image, text = comparison.cosines(term.keys, queue=term.queue)
        scale = comparison.student.logit_scale.detach()
        movable = scale * image, scale * text
    return both_directions(term, comparison, logits, movable)


def dkl(term: DKLTerm, comparison: Comparison) -> Value:
    """GKL whose squared error does not reach the student: kept for comparison, its curve shows what GKL adds."""
    image, text = comparison.student_logits(term.keys, queue=term.queue)
    return both_directions(term, comparison, (image, text), (image.detach(), text.detach()))


def both_directions(term: GKLTerm, comparison: Comparison, logits: Pair, movable: Pair) -> Value:
    """movable: the student's logits once more, as the squared error may move them."""
    teacher_logits = comparison.teacher_logits(0, queue=term.queue)
    return mean_of(
        weigh_halves(
            term,
            losses.row_statistics(
                student,
                teacher,
                temperature=term.temperature,
                weight_temperature=term.weight_temperature,
                gamma=term.gamma,
                squared_error_logits=squared,
            ),
        )
        for student, teacher, squared in zip(logits, teacher_logits, movable, strict=True)
    )


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
    return soft_target(term, comparison, "soft_ce")


def soft_target(term: SoftTargetTerm, comparison: Comparison, which: str) -> Value:
    """Against the mean of all teachers' softmaxes, which of one teacher is its softmax."""
    numbers = range(len(comparison.targets.teachers))
    teachers = [comparison.teacher_logits(number, queue=term.queue) for number in numbers]
    parts: list[Value] = []
    for way, logits in enumerate(comparison.student_logits(term.keys, queue=term.queue)):
        target = losses.log_mean_softmax([pair[way] for pair in teachers], temperature=term.temperature)
        found = series(losses.soft_target_statistics(logits, target, temperature=term.temperature))
        parts.append((found[which], found))
    value, curves = mean_of(parts)
    if not term.scale_by_temperature_squared:
        del curves[which]  # the term itself
        return value, curves
    return term.temperature**2 * value, curves


def affinity(term: AffinityTerm, comparison: Comparison) -> Value:
    """Soft cross-entropy of both models' affinities at one fixed scale (TinyCLIP, arXiv 2309.12314)."""
    student = comparison.cosines(term.keys, queue=term.queue)
    teacher = comparison.teacher_cosines(0, queue=term.queue)
    parts: list[Value] = []
    for s, t in zip(student, teacher, strict=True):
        rows = losses.soft_target_statistics(term.scale * s, (term.scale * t).log_softmax(dim=-1))
        parts.append((rows.ce.mean(), series(rows)))
    return mean_of(parts)


def closed_set(term: ClosedSetTerm, comparison: Comparison) -> Value:
    """GKL of images against class prompts; a labelled image's pairs weigh by its class's prior (arXiv 2503.08038)."""
    student = comparison.student
    assert comparison.class_features is not None
    cosines = student.image @ comparison.class_features.T
    logits, still = student.logit_scale * cosines, student.logit_scale.detach() * cosines
    rows = losses.row_statistics(
        logits,
        comparison.class_logits(),
        temperature=term.temperature,
        weight_temperature=term.weight_temperature,
        gamma=term.gamma,
        pair_prior=pair_prior(term, comparison),
        squared_error_logits=logits if comparison.policy.mse_moves_scale else still,
    )
    return weigh_halves(term, rows)


def pair_prior(term: ClosedSetTerm, comparison: Comparison) -> Tensor | None:
    """Log-probabilities that weigh the pairs: the class's prior where an image is labelled, else its own."""
    labels, bank = comparison.targets.labels, comparison.closed_set
    if bank is None or bank.prior is None or labels is None:
        return None
    own = (comparison.class_logits() / term.weight_temperature).log_softmax(dim=-1)
    # A probability that underflowed has weight 0 at any gamma but 0; its logarithm must stay a number.
    prior = bank.prior.rows(labels).to(own.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where((labels >= 0)[:, None], prior.log(), own)


def mean_of(values: Iterable[Value]) -> Value:
    """Mean over directions of values and series."""
    numbers, parts = zip(*values, strict=True)
    return torch.stack(numbers).mean(), {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}
