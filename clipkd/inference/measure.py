"""One runtime, measured in a process of its own, which prints what it finds as JSON.

Only what the runtime needs is imported, so that the memory of the process is the runtime's own.
"""

import importlib.metadata
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
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
WARM_UP_RUNS, LEAST_RUNS = 2, 5

Run = Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """A loaded model."""

    towers: dict[str, Callable[[int], tuple[Run, dict[str, Any]]]]
    """image and text: batch size → a run on inputs that are ready, and what a row says of them."""
    about: dict[str, dict[str, Any]]
    """Per tower what its rows say of the model."""
    baseline: float
    """MB of the process before it loaded the model."""
    packages: tuple[str, ...]


def measure(*, runtime: str, folder: str, batch: list[int], seconds: float, threads: int) -> dict[str, Any]:
    """A row per batch size and tower, and versions."""
    subject = open_torch(folder, threads) if runtime == "torch" else open_onnx(Path(folder), runtime, threads)
    rows = []
    for size in batch:
        for tower, prepare in subject.towers.items():
            work, inputs = prepare(size)
            row = {"runtime": runtime, "tower": tower, "batch": size, **inputs, **time_runs(work, size, seconds)}
            row |= {"peak_rss_mb": peak_rss_mb(), "baseline_rss_mb": subject.baseline}
            rows.append({**row, **subject.about[tower], "threads": threads})
    versions = {name: importlib.metadata.version(name) for name in subject.packages}
    return {"rows": rows, "versions": {"python": platform.python_version(), **versions}}


def open_onnx(folder: Path, runtime: str, threads: int) -> Subject:
    import numpy as np
    import onnxruntime  # noqa: F401
    import tokenizers  # noqa: F401

    baseline = peak_rss_mb()
    student = OnnxStudent.load(folder, runtime, threads=threads)

    def images(size: int) -> tuple[Run, dict[str, Any]]:
        shape = (size, 3, *student.about["image_size"])
        pixels = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        return lambda: student.run("vision", pixels), {}

    def texts(size: int) -> tuple[Run, dict[str, Any]]:
        ids = student.tokenize(captions(size))
        return lambda: student.run("text", ids), {"tokens": ids.shape[1]}

    about = {
        tower: {
            "parameters": student.about["parameters"][tower],
            "macs": student.about["macs"][tower],
            "file_mb": megabytes(onnx_file(folder, file, runtime).stat().st_size),
        }
        for tower, file in (("image", "vision"), ("text", "text"))
    }
    return Subject({"image": images, "text": texts}, about, baseline, ("onnxruntime", "numpy"))


def open_torch(folder: str, threads: int) -> Subject:
    import torch

    from clipkd.models import students
    from clipkd.models.cost import count_macs
    from clipkd.models.load import load_model

    torch.set_num_threads(threads)
    baseline = peak_rss_mb()
    encoder = load_model(folder)

    def images(size: int) -> tuple[Run, dict[str, Any]]:
        pixels = torch.randn(size, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(0))
        return torch.inference_mode()(lambda: encoder.encode_image(pixels)), {}

    def texts(size: int) -> tuple[Run, dict[str, Any]]:
        ids = encoder.spec.tokenize(captions(size))
        return torch.inference_mode()(lambda: encoder.encode_text(ids)), {"tokens": ids.shape[1]}

    towers = {"image": images, "text": texts}
    about = {
        tower: {
            "parameters": number,
            "macs": count_macs(encoder, towers[tower](1)[0]),
            "file_mb": megabytes(4 * number),
        }
        for tower, number in students.count_parameters(encoder.model).items()
    }
    return Subject(towers, about, baseline, ("torch", "open_clip_torch"))


def captions(number: int) -> list[str]:
    return [CAPTIONS[place % len(CAPTIONS)] for place in range(number)]


def time_runs(work: Run, size: int, seconds: float) -> dict[str, float]:
    """Percentiles are of runs that took place: the least time that this share of them kept to."""
    for _ in range(WARM_UP_RUNS):
        work()
    times: list[float] = []
    while len(times) < LEAST_RUNS or sum(times) < seconds:
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    times.sort()
    p50, p95 = (times[-(-share * len(times) // 100) - 1] for share in (50, 95))
    rate = round(size / p50, 2)
    return {"runs": len(times), "p50_ms": round(1000 * p50, 3), "p95_ms": round(1000 * p95, 3), "per_second": rate}


def peak_rss_mb() -> float:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would count the process that started this one, too
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return megabytes(1024 * int(line.split()[1]))
    import resource

    return megabytes(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # macOS says it in bytes


def megabytes(number: int) -> float:
    return round(number / 1e6, 2)


def main() -> None:
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
