"""A run folder belongs to one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import GKLTerm
from clipkd.config.train import StudentConfig, TeacherConfig, TrainConfig, to_dict
from clipkd.files import claim
from clipkd.training.resume import require_same_run

HOLDER = """
import sys, time
from pathlib import Path
from clipkd.files import claim
held = claim(Path(sys.argv[1]))
print("claimed", flush=True)
time.sleep(600)
"""


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "claimed\n"
        with pytest.raises(ValueError, match=rf"is being written by process {holder.pid} on \S+; wait for it"):
            claim(tmp_path)
        holder.kill()
        holder.wait()
        with claim(tmp_path) as held:
            assert Path(held.name) == tmp_path / ".lock"
    claim(tmp_path).close()


def test_a_run_goes_on_only_with_the_text_tower_it_began_with() -> None:
    def config(**options: str) -> TrainConfig:
        objective = ObjectiveConfig(gkl=GKLTerm(weight=1.0))
        student = StudentConfig(model="demo-student@x.bin", **options)  # type: ignore[arg-type]
        return TrainConfig(student=student, teacher=TeacherConfig(models="x"), objective=objective)

    kinds = ("trained", "frozen", "teacher")
    for before, now in [(a, b) for a in kinds for b in kinds]:
        state = {"config": to_dict(config(text=before)), "identity": {}}
        if before == now:
            require_same_run(Path("step_1"), state, config(text=now), {})
            continue
        with pytest.raises(ValueError, match=f"made with student.text = {before}, now it is {now}"):
            require_same_run(Path("step_1"), state, config(text=now), {})
    state = {"config": to_dict(config()), "identity": {}}
    del state["config"]["student"]["text"]  # of a run that was begun before there was this option
    require_same_run(Path("step_1"), state, config(text="trained"), {})
    with pytest.raises(ValueError, match="now it is frozen"):
        require_same_run(Path("step_1"), state, config(text="frozen"), {})
