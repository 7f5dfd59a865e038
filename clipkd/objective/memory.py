"""What outlives a step besides weights: a model's moving average, a queue of earlier features, a running class prior."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Generic, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from clipkd import distributed

M = TypeVar("M", bound=nn.Module)


class MovingAverage(Generic[M]):
    """average ← momentum · average + (1 − momentum) · model, over parameters and buffers.

    Buffers too: a BatchNorm student's running statistics belong to the weights they were measured with. Integer
    buffers are copied.
    """

    def __init__(self, model: M, momentum: float) -> None:
        """model: on its device; the average starts at its weights."""
        self.momentum, self.model = momentum, deepcopy(model).eval().requires_grad_(False)
        """The average: frozen, in eval mode."""
        # Parameters, not a state_dict's tensors: DDP gives parameters other storage.
        (means, _), (current, self.buffers) = weights_of(self.model), weights_of(model)
        pairs = list(zip(means, current, strict=True))
        self.pairs = [pair for pair in pairs if pair[0].is_floating_point()]
        self.counts = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the model's present weights in. Call on every process."""
        # DDP copies the main process's buffers at the next forward only; the averages must not differ before.
        distributed.copy_from_main(self.buffers)
        means, current = zip(*self.pairs, strict=True)
        get_ema_multi_avg_fn(self.momentum)(means, current, 0)
        for count, present in self.counts:
            count.copy_(present)


def weights_of(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and the buffers that are saved with them, as a BatchNorm's are but a mask is not; and those buffers alone."""
    saved = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    return [*model.parameters(), *buffers], buffers


class FeatureQueue:
    """Aligned rings of the newest features: slot i of every ring and of the ids belongs to one pair (ALBEF, arXiv 2107.07651).

    No module and no buffers: DDP would send them to every process at every step. Each process pushes the same
    gathered batch instead. It starts empty, not with random vectors: `filled` gives what is there.
    """

    def __init__(self, capacity: int, widths: Mapping[str, int], *, device: torch.device) -> None:
        """widths: name of each ring → width of its features. Raises: ValueError if the capacity is not positive."""
        if capacity < 1:
            raise ValueError(f"the queue's capacity is {capacity}; it must be 1 or more")
        self.capacity, self.num_pushed = capacity, 0
        self.ids = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.rings = {name: torch.zeros(capacity, width, device=device) for name, width in widths.items()}

    def __len__(self) -> int:
        """Filled slots."""
        return min(self.num_pushed, self.capacity)

    def filled(self, name: str) -> Float[Tensor, "q d"]:
        """One ring's features, in the order of slots."""
        return self.rings[name][: len(self)]

    def filled_ids(self) -> Int[Tensor, "q"]:
        return self.ids[: len(self)]

    @torch.no_grad()
    def push(self, ids: Int[Tensor, "n"], features: Mapping[str, Float[Tensor, "n d"]]) -> None:
        """Replace the oldest pairs by a batch; of a batch larger than the ring only the last pairs stay.

        Raises: ValueError if the batch does not bring every ring's features, one row per id.
        """
        if features.keys() != self.rings.keys() or {len(rows) for rows in features.values()} - {len(ids)}:
            shapes = {name: tuple(rows.shape) for name, rows in features.items()}
            raise ValueError(f"a queue of {list(self.rings)} was given {shapes} for {len(ids)} ids")
        last = torch.arange(len(ids), device=ids.device)[-self.capacity :]
        slots = (self.num_pushed + last) % self.capacity
        self.ids[slots] = ids[last]
        for name, rows in features.items():
            self.rings[name][slots] = rows[last].to(self.rings[name].dtype)
        self.num_pushed += len(ids)

    def tensors(self) -> dict[str, Tensor]:
        """The state to checkpoint."""
        return {"num_pushed": torch.tensor(self.num_pushed), "ids": self.ids, **self.rings}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises: ValueError if the tensors are of a queue with other rings or another capacity."""
        own = self.tensors()
        if {name: t.shape for name, t in tensors.items()} != {name: t.shape for name, t in own.items()}:
            raise ValueError(f"the stored queue holds {sorted(tensors)}, this one {sorted(own)}, or their sizes differ")
        self.num_pushed = int(tensors["num_pushed"])
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


class ClassPrior:
    """Per class, the running mean of the teacher's class probabilities over its samples; uniform until one was seen."""

    def __init__(self, num_classes: int, *, device: torch.device) -> None:
        # Double precision: a sum over a data set in single precision stops growing.
        self.sums = torch.zeros(num_classes, num_classes, dtype=torch.float64, device=device)
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)

    def rows(self, labels: Int[Tensor, "b"]) -> Float[Tensor, "b k"]:
        """Each label's prior; unlabelled samples (−1) get a row that means nothing."""
        labels = labels.clamp(min=0)
        counts = self.counts[labels][:, None]
        return torch.where(counts > 0, self.sums[labels] / counts.clamp(min=1), 1 / len(self.counts)).float()

    @torch.no_grad()
    def update(self, labels: Int[Tensor, "n"], probabilities: Float[Tensor, "n k"]) -> None:
        """Add samples to their classes' means; label −1 adds nothing."""
        # By a matrix product: scattered additions come in any order on a GPU, and a resumed run must repeat the bits.
        member = (labels[:, None] == torch.arange(len(self.counts), device=labels.device)).double()
        self.counts += member.sum(dim=0)
        self.sums.addmm_(member.T, probabilities.double())  # in place: sums of 20,000 classes take 3 GB

    def tensors(self) -> dict[str, Tensor]:
        """The state to checkpoint."""
        return {"sums": self.sums, "counts": self.counts}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises: ValueError if the tensors are of another number of classes."""
        if tensors.keys() != {"sums", "counts"} or tensors["sums"].shape != self.sums.shape:
            raise ValueError(f"the stored class prior is not one of {len(self.counts)} classes")
        self.sums.copy_(tensors["sums"])
        self.counts.copy_(tensors["counts"])
