"""Cost of a model: parameters, multiply-accumulates and latency per tower, and the bytes that autograd saves."""

import contextlib
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
    """`count_cost`, and the median milliseconds of one input per tower, on the encoder's device."""
    return {
        **count_cost(encoder, device),
        "latency_ms": {tower: time_median(run, device) for tower, run in tower_runs(encoder, device).items()},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads",
    }


@torch.inference_mode()
def count_cost(encoder: Encoder, device: torch.device | None = None) -> dict[str, dict[str, int]]:
    """Per tower (image, text): parameters, and MACs of one input. device: the encoder's.

    MACs are half of torch's floating-point operations of matrix products, convolutions and attention.
    """
    return getattr(encoder.model, "stated_cost", None) or {
        "parameters": students.count_parameters(encoder.model),
        "macs": {tower: count_macs(encoder, run) for tower, run in tower_runs(encoder, device).items()},
    }


def tower_runs(encoder: Encoder, device: torch.device | None) -> dict[str, Callable[[], Any]]:
    """Tower → a pass of one input."""
    pixels = torch.zeros(1, 3, *encoder.spec.size, device=device)
    tokens = encoder.spec.tokenize(["a photo of a cat"]).to(device)
    return {"image": lambda: encoder.encode_image(pixels), "text": lambda: encoder.encode_text(tokens)}


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
        self.holders: Counter[int] = Counter()
        """Address of a storage → saved tensors that share it."""
        self.now = self.peak = 0

    def keep(self, tensor: Tensor) -> "SavedTensor":
        saved = SavedTensor(tensor.detach())  # the graph must not refer to itself
        if not (tensor.is_leaf and tensor.requires_grad):
            storage = tensor.untyped_storage()
            self.now += storage.nbytes() if not self.holders[storage.data_ptr()] else 0
            self.holders[storage.data_ptr()] += 1
            self.peak = max(self.peak, self.now)
            weakref.finalize(saved, self.release, storage.data_ptr(), storage.nbytes())
        return saved

    def release(self, address: int, num_bytes: int) -> None:
        self.holders[address] -= 1
        self.now -= num_bytes if not self.holders[address] else 0


@dataclass(eq=False)
class SavedTensor:
    tensor: Tensor


@contextlib.contextmanager
def count_saved() -> Iterator[SavedBytes]:
    saved = SavedBytes()
    with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda kept: kept.tensor):
        yield saved
