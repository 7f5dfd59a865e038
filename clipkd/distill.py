"""The objective on one batch: everything trainable in one module, every loss term by its name in the configuration."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from clipkd import distributed, losses
from clipkd.config import GKLConfig, ObjectiveConfig, SoftTargetConfig
from clipkd.models import Encoder
from clipkd.views import Features, View

Metrics = dict[str, Tensor]


@dataclass(frozen=True)
class Direction:
    """One retrieval direction: this process's queries against the keys of all processes."""

    student_logits: Float[Tensor, "b B"]
    teacher_logits: Float[Tensor, "b B"] | None


class Distiller(nn.Module):
    """The student, with the projections and the scale that it trains with.

    The teacher stays outside: it is frozen, needs no gradient synchronisation and no place in the checkpoint. Where
    widths differ and a term compares features of both models, the student's features pass through a linear map first.

    Raises: ValueError if a term needs equal widths, they differ, and objective.projection is none.
    """

    def __init__(self, student: Encoder, objective: ObjectiveConfig, *, teacher_dim: int | None) -> None:
        super().__init__()
        self.student, self.objective = student, objective
        self.image_projection: nn.Module = nn.Identity()
        self.text_projection: nn.Module = nn.Identity()
        if teacher_dim not in (None, student.dim) and self.compares_features():
            if objective.projection == "none":
                raise ValueError(
                    f"the student is {student.dim} wide, the teacher {teacher_dim}, and objective.projection is none; "
                    "set objective.projection to linear, or use student keys and no feature term"
                )
            self.image_projection = nn.Linear(student.dim, teacher_dim, bias=False)
            self.text_projection = nn.Linear(student.dim, teacher_dim, bias=False)
        # DDP waits for the gradient of every parameter that asks for one; a softmax does not see the bias of SigLIP models.
        if not self.uses_logits():
            student.model.logit_scale.requires_grad_(False)
        if getattr(student.model, "logit_bias", None) is not None:
            student.model.logit_bias.requires_grad_(False)

    def compares_features(self) -> bool:
        """Whether a term sets the student's features beside the teacher's, which takes equal widths."""
        return self.objective.features.weight > 0 or any(term.keys == "teacher" for term in self.logit_terms().values())

    def uses_logits(self) -> bool:
        return self.objective.info_nce.weight > 0 or bool(self.logit_terms())

    def forward(self, view: View, teacher: Features | None) -> tuple[Float[Tensor, ""], Metrics]:
        """This process's share of the batch → (loss, terms). The mean over processes is the loss of the global batch.

        Terms are unweighted and detached. teacher: its features of the same pairs; None without a teacher.
        """
        student = self.student.features(view)
        with torch.autocast(view.images.device.type, enabled=False):  # bf16 logits are off by 13 %
            return self.loss(student, teacher)

    def loss(self, student: Features, teacher: Features | None) -> tuple[Float[Tensor, ""], Metrics]:
        """Weighted sum of the terms whose weight is not 0, and all that is worth a curve."""
        o = self.objective
        metrics: Metrics = {"logit_scale": student.logit_scale.detach()}
        terms: list[tuple[float, str, Tensor]] = []
        projected = student
        if teacher is not None:
            teacher = Features(*(tensor.detach() for tensor in teacher))
            metrics["teacher_logit_scale"] = teacher.logit_scale
            projected = self.project(student)
        keyed = self.directions(student, projected, teacher)
        if o.info_nce.weight:
            terms.append((o.info_nce.weight, "info_nce", info_nce(keyed["student"])))
        for name, term in self.logit_terms().items():
            value, parts = logit_term(name, term, keyed[term.keys])
            terms.append((term.weight, name, value))
            metrics |= parts
        if o.features.weight:
            assert teacher is not None
            mse = losses.feature_mse(projected.image, teacher.image) + losses.feature_mse(projected.text, teacher.text)
            terms.append((o.features.weight, "features", mse))
        total = torch.stack([weight * value for weight, _, value in terms]).sum()
        return total, {"loss": total.detach(), **{name: value.detach() for _, name, value in terms}, **metrics}

    def logit_terms(self) -> dict[str, GKLConfig | SoftTargetConfig]:
        """The distillation terms on logits that are switched on, by name."""
        o = self.objective
        return {name: term for name, term in (("gkl", o.gkl), ("kl", o.kl), ("soft_ce", o.soft_ce)) if term.weight}

    def project(self, student: Features) -> Features:
        """The student's features in the teacher's space, normalised again if anything was done to them."""
        if isinstance(self.image_projection, nn.Identity):
            return student
        return student._replace(
            image=F.normalize(self.image_projection(student.image), dim=-1),
            text=F.normalize(self.text_projection(student.text), dim=-1),
        )

    def directions(
        self, student: Features, projected: Features, teacher: Features | None
    ) -> dict[str, list[Direction]]:
        """Logits of both directions for each kind of keys that a term uses.

        student: queries and keys are the student's. teacher: the student's queries, projected, against the teacher's
        features of the other modality, at the student's logit scale. The target is the teacher's own logits in both.
        """
        kinds = {term.keys for term in self.logit_terms().values()}
        teacher_keys, targets = None, (None, None)
        if kinds:
            assert teacher is not None
            teacher_keys = gather_features(teacher, distributed.gather_constant)
            targets = logits(teacher, teacher_keys)
        keyed = {}
        if "student" in kinds or self.objective.info_nce.weight:
            student_keys = gather_features(student, distributed.gather)
            keyed["student"] = list(map(Direction, logits(student, student_keys), targets))
        if "teacher" in kinds:
            assert teacher_keys is not None
            keyed["teacher"] = list(map(Direction, logits(projected, teacher_keys), targets))
        return keyed


