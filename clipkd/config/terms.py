"""The options of every loss term, and what each term asks of the run. Adding a term: a class and a field here."""

from dataclasses import dataclass, field
from typing import Literal

from clipkd.errors import require

Keys = Literal["teacher", "student", "momentum"]


@dataclass(frozen=True, kw_only=True)
class Asks:
    """What a term asks of the run; no other code knows terms by name."""

    keys: Keys | None = None
    """Whose features the student's are compared with; None: whose objective.keys says."""
    queue: bool = False
    """Whether the keys of earlier batches join (objective.queue)."""
    teacher: bool = True
    """Whether it needs a teacher."""
    several_teachers: bool = False
    """Whether it learns from several teachers too, but then not on the teacher's keys and without a queue."""
    teacher_logits: Literal["softmax", "sigmoid"] | None = None
    """What it applies to the teacher's logits; the teacher must have been trained with the same."""
    model_scales: bool = True
    """Whether its logits have the models' own scales; if not, a fixed one or one of own_scales."""
    own_scales: tuple[str, ...] = ()
    """Learned logit scales beside the student's; terms that name the same one share it."""
    logit_bias: bool = False
    """Whether it trains a logit bias."""
    labels: bool = False
    """Whether it needs class labels."""
    needs: tuple[str, ...] = ()
    """Terms that must be on, too: they train the logit scale that this one shares."""

    @property
    def captions(self) -> bool:
        """Whether it makes no sense where images stand for their captions."""
        return not self.teacher or self.keys == "momentum" or self.teacher_logits == "sigmoid"

    task: bool = False
    """Whether it is a task loss, which objective.warmup_steps does not apply to."""
    warms_itself: bool = False
    """Whether objective.warmup_steps raises a part of it, not its weight."""


