"""One batch as the loss terms see it: the queries of this process, and the keys of all processes and of the queue."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from clipkd import distributed, losses
from clipkd.config.objective import ObjectiveConfig
from clipkd.objective.closed_set import ClosedSet
from clipkd.objective.memory import FeatureQueue
from clipkd.views import Features

F = TypeVar("F", bound=Callable[..., Any])

Rows = dict[str, Float[Tensor, "ways b"]]
"""A term's `value` for each query, and the series that explain it: one row per direction, one column per query."""


class Targets(NamedTuple):
    """What the student learns from on one process's share of a batch; all of it constant."""

    teachers: tuple[Features, ...] = ()
    momentum: Features | None = None
    """The moving average's features of the student's own view."""
    ids: Int[Tensor, "b"] | None = None
    """Equal ids are positives of each other; needed by a queue and by the terms that take a mask."""
    labels: Int[Tensor, "b"] | None = None
    """Class of each image, −1 where it has none."""


class Pairs(NamedTuple):
    """Unit features of images and of their texts, row by row."""

    image: Float[Tensor, "n d"]
    text: Float[Tensor, "n d"]


Sides = Features | Pairs
"""Whatever has features of images and of texts."""


def directions(queries: Sides, keys: Sides) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Queries and keys image→text, and text→image."""
    return (queries.image, keys.text), (queries.text, keys.image)


def logits(queries: Sides, keys: Sides, scale: Tensor | float) -> tuple[Tensor, Tensor]:
    """scale · cosines image→text, and text→image; one row per query."""
    image, text = (scale * query @ key.T for query, key in directions(queries, keys))
    return image, text


@dataclass
class Comparison:
    """Keys are gathered when the first term asks for them, in the same order on every process, and once per step."""

    student: Features
    projected: Features
    """The student's features in the teacher's space."""
    targets: Targets
    objective: ObjectiveConfig
    queue: FeatureQueue | None
    scales: Mapping[str, Tensor]
    """Learned logit scales that belong to single terms."""
    modules: nn.ModuleDict
    """What terms train beside the student."""
    closed_set: ClosedSet | None
    class_features: Float[Tensor, "k d"] | None
    """The student's, of the closed set's prompts."""
    step: int

    @cached_property
    def student_keys(self) -> Pairs:
        """The student's own features of all processes in rank order, with their gradient."""
        return Pairs(distributed.gather(self.student.image), distributed.gather(self.student.text))

    @cached_property
    def projected_keys(self) -> Pairs:
        """The student's features in the teacher's space, of all processes, with their gradient."""
        if self.projected is self.student:
            return self.student_keys
        return Pairs(distributed.gather(self.projected.image), distributed.gather(self.projected.text))

    @cached_property
    def momentum_keys(self) -> Pairs:
        return gather_constants(self.momentum)

    @cached_property
    def teacher_keys(self) -> Pairs:
        return gather_constants(self.teacher)

    @cached_property
    def momentum_candidates(self) -> Pairs:
        """Momentum features of the batch, then of the queue."""
        return self.with_queue(self.momentum_keys, "momentum")

    @cached_property
    def teacher_candidates(self) -> Pairs:
        """Teacher features of the batch, then of the queue."""
        return self.with_queue(self.teacher_keys, "teacher")

    @cached_property
    def candidates(self) -> tuple[Features, Pairs]:
        """The student's queries and what objective.keys compares them with, then the queue."""
        if self.objective.keys == "teacher":
            return self.projected, self.teacher_candidates
        if self.objective.keys == "momentum":
            return self.student, self.momentum_candidates
        return self.student, self.with_queue(self.student_keys, "momentum")

    def with_queue(self, keys: Pairs, ring: str) -> Pairs:
        if self.queue is None:
            return keys
        image, text = (self.queue.filled(f"{ring}_{side}") for side in ("image", "text"))
        return Pairs(torch.cat([keys.image, image]), torch.cat([keys.text, text]))

    @property
    def teacher(self) -> Features:
        return self.targets.teachers[0]

    @property
    def momentum(self) -> Features:
        assert self.targets.momentum is not None
        return self.targets.momentum

    def teacher_scale(self, number: int = 0) -> Tensor:
        """Multiplier of a teacher's cosines under the configured policy."""
        policy = self.objective.logit_scale.teacher
        if policy == "own":
            return self.targets.teachers[number].logit_scale
        if policy == "student":
            return self.student.logit_scale.detach()
        assert not isinstance(policy, str)
        value = policy[number] if isinstance(policy, tuple) else policy
        return torch.full_like(self.student.logit_scale.detach(), value)  # torch.tensor would wait for the device

    @property
    def ids(self) -> Int[Tensor, "b"]:
        assert self.targets.ids is not None
        return self.targets.ids

    @cached_property
    def batch_ids(self) -> Int[Tensor, "B"]:
        """Of the pairs of all processes."""
        return distributed.gather_constant(self.ids)

    @cached_property
    def candidate_ids(self) -> Int[Tensor, "N"]:
        """Of the batch's pairs, then of the queue's."""
        return self.batch_ids if self.queue is None else torch.cat([self.batch_ids, self.queue.filled_ids()])

    @property
    def own_columns(self) -> Int[Tensor, "b"]:
        """Where this process's pairs stand among those of all processes."""
        num = len(self.student.image)
        return torch.arange(num, device=self.student.image.device) + distributed.rank() * num

    def in_panels(self, compute: Callable[..., Rows], *rows: Tensor, num_columns: int) -> Rows:
        """Apply compute to all rows of queries, as many at a time as objective.tile_size allows.

        compute takes as many tensors as are given here, fewer rows of each, and must not gather anything.
        """
        height = losses.panel_height(num_columns, self.student.image.device, self.objective.tile_size)
        return losses.in_panels(compute, rows, height=height)

    def tile(self, function: F) -> F:
        """A function of logits, compiled if objective.compile says so."""
        return losses.compile_tile(function) if self.objective.compile else function


def gather_constants(features: Features) -> Pairs:
    """Features of all processes in rank order."""
    return Pairs(distributed.gather_constant(features.image), distributed.gather_constant(features.text))
