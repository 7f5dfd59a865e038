"""Comparing training runs: by every logged number and every saved tensor."""

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from clipkd import files

VARYING = {"seconds", "images_per_second", "data_wait", "world_size"}
"""Logged values that differ between equal runs."""

ALL_TERMS = (
    *("queue=2", "warmup_steps=4", "gkl.weight=1", "gkl.gamma=0.5", "kl.weight=0.5", "affinity.weight=0.1"),
    *("features.weight=10", "icl.weight=1", "gd.weight=100", "afd.weight=0.5", "vrd.weight=0.1", "xrd.weight=0.1"),
    *("itc.weight=0.3", "itc.teacher_share=0.2", "sigmoid.weight=0.01", "closed_set.weight=1"),
)
"""All that need no second kind of teacher; the queue wraps around at the third step of 16 pairs."""


def with_all_terms(data: Path) -> tuple[str, ...]:
    classes = ("--objective.closed_set.classes", str(data / "noto" / "classnames.txt"), "--data.label_key", "label")
    return (*(f"--objective.{option}" for option in ALL_TERMS), *classes, "--optim.ema_momentum", "0.9")


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return files.read_rows(run / "metrics.jsonl")


def saved(run: Path, step: int, file: str = "model.safetensors") -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / f"step_{step:06d}" / file)


def assert_same_run(one: Path, other: Path, *, steps: int) -> None:
    """All logged numbers and the last checkpoint are equal to the bit."""
    rows = [[{k: v for k, v in row.items() if k not in VARYING} for row in read_metrics(run)] for run in (one, other)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == steps
    names = [
        sorted(path.name for path in (run / "checkpoints" / f"step_{steps:06d}").glob("*.safetensors"))
        for run in (one, other)
    ]
    assert "model.safetensors" in names[0]
    assert names[0] == names[1]
    for file in names[0]:
        expected, found = saved(one, steps, file), saved(other, steps, file)
        assert expected.keys() == found.keys()
        assert [name for name in expected if not expected[name].equal(found[name])] == [], file


def assert_close_runs(one: Path, other: Path, *, world_sizes: set[int], rel: float = 1e-5) -> None:
    """All logged numbers are equal up to rounding."""
    expected, found = read_metrics(one), read_metrics(other)
    assert {row["world_size"] for row in found} == world_sizes
    for name in expected[0].keys() - VARYING:
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=rel, abs=1e-5), name


@contextlib.contextmanager
def tmpfs(folder: Path, size: str) -> Iterator[Path]:
    """A small disk."""
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)