def gather_features(features: Features, gather: Callable[[Tensor], Tensor]) -> Features:
    return features._replace(image=gather(features.image), text=gather(features.text))


def logits(queries: Features, keys: Features) -> tuple[Float[Tensor, "b B"], Float[Tensor, "b B"]]:
    """Image→text and text→image, at the queries' logit scale."""
    return queries.logit_scale * queries.image @ keys.text.T, queries.logit_scale * queries.text @ keys.image.T


def info_nce(pair: list[Direction]) -> Float[Tensor, ""]:
    b = len(pair[0].student_logits)
    positives = torch.arange(b, device=pair[0].student_logits.device) + distributed.rank() * b
    return torch.stack([losses.info_nce(direction.student_logits, positives) for direction in pair]).mean()


def logit_term(name: str, term: GKLConfig | SoftTargetConfig, pair: list[Direction]) -> tuple[Tensor, Metrics]:
    """Mean of both directions, and the series that explain it: KL and the teacher's entropy, which soft CE would hide."""
    values, parts = zip(*(one_direction(name, term, direction) for direction in pair), strict=True)
    return torch.stack(values).mean(), {key: torch.stack([part[key] for part in parts]).mean() for key in parts[0]}


def one_direction(name: str, term: GKLConfig | SoftTargetConfig, direction: Direction) -> tuple[Tensor, Metrics]:
    student_logits, teacher_logits = direction.student_logits, direction.teacher_logits
    assert teacher_logits is not None
    factor = term.temperature**2 if term.scale_by_temperature_squared else 1.0
    if isinstance(term, GKLConfig):
        rows = losses.row_statistics(
            student_logits,
            teacher_logits,
            temperature=term.temperature,
            weight_temperature=term.weight_temperature,
            gamma=term.gamma,
        )
        weighted_mse = losses.weighted_squared_error(rows, local_row_weights(rows.log_weight_mass, term))
        value = term.ce_weight * factor * rows.ce.mean() + term.mse_weight * weighted_mse
        extra = {f"{name}_wmse": weighted_mse.detach()}
    else:
        rows = losses.row_statistics(student_logits, teacher_logits, temperature=term.temperature)
        value = factor * (rows.kl if name == "kl" else rows.ce).mean()
        extra = {}
    if name != "kl":
        extra[f"{name}_kl"] = rows.kl.mean().detach()
    return value, {**extra, f"{name}_teacher_entropy": rows.teacher_entropy.mean()}


def local_row_weights(log_weight_mass: Float[Tensor, "b"], term: GKLConfig) -> Float[Tensor, "b"]:
    """This process's rows' weights, normalised over all processes, times their number since losses are averaged over them."""
    weights = losses.row_weights(distributed.gather_constant(log_weight_mass), term.row_weight)
    return weights.chunk(distributed.world_size())[distributed.rank()] * distributed.world_size()
