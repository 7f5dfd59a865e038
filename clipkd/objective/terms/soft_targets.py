"""Terms against a teacher's softmax: GKL and its neighbours, on batch logits and on class logits."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from clipkd import distributed, losses
from clipkd.config.terms import AffinityTerm, ClosedSetTerm, GKLTerm, KLTerm
from clipkd.objective.comparison import Comparison, Pairs, Rows, directions, gather_constants, logits
from clipkd.objective.entry import term

AFFINITY_SCALE = 50.0
"""TinyCLIP's fixed logit scale of both sides."""


@term(GKLTerm)
def gkl(options: GKLTerm, batch: Comparison) -> Rows:
    return weigh_halves(statistics(batch, temperature=options.temperature, gamma=options.gamma), batch)


@term(KLTerm)
def kl(options: KLTerm, batch: Comparison) -> Rows:
    """Against the mean of all teachers' softmaxes. Soft cross-entropy has the same gradient and is a series."""
    one = len(batch.targets.teachers) == 1
    rows = statistics(batch, temperature=options.temperature) if one else ensemble_statistics(options, batch)
    return {"value": rows["kl"], **{name: rows[name] for name in ("soft_ce", "teacher_entropy")}}


@term(AffinityTerm)
def affinity(_: AffinityTerm, batch: Comparison) -> Rows:
    """Soft cross-entropy of both models' affinities at one fixed scale (TinyCLIP, arXiv 2309.12314)."""
    rows = statistics(batch, scale=AFFINITY_SCALE, teacher_scale=AFFINITY_SCALE)
    return {"value": rows["soft_ce"], **{name: rows[name] for name in ("kl", "soft_ce", "teacher_entropy")}}


def statistics(
    batch: Comparison,
    *,
    scale: Tensor | float | None = None,
    teacher_scale: Tensor | float | None = None,
    **powers: Any,
) -> Rows:
    """`losses.query_statistics` of both directions, student and first teacher at their own logit scales by default."""
    ways = zip(directions(*batch.candidates), directions(batch.teacher, batch.teacher_candidates), strict=True)
    return stack(
        losses.query_statistics(
            *student,
            *teacher,
            logit_scale=batch.student.logit_scale if scale is None else scale,
            teacher_logit_scale=batch.teacher_scale() if teacher_scale is None else teacher_scale,
            tile_size=batch.objective.tile_size,
            compiled=batch.objective.compile,
            **powers,
        )
        for student, teacher in ways
    )


def stack(ways: Any) -> Rows:
    """The statistics of each direction above each other, cross-entropy under the name of its series."""
    found = [vars(way) for way in ways]
    rows = {name: [way[name] for way in found] for name in found[0]}
    return {"soft_ce" if name == "ce" else name: torch.stack(values) for name, values in rows.items()}


def ensemble_statistics(options: KLTerm, batch: Comparison) -> Rows:
    """Of the mean softmax of several teachers, each at its own scale (MobileCLIP)."""
    queries, keys = batch.candidates
    teachers = batch.targets.teachers
    teacher_keys = [gather_constants(teacher) for teacher in teachers]
    log_mean_softmax = batch.tile(losses.log_mean_softmax)
    soft_target_statistics = batch.tile(losses.soft_target_statistics)

    def compute(image: Tensor, text: Tensor, *sides: Tensor) -> Rows:
        wanted = [
            logits(Pairs(*sides[2 * number : 2 * number + 2]), their_keys, batch.teacher_scale(number))
            for number, their_keys in enumerate(teacher_keys)
        ]
        temperature = {"temperature": options.temperature}
        return stack(
            soft_target_statistics(
                student, log_mean_softmax([ways[way] for ways in wanted], **temperature), **temperature
            )
            for way, student in enumerate(logits(Pairs(image, text), keys, batch.student.logit_scale))
        )

    sides = [side for teacher in teachers for side in teacher[:2]]
    return batch.in_panels(compute, *queries[:2], *sides, num_columns=len(keys.text))


@term(ClosedSetTerm)
def closed_set(_: ClosedSetTerm, batch: Comparison) -> Rows:
    """GKL of images against class prompts; a labelled image's pairs weigh by its class's prior (arXiv 2503.08038)."""
    bank, classes, options = batch.closed_set, batch.class_features, batch.objective.gkl
    row_statistics = batch.tile(losses.row_statistics)
    assert bank is not None
    assert classes is not None
    rows = [batch.student.image, batch.teacher.image]
    rows += [] if bank.prior is None or batch.targets.labels is None else [batch.targets.labels]

    def compute(image: Tensor, teacher_image: Tensor, *labels: Tensor) -> Rows:
        wanted = batch.teacher_scale() * teacher_image @ bank.teacher_classes.T
        prior = None
        if labels and bank.prior is not None:
            own = wanted.log_softmax(dim=-1)
            # A probability that underflowed has weight 0 at any gamma but 0; its logarithm must stay a number.
            of_class = bank.prior.rows(labels[0]).to(own.dtype).clamp(min=torch.finfo(torch.float32).tiny)
            prior = torch.where((labels[0] >= 0)[:, None], of_class.log(), own)
        student = batch.student.logit_scale * image @ classes.T
        powers = {name: getattr(options, name) for name in ("temperature", "gamma")}
        return stack([row_statistics(student, wanted, **powers, pair_prior=prior)])

    return weigh_halves(batch.in_panels(compute, *rows, num_columns=len(classes)), batch)


def weigh_halves(rows: Rows, batch: Comparison) -> Rows:
    """GKL of each query from its statistics, with the weights of objective.gkl."""
    options = batch.objective.gkl
    wmse = 0.5 * local_row_weights(rows["log_weight_mass"]) * rows["variance"]
    value = options.ce_weight * rows["soft_ce"] + options.mse_weight * wmse
    series = {name: rows[name] for name in ("kl", "soft_ce", "teacher_entropy")}
    return {"value": value, "wmse": wmse, **series}


def local_row_weights(log_weight_mass: Float[Tensor, "ways b"]) -> Float[Tensor, "ways b"]:
    """Weights of this process's queries in the squared error, whose mean over the queries of all processes is 1."""
    everywhere = distributed.gather_constant(log_weight_mass.T).T
    weights = torch.stack([losses.row_weights(way) for way in everywhere]) * everywhere.shape[1]
    return weights.chunk(distributed.world_size(), dim=-1)[distributed.rank()]
