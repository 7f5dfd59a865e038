"""Measure one runtime in this process and print the result as JSON.

Only what the runtime needs is imported, so that the memory of the process is the runtime's own.
"""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clipkd.models.onnx_student import OnnxStudent, onnx_file

CAPTIONS = (
    "a brown dog runs through the deep snow",
    "two children ride on a small red bicycle",
    "a plate of pasta with tomatoes and basil",
    "an old lighthouse above the sea at dusk",
    "a photo of a grey cat asleep indoors",
    "people are waiting for a train in rain",
    "a round wooden table with four green chairs",
    "the skyline of a large city at night",
)
"""Ten tokens each."""

NUM_WARM_UP, MIN_RUNS = 2, 5

Run = tuple[str, int, dict[str, Any], Callable[[], Any]]
"""Tower, batch size, the row's fields about model and inputs, the work to time."""


def measure(*, runtime: str, folder: str, batch: list[int], seconds: float, threads: int) -> dict[str, Any]:
    """Time both towers at every batch size; returns rows and versions."""
    if runtime == "torch":
        packages, runs = ("torch", "open_clip_torch"), torch_runs(folder, batch, threads)
    else:
        packages, runs = ("onnxruntime", "numpy"), onnx_runs(Path(folder), runtime, batch, threads)
    rows = []
    for tower, size, about, work in runs:
        row = {"runtime": runtime, "tower": tower, "batch": size, "threads": threads, **about}
        rows.append(row | time_runs(work, size, seconds) | {"peak_rss_mb": peak_rss_mb()})
    versions = {name: importlib.metadata.version(name) for name in packages}
    return {"rows": rows, "versions": {"python": platform.python_version(), **versions}}


def onnx_runs(folder: Path, runtime: str, batch: list[int], threads: int) -> Iterator[Run]:
    import numpy as np
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    baseline = peak_rss_mb()
    student = OnnxStudent.load(folder, runtime, threads=threads)
    about = {
        tower: {name: student.about[name][tower] for name in ("parameters", "macs")}
        | {"file_mb": megabytes(onnx_file(folder, file, runtime).stat().st_size), "baseline_rss_mb": baseline}
        for tower, file in (("image", "vision"), ("text", "text"))
    }
    for size in batch:
        shape = (size, 3, *student.about["image_size"])
        pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        ids = student.tokenize(captions(size))
        yield "image", size, about["image"], partial(student.run, "vision", pixels)
        yield "text", size, about["text"] | {"tokens": ids.shape[1]}, partial(student.run, "text", ids)


def torch_runs(folder: str, batch: list[int], threads: int) -> Iterator[Run]:
    import torch

    from clipkd.models.cost import count_cost
    from clipkd.models.load import load_model

    torch.set_num_threads(threads)
    baseline = peak_rss_mb()
    encoder = load_model(folder)

    cost = count_cost(encoder)
    about: dict[str, dict[str, Any]] = {
        tower: {"parameters": number, "macs": cost["macs"][tower], "baseline_rss_mb": baseline}
        | {"file_mb": megabytes(4 * number)}
        for tower, number in cost["parameters"].items()
    }
    about["text"]["tokens"] = encoder.spec.tokenize(["a"]).shape[1]
    for size in batch:
        pixels = torch.randn(size, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(0))
        inference, ids = torch.inference_mode(), encoder.spec.tokenize(captions(size))
        yield "image", size, about["image"], inference(partial(encoder.encode_image, pixels))
        yield "text", size, about["text"], inference(partial(encoder.encode_text, ids))


def captions(number: int) -> list[str]:
    return [CAPTIONS[place % len(CAPTIONS)] for place in range(number)]


def time_runs(work: Callable[[], Any], size: int, seconds: float) -> dict[str, float]:
    """Time repeated runs. Percentiles are nearest-rank: times of runs that took place, without interpolation."""
    for _ in range(NUM_WARM_UP):
        work()
    times: list[float] = []
    while len(times) < MIN_RUNS or sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    times.sort()
    p50, p95 = (times[-(-share * len(times) // 100) - 1] for share in (50, 95))
    rate = round(size / p50, 2)
    return {"runs": len(times), "p50_ms": round(1000 * p50, 3), "p95_ms": round(1000 * p95, 3), "per_second": rate}


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would include the parent process from before the exec
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return megabytes(1024 * int(line.split()[1]))
    import resource

    return megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


def megabytes(number: int) -> float:
    return round(number / 1e6, 2)


def main() -> None:
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
