"""A run folder belongs to one process at a time, and a checkpoint to one run."""

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from clipkd.config.train import DataConfig, OptimConfig, StudentConfig, TeacherConfig, TrainConfig, to_dict
from clipkd.errors import collecting
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


IDENTITY = {"teachers": {"0": {"sha256": "a", "dtype": "fp32"}}, "classes": ["cat", "dog"]}


@pytest.mark.parametrize(
    ("now", "identity", "words"),
    [
        # Compared by content: another path is no other run.
        ({"teacher": TeacherConfig(models="moved"), "data": DataConfig(path="moved")}, {}, None),
        ({"micro_batches": 2, "output": "moved", "threads": 3}, {}, None),
        ({"student": StudentConfig(text="frozen")}, {}, "with student.text = trained, now it is frozen"),
        ({"optim": OptimConfig(learning_rate=0.5)}, {}, "with optim.learning_rate = 0.001, now it is 0.5"),
        ({"steps": 3}, {}, "with steps = 10000, now it is 3"),
        ({}, {"classes": ["dog", "cat"]}, "was made with classes = "),
        ({}, {"teachers": {"0": {"sha256": "a", "dtype": "bf16"}}}, r"with teachers\.0\.dtype = fp32, now it is bf16"),
        (
            {},
            {"teachers": IDENTITY["teachers"] | {"1": {"sha256": "b"}}},
            r"with teachers\.1\.sha256 = None, now it is b",
        ),
        ({}, {"teacher_cache": {"dtype": "float16"}}, r"with teacher_cache\.dtype = None, now it is float16"),
    ],
)
def test_a_run_continues_only_as_itself(now: dict[str, Any], identity: dict[str, Any], words: str | None) -> None:
    with collecting():  # a run with these options would need more of them
        before = TrainConfig(teacher=TeacherConfig(models="here"))
        config = dataclasses.replace(before, **now)
    state = {"config": to_dict(before), "identity": IDENTITY}
    del state["config"]["student"]["text"]  # the checkpoint is older than this option
    if words is None:
        require_same_run(Path("step_1"), state, config, IDENTITY | identity)
        return
    with pytest.raises(ValueError, match=words):
        require_same_run(Path("step_1"), state, config, IDENTITY | identity)
