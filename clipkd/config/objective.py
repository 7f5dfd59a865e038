"""The objective's options: the loss terms, what they share, and the checks across them. Free of torch."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from clipkd.config.terms import Keys, Term, Terms
from clipkd.errors import require, require_least

MIN_LOGIT_SCALE = 1.0
"""Smallest logit scale that training may reach."""
INITIAL_LOGIT_BIAS = -10.0
"""Logit bias that a student without one gets where a term trains it (SigLIP)."""


@dataclass(frozen=True, kw_only=True)
class LogitScaleConfig:
    init: float | None = None
    """The student's logit scale at the start; null keeps its model's (1/0.07 for a fresh one)."""
    learned: bool = True
    """Whether the student's logit scale is trained; false keeps it fixed."""
    maximum: float = 100.0
    """Largest logit scale that training may reach (CLIP: 100); the smallest is 1."""
    teacher: Literal["own", "student"] | float | tuple[float, ...] = "own"
    """Of the teacher's logits: its own, the student's at each step, a fixed value, or a list with one value per teacher."""

    def check(self) -> None:
        where, bounds = "objective.logit_scale", f"{MIN_LOGIT_SCALE:g} and maximum, {self.maximum:g}"
        require(self.maximum >= MIN_LOGIT_SCALE, f"{where}.maximum is {self.maximum}; it must be 1 or more")
        require(
            self.init is None or MIN_LOGIT_SCALE <= self.init <= self.maximum,
            f"{where}.init is {self.init}; it must lie between {bounds}",
        )
        values = () if isinstance(self.teacher, str) else self.teacher
        values = values if isinstance(values, tuple) else (values,)
        require(all(value > 0 for value in values), f"{where}.teacher is {self.teacher}; it must be positive")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig(Terms):
    keys: Keys = "teacher"
    """What gkl, kl, affinity and soft_bce compare the student with: the teacher's features, its own, or its moving average's."""
    queue: int = 0
    """Earlier global batches whose keys join this one's, in gkl, kl, affinity, soft_bce, itc and icl; 0 none."""
    warmup_steps: int = 0
    """Steps over which the weights of all terms but info_nce and sigmoid, and the shares of itc's softened targets, rise linearly to their values."""
    logit_scale: LogitScaleConfig = field(default_factory=LogitScaleConfig)
    """Logit-scale policy."""
    tile_size: int | None = None
    """At most tile_size² logits of a kind are formed at once (at least a row); more come in parts, to the same numbers. null: 2,048 on a CPU, 2,048 to 8,192 by a GPU's memory."""
    compile: bool = False
    """Fuse what is done to the logits (torch.compile; not for itc and gd): faster after the first steps, which compile."""

    def terms(self) -> dict[str, Term]:
        """Every term by name."""
        values = {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Term)}

    def active(self) -> dict[str, Term]:
        """The terms that are switched on."""
        return {name: term for name, term in self.terms().items() if term.weight}

    def weight_at(self, term: Term, step: int) -> float:
        """Weight of a term at a step (counted from 0)."""
        warm = term.asks.task or term.asks.warms_itself or step + 1 >= self.warmup_steps
        return term.weight if warm else term.weight * (step + 1) / self.warmup_steps

    def keys_of(self, term: Term) -> Keys:
        """Whose features a term compares the student's with."""
        return term.asks.keys or self.keys

    def rings_of(self, term: Term) -> set[str]:
        """Whose features a term takes from the queue."""
        if not (self.queue and term.asks.queue):
            return set()
        # Earlier features of the student itself are out of date; its moving average's less so.
        own = {"teacher" if self.keys_of(term) == "teacher" else "momentum"}
        return own | {"teacher"} if term.asks.teacher else own

    @property
    def queues(self) -> list[str]:
        """Whose features are queued: momentum, teacher."""
        return sorted(set().union(*(self.rings_of(term) for term in self.active().values())))

    def needs_momentum(self, term: Term) -> bool:
        return self.keys_of(term) == "momentum" or "momentum" in self.rings_of(term)

    @property
    def needs_bias(self) -> bool:
        return any(term.asks.logit_bias for term in self.active().values())

    @property
    def uses_teacher_scale(self) -> bool:
        """Whether a term forms the teacher's logits at logit_scale.teacher."""
        return any(term.asks.teacher_logits and term.asks.model_scales for term in self.active().values())

    def __post_init__(self) -> None:
        for name, term in self.terms().items():
            term.check(name)
        require_least(self, "objective.", tile_size=1, queue=0, warmup_steps=0)
        self.logit_scale.check()
        active, policy = self.active(), self.logit_scale.teacher
        require(
            not self.warmup_steps or not all(term.asks.task for term in active.values()),
            f"objective.warmup_steps is {self.warmup_steps}, but only task losses are on, which it leaves alone; leave it out",
        )
        require(
            not self.queue or bool(self.queues),
            f"objective.queue is {self.queue}, but no term that is on uses earlier keys; leave it out",
        )
        require(
            policy == "own" or self.uses_teacher_scale,
            f"objective.logit_scale.teacher is {policy}, but no term takes a softmax of the teacher's logits at it",
        )
        for name, term in active.items():
            require(
                policy == "own" or term.asks.teacher_logits != "sigmoid",
                f"objective.logit_scale.teacher is {policy}; objective.{name} needs own: a sigmoid teacher's bias fits its "
                "own scale only",
            )
            for other in term.asks.needs:
                require(
                    other in active,
                    f"objective.{name} shares the learned logit scale of objective.{other} and cannot train it alone; set "
                    f"objective.{other}.weight",
                )


