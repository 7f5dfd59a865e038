"""What the loss terms compare: this process's queries against the keys of all processes and of the queue."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from clipkd import distributed, losses
from clipkd.config.objective import LogitScaleConfig
from clipkd.config.terms import Keys
from clipkd.objective.closed_set import ClosedSet
from clipkd.objective.memory import FeatureQueue
from clipkd.views import Features

Pair = tuple[Tensor, Tensor]
"""The same thing for images and for texts; of logits: image→text and text→image."""

Rows = dict[str, Float[Tensor, "ways b"]]
"""What a term makes of each query: one row per direction (or whatever it counts), one column per query."""

Value = tuple[Tensor, dict[str, Tensor]]
"""A term, and the series that explain it."""

F = TypeVar("F", bound=Callable[..., Any])


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
    """One batch, seen from every term: each matrix of cosines is made once, when the first term asks for it.

    The matrices of a large batch do not fit: `in_panels` shows the terms some queries at a time, as a comparison of its
    own with the keys of the whole.
    """

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
    tile_size: int
    """At most its square of logits are formed at once."""
    compiled: bool = False
    """Whether what is done to the logits is compiled."""
    whole: "Comparison | None" = None
    """What this is a panel of; None for all queries of this process."""
    first: int = 0
    """Number of its first query within the whole."""
    uses_teacher_scale: bool = False
    """Whether a term has asked for a teacher's logits, so that its scale means something."""
    made: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    @property
    def root(self) -> "Comparison":
        """Where the keys are kept."""
        return self.whole or self

    def panel(self, first: int, cut: Callable[[Tensor], Tensor]) -> "Comparison":
        """Some of the queries, from number `first` on, with the keys of all; cut takes their rows."""

        def cut_features(features: Features) -> Features:
            return features._replace(image=cut(features.image), text=cut(features.text))

        targets, fused = self.targets, self.fused
        return dataclasses.replace(
            self,
            student=cut_features(self.student),
            projected=cut_features(self.projected),
            targets=Targets(
                tuple(cut_features(teacher) for teacher in targets.teachers),
                None if targets.momentum is None else cut_features(targets.momentum),
                None if targets.ids is None else cut(targets.ids),
                None if targets.labels is None else cut(targets.labels),
            ),
            fused=None if fused is None else (cut(fused[0]), cut(fused[1])),
            whole=self,
            first=first,
            made={},
        )

    def panels(self) -> list["Comparison"]:
        """All queries, so many at a time that no more than tile_size² logits are formed at once."""
        height = min(self.panel_height, len(self.student.image))

        def piece(tensor: Tensor, number: int) -> Tensor:
            # Split once: a slice's gradient would be as large as the whole, for each of the panels.
            return self.once("pieces", id(tensor), make=lambda: tensor.split(height))[number]

        starts = enumerate(range(0, len(self.student.image), height))
        return [self.panel(first, functools.partial(piece, number=number)) for number, first in starts]

    def in_panels(self, compute: Callable[["Comparison"], Rows]) -> Rows:
        """What compute gives for every query."""
        if self.is_large:
            # Each panel is computed again for its gradient, when no process may wait for another: an empty one first
            # makes all keys that the processes must gather.
            compute(self.panel(0, lambda tensor: tensor[:0]))

        def afresh(panel: Comparison) -> Rows:
            return compute(dataclasses.replace(panel, made={}))

        return losses.in_panels(afresh, self.panels())

    @property
    def num_candidates(self) -> int:
        """Columns of the widest matrix of logits."""
        classes = 0 if self.class_features is None else len(self.class_features)
        return max(len(self.student.image) * distributed.world_size() + len(self.queue or ()), classes)

    @property
    def panel_height(self) -> int:
        return losses.panel_height(self.num_candidates, tile_size=self.tile_size)

    @property
    def is_large(self) -> bool:
        """Whether the queries are shown in panels."""
        return self.root.panel_height < len(self.root.student.image)

    def tile(self, function: F) -> F:
        """A function of logits as it is applied to a panel."""
        return losses.compile_tile(function) if self.compiled and len(self.student.image) else function

    def once(self, *key: Any, make: Callable[[], Any]) -> Any:
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    @property
    def teacher(self) -> Features:
        return self.targets.teachers[0]

    def batch_keys(self, kind: Keys, teacher: int = 0) -> Pair:
        """Features of all processes' pairs, in rank order; the student's own with their gradient."""
        root = self.root
        gather = distributed.gather if kind == "student" else distributed.gather_constant
        source = {"student": root.student, "momentum": root.targets.momentum}.get(kind)
        features = root.targets.teachers[teacher] if kind == "teacher" else source
        assert features is not None
        return root.once("batch keys", kind, teacher, make=lambda: (gather(features.image), gather(features.text)))

    def keys(self, kind: Keys, *, queue: bool, teacher: int = 0) -> Pair:
        """The batch's keys, followed by the queue's where a term wants it."""
        batch = self.batch_keys(kind, teacher)
        if not queue:
            return batch
        assert self.queue is not None
        ring = "teacher" if kind == "teacher" else "momentum"
        old = self.queue.filled(f"{ring}_image"), self.queue.filled(f"{ring}_text")
        return self.root.once(
            "keys", kind, teacher, make=lambda: tuple(torch.cat(pair) for pair in zip(batch, old, strict=True))
        )

    def projected_keys(self) -> Pair:
        """The student's features in the teacher's space, of all processes, with their gradient."""
        image, text = self.root.projected.image, self.root.projected.text
        return self.root.once("projected keys", make=lambda: (distributed.gather(image), distributed.gather(text)))

    def fused_keys(self) -> Pair:
        """AFD's fused features of all processes, with their gradient."""
        assert self.root.fused is not None
        image, text = self.root.fused
        return self.root.once("fused keys", make=lambda: (distributed.gather(image), distributed.gather(text)))

    def cosines(self, kind: Keys, *, queue: bool) -> Pair:
        """Of the student's queries, in the teacher's space where the keys are the teacher's."""
        queries = self.projected if kind == "teacher" else self.student
        return self.once("cosines", kind, queue, make=lambda: products(queries, self.keys(kind, queue=queue)))

    def student_logits(self, kind: Keys, *, queue: bool) -> Pair:
        image, text = self.cosines(kind, queue=queue)
        scale = self.student.logit_scale
        return self.once("student logits", kind, queue, make=lambda: (scale * image, scale * text))

    def shared_tiles(
        self, *, queue: bool, temperature: float, weight_temperature: float = 1.0, gamma: float = 1.0
    ) -> Rows:
        """GKL's statistics of student keys, whose matrices are each other's transposes: one tile serves both directions."""
        root = self.root
        root.uses_teacher_scale = True

        def make() -> Rows:
            rings = None
            if queue:
                assert root.queue is not None
                names = ("momentum_image", "momentum_text", "teacher_image", "teacher_text")
                rings = losses.Queue(*map(root.queue.filled, names))
            found = losses.similarity_statistics(
                *(root.student.image, root.student.text, root.teacher.image, root.teacher.text),
                logit_scale=root.student.logit_scale,
                teacher_logit_scale=root.teacher_scale(0),
                temperature=temperature,
                weight_temperature=weight_temperature,
                gamma=gamma,
                queue=rings,
                tile_size=root.tile_size,
                compiled=root.compiled,
                exchange=distributed if distributed.world_size() > 1 else None,
            )
            ways = vars(found.image_to_text), vars(found.text_to_image)
            return {name: torch.stack([way[name] for way in ways]) for name in ways[0]}

        found = root.once("shared tiles", queue, temperature, weight_temperature, gamma, make=make)
        return {name: rows[:, self.first :][:, : len(self.student.image)] for name, rows in found.items()}

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
        self.root.uses_teacher_scale = True
        return self.once("teacher logits", teacher, queue, make=lambda: (scale * image, scale * text))

    def teacher_scale(self, teacher: int) -> Tensor | float:
        """Multiplier of a teacher's cosines under the configured policy."""
        if self.policy.teacher == "own":
            return self.targets.teachers[teacher].logit_scale
        if self.policy.teacher == "student":
            return self.student.logit_scale.detach()
        assert not isinstance(self.policy.teacher, str)
        return self.policy.teacher[teacher] if isinstance(self.policy.teacher, tuple) else self.policy.teacher

    def class_logits(self) -> Float[Tensor, "b k"]:
        """The teacher's, of images against the closed set's classes."""
        assert self.closed_set is not None
        classes, image = self.closed_set.teacher_classes, self.teacher.image
        self.root.uses_teacher_scale = True
        return self.once("class logits", make=lambda: self.teacher_scale(0) * image @ classes.T)

    @property
    def all_ids(self) -> Int[Tensor, "B"]:
        ids = self.root.targets.ids
        assert ids is not None
        return self.root.once("ids", make=lambda: distributed.gather_constant(ids))

    def key_ids(self, *, queue: bool) -> Int[Tensor, "N"]:
        """Of the batch's keys, followed by the queue's where a term wants it."""
        if not queue:
            return self.all_ids
        assert self.queue is not None
        old = self.queue.filled_ids()
        return self.root.once("key ids", make=lambda: torch.cat([self.all_ids, old]))

    @property
    def own_columns(self) -> Int[Tensor, "b"]:
        """Where this process's pairs stand among those of all processes."""
        before = distributed.rank() * len(self.root.student.image) + self.first
        return torch.arange(len(self.student.image), device=self.student.image.device) + before

    def positives(self, *, queue: bool) -> Bool[Tensor, "b N"]:
        """Candidates with a query's id."""

        def make() -> Tensor:
            assert self.targets.ids is not None
            return self.targets.ids[:, None] == self.key_ids(queue=queue)

        return self.once("positives", queue, make=make)


def products(queries: Features, keys: Pair) -> Pair:
    """Cosines image→text and text→image."""
    return queries.image @ keys[1].T, queries.text @ keys[0].T
