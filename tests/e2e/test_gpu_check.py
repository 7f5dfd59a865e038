"""`scripts/gpu_check.py` on a CPU: its own code runs, and a check that fails says so."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipkd import files

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"


def run(output: Path, environment: dict[str, str], *checks: str) -> dict[str, dict]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--output", str(output), "--checks", *checks]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    machine, *rows = files.read_rows(output)
    assert (machine["kind"], machine["device"]) == ("machine", "cpu")
    assert [row["check"] for row in rows] == list(checks)
    return {row["check"]: row for row in rows}


def test_checks_in_one_process(environment: dict[str, str], tmp_path: Path) -> None:
    rows = run(tmp_path / "gpu.jsonl", environment, "waits", "numbers", "fp16", "evaluation", "closed_set")
    assert rows["waits"]["waits"] == []
    assert 0 < rows["waits"]["host_seconds_of_ema"] < rows["waits"]["seconds_per_step"]
    assert rows["numbers"]["loss"] == pytest.approx(rows["numbers"]["cpu"], rel=1e-6)
    assert rows["fp16"]["skipped"] == "needs a GPU"
    assert (rows["evaluation"]["flips_fp32"], rows["evaluation"]["difference_fp32"]) == (0, 0)
    assert rows["closed_set"]["seconds_with"] > rows["closed_set"]["seconds_without"] > 0


@pytest.mark.slow
def test_checks_of_launched_runs(environment: dict[str, str], tmp_path: Path) -> None:
    rows = run(tmp_path / "gpu.jsonl", environment, "collectives", "loss", "signal")
    assert rows["collectives"]["losses_of_two"] == pytest.approx(rows["collectives"]["losses"], rel=1e-4)
    assert rows["signal"]["seconds"] > 0