def require_objective(
    objective: ObjectiveConfig,
    *,
    has_teacher: bool,
    ema_momentum: float,
    label_key: str | None,
    has_captions: bool = True,
) -> None:
    """Raises: ValueError if the terms that are on ask for something that the run does not have."""
    active = objective.active()
    require(bool(active), "no loss term is on: set objective.info_nce.weight, or a teacher and one of its terms")
    for name, term in active.items():
        where = f"objective.{name}"
        require(
            has_teacher or not term.asks.teacher,
            f"{where} needs a teacher: set teacher.models, or a teacher.cache that was made with them",
        )
        require(
            has_captions or not (term.asks.captions or objective.needs_momentum(term)),
            f"{where} needs captions, but data.caption_key is null; set its weight to 0, and use gkl, kl, affinity, features or icl",
        )
        require(
            ema_momentum > 0 or not objective.needs_momentum(term),
            f"{where} uses momentum features, but optim.ema_momentum is 0; set it, e.g. 0.995",
        )
        require(
            label_key is not None or not term.asks.labels,
            f"{where}.class_prior needs labels: set data.label_key, or class_prior to false",
        )
    require(
        not has_teacher or any(term.asks.teacher for term in active.values()),
        "a teacher is set but no term uses it: set objective.gkl.weight or that of another distillation term, "
        "or leave teacher.models and teacher.cache out",
    )
    require(
        label_key is None or any(term.asks.labels for term in active.values()),
        f"data.label_key is {label_key}, but no term uses labels; set objective.closed_set.weight, or leave it out",
    )


def require_number_of_teachers(objective: ObjectiveConfig, number: int) -> None:
    """Raises: ValueError if a term learns from one teacher and there are several, or their logit scales are not as many."""
    for name, term in objective.active().items():
        several = term.asks.several_teachers and objective.keys_of(term) != "teacher" and not objective.queue
        require(
            number == 1 or several or not term.asks.teacher,
            f"objective.{name} learns from one teacher; with several use kl with objective.keys student and no queue",
        )
    fixed = objective.logit_scale.teacher
    require(
        not isinstance(fixed, tuple) or len(fixed) == number,
        f"objective.logit_scale.teacher lists {fixed}; it needs one value for each of the teachers, {number} here",
    )
