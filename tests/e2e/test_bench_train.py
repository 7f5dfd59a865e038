"""`scripts/bench_train.py` at a size that says nothing about time: every variant has a row, and both losses are one number."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_train
import pytest
import torch
import train_loops

from clipkd import files

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_train.py"
VARIANTS = ("plain", "online", "online_gkl", "cached", "open_clip")
PARTS = ("data", "teacher", "student", "loss", "optimizer")


@pytest.fixture(scope="module")
def rows(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    output = tmp_path_factory.mktemp("bench_train") / "results" / "train.jsonl"
    sizes = ("--setting", "demo", "--batch", 8, "--images", 32, "--steps", 2, "--rounds", 2, "--workers", 1)
    command = [sys.executable, SCRIPT, *sizes, "--device", "cpu", "--threads", 1, "--variants", *VARIANTS]
    command += ["--output", output]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert [name for name in VARIANTS if name not in done.stdout] == []
    machine, *rows = files.read_rows(output)
    assert machine["kind"] == "machine"
    assert [row["variant"] for row in rows] == list(VARIANTS)
    return {row["variant"]: row for row in rows}


@pytest.mark.slow
def test_rates_ratios_and_shares_fit_together(rows: dict[str, dict[str, Any]]) -> None:
    for name, row in rows.items():
        one, two = row["seconds_per_step_rounds"]
        assert row["seconds_per_step"] == pytest.approx((one + two) / 2)
        assert row["seconds_per_step_min"] == min(one, two)
        assert row["images_per_second"] == pytest.approx(8 / row["seconds_per_step"])
        for other in ("plain", "open_clip"):
            theirs = rows[other]["seconds_per_step_rounds"]
            assert row[f"of_{other}"] == pytest.approx((theirs[0] / one + theirs[1] / two) / 2)
        shares = {part: row[f"share_{part}"] for part in PARTS}
        assert sum(shares.values()) == pytest.approx(1)
        assert min(shares["data"], shares["student"], shares["loss"], shares["optimizer"]) > 0
        assert (shares["teacher"] > 0.05) == (name in ("online", "online_gkl", "open_clip"))
        assert 0 <= row["data_wait"] < 1
        assert row["cpu_seconds_per_step"] > 0


@pytest.mark.slow
def test_clipkd_and_open_clip_start_from_one_loss(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["online"]["first_loss"] == pytest.approx(rows["open_clip"]["first_loss"], rel=1e-6)
    assert rows["cached"]["first_loss"] == pytest.approx(rows["online"]["first_loss"], rel=1e-2)
    assert abs(rows["online_gkl"]["first_loss"] - rows["online"]["first_loss"]) > 1e-3
    assert rows["plain"]["first_loss"] < 3  # the logarithm of 8 pairs is 2.08
    assert rows["cached"]["cache_bytes"] >= 2 * 32 * 128 * 2  # 32 images and texts of 128 numbers of 2 bytes


def test_parts_of_a_step_make_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    setting = bench_train.SETTINGS["demo"]._replace(batch=8, images=16)
    bench_train.write_files(setting, tmp_path)
    task = train_loops.Task(tmp_path, "tiny-student", 8, "cpu", "fp32", 0)
    for variant in ("online_gkl", "open_clip"):
        weights: dict[bool, dict[str, torch.Tensor]] = {}
        for by_parts in (False, True):
            loop, batch = train_loops.open_loop(variant, task), train_loops.first_batch(variant, task)
            seen: list[str] = []
            loop.step(batch, seen.append if by_parts else None)
            assert len(seen) == (6 if by_parts else 0)
            module = loop.model if variant == "open_clip" else loop.run.learner.distiller
            weights[by_parts] = {name: each.clone() for name, each in module.state_dict().items()}
        for name, whole in weights[False].items():
            torch.testing.assert_close(weights[True][name], whole, rtol=0, atol=1e-6)
