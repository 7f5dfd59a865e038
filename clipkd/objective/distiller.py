"""The objective on one batch: everything trainable in one module, every loss term by its name in the configuration."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipkd import distributed
from clipkd.config.objective import ObjectiveConfig
from clipkd.models.encoder import Encoder
from clipkd.objective.closed_set import ClosedSet
from clipkd.objective.comparison import Comparison, Pair, Rows, Targets
from clipkd.objective.memory import ClassPrior, FeatureQueue
from clipkd.objective.terms import OWN_SCALES, TERMS, Metrics
from clipkd.views import Features, View

FRESH_LOG_SCALE = math.log(1 / 0.07)


class Distiller(nn.Module):
    """The student, with the projections and the scales that it trains with.

    Teachers stay outside: they are frozen, need no gradient synchronisation and no place in the checkpoint. Where
    widths differ and a term compares features of both models, the student's features pass through a linear map first.
    The queue and the class prior are in `memory`, apart from the weights: DDP must not send them at every step.

    Raises: ValueError if a term needs equal widths, they differ, and objective.projection is none.
    """

    def __init__(
        self,
        student: Encoder,
        objective: ObjectiveConfig,
        *,
        teacher_dim: int | None,
        closed_set: ClosedSet | None = None,
        device: torch.device | None = None,
    ) -> None:
        """teacher_dim: width of the first teacher's features; None without one. device: where batches will come from."""
        super().__init__()
        self.student, self.objective, self.closed_set = student, objective, closed_set
        self.active = objective.active()
        self.image_projection: nn.Module = nn.Identity()
        self.text_projection: nn.Module = nn.Identity()
        compares = any(term.compares_features for term in self.active.values())
        if teacher_dim not in (None, student.dim) and compares:
            if objective.projection == "none":
                raise ValueError(
                    f"the student is {student.dim} wide, the teacher {teacher_dim}, and objective.projection is none; "
                    "set objective.projection to linear, or use student keys and no feature term"
                )
            self.image_projection = nn.Linear(student.dim, teacher_dim, bias=False)
            self.text_projection = nn.Linear(student.dim, teacher_dim, bias=False)
        if "afd" in self.active:
            assert teacher_dim is not None
            self.image_fusion = nn.Linear(2 * teacher_dim, student.dim)
            self.text_fusion = nn.Linear(2 * teacher_dim, student.dim)
        own = sorted({scale for name in self.active for scale in OWN_SCALES.get(name, ())})
        self.scales = nn.ParameterDict(
            {f"{name}_logit_scale": nn.Parameter(torch.tensor(FRESH_LOG_SCALE)) for name in own}
        )
        self.prepare_logit_scale()
        widths = {"teacher": teacher_dim, "momentum": student.dim}
        rings = {f"{whose}_{side}": widths[whose] for whose in sorted(objective.queues) for side in ("image", "text")}
        self.queue = None
        if rings:
            self.queue = FeatureQueue(objective.queue.capacity, rings, device=device or torch.device("cpu"))  # type: ignore[arg-type]
        self.pending: dict[str, Tensor] = {}
        self.num_pairs: int | None = None
        """Of each process's share of a batch, once the processes have agreed."""

    def prepare_logit_scale(self) -> None:
        """Start and freeze the student's scale and bias as the policy and the terms ask."""
        model: Any = self.student.model
        policy = self.objective.logit_scale
        if policy.init is not None:
            model.logit_scale.data.fill_(math.log(policy.init))
        scale = model.logit_scale.detach().exp().item()
        if not policy.minimum * (1 - 1e-3) <= scale <= policy.maximum * (1 + 1e-3):
            raise ValueError(
                f"the student's logit scale is {scale:.4g} at first, outside objective.logit_scale.minimum and maximum, "
                f"{policy.minimum:g} and {policy.maximum:g}; widen them, or set objective.logit_scale.init"
            )
        # DDP waits for the gradient of every parameter that asks for one; a softmax does not see the bias of SigLIP models.
        reached = any(term.trains_logit_scale(mse_moves_scale=policy.mse_moves_scale) for term in self.active.values())
        model.logit_scale.requires_grad_(policy.learned and reached)
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias.requires_grad_(self.objective.needs_bias)

    @property
    def needs_momentum(self) -> bool:
        return any(term.needs_momentum for term in self.active.values())

    def prompts_at(self, step: int) -> Int[Tensor, "k t"] | None:
        """Class prompts that the student reads at a step, if the objective has any."""
        return None if self.closed_set is None else self.closed_set.prompts_at(step)

    def forward(
        self, view: View, prompts: Int[Tensor, "k t"] | None = None
    ) -> tuple[Features, Float[Tensor, "k d"] | None]:
        """The towers alone, which is what DDP and autocast need to see: features of a view, and of class prompts."""
        model = self.student
        text = self.text_features(view.texts) if view.text_features is None else view.text_features
        features = Features(model.encode_image(view.images), text, model.logit_scale, model.logit_bias)
        return features, None if prompts is None else self.text_features(prompts)

    def text_features(self, texts: Int[Tensor, "n t"]) -> Float[Tensor, "n d"]:
        """The student's, of captions and of class prompts."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.student.text_is_frozen):
            return self.student.encode_text(texts)

    def loss(
        self, student: Features, targets: Targets, *, step: int = 0, class_features: Float[Tensor, "k d"] | None = None
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Weighted sum of the terms that are on, and all that is worth a curve (unweighted, detached).

        Both are this process's share of the batch: the mean over processes is the loss of the global batch. step:
        completed optimizer steps, for warm-ups and ramps.

        Raises: ValueError if the processes bring different numbers of pairs.
        """
        self.require_even_batch(len(student.image))
        with torch.autocast(student.image.device.type, enabled=False):  # bf16 logits are off by 13 %
            return self.combine(self.compare(student, detach(targets), step=step, class_features=class_features))

    def compare(
        self, student: Features, targets: Targets, *, step: int, class_features: Float[Tensor, "k d"] | None
    ) -> Comparison:
        projected = self.project(student) if targets.teachers else student
        return Comparison(
            student=student,
            projected=projected,
            targets=targets,
            queue=self.queue,
            policy=self.objective.logit_scale,
            scales={name.removesuffix("_logit_scale"): scale.exp() for name, scale in self.scales.items()},
            fused=self.fuse(projected, targets.teachers[0]) if "afd" in self.active else None,
            closed_set=self.closed_set,
            class_features=class_features,
            step=step,
            tile_size=self.objective.tile_size,
            compiled=self.objective.compile,
        )

    def combine(self, comparison: Comparison) -> tuple[Float[Tensor, ""], Metrics]:
        step, student = comparison.step, comparison.student
        rows = comparison.in_panels(self.rows)
        metrics: Metrics = {"logit_scale": student.logit_scale}
        if self.objective.needs_bias and student.logit_bias is not None:
            metrics["logit_bias"] = student.logit_bias
        metrics |= {f"{name}_logit_scale": scale for name, scale in comparison.scales.items()}
        total: list[Tensor] = []
        for name, term in self.active.items():
            own = {key.removeprefix(f"{name}/"): value for key, value in rows.items() if key.startswith(f"{name}/")}
            value, parts = TERMS[name].value(term, own)
            total.append(term.factor(step) * value)
            metrics |= {name: value, **{f"{name}_{part}": number for part, number in parts.items()}}
        if comparison.uses_teacher_scale:
            metrics["teacher_logit_scale"] = torch.as_tensor(comparison.teacher_scale(0), device=student.image.device)
        self.remember(comparison)
        loss = torch.stack(total).sum()
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in metrics.items()}}

    def rows(self, comparison: Comparison) -> Rows:
        """Every term's, under TERM/NAME."""
        return {
            f"{name}/{key}": row
            for name, term in self.active.items()
            for key, row in TERMS[name].rows(term, comparison).items()
        }

    def require_even_batch(self, num_pairs: int) -> None:
        """Raises: ValueError. Collectives on rows of different numbers would hang or mix them up."""
        if distributed.world_size() == 1 or num_pairs == self.num_pairs:
            return
        if self.num_pairs is not None:
            raise ValueError(
                f"this process's batch has {num_pairs} pairs, those before had {self.num_pairs}; on several processes all "
                "batches need one size"
            )
        counts = distributed.gather_objects(num_pairs)
        if len(set(counts)) > 1:
            raise ValueError(f"the processes bring {counts} pairs; every batch needs the same number on every process")
        self.num_pairs = num_pairs

    def project(self, student: Features) -> Features:
        """The student's features in the teacher's space, normalised again if anything was done to them."""
        if isinstance(self.image_projection, nn.Identity):
            return student
        return student._replace(
            image=F.normalize(self.image_projection(student.image), dim=-1),
            text=F.normalize(self.text_projection(student.text), dim=-1),
        )

    def fuse(self, projected: Features, teacher: Features) -> Pair:
        """AFD's fused features: both models' side by side through a linear map, of unit norm."""
        image = self.image_fusion(torch.cat([projected.image, teacher.image], dim=-1))
        text = self.text_fusion(torch.cat([projected.text, teacher.text], dim=-1))
        return F.normalize(image, dim=-1), F.normalize(text, dim=-1)

    @torch.no_grad()
    def remember(self, comparison: Comparison) -> None:
        """Set aside what the queue and the class prior shall take up once the step is good: the same on every process."""
        self.pending = {}
        if self.queue is not None:
            self.pending["ids"] = comparison.all_ids
            for whose in sorted(self.objective.queues):  # this may be the first to gather: the same order everywhere
                image, text = comparison.batch_keys("teacher" if whose == "teacher" else "momentum")
                self.pending |= {f"{whose}_image": image, f"{whose}_text": text}
        if self.closed_set is not None and self.closed_set.prior is not None:
            assert comparison.targets.labels is not None
            probabilities = (comparison.class_logits() / self.objective.closed_set.weight_temperature).softmax(dim=-1)
            self.pending["labels"] = distributed.gather_constant(comparison.targets.labels)
            self.pending["class_probabilities"] = distributed.gather_constant(probabilities)

    @torch.no_grad()
    def finish_step(self) -> None:
        """After the optimizer's step: keep the scales in bounds, and let the queue and the class prior take up the batch.

        Not before the backward pass, which may read both again.
        """
        policy = self.objective.logit_scale
        for scale in (self.student.model.logit_scale, *self.scales.values()):
            # A fixed scale is within these bounds from the start; the terms' own scales know no other policy.
            scale.clamp_(math.log(policy.minimum), math.log(policy.maximum))  # type: ignore[operator]
        # Push after the loss: pushed first, every pair of this batch would stand twice among its own candidates.
        if self.queue is not None:
            self.queue.push(self.pending["ids"], {name: self.pending[name] for name in self.queue.rings})
        if self.closed_set is not None and self.closed_set.prior is not None:
            self.closed_set.prior.update(self.pending["labels"], self.pending["class_probabilities"])
        self.pending = {}

    def memory(self) -> dict[str, Tensor]:
        """State beyond weights, for a checkpoint."""
        return {
            f"{part}/{name}": tensor
            for part, state in self.memories().items()
            for name, tensor in state.tensors().items()
        }

    def load_memory(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises: ValueError if the stored state is of another objective."""
        for part, state in self.memories().items():
            state.load({name.removeprefix(f"{part}/"): t for name, t in tensors.items() if name.startswith(f"{part}/")})

    def memories(self) -> dict[str, FeatureQueue | ClassPrior]:
        prior = None if self.closed_set is None else self.closed_set.prior
        return {name: state for name, state in (("queue", self.queue), ("class_prior", prior)) if state is not None}


def detach(targets: Targets) -> Targets:
    momentum = None if targets.momentum is None else targets.momentum.detach()
    return targets._replace(teachers=tuple(teacher.detach() for teacher in targets.teachers), momentum=momentum)


@runtime_checkable
class FrozenTeacher(Protocol):
    """What the objective asks of a teacher besides its features."""

    @property
    def name(self) -> str: ...

    @property
    def logit_bias(self) -> Tensor | None: ...


def require_fitting_teachers(objective: ObjectiveConfig, teachers: Sequence[FrozenTeacher]) -> None:
    """Raises: ValueError if a term wants another kind of teacher: one trained with a softmax, or with a sigmoid (SigLIP)."""
    for number, teacher in enumerate(teachers):
        option = f"teacher.models[{number}]"
        sigmoid = teacher.logit_bias is not None
        for name, term in objective.active().items():
            if sigmoid and term.softens_teacher:
                raise ValueError(
                    f"objective.{name} takes a softmax of the teacher's logits, but {option} {teacher.name} was trained "
                    "with a sigmoid (it has a logit_bias); use objective.soft_bce, or feature terms (features, icl, afd)"
                )
            if name == "soft_bce" and not sigmoid:
                raise ValueError(
                    f"objective.soft_bce needs a sigmoid teacher (SigLIP), but {option} {teacher.name} has no logit_bias; "
                    "use objective.kl or gkl"
                )
