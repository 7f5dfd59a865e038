"""The objective on one batch: the student with all that is trained beside it, and the weighted sum of the loss terms."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

import clipkd.objective.terms  # noqa: F401, fills TERMS
from clipkd import distributed, losses
from clipkd.config.objective import MIN_LOGIT_SCALE, ObjectiveConfig
from clipkd.models.encoder import Encoder
from clipkd.objective.closed_set import ClosedSet
from clipkd.objective.comparison import Comparison, Targets
from clipkd.objective.entry import TERMS
from clipkd.objective.memory import ClassPrior, FeatureQueue
from clipkd.views import Features, View

INITIAL_LOG_SCALE = math.log(1 / 0.07)

Metrics = dict[str, Tensor]


class Distiller(nn.Module):
    """The student, with the projections, modules and logit scales that the loss terms train beside it.

    Teachers stay outside: they are frozen and need neither gradient synchronisation nor a place in the checkpoint. Where
    widths differ and a term compares features of both models, the student's features pass through a linear map first.
    The queue and the class prior are no module's buffers: DDP would send them at every step.
    """

    def __init__(
        self,
        student: Encoder,
        objective: ObjectiveConfig,
        *,
        teacher_dim: int | None,
        queue_capacity: int = 0,
        closed_set: ClosedSet | None = None,
        device: torch.device | None = None,
        images_alone: bool = False,
    ) -> None:
        """teacher_dim: width of the first teacher's features; None without one. queue_capacity: pairs, if objective.queue
        is on. device: where batches will come from. images_alone: without captions every image stands for its own.

        Raises: ValueError if the student's logit scale is out of bounds.
        """
        super().__init__()
        self.student, self.objective, self.closed_set = student, objective, closed_set
        self.active, self.images_alone = objective.active(), images_alone
        compares = any(objective.keys_of(term) == "teacher" for term in self.active.values())
        self.image_projection: nn.Module = nn.Identity()
        self.text_projection: nn.Module = nn.Identity()
        if teacher_dim not in (None, student.dim) and compares:
            self.image_projection = nn.Linear(student.dim, teacher_dim, bias=False)
            self.text_projection = self.image_projection
            if not images_alone:
                self.text_projection = nn.Linear(student.dim, teacher_dim, bias=False)
        self.term_modules, scales = nn.ModuleDict(), set[str]()
        for term in self.active.values():
            self.term_modules.update(TERMS[type(term)].modules(student.dim, teacher_dim or student.dim))
            scales.update(term.asks.own_scales)
        self.scales = nn.ParameterDict(
            {f"{name}_logit_scale": nn.Parameter(torch.tensor(INITIAL_LOG_SCALE)) for name in sorted(scales)}
        )
        self.prepare_logit_scale()
        self.queue = None
        if objective.queues:
            widths = {"teacher": teacher_dim or student.dim, "momentum": student.dim}
            rings = {f"{ring}_{side}": widths[ring] for ring in objective.queues for side in ("image", "text")}
            self.queue = FeatureQueue(queue_capacity, rings, device=device or torch.device("cpu"))
        self.staged: dict[str, Tensor] = {}
        self.num_pairs: int | None = None
        """Of each process's share of a batch, once the processes have agreed."""

    def prepare_logit_scale(self) -> None:
        """Start and freeze the student's scale and bias as the policy and the terms ask."""
        model: Any = self.student.model
        policy = self.objective.logit_scale
        if policy.init is not None:
            model.logit_scale.data.fill_(math.log(policy.init))
        scale = model.logit_scale.detach().exp().item()
        if not MIN_LOGIT_SCALE * (1 - 1e-3) <= scale <= policy.maximum * (1 + 1e-3):
            raise ValueError(
                f"the student's logit scale is {scale:.4g} at first, outside {MIN_LOGIT_SCALE:g} and "
                f"objective.logit_scale.maximum, {policy.maximum:g}; raise maximum, or set objective.logit_scale.init"
            )
        # DDP waits for the gradient of every parameter that asks for one; a softmax does not see the bias of SigLIP models.
        model.logit_scale.requires_grad_(policy.learned and any(t.asks.model_scales for t in self.active.values()))
        if getattr(model, "logit_bias", None) is not None:
            model.logit_bias.requires_grad_(self.objective.needs_bias)

    @property
    def needs_momentum(self) -> bool:
        return any(self.objective.needs_momentum(term) for term in self.active.values())

    def prompts_at(self, step: int) -> Int[Tensor, "k t"] | None:
        """Class prompts that the student reads at a step on this process, if the objective has any."""
        return None if self.closed_set is None else self.closed_set.prompts_at(step)

    def forward(
        self, view: View, prompts: Int[Tensor, "k t"] | None = None
    ) -> tuple[Features, Float[Tensor, "k d"] | None]:
        """The towers alone, which is what DDP and autocast need to see: features of a view, and of class prompts."""
        return self.student.features(view), None if prompts is None else self.student.encode_text(prompts)

    def loss(
        self, student: Features, targets: Targets, *, step: int = 0, class_features: Float[Tensor, "k d"] | None = None
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """Weighted sum of the terms that are on, and all that is worth a curve (unweighted, detached).

        Both are this process's share of the batch: the mean over processes is the loss of the global batch. step:
        completed optimizer steps, for warm-ups and ramps. class_features: of this process's share of the class prompts.

        Raises: ValueError if the processes bring different numbers of pairs.
        """
        self.require_even_batch(len(student.image))
        with torch.autocast(student.image.device.type, enabled=False):  # bf16 logits are off by 13 %
            batch = self.compare(student, targets, step=step, class_features=class_features)
            total: list[Tensor] = []
            metrics: Metrics = {}
            for name, term in self.active.items():
                rows = TERMS[type(term)].rows(term, batch)
                metrics |= {name if key == "value" else f"{name}_{key}": row.mean() for key, row in rows.items()}
                total.append(self.objective.weight_at(term, step) * metrics[name])
            loss = torch.stack(total).sum()
            self.stage(batch)
        metrics |= {"loss": loss, **self.scale_metrics(batch)}
        return loss, {name: value.detach() for name, value in metrics.items()}

    def compare(
        self, student: Features, targets: Targets, *, step: int, class_features: Float[Tensor, "k d"] | None
    ) -> Comparison:
        if self.images_alone:
            student = student._replace(text=student.image)
            targets = targets._replace(teachers=tuple(one._replace(text=one.image) for one in targets.teachers))
        if class_features is not None and self.closed_set is not None:
            class_features = distributed.gather(class_features)[: len(self.closed_set.teacher_classes)]
        return Comparison(
            student=student,
            projected=self.project(student) if targets.teachers else student,
            targets=targets._replace(
                teachers=tuple(teacher.detach() for teacher in targets.teachers),
                momentum=None if targets.momentum is None else targets.momentum.detach(),
            ),
            objective=self.objective,
            queue=self.queue,
            scales={name.removesuffix("_logit_scale"): scale.exp() for name, scale in self.scales.items()},
            modules=self.term_modules,
            closed_set=self.closed_set,
            class_features=class_features,
            step=step,
        )

    def scale_metrics(self, batch: Comparison) -> Metrics:
        """Logit scales and biases of this step."""
        metrics = {"logit_scale": batch.student.logit_scale}
        metrics |= {f"{name}_logit_scale": scale for name, scale in batch.scales.items()}
        if self.objective.needs_bias and batch.student.logit_bias is not None:
            metrics["logit_bias"] = batch.student.logit_bias
        if self.objective.uses_teacher_scale:
            metrics["teacher_logit_scale"] = batch.teacher_scale()
        return metrics

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

    @torch.no_grad()
    def stage(self, batch: Comparison) -> None:
        """Stage this batch's keys for the queue and the class prior; `finish_step` commits them if the step succeeded."""
        self.staged = {}
        if self.queue is not None:
            self.staged["ids"] = batch.batch_ids
            for ring in self.objective.queues:
                keys = batch.teacher_keys if ring == "teacher" else batch.momentum_keys
                self.staged |= {f"{ring}_image": keys.image, f"{ring}_text": keys.text}
        if self.closed_set is not None and self.closed_set.prior is not None:
            assert batch.targets.labels is not None
            logits = batch.teacher_scale() * batch.teacher.image @ self.closed_set.teacher_classes.T
            probabilities = logits.softmax(dim=-1)
            self.staged["labels"] = distributed.gather_constant(batch.targets.labels)
            self.staged["class_probabilities"] = distributed.gather_constant(probabilities)

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """After the optimizer's step. A fixed scale is within the bounds from the start."""
        for scale in (self.student.model.logit_scale, *self.scales.values()):
            scale.clamp_(math.log(MIN_LOGIT_SCALE), math.log(self.objective.logit_scale.maximum))  # type: ignore[operator]

    @torch.no_grad()
    def finish_step(self) -> None:
        """Commit what `stage` prepared. Not before the backward pass, which may read queue and class prior again."""
        # Push after the loss: pushed first, every pair of this batch would stand twice among its own candidates.
        if self.queue is not None:
            self.queue.push(self.staged["ids"], {name: self.staged[name] for name in self.queue.rings})
        if self.closed_set is not None and self.closed_set.prior is not None:
            self.closed_set.prior.update(self.staged["labels"], self.staged["class_probabilities"])
        self.staged = {}

    def describe_logits(self, batch_size: int) -> str:
        """Size of a process's largest matrix of batch logits once the queue is full, and how much of it is formed at once."""
        rows = batch_size // distributed.world_size()
        columns = batch_size + (0 if self.queue is None else self.queue.capacity)
        height = min(rows, losses.panel_height(columns, self.student.logit_scale.device, self.objective.tile_size))
        return f"{rows:,} × {columns:,} logits, {height:,} rows at a time"

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


@runtime_checkable
class FrozenTeacher(Protocol):
    """What the objective asks of a teacher besides its features."""

    @property
    def name(self) -> str: ...

    @property
    def logit_bias(self) -> Tensor | float | None: ...


def require_fitting_teachers(objective: ObjectiveConfig, teachers: Sequence[FrozenTeacher]) -> None:
    """Raises: ValueError if a term wants another kind of teacher: one trained with a softmax, or with a sigmoid (SigLIP)."""
    for number, teacher in enumerate(teachers):
        option = f"teacher.models[{number}]"
        sigmoid = teacher.logit_bias is not None
        for name, term in objective.active().items():
            if sigmoid and term.asks.teacher_logits == "softmax":
                raise ValueError(
                    f"objective.{name} takes a softmax of the teacher's logits, but {option} {teacher.name} was trained "
                    "with a sigmoid (it has a logit_bias); use objective.soft_bce, or feature terms (features, icl, afd)"
                )
            if term.asks.teacher_logits == "sigmoid" and not sigmoid:
                raise ValueError(
                    f"objective.{name} needs a sigmoid teacher (SigLIP), but {option} {teacher.name} has no logit_bias; "
                    "use objective.kl or gkl"
                )
