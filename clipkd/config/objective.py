"""The objective's options: every loss term under the name by which it is logged, logit scales and queue."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from clipkd.config.terms import (
    AffinityTerm,
    ClosedSetTerm,
    DKLTerm,
    FeatureTerm,
    GKLTerm,
    GradientTerm,
    InfoNCETerm,
    InteractiveTerm,
    MixedTargetTerm,
    SigmoidTerm,
    SoftBCETerm,
    SoftTargetTerm,
    Term,
)
from clipkd.errors import require


@dataclass(frozen=True, kw_only=True)
class LogitScaleConfig:
    """One policy for the multiplier of the cosines, on both sides."""

    init: float | None = None
    """The student's logit scale at the start; null keeps its model's (1/0.07 for a fresh one)."""
    learned: bool = True
    """Whether the student's logit scale is trained; false keeps it fixed."""
    minimum: float = 1.0
    """Smallest logit scale that training may reach."""
    maximum: float = 100.0
    """Largest logit scale that training may reach (CLIP: 100)."""
    teacher: Literal["own", "student"] | float | tuple[float, ...] = "own"
    """Of the teacher's logits: its own, the student's at each step, a fixed value, or a list with one value per teacher."""
    mse_moves_scale: bool = True
    """Whether the squared-error half of gkl may move the student's logit scale, or only its features."""
    bias_init: float = -10.0
    """Initial logit bias of a student without one, where a sigmoid term needs it (SigLIP: -10)."""

    def check(self) -> None:
        where = "objective.logit_scale"
        require(
            0 < self.minimum <= self.maximum,
            f"{where}.minimum and maximum are {self.minimum} and {self.maximum}; both must be positive and in order",
        )
        require(
            self.init is None or self.minimum <= self.init <= self.maximum,
            f"{where}.init is {self.init}; it must lie between minimum and maximum, {self.minimum} and {self.maximum}",
        )
        values = () if isinstance(self.teacher, str) else self.teacher
        values = values if isinstance(values, tuple) else (values,)
        require(all(value > 0 for value in values), f"{where}.teacher is {self.teacher}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    capacity: int = 0
    """Slots for features of earlier batches, each with image, text and id; 0 keeps none."""


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    info_nce: InfoNCETerm = field(default_factory=InfoNCETerm)
    """Contrastive task loss (CLIP)."""
    sigmoid: SigmoidTerm = field(default_factory=SigmoidTerm)
    """Sigmoid task loss (SigLIP)."""
    gkl: GKLTerm = field(default_factory=GKLTerm)
    """Generalized Kullback-Leibler divergence (arXiv 2503.08038)."""
    dkl: DKLTerm = field(default_factory=DKLTerm)
    """GKL with the stop-gradients of DKL (arXiv 2305.13948): with a frozen teacher only its cross-entropy half pulls."""
    kl: SoftTargetTerm = field(default_factory=SoftTargetTerm)
    """KL divergence from the teacher's distribution, or from the mean of several teachers' (MobileCLIP)."""
    soft_ce: SoftTargetTerm = field(default_factory=SoftTargetTerm)
    """Cross-entropy against the same target: KL's gradient, another value."""
    affinity: AffinityTerm = field(default_factory=AffinityTerm)
    """Affinity mimicking: soft cross-entropy at one fixed logit scale (TinyCLIP)."""
    soft_bce: SoftBCETerm = field(default_factory=SoftBCETerm)
    """Binary cross-entropy against a sigmoid teacher's probabilities (SigLIP teachers)."""
    itc: MixedTargetTerm = field(default_factory=MixedTargetTerm)
    """Image-text contrastive loss with mixed targets: true pairs, momentum encoder, teacher (ALBEF)."""
    closed_set: ClosedSetTerm = field(default_factory=ClosedSetTerm)
    """GKL on the logits of class prompts, with class-wise global information."""
    features: FeatureTerm = field(default_factory=FeatureTerm)
    """Mean squared error of unit features (CLIP-KD's FD, there with weight 2000)."""
    icl: InteractiveTerm = field(default_factory=InteractiveTerm)
    """Interactive contrastive loss: student queries against teacher keys, with a learned scale (CLIP-KD)."""
    gd: GradientTerm = field(default_factory=GradientTerm)
    """Gradient distillation: mean squared error of the contrastive gradients (CLIP-KD)."""
    afd: FeatureTerm = field(default_factory=FeatureTerm)
    """Augmented feature distillation: InfoNCE of fused student and teacher features (CLIP-KD)."""
    vrd: FeatureTerm = field(default_factory=FeatureTerm)
    """Vertical relational distillation (CLIP-RD)."""
    xrd: FeatureTerm = field(default_factory=FeatureTerm)
    """Cross relational distillation (CLIP-RD)."""
    projection: Literal["linear", "none"] = "linear"
    """Where student and teacher widths differ: a learned linear map of the student's features, or none (then an error)."""
    logit_scale: LogitScaleConfig = field(default_factory=LogitScaleConfig)
    """Logit-scale policy."""
    queue: QueueConfig = field(default_factory=QueueConfig)
    """Queue of keys from earlier batches."""
    tile_size: int = 2048
    """At most tile_size² logits of a kind are formed at once (at least a row); more come in parts, to the same numbers."""
    compile: bool = False
    """Fuse what is done to the logits (torch.compile; not for itc and gd): faster after the first steps, which compile."""

    def terms(self) -> dict[str, Term]:
        """Every term by name."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Term)}

    def active(self) -> dict[str, Term]:
        """The terms that are switched on."""
        return {name: term for name, term in self.terms().items() if term.weight}

    @property
    def queues(self) -> frozenset[str]:
        """Whose features must be queued: momentum, teacher."""
        return frozenset().union(*(term.queues for term in self.active().values()))

    @property
    def needs_bias(self) -> bool:
        return bool(self.sigmoid.weight or self.soft_bce.weight)

    def __post_init__(self) -> None:
        for name, term in self.terms().items():
            term.check(name)
        require(self.tile_size >= 1, f"objective.tile_size is {self.tile_size}; it must be 1 or more")
        self.logit_scale.check()
        self.check_queue()
        self.check_policy()

    def check_queue(self) -> None:
        capacity = self.queue.capacity
        require(capacity >= 0, f"objective.queue.capacity is {capacity}; it must be 0 or more")
        queued = [name for name, term in self.active().items() if term.queues]
        require(
            not queued or capacity > 0,
            f"objective.{queued[0] if queued else ''}.queue is on and objective.queue.capacity is 0; give it slots",
        )
        require(
            bool(queued) or not capacity,
            f"objective.queue.capacity is {capacity} but no term uses it; set queue: true for one that has a weight",
        )

    def check_policy(self) -> None:
        """Combinations that would do nothing, or something else than they say."""
        active, policy = self.active(), self.logit_scale
        require(
            policy.teacher == "own" or any(term.softens_teacher for name, term in active.items() if name != "affinity"),
            f"objective.logit_scale.teacher is {policy.teacher}, but no term takes a softmax of the teacher's logits at it",
        )
        require(
            policy.teacher == "own" or not self.soft_bce.weight,
            f"objective.logit_scale.teacher is {policy.teacher}; objective.soft_bce needs own: a sigmoid teacher's bias "
            "fits its own scale only",
        )
        require(
            policy.mse_moves_scale or bool(self.gkl.weight or self.closed_set.weight),
            "objective.logit_scale.mse_moves_scale is false, but neither objective.gkl nor closed_set has a weight",
        )
        require(
            not self.xrd.weight or self.icl.weight > 0,
            "objective.xrd alone would shrink its logit scale to nothing; it shares that of objective.icl, which trains it "
            "on true pairs: set objective.icl.weight",
        )


def require_number_of_teachers(objective: ObjectiveConfig, number: int) -> None:
    """Raises: ValueError if a term learns from one teacher and there are several, or their logit scales are not as many."""
    for name, term in objective.active().items():
        alone = not term.needs_teacher or (name in ("kl", "soft_ce") and not term.compares_features and not term.queues)
        require(
            number == 1 or alone,
            f"objective.{name} learns from one teacher; with an ensemble use kl or soft_ce with keys: student, no queue",
        )
    fixed = objective.logit_scale.teacher
    require(
        not isinstance(fixed, tuple) or len(fixed) == number,
        f"objective.logit_scale.teacher lists {fixed}; it needs one value for each of the teachers, {number} here",
    )
