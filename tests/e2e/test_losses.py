"""`clipkd train` with every file of configs/losses/: the same first ten losses on one and on two processes."""

from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL, Run
from tests.e2e.runs import VARYING, read_metrics

CONFIGS = Path(__file__).parents[2] / "configs" / "losses"
OPTIONS = {
    "albef": ("--objective.queue", "3", "--objective.itc.ramp_steps", "5"),
}


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_two_processes_log_the_first_ten_losses_of_one(
    clipkd: Run, data: Path, teacher: Path, tmp_path: Path, name: str
) -> None:
    arguments = [*SMALL, "--config", CONFIGS / f"{name}.yaml", *OPTIONS.get(name, ()), "--steps", 10]
    arguments += ["--data.path", data / "pairs", "--precision", "fp32"]
    if name not in ("albef", "mobileclip"):
        arguments += ["--teacher.models", f"local-dir:{teacher}"]
    if name == "mobileclip":
        arguments += [
            "--teacher.models",
            f"local-dir:{teacher}",
            teacher.parent / "run",
            "--objective.logit_scale.teacher",
            "[70, 60]",
        ]
    logged = {}
    for processes in (1, 2):
        clipkd("train", *arguments, "--output", tmp_path / str(processes), processes=processes)
        logged[processes] = read_metrics(tmp_path / str(processes))
        assert {row["world_size"] for row in logged[processes]} == {processes}
        assert [row["step"] for row in logged[processes]] == list(range(1, 11))
    for series in logged[1][0].keys() - VARYING:
        one, two = ([row[series] for row in logged[processes]] for processes in (1, 2))
        assert one == pytest.approx(two, rel=1e-4, abs=1e-5), series
    losses = [row["loss"] for row in logged[1]]
    assert len(set(losses)) == 10
