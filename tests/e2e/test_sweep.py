"""`clipkd sweep`: every run is one of `clipkd train`; what is trained stays, and what fails is named."""

import json
from pathlib import Path

from tests.e2e.conftest import SMALL, Run, refused


def test_a_sweep_goes_on_where_it_was_and_names_what_failed(clipkd: Run, data: Path, tmp_path: Path) -> None:
    grid, output = tmp_path / "grid.yaml", tmp_path / "sweep"
    base = " ".join([*SMALL, f"--data.path {data / 'pairs'} --evaluation.data {data / 'noto'} --steps 1"])
    grid.write_text(
        f"base: {base}\nrows:\n  alone:\n  broken: --optim.learning_rate 1e38 --steps 3\n", encoding="utf-8"
    )
    done = clipkd("sweep", grid, "--seeds", 1, "--jobs", 2, "--output", output, check=False)
    assert done.returncode == 1
    assert "clipkd sweep: problem: broken, seed 0: exit status 1: clipkd train: error: step " in done.stderr
    (row,) = [json.loads(line) for line in (output / "runs.jsonl").read_text().splitlines()]
    assert (row["row"], row["seed"], row["step"], row["metrics"]["noto"]["n"]) == ("alone", 0, 1, 32)
    weights = output / "runs" / "alone" / "0" / "checkpoints" / "step_000001" / "model.safetensors"
    assert weights.is_file()
    before = weights.stat().st_mtime_ns
    grid.write_text(f"base: {base}\nrows:\n  alone:\n", encoding="utf-8")
    done = clipkd("sweep", grid, "--seeds", 2, "--output", output)
    assert "1 rows × 2 seeds: 1 runs to train" in done.stdout
    table = (output / "table.md").read_text()
    assert table in done.stdout
    assert table.splitlines()[2].startswith("| alone | 2 | 1 | ")
    assert weights.stat().st_mtime_ns == before
    grid.write_text(f"base: {base}\nrows:\n  alone: --steps 2\n  typo: --objective.kll.weight 1\n", encoding="utf-8")
    done = clipkd("sweep", grid, "--output", output, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "clipkd sweep: row 'typo': error: " in done.stderr
    assert "objective.kll.weight" in done.stderr
    grid.write_text(f"base: {base}\nrows:\n  alone: --steps 2\n", encoding="utf-8")
    assert "holds row ['alone'] with other options" in refused(clipkd, "sweep", [str(grid), "--output", str(output)])
