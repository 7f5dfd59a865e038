"""What the loss terms compare: this process's queries against the keys of all processes and of the queue."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipkd import distributed
from clipkd.closed_set import ClosedSet
from clipkd.momentum import FeatureQueue
from clipkd.objective import LogitScaleConfig
from clipkd.term_options import Keys
from clipkd.views import Features

Pair = tuple[Tensor, Tensor]
"""The same thing for images and for texts; of logits: image→text and text→image."""

Value = tuple[Tensor, dict[str, Tensor]]
"""A term, and the series that explain it."""


class Targets(NamedTuple):
    """What the student learns from on one process's share of a batch; all of it constant."""

    teachers: tuple[Features, ...] = ()
    momentum: Features | None = None
    """The moving average's features of the student's own view."""
    ids: Int[Tensor, "b"] | None = None
    """Equal ids are positives of each other; needed by a queue and by the terms that take a mask."""
    labels: Int[Tensor, "b"] | None = None
    """Class of each image, −1 where it has none."""


@dataclass
class Comparison:
    """One batch, seen from every term: each matrix of cosines is made once, when the first term asks for it."""

    student: Features
    projected: Features
    """The student's features in the teacher's space."""
    targets: Targets
    queue: FeatureQueue | None
    policy: LogitScaleConfig
    scales: dict[str, Tensor]
    """Learned logit scales that belong to single terms."""
    fused: Pair | None
    """AFD's fused features of images and texts."""
    closed_set: ClosedSet | None
    class_features: Float[Tensor, "k d"] | None
    """The student's, of the closed set's prompts."""
    step: int
    made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    def once(self, *key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def teacher(self) -> Features:
        return self.targets.teachers[0]

    def batch_keys(self, kind: Keys, teacher: int = 0) -> Pair:
        """Features of all processes' pairs, in rank order; the student's own with their gradient."""
        gather = distributed.gather if kind == "student" else distributed.gather_constant
        source = {"student": self.student, "momentum": self.targets.momentum}.get(kind)
        features = self.targets.teachers[teacher] if kind == "teacher" else source
        assert features is not None
        return self.once("batch keys", kind, teacher, make=lambda: (gather(features.image), gather(features.text)))

    def keys(self, kind: Keys, *, queue: bool, teacher: int = 0) -> Pair:
        """The batch's keys, followed by the queue's where a term wants it."""
        batch = self.batch_keys(kind, teacher)
        if not queue:
            return batch
        assert self.queue is not None
        ring = "teacher" if kind == "teacher" else "momentum"
        old = self.queue.filled(f"{ring}_image"), self.queue.filled(f"{ring}_text")
        return self.once(
            "keys", kind, teacher, make=lambda: tuple(torch.cat(pair) for pair in zip(batch, old, strict=True))
        )

    def projected_keys(self) -> Pair:
        """The student's features in the teacher's space, of all processes, with their gradient."""
        image, text = self.projected.image, self.projected.text
        return self.once("projected keys", make=lambda: (distributed.gather(image), distributed.gather(text)))

    def cosines(self, kind: Keys, *, queue: bool) -> Pair:
        """Of the student's queries, in the teacher's space where the keys are the teacher's."""
        queries = self.projected if kind == "teacher" else self.student
        return self.once("cosines", kind, queue, make=lambda: products(queries, self.keys(kind, queue=queue)))

    def student_logits(self, kind: Keys, *, queue: bool) -> Pair:
        image, text = self.cosines(kind, queue=queue)
        scale = self.student.logit_scale
        return self.once("student logits", kind, queue, make=lambda: (scale * image, scale * text))

    def momentum_cosines(self, *, queue: bool) -> Pair:
        """Of the moving average's queries with its own keys."""
        queries = self.targets.momentum
        assert queries is not None
        return self.once("momentum", queue, make=lambda: products(queries, self.keys("momentum", queue=queue)))

    def teacher_cosines(self, teacher: int, *, queue: bool) -> Pair:
        """Of a teacher's queries with its own keys."""
        queries = self.targets.teachers[teacher]
        return self.once(
            "teacher",
            teacher,
            queue,
            make=lambda: products(queries, self.keys("teacher", queue=queue, teacher=teacher)),
        )

    def teacher_logits(self, teacher: int, *, queue: bool) -> Pair:
        image, text = self.teacher_cosines(teacher, queue=queue)
        scale = self.teacher_scale(teacher)
        return self.once("teacher logits", teacher, queue, make=lambda: (scale * image, scale * text))

    def teacher_scale(self, teacher: int) -> Tensor | float:
        """Multiplier of a teacher's cosines under the configured policy."""
        if self.policy.teacher == "own":
            return self.targets.teachers[teacher].logit_scale
        if self.policy.teacher == "student":
            return self.student.logit_scale.detach()
        assert not isinstance(self.policy.teacher, str)
        return self.policy.teacher[teacher] if isinstance(self.policy.teacher, tuple) else self.policy.teacher

    @property
    def uses_teacher_logits(self) -> bool:
        """Whether a term has asked for a teacher's logits, so that its scale means something."""
        return any(key[0] in ("teacher logits", "class logits") for key in self.made)

    def class_logits(self) -> Float[Tensor, "b k"]:
        """The teacher's, of images against the closed set's classes."""
        assert self.closed_set is not None
        classes, image = self.closed_set.teacher_classes, self.teacher.image
        return self.once("class logits", make=lambda: self.teacher_scale(0) * image @ classes.T)

    @property
    def all_ids(self) -> Int[Tensor, "B"]:
        ids = self.targets.ids
        assert ids is not None
        return self.once("ids", make=lambda: distributed.gather_constant(ids))

    @property
    def own_columns(self) -> Int[Tensor, "b"]:
        """Where this process's pairs stand among those of all processes."""
        b = len(self.student.image)
        return torch.arange(b, device=self.student.image.device) + distributed.rank() * b

    def positives(self, *, queue: bool) -> Bool[Tensor, "b N"]:
        """Candidates with a query's id."""

        def make() -> Tensor:
            assert self.targets.ids is not None
            columns = self.all_ids
            if queue:
                assert self.queue is not None
                columns = torch.cat([columns, self.queue.filled_ids()])
            return self.targets.ids[:, None] == columns

        return self.once("positives", queue, make=make)


def products(queries: Features, keys: Pair) -> Pair:
    """Cosines image→text and text→image."""
    return queries.image @ keys[1].T, queries.text @ keys[0].T
