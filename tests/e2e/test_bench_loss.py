"""`scripts/bench_loss.py` at a size that says nothing about time: every form has a row, and its gradient is right."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import bench_loss
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_loss.py"
GKL, SOFT_CE = ("published", "expanded", "plain", "fused"), ("open_clip_soft_ce", "fused_soft_ce")
# 16 · 24 · 24 float64 numbers, seven times, are more than that; all else is less.
LIMIT = 0.0004


@pytest.fixture(scope="module")
def rows(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    output = tmp_path_factory.mktemp("bench_loss") / "results" / "loss.jsonl"
    sizes = ("--batch", 16, "--queue", 0, 8, "--dim", 32, "--teacher-dim", 48, "--dtype", "float32", "float64")
    options = ("--device", "cpu", "--repeats", 1, "--threads", 1, "--memory-limit", LIMIT, "--tile-size", 10)
    command = [sys.executable, SCRIPT, *sizes, *options, "--variants", *GKL, *SOFT_CE, "--output", output]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"→ {output}"
    assert "fused_soft_ce" in done.stdout
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_every_form_has_a_row_and_the_machine_the_first(rows: list[dict[str, Any]]) -> None:
    assert rows[0]["kind"] == "machine"
    assert (rows[0]["threads"], rows[0]["repeats"], rows[0]["memory_limit"]) == (1, 1, pytest.approx(1e9 * LIMIT))
    assert all(rows[0]["gemm_tflops"][dtype] > 0 for dtype in ("float32", "float64"))
    found = [(row["queue"], row["dtype"], row["variant"]) for row in rows if row["kind"] == "loss"]
    forms = {0: (*GKL, *SOFT_CE), 8: GKL}
    dtypes = ("float32", "float64")
    assert found == [(queue, dtype, form) for queue in forms for dtype in dtypes for form in forms[queue]]
    for row in rows:
        if row["kind"] == "loss" and "error" not in row:
            assert row["ms"] == row["ms_min"] > 0
            assert row["first_step_seconds"] > 0
            assert row["of_gemm"] == pytest.approx(row["useful_tflops"] / rows[0]["gemm_tflops"][row["dtype"]])
            # Teacher and student logits and a gradient, of two directions or of one pair of matrices with two gradients.
            products = 16 * 16 * 4 if row["variant"] in SOFT_CE else 2 * 3 * 16 * (16 + row["queue"])
            flop = 2 * 48 * products
            assert row["useful_tflops"] * row["ms"] == pytest.approx(flop / 1e9)


def test_gradients_are_those_of_the_loss_in_float64(rows: list[dict[str, Any]]) -> None:
    compared = [row for row in rows if "exact" in row]
    assert len(compared) == 19
    for row in compared:
        assert row["exact"] == f"{'open_clip_soft_ce' if row['variant'] in SOFT_CE else 'plain'} float64"
        most = {"float32": 1e-4, "float64": 1e-10}[row["dtype"]]
        assert all(row[f"error_{name}"] <= most for name in ("image", "text", "logit_scale")), row
        assert row["dtype"] == "float64" or row["error_image"] > 0


def test_a_form_that_needs_more_than_the_limit_is_a_row_with_an_error(rows: list[dict[str, Any]]) -> None:
    (row,) = [row for row in rows if "error" in row]
    assert (row["variant"], row["queue"], row["dtype"]) == ("published", 8, "float64")
    assert row["error"] == "out of memory (estimated 0.000516 GB, limit 0.0004 GB)"
    assert "ms" not in row


def test_bytes_by_hand(rows: list[dict[str, Any]]) -> None:
    eight, sixteen = (row for row in rows if row["kind"] == "bytes")
    assert [eight["ranks"], sixteen["ranks"]] == [8, 16]
    # 7/8 of: 16 images and texts of width 48 (6144 bytes); 16 of width 32 (4096), twice; 16 × 16 logits (1024), thrice.
    assert eight["teacher_keys"] == 5376
    assert eight["student_keys"] == eight["open_clip_sharded"] == 5376 + 7168
    assert eight["whole_logits"] == 2688
    assert sixteen["teacher_keys"] == 5760


@pytest.mark.parametrize("soft_ce", [False, True])
def test_without_memory_for_whole_matrices_the_exact_gradient_is_fused(soft_ce: bool) -> None:
    setting = bench_loss.Setting(12, 0 if soft_ce else 5, "float32", 6, 5, 4, "cpu")
    inputs = bench_loss.make_inputs(setting)
    (_, whole), (form, fused) = (
        bench_loss.exact_gradients(setting, inputs, limit, soft_ce=soft_ce) for limit in (1e9, 0)
    )
    assert form == ("fused_soft_ce float64" if soft_ce else "fused float64")
    for found, expected in zip(fused, whole, strict=True):
        assert (found - expected).norm() <= 1e-12 * expected.norm()


def test_what_fails_is_told() -> None:
    attempt = bench_loss.attempt

    def fail(error: Exception) -> None:
        raise error

    assert attempt(lambda: 3) == 3
    assert attempt(lambda: fail(MemoryError())) == "out of memory: MemoryError: "
    assert attempt(lambda: fail(RuntimeError("not for Half\nmore"))) == "RuntimeError: not for Half"
    with pytest.raises(ValueError, match="wrong"):
        attempt(lambda: fail(ValueError("wrong")))
