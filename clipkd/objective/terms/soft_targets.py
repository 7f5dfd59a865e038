"""Terms against a teacher's distribution: GKL and its neighbours, on batch logits and on class logits."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from clipkd import distributed, losses
from clipkd.config.terms import AffinityTerm, ClosedSetTerm, DKLTerm, GKLOptions, GKLTerm, SoftTargetTerm
from clipkd.losses import SoftTargetStatistics
from clipkd.objective.comparison import Comparison, Pair, Rows, Value


def gkl(term: GKLTerm, comparison: Comparison) -> Rows:
    """Both directions; the series tell the halves apart, and KL from the teacher's entropy."""
    if comparison.is_large and term.keys == "student" and comparison.policy.mse_moves_scale:
        powers = {"weight_temperature": term.weight_temperature, "gamma": term.gamma}
        return name_rows(comparison.shared_tiles(queue=term.queue, temperature=term.temperature, **powers))
    logits = comparison.student_logits(term.keys, queue=term.queue)
    movable = logits
    if not comparison.policy.mse_moves_scale:
        image, text = comparison.cosines(term.keys, queue=term.queue)
        scale = comparison.student.logit_scale.detach()
        movable = scale * image, scale * text
    return both_directions(term, comparison, logits, movable)


def dkl(term: DKLTerm, comparison: Comparison) -> Rows:
    """GKL whose squared error does not reach the student: kept for comparison, its curve shows what GKL adds."""
    image, text = comparison.student_logits(term.keys, queue=term.queue)
    return both_directions(term, comparison, (image, text), (image.detach(), text.detach()))


def both_directions(term: GKLTerm, comparison: Comparison, logits: Pair, movable: Pair) -> Rows:
    """movable: the student's logits once more, as the squared error may move them."""
    row_statistics = comparison.tile(losses.row_statistics)
    teacher_logits = comparison.teacher_logits(0, queue=term.queue)
    return stack(
        row_statistics(
            student,
            teacher,
            temperature=term.temperature,
            weight_temperature=term.weight_temperature,
            gamma=term.gamma,
            squared_error_logits=squared,
        )
        for student, teacher, squared in zip(logits, teacher_logits, movable, strict=True)
    )


def weigh_halves(term: GKLOptions, rows: Rows) -> Value:
    """Of all queries: the squared error's weights are shares of the whole batch's."""
    weights = local_row_weights(rows["log_weight_mass"], term)
    weighted_mse = losses.weighted_squared_error(rows["variance"], weights).mean()
    factor = term.temperature**2 if term.scale_by_temperature_squared else 1.0
    value = term.ce_weight * factor * rows["soft_ce"].mean() + term.mse_weight * weighted_mse
    curves = {name: rows[name].mean() for name in ("kl", "soft_ce", "teacher_entropy")}
    return value, {"wmse": weighted_mse, **curves}


def local_row_weights(log_weight_mass: Float[Tensor, "ways b"], term: GKLOptions) -> Float[Tensor, "ways b"]:
    """This process's rows' weights, normalised over all processes, times their number since losses are averaged over them."""
    everywhere = distributed.gather_constant(log_weight_mass.T).T
    weights = torch.stack([losses.row_weights(way, term.row_weight) for way in everywhere])
    return weights.chunk(distributed.world_size(), dim=-1)[distributed.rank()] * distributed.world_size()


def stack(ways: Iterable[SoftTargetStatistics]) -> Rows:
    """The directions' statistics above each other. Soft cross-entropy is KL plus the teacher's entropy: three curves."""
    found = [vars(way) for way in ways]
    return name_rows({name: torch.stack([way[name] for way in found]) for name in found[0]})


def name_rows(rows: Rows) -> Rows:
    """Under the names of their curves."""
    return {"soft_ce" if name == "ce" else name: row for name, row in rows.items()}


def kl(term: SoftTargetTerm, comparison: Comparison) -> Rows:
    return soft_target(term, comparison, "kl")


def soft_ce(term: SoftTargetTerm, comparison: Comparison) -> Rows:
    return soft_target(term, comparison, "soft_ce")


def soft_target(term: SoftTargetTerm, comparison: Comparison, which: str) -> Rows:
    """Against the mean of all teachers' softmaxes, which of one teacher is its softmax."""
    rows = soft_target_rows(term, comparison)
    if not term.scale_by_temperature_squared:
        return {"value": rows.pop(which), **rows}  # the term itself is that series
    return {"value": term.temperature**2 * rows[which], **rows}


def soft_target_rows(term: SoftTargetTerm, comparison: Comparison) -> Rows:
    if comparison.is_large and term.keys == "student" and len(comparison.targets.teachers) == 1:
        rows = name_rows(comparison.shared_tiles(queue=term.queue, temperature=term.temperature))
        return {name: rows[name] for name in ("soft_ce", "kl", "teacher_entropy")}
    log_mean_softmax = comparison.tile(losses.log_mean_softmax)
    statistics = comparison.tile(losses.soft_target_statistics)
    numbers = range(len(comparison.targets.teachers))
    teachers = [comparison.teacher_logits(number, queue=term.queue) for number in numbers]
    return stack(
        statistics(
            logits,
            log_mean_softmax([pair[way] for pair in teachers], temperature=term.temperature),
            temperature=term.temperature,
        )
        for way, logits in enumerate(comparison.student_logits(term.keys, queue=term.queue))
    )


def affinity(term: AffinityTerm, comparison: Comparison) -> Rows:
    """Soft cross-entropy of both models' affinities at one fixed scale (TinyCLIP, arXiv 2309.12314)."""
    statistics = comparison.tile(losses.soft_target_statistics)
    student = comparison.cosines(term.keys, queue=term.queue)
    teacher = comparison.teacher_cosines(0, queue=term.queue)
    rows = stack(
        statistics(term.scale * s, (term.scale * t).log_softmax(dim=-1)) for s, t in zip(student, teacher, strict=True)
    )
    return {"value": rows["soft_ce"], **rows}


def closed_set(term: ClosedSetTerm, comparison: Comparison) -> Rows:
    """GKL of images against class prompts; a labelled image's pairs weigh by its class's prior (arXiv 2503.08038)."""
    student = comparison.student
    assert comparison.class_features is not None
    cosines = student.image @ comparison.class_features.T
    logits, still = student.logit_scale * cosines, student.logit_scale.detach() * cosines
    row_statistics = comparison.tile(losses.row_statistics)
    found = row_statistics(
        logits,
        comparison.class_logits(),
        temperature=term.temperature,
        weight_temperature=term.weight_temperature,
        gamma=term.gamma,
        pair_prior=pair_prior(term, comparison),
        squared_error_logits=logits if comparison.policy.mse_moves_scale else still,
    )
    return stack([found])


def pair_prior(term: ClosedSetTerm, comparison: Comparison) -> Tensor | None:
    """Log-probabilities that weigh the pairs: the class's prior where an image is labelled, else its own."""
    labels, bank = comparison.targets.labels, comparison.closed_set
    if bank is None or bank.prior is None or labels is None:
        return None
    own = (comparison.class_logits() / term.weight_temperature).log_softmax(dim=-1)
    # A probability that underflowed has weight 0 at any gamma but 0; its logarithm must stay a number.
    prior = bank.prior.rows(labels).to(own.dtype).clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where((labels >= 0)[:, None], prior.log(), own)
