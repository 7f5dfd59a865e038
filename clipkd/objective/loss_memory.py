"""What a batch's logits will take: whole, or some queries at a time."""

import dataclasses
import itertools
from collections import Counter
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from clipkd import distributed, losses
from clipkd.objective.comparison import Targets
from clipkd.objective.distiller import Distiller
from clipkd.objective.memory import FeatureQueue
from clipkd.progress import mib
from clipkd.views import Features

LATE = 1 << 30
"""A step at which every warm-up and ramp is over."""
PROBE = 61
"""Pairs of a small batch that is measured, or some more if anything else has their number."""
TRANSIENT = 40
"""Bytes per logit that a backward pass needs beside what was kept for it, and at most as much again: gradients on their way."""


@dataclass(frozen=True)
class LossMemory:
    """Of one process, for batches of one size and a queue that is full."""

    num_queries: int
    num_candidates: int
    panel_height: int
    kept_per_query: int
    """Bytes for the backward pass."""

    def num_bytes(self, rows: int) -> int:
        """At the peak, with so many queries at a time."""
        return rows * (self.kept_per_query + min(self.kept_per_query, TRANSIENT * self.num_candidates))

    def describe(self) -> str:
        if not self.kept_per_query:
            return "no logits"
        whole = f"{self.num_queries:,} × {self.num_candidates:,} logits"
        if self.panel_height >= self.num_queries:
            return f"{whole} at once, about {mib(self.num_bytes(self.num_queries))}"
        rows = f"{self.panel_height:,} row{'s' if self.panel_height > 1 else ''}"
        return (
            f"{whole}, {rows} at a time, about {mib(self.num_bytes(self.panel_height))} "
            f"({mib(self.num_bytes(self.num_queries))} at once; objective.tile_size)"
        )


def measure_loss_memory(distiller: Distiller, teacher_dims: list[int], *, batch_size: int) -> LossMemory:
    """From what the terms keep of a small batch's logits. Call on every process."""
    objective, capacity = distiller.objective, distiller.objective.queue.capacity
    kept = count_matrices(distiller, teacher_dims)
    # A full batch's columns instead of the small one's.
    widths = {"batch": batch_size, "queue": batch_size + capacity, "classes": num_classes(distiller)}
    num_candidates = max(widths[kind] for kind in kept) if kept else batch_size
    return LossMemory(
        num_queries=batch_size // distributed.world_size(),
        num_candidates=num_candidates,
        panel_height=losses.panel_height(max(widths.values()), tile_size=objective.tile_size),
        kept_per_query=sum(num_bytes * widths[kind] for kind, num_bytes in kept.items()),
    )


def num_classes(distiller: Distiller) -> int:
    return 0 if distiller.closed_set is None else len(distiller.closed_set.teacher_classes)


def count_matrices(distiller: Distiller, teacher_dims: list[int]) -> Counter[str]:
    """Bytes kept for the backward pass per logit, of matrices with the batch, batch and queue, or classes as columns."""
    device = distiller.student.logit_scale.device
    world_size, classes = distributed.world_size(), num_classes(distiller)
    taken = {classes, distiller.student.dim, *teacher_dims}
    rows = next(n for n in itertools.count(PROBE) if not taken & {n, world_size * n, world_size * n + 1})
    pairs = world_size * rows

    def features(width: int) -> Features:
        image, text = (F.normalize(torch.ones(rows, width, device=device), dim=-1) for _ in range(2))
        return Features(image, text, torch.tensor(1.0, device=device), torch.tensor(0.0, device=device))

    numbers = torch.arange(rows, device=device)
    width = distiller.student.dim
    targets = Targets(tuple(features(dim) for dim in teacher_dims), features(width), numbers, -torch.ones_like(numbers))
    student = features(width)._replace(
        logit_scale=distiller.student.logit_scale, logit_bias=distiller.student.logit_bias
    )
    trains_text = not distiller.student.text_is_frozen
    student.image.requires_grad_()
    student.text.requires_grad_(trains_text)
    class_features = features(width).image[:1].repeat(classes, 1).requires_grad_(trains_text) if classes else None
    comparison = distiller.compare(student, targets, step=LATE, class_features=class_features)
    queue = None
    if distiller.queue is not None:
        queue = FeatureQueue(1, {name: ring.shape[1] for name, ring in distiller.queue.rings.items()}, device=device)
        queue.push(numbers[:1], {name: torch.zeros_like(ring) for name, ring in queue.rings.items()})
    columns = {classes: "classes", pairs: "batch", pairs + 1: "queue"}
    kept: dict[int, Tensor] = {}  # held, so that no two have the same address

    def keep(tensor: Tensor) -> None:
        """No backward pass comes; and a graph that holds its own tensors would never go."""
        if tensor.ndim == 2 and tensor.shape[0] == rows and tensor.shape[1] in columns:
            kept[tensor.untyped_storage().data_ptr()] = tensor.detach()

    whole = dataclasses.replace(comparison, queue=queue, compiled=False, tile_size=1 << 30)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda nothing: nothing):
        whole.in_panels(distiller.rows)
    counted: Counter[str] = Counter()
    for tensor in kept.values():
        counted[columns[tensor.shape[1]]] += tensor.element_size()
    return counted
