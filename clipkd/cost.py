"""What a model costs: parameters, multiply-accumulates and measured latency of each tower."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clipkd import students
from clipkd.models import Encoder

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
    """Multiply-accumulates of a run of the module."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # the counter does not look into the fused kernel
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)  # the counter stumbles over a parameter that is a module's input (attention pools)
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
