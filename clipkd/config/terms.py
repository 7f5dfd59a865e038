"""The options of one loss term, by family, and what each family asks of the run."""

from dataclasses import dataclass
from typing import Literal

from clipkd.errors import require

Keys = Literal["student", "momentum", "teacher"]


@dataclass(frozen=True, kw_only=True)
class Term:
    """What every term has, and what it asks of the run."""

    weight: float = 0.0
    """Weight of this term in the loss; 0 leaves it out and costs nothing."""
    warmup_steps: int = 0
    """Steps over which the weight rises linearly to its value; it shows in the loss, not in the term's own series."""

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def compares_features(self) -> bool:
        """Whether the student's features stand beside the teacher's, which takes equal widths or a projection."""
        return True

    @property
    def softens_teacher(self) -> bool:
        """Whether it takes a softmax of the teacher's logits, which those of a sigmoid teacher are not meant for."""
        return False

    def trains_logit_scale(self, *, mse_moves_scale: bool) -> bool:
        """Whether its gradient reaches the student's own logit scale."""
        return True

    @property
    def queues(self) -> frozenset[str]:
        """Whose features it wants from the queue: momentum, teacher."""
        return frozenset()

    @property
    def needs_momentum(self) -> bool:
        return "momentum" in self.queues

    def factor(self, step: int) -> float:
        """Weight at a step (counted from 0)."""
        return self.weight * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.weight

    def check(self, name: str) -> None:
        """Raises: ValueError naming the option."""
        where = f"objective.{name}"
        require(self.weight >= 0, f"{where}.weight is {self.weight}; it must be 0 or more")
        require(self.warmup_steps >= 0, f"{where}.warmup_steps is {self.warmup_steps}; it must be 0 or more")
        for option in ("temperature", "weight_temperature", "scale"):
            value = getattr(self, option, 1.0)
            require(value > 0, f"{where}.{option} is {value}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class InfoNCETerm(Term):
    weight: float = 1.0
    """Weight of the contrastive task loss on the student's own logits (CLIP); 0 leaves it out."""
    queue: bool = False
    """Add the queue's momentum features to the batch's keys."""

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def compares_features(self) -> bool:
        return False

    @property
    def queues(self) -> frozenset[str]:
        return frozenset({"momentum"} if self.queue else ())


@dataclass(frozen=True, kw_only=True)
class SigmoidTerm(Term):
    """SigLIP's pairwise task loss; the student gets a logit bias."""

    @property
    def needs_teacher(self) -> bool:
        return False

    @property
    def compares_features(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class LogitTerm(Term):
    """A term on logits of the student's queries against a choice of keys; the target is the teacher's own logits."""

    keys: Keys = "teacher"
    """What the student's queries are compared with: the teacher's features, the student's own, or its moving average's."""
    queue: bool = False
    """Add the queue to the batch's keys: teacher features for teacher keys, momentum features for the others."""

    @property
    def compares_features(self) -> bool:
        return self.keys == "teacher"

    @property
    def softens_teacher(self) -> bool:
        return True

    @property
    def queues(self) -> frozenset[str]:
        whose = {"teacher"} if self.keys == "teacher" else {"teacher", "momentum"}
        return frozenset(whose if self.queue else ())

    @property
    def needs_momentum(self) -> bool:
        return self.keys == "momentum" or super().needs_momentum


@dataclass(frozen=True, kw_only=True)
class SoftTargetTerm(LogitTerm):
    temperature: float = 1.0
    """Softens both sides; multiplies on top of the logit scales."""
    scale_by_temperature_squared: bool = False
    """Multiply by temperature² so that the gradient keeps its size (Hinton et al. 2015)."""


@dataclass(frozen=True, kw_only=True)
class AffinityTerm(LogitTerm):
    keys: Keys = "student"
    """What the student's queries are compared with; TinyCLIP's are the student's own."""
    scale: float = 50.0
    """Fixed logit scale of both sides (TinyCLIP: 50)."""

    def trains_logit_scale(self, *, mse_moves_scale: bool) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class GKLOptions(Term):
    """What GKL is made of, on any logits."""

    ce_weight: float = 1.0
    """Weight of the soft cross-entropy half (the reference code's alpha)."""
    mse_weight: float = 0.1
    """Weight of the weighted squared-error half (the reference code's beta)."""
    gamma: float = 0.3
    """Smoothing power on the pair weights: 1 plain, 0 uniform."""
    temperature: float = 1.0
    """Softens both sides of the cross-entropy half; multiplies on top of the logit scales."""
    weight_temperature: float = 1.0
    """Softens the teacher's probabilities used as pair weights."""
    row_weight: Literal["reference", "uniform"] = "reference"
    """How queries share the squared-error half: by the mass of their pair weights (published code) or equally."""
    scale_by_temperature_squared: bool = False
    """Multiply the cross-entropy half by temperature² (the published code does not)."""

    def trains_logit_scale(self, *, mse_moves_scale: bool) -> bool:
        return self.ce_weight > 0 or (mse_moves_scale and self.mse_weight > 0)

    def check(self, name: str) -> None:
        super().check(name)
        require(
            min(self.ce_weight, self.mse_weight) >= 0 < max(self.ce_weight, self.mse_weight),
            f"objective.{name}.ce_weight and mse_weight are {self.ce_weight} and {self.mse_weight}; one must be positive, "
            "none negative",
        )
        require(self.gamma >= 0, f"objective.{name}.gamma is {self.gamma}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class GKLTerm(GKLOptions, LogitTerm):
    pass


@dataclass(frozen=True, kw_only=True)
class DKLTerm(GKLTerm):
    """GKL's options; its squared error reaches no student."""

    def trains_logit_scale(self, *, mse_moves_scale: bool) -> bool:
        return True

    def check(self, name: str) -> None:
        super().check(name)
        require(
            self.ce_weight > 0,
            f"objective.{name}.ce_weight is 0; the other half reaches the teacher only, so nothing would train the student",
        )


@dataclass(frozen=True, kw_only=True)
class ClosedSetTerm(GKLOptions):
    classes: str = ""
    """A text file with one class name per line, or imagenet for its 1,000 names."""
    templates: tuple[str, ...] = ()
    """Prompts with the placeholder {c}; the student trains on one of them per step, in turn. Empty: imagenet's 80, else 'a photo of a {c}.'."""
    class_prior: bool = True
    """Pair weights of labelled images from the running mean of the teacher's probabilities in their class; false: from the image's own."""

    @property
    def compares_features(self) -> bool:
        return False

    @property
    def softens_teacher(self) -> bool:
        return True

    def check(self, name: str) -> None:
        super().check(name)
        require(
            not self.weight or bool(self.classes),
            f"objective.{name}.classes is empty; name a file with one class per line, or imagenet",
        )
        wrong = [template for template in self.templates if "{c}" not in template]
        require(not wrong, f"objective.{name}.templates: {wrong[0] if wrong else ''!r} lacks the placeholder {{c}}")


@dataclass(frozen=True, kw_only=True)
class SoftBCETerm(LogitTerm):
    keys: Keys = "student"
    """What the student's queries are compared with; SigLIP's are the student's own."""

    @property
    def softens_teacher(self) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class MixedTargetTerm(LogitTerm):
    keys: Keys = "momentum"
    """ALBEF compares with momentum features."""
    momentum_share: float = 0.4
    """Share of the momentum encoder's softmax in the target (ALBEF's alpha); what both shares leave goes to the true pairs."""
    teacher_share: float = 0.0
    """Share of the teacher's softmax in the target."""
    ramp_steps: int = 0
    """Steps over which both shares rise linearly from 0 (ALBEF: the first epoch)."""

    @property
    def needs_teacher(self) -> bool:
        return self.keys == "teacher" or self.teacher_share > 0

    @property
    def softens_teacher(self) -> bool:
        return self.teacher_share > 0

    @property
    def queues(self) -> frozenset[str]:
        from_teacher = {"teacher"} if self.needs_teacher else set()
        from_momentum = {"momentum"} if self.keys != "teacher" or self.momentum_share > 0 else set()
        return frozenset(from_teacher | from_momentum if self.queue else ())

    @property
    def needs_momentum(self) -> bool:
        return self.momentum_share > 0 or super().needs_momentum

    def shares(self, step: int) -> tuple[float, float]:
        """Shares of momentum encoder and teacher at a step (counted from 0)."""
        ramp = min(1.0, step / self.ramp_steps) if self.ramp_steps else 1.0
        return ramp * self.momentum_share, ramp * self.teacher_share

    def check(self, name: str) -> None:
        super().check(name)
        shares = (self.momentum_share, self.teacher_share)
        allowed = min(shares) >= 0 and sum(shares) <= 1
        where = f"objective.{name}.momentum_share and teacher_share"
        require(allowed, f"{where} are {shares[0]} and {shares[1]}; both must be 0 or more, their sum 1 at most")
        require(self.ramp_steps >= 0, f"objective.{name}.ramp_steps is {self.ramp_steps}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class FeatureTerm(Term):
    """A term on features beside the teacher's; it may have a logit scale of its own."""

    def trains_logit_scale(self, *, mse_moves_scale: bool) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class InteractiveTerm(FeatureTerm):
    queue: bool = False
    """Add the queue's teacher features to the batch's keys."""

    @property
    def queues(self) -> frozenset[str]:
        return frozenset({"teacher"} if self.queue else ())


@dataclass(frozen=True, kw_only=True)
class GradientTerm(Term):
    """CLIP-KD's GD: gradients of both contrastive losses, the teacher's by a softmax of its logits."""

    @property
    def softens_teacher(self) -> bool:
        return True