@dataclass(frozen=True, kw_only=True)
class Term:
    weight: float = 0.0
    """Weight of this term in the loss; 0 leaves it out and costs nothing."""

    asks = Asks()

    def check(self, name: str) -> None:
        """Raises: ValueError naming the option."""
        require(self.weight >= 0, f"objective.{name}.weight is {self.weight}; it must be 0 or more")
        temperature = getattr(self, "temperature", 1.0)
        require(temperature > 0, f"objective.{name}.temperature is {temperature}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class InfoNCETerm(Term):
    weight: float = 1.0
    """Weight of the contrastive task loss on the student's own logits; 0 leaves it out."""

    asks = Asks(keys="student", teacher=False, task=True)


@dataclass(frozen=True, kw_only=True)
class SigmoidTerm(Term):
    asks = Asks(keys="student", teacher=False, logit_bias=True, task=True)


@dataclass(frozen=True, kw_only=True)
class GKLTerm(Term):
    ce_weight: float = 1.0
    """Weight of the soft cross-entropy half (the reference code's alpha)."""
    mse_weight: float = 0.1
    """Weight of the weighted squared-error half (the reference code's beta)."""
    gamma: float = 0.3
    """Smoothing power on the pair weights: 1 plain, 0 uniform."""
    temperature: float = 1.0
    """Softens both sides of the cross-entropy half; multiplies on top of the logit scales."""

    asks = Asks(queue=True, teacher_logits="softmax")

    def check(self, name: str) -> None:
        super().check(name)
        require(
            min(self.ce_weight, self.mse_weight) >= 0 < max(self.ce_weight, self.mse_weight),
            f"objective.{name}.ce_weight and mse_weight are {self.ce_weight} and {self.mse_weight}; one must be positive, "
            "none negative",
        )
        require(self.gamma >= 0, f"objective.{name}.gamma is {self.gamma}; it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class KLTerm(Term):
    temperature: float = 1.0
    """Softens both sides; multiplies on top of the logit scales."""

    asks = Asks(queue=True, several_teachers=True, teacher_logits="softmax")


@dataclass(frozen=True, kw_only=True)
class AffinityTerm(Term):
    asks = Asks(queue=True, teacher_logits="softmax", model_scales=False)


@dataclass(frozen=True, kw_only=True)
class SoftBCETerm(Term):
    asks = Asks(queue=True, teacher_logits="sigmoid", logit_bias=True)


@dataclass(frozen=True, kw_only=True)
class ITCTerm(Term):
    momentum_share: float = 0.4
    """Share of the momentum encoder's softmax in the target (ALBEF's alpha); what both shares leave goes to the true pairs."""
    teacher_share: float = 0.0
    """Share of the teacher's softmax in the target."""

    @property
    def asks(self) -> Asks:  # type: ignore[override]
        teacher = self.teacher_share > 0
        return Asks(
            keys="momentum",
            queue=True,
            warms_itself=True,
            teacher=teacher,
            teacher_logits="softmax" if teacher else None,
        )

    def shares(self, step: int, warmup_steps: int) -> tuple[float, float]:
        """Shares of momentum encoder and teacher at a step (counted from 0)."""
        ramp = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return ramp * self.momentum_share, ramp * self.teacher_share

    def check(self, name: str) -> None:
        super().check(name)
        shares = (self.momentum_share, self.teacher_share)
        allowed = min(shares) >= 0 and sum(shares) <= 1
        where = f"objective.{name}.momentum_share and teacher_share"
        require(allowed, f"{where} are {shares[0]} and {shares[1]}; both must be 0 or more, their sum 1 at most")


@dataclass(frozen=True, kw_only=True)
class ClosedSetTerm(Term):
    classes: str = ""
    """A text file with one class name per line, or imagenet for its 1,000 names."""
    templates: tuple[str, ...] = ()
    """Prompts with the placeholder {c}; the student trains on one of them per step, in turn. Empty: imagenet's 80, else 'a photo of a {c}.'."""
    class_prior: bool = True
    """Pair weights of labelled images from the running mean of the teacher's probabilities in their class; false: from the image's own."""

    @property
    def asks(self) -> Asks:  # type: ignore[override]
        return Asks(keys="student", teacher_logits="softmax", labels=self.class_prior)

    def check(self, name: str) -> None:
        super().check(name)
        require(
            not self.weight or bool(self.classes),
            f"objective.{name}.classes is empty; name a file with one class per line, or imagenet",
        )
        wrong = [template for template in self.templates if "{c}" not in template]
        require(not wrong, f"objective.{name}.templates: {wrong[0] if wrong else ''!r} lacks the placeholder {{c}}")


@dataclass(frozen=True, kw_only=True)
class FeaturesTerm(Term):
    asks = Asks(keys="teacher", model_scales=False)


@dataclass(frozen=True, kw_only=True)
class ICLTerm(Term):
    asks = Asks(keys="teacher", queue=True, model_scales=False, own_scales=("cross",))


@dataclass(frozen=True, kw_only=True)
class GDTerm(Term):
    asks = Asks(keys="teacher", teacher_logits="softmax")


@dataclass(frozen=True, kw_only=True)
class AFDTerm(Term):
    asks = Asks(keys="teacher", model_scales=False, own_scales=("fusion",))


@dataclass(frozen=True, kw_only=True)
class VRDTerm(Term):
    asks = Asks(keys="teacher", model_scales=False, own_scales=("image", "text"))


@dataclass(frozen=True, kw_only=True)
class XRDTerm(Term):
    asks = Asks(keys="teacher", model_scales=False, own_scales=("cross",), needs=("icl",))


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Every loss term under the name by which it is logged."""

    info_nce: InfoNCETerm = field(default_factory=InfoNCETerm)
    """Contrastive task loss (CLIP)."""
    sigmoid: SigmoidTerm = field(default_factory=SigmoidTerm)
    """Sigmoid task loss (SigLIP); the student gets a logit bias."""
    gkl: GKLTerm = field(default_factory=GKLTerm)
    """Generalized Kullback-Leibler divergence (arXiv 2503.08038)."""
    kl: KLTerm = field(default_factory=KLTerm)
    """KL divergence from the teacher's distribution, or from the mean of several teachers' (MobileCLIP)."""
    affinity: AffinityTerm = field(default_factory=AffinityTerm)
    """Affinity mimicking: soft cross-entropy at the fixed logit scale 50 (TinyCLIP)."""
    soft_bce: SoftBCETerm = field(default_factory=SoftBCETerm)
    """Binary cross-entropy against a sigmoid teacher's probabilities (SigLIP teachers)."""
    itc: ITCTerm = field(default_factory=ITCTerm)
    """Image-text contrastive loss on momentum keys with mixed targets: true pairs, momentum encoder, teacher (ALBEF)."""
    closed_set: ClosedSetTerm = field(default_factory=ClosedSetTerm)
    """GKL on the logits of class prompts with objective.gkl's numbers, and class-wise global information."""
    features: FeaturesTerm = field(default_factory=FeaturesTerm)
    """Mean squared error of unit features (CLIP-KD's FD, there with weight 2000)."""
    icl: ICLTerm = field(default_factory=ICLTerm)
    """Interactive contrastive loss: student queries against teacher keys, with a learned scale (CLIP-KD)."""
    gd: GDTerm = field(default_factory=GDTerm)
    """Gradient distillation: mean squared error of the contrastive gradients (CLIP-KD)."""
    afd: AFDTerm = field(default_factory=AFDTerm)
    """Augmented feature distillation: InfoNCE of fused student and teacher features (CLIP-KD)."""
    vrd: VRDTerm = field(default_factory=VRDTerm)
    """Vertical relational distillation (CLIP-RD)."""
    xrd: XRDTerm = field(default_factory=XRDTerm)
    """Cross relational distillation (CLIP-RD)."""
