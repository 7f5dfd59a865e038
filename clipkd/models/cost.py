"""Cost of a model: parameters, multiply-accumulates and latency per tower, and the bytes that autograd saves."""

import contextlib
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from clipkd.models import students
from clipkd.models.encoder import Encoder

SECONDS_TO_TIME = 1.0
MOST_RUNS = 50


@torch.inference_mode()
def measure_cost(encoder: Encoder, device: torch.device) -> dict[str, Any]:
    """Per tower (image, text): parameters, MACs of one input, median milliseconds of one input, on the encoder's device.

    MACs are half of torch's floating-point operations of matrix products, convolutions and attention.
    """
    pixels = torch.zeros(1, 3, *encoder.spec.size, device=device)
    tokens = encoder.spec.tokenize(["a photo of a cat"]).to(device)
    towers: dict[str, Callable[[], Any]] = {
        "image": lambda: encoder.encode_image(pixels),
        "text": lambda: encoder.encode_text(tokens),
    }
    counted: dict[str, Any] = getattr(encoder.model, "stated_cost", None) or {
        "parameters": students.count_parameters(encoder.model),
        "macs": {tower: count_macs(encoder, run) for tower, run in towers.items()},
    }
    return {
        **counted,
        "latency_ms": {tower: time_median(run, device) for tower, run in towers.items()},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
    }


def count_macs(module: nn.Module, run: Callable[[], Any]) -> int:
    """Multiply-accumulates of one call of `run`, which uses the module."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not see the fused kernel
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)  # the counter fails on parameters that are inputs of modules (attention pools)
    try:
        with FlopCounterMode(display=False) as counter:
            run()
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops() // 2


def time_median(run: Callable[[], Any], device: torch.device) -> float:
    seconds: list[float] = []
    run()
    while len(seconds) < 3 or (sum(seconds) < SECONDS_TO_TIME and len(seconds) < MOST_RUNS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 3)


class SavedBytes:
    """Bytes that autograd saves for backward passes, without the weights: now and at the peak. A storage counts once."""

    def __init__(self) -> None:
        self.storages: Counter[int] = Counter()
        self.now = self.peak = 0

    def keep(self, tensor: Tensor) -> "SavedTensor":
        return SavedTensor(tensor, None if tensor.is_leaf and tensor.requires_grad else self)


class SavedTensor:
    """A saved tensor, counted while the graph holds it."""

    def __init__(self, tensor: Tensor, counter: SavedBytes | None) -> None:
        # Detached, as the graph must not refer to itself.
        self.tensor, self.counter, storage = tensor.detach(), counter, tensor.untyped_storage()
        self.address, self.num_bytes = storage.data_ptr(), storage.nbytes()
        self.count(1)

    def count(self, number: int) -> None:
        if self.counter is None:
            return
        held, self.counter.storages[self.address] = (n := self.counter.storages[self.address]), n + number
        self.counter.now += self.num_bytes * (bool(held + number) - bool(held))
        self.counter.peak = max(self.counter.peak, self.counter.now)

    def __del__(self) -> None:
        self.count(-1)


@contextlib.contextmanager
def count_saved() -> Iterator[SavedBytes]:
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda kept: kept.tensor):
        yield saved
