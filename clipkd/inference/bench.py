"""`clipkd bench`: latency, throughput, memory and size of a student in each of its formats, each in a subprocess."""

import json
import os
import platform
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from clipkd import files, progress
from clipkd.errors import require, require_least
from clipkd.inference.isolated import describe_exit, run_module
from clipkd.inference.runtime import has_weights
from clipkd.models.onnx_student import find_formats
from clipkd.progress import count_cores, read_load


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    model: str
    """An exported folder, an open_clip folder or a run."""
    format: tuple[Literal["torch", "onnx", "onnx-fp16", "onnx-int8"], ...] = ()
    """Formats to measure, in this order; none means all that the folder has."""
    batch: tuple[int, ...] = (1, 32)
    """Batch sizes to measure, in images or texts."""
    seconds: float = 2.0
    """Seconds per measurement after the warm-up; at least 5 runs are timed."""
    threads: int | None = None
    """Threads of a runtime; null takes one per core."""
    output: str | None = None
    """JSON file to write; null writes bench.json into the folder."""

    def __post_init__(self) -> None:
        require(bool(self.batch) and min(self.batch) >= 1, f"batch is {list(self.batch)}; give sizes of 1 or more")
        require_least(self, seconds=0, threads=1)


def run(config: BenchConfig) -> tuple[Path, dict[str, Any]]:
    """Measure every format and write the record as JSON. A runtime that fails has its reason in `errors` and in its row.

    Raises: ValueError if there is no such folder, or it holds no model or lacks a requested format.
    """
    folder = Path(config.model.removeprefix("local-dir:"))
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; name one that clipkd export has written, or a run")
    output = folder / "bench.json" if config.output is None else Path(config.output)
    if output.is_dir():
        raise ValueError(f"{output} is a folder; name a JSON file with --output")
    available = find_runtimes(folder)
    if missing := [name for name in config.format if name not in available]:
        raise ValueError(f"{folder} has no {' and no '.join(missing)}; format may be {', '.join(available)}")
    order = list(config.format or available)
    task = {"batch": config.batch, "seconds": config.seconds, "threads": config.threads or count_cores()}
    load, busy = read_load()
    if busy:
        message = f"other work is running (load {load}), so times are too long; --threads 1 suffers least"
        warnings.warn(message, stacklevel=2)
    record: dict[str, Any] = {"model": str(folder), "cpu": cpu_name(), "load": load, **task, "order": order}
    record |= {"versions": {}, "errors": {}, "rows": []}
    for runtime in progress.track(order, "runtimes", len(order)):
        measured = measure_isolated({"runtime": runtime, "folder": str(folder), **task})
        if isinstance(measured, str):
            record["errors"][runtime] = measured
            measured = {"versions": {}, "rows": [{"runtime": runtime, "error": measured}]}
        record["versions"] |= measured["versions"]
        record["rows"] += measured["rows"]
    files.write_json(output, record)
    return output, record


def find_runtimes(folder: Path) -> list[str]:
    """List the runtimes that can load a folder. Raises: ValueError if it holds no model."""
    formats = find_formats(folder)
    if has_weights(folder):
        return ["torch", *formats]
    if not formats:
        from clipkd.models import run_folder

        if not run_folder.is_run(folder):
            raise ValueError(f"{folder} holds no model: no open_clip_config.json, no onnx/ and no checkpoints of a run")
    return formats or ["torch"]


def measure_isolated(task: dict[str, Any]) -> dict[str, Any] | str:
    """Run clipkd.inference.measure in a subprocess; the reason if it failed."""
    # Threads that wait actively slow torch down a hundred times where other work wants the same cores.
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ}
    done = run_module("clipkd.inference.measure", json.dumps(task), environment=environment, capture=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() if done.returncode > 0 else []
        return lines[-1] if lines else describe_exit(done.returncode)
    return json.loads(done.stdout.splitlines()[-1])


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.+)", information.read_text()) if information.is_file() else None
    return named[1] if named else platform.processor() or platform.machine()


CAPTION = (
    "Inputs are prepared: decoding, resizing and tokenizing are not timed. Per second: at the median time. Each runtime runs "
    "in its own subprocess, which holds both towers. Peak MB: its largest resident memory up to that row; base MB: before it "
    "loaded the model. int8 batches run in one pass, where eval and predict encode one item at a time. Texts are captions of "
    "about ten tokens; torch pads them to the context, ONNX to the longest if the text tower is causal."
)


def table(record: dict[str, Any]) -> Table:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    about = f"{record['cpu']}, load {record['load']} before; threads {record['threads']}; {versions}."
    grid = Table(title=f"clipkd bench {record['model']}", caption=f"{about} {CAPTION}")
    headings = ("runtime", "tower", "batch", "tokens", "p50 ms", "p95 ms", "per second", "peak MB", "base MB")
    for place, heading in enumerate((*headings, "M params", "M MACs", "file MB")):
        grid.add_column(heading, justify="left" if place < 2 else "right")
    for row in record["rows"]:
        if "error" in row:
            grid.add_row(row["runtime"], "failed")
            continue
        numbers = [f"{row[key]:.2f}" for key in ("p50_ms", "p95_ms")]
        numbers += [f"{row[key]:,.0f}" for key in ("per_second", "peak_rss_mb", "baseline_rss_mb")]
        numbers += [f"{row[key] / 1e6:,.2f}" for key in ("parameters", "macs")]
        tokens = str(row.get("tokens", ""))
        grid.add_row(row["runtime"], row["tower"], str(row["batch"]), tokens, *numbers, f"{row['file_mb']:.2f}")
    return grid
