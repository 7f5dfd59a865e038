"""`clipkd cache` and training from it: killed anywhere, damaged anyhow, and to the bit what it is without a cache."""

import re
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clipkd.config.train import StudentConfig
from clipkd.export.artefacts import write_open_clip
from clipkd.models.initial import create_student
from tests.e2e.conftest import SMALL, Run
from tests.e2e.events import Event
from tests.e2e.forked import running
from tests.e2e.runs import assert_close_runs, assert_same_run, read_metrics, tmpfs, with_all_terms
from tests.teachers.world import content_of, flip, write_data

slow = pytest.mark.slow

SHARDS, STEPS = (20, 12, 16), 6
"""Two passes over 48 pairs: as many as the caches have views."""


@dataclass(frozen=True)
class Setting:
    """Data, a teacher, the objective with everything, and its float32 cache of two views, made without interruption."""

    folder: Path
    clipkd: Run
    environment: dict[str, str]

    @property
    def common(self) -> list[str]:
        """Options of caching and training."""
        teacher = ("--teacher.models", str(self.teacher), "--data.path", str(self.pairs))
        return [*SMALL, *with_all_terms(self.folder), *teacher]

    @property
    def caching(self) -> list[str]:
        return ["cache", *self.common, "--views", "2", "--dtype", "float32"]

    @property
    def training(self) -> list[str]:
        return ["train", *self.common, "--steps", str(STEPS), "--checkpoint.every_steps", "2"]

    @property
    def teacher(self) -> Path:
        return self.folder / "teacher"

    @property
    def pairs(self) -> Path:
        return self.folder / "pairs"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    def run(self, name: str, *options: object, processes: int = 1) -> Path:
        """The folder of a training, which is run once."""
        folder = self.folder / "runs" / name
        if not folder.exists():
            self.clipkd(*self.training, *options, "--output", folder, processes=processes)
        return folder

    @property
    def online(self) -> Path:
        return self.run("online")

    @property
    def cached(self) -> Path:
        return self.run("cached", "--teacher.cache", self.cache)


@pytest.fixture(scope="module")
def setting(clipkd: Run, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Setting:
    setting = Setting(tmp_path_factory.mktemp("setting"), clipkd, environment)
    write_data(setting.pairs, SHARDS)
    write_teacher(setting.teacher, seed=1)
    (setting.folder / "noto").mkdir()
    (setting.folder / "noto" / "classnames.txt").write_text("".join(f"thing {number}\n" for number in range(8)))
    (setting.folder / "noto" / "zeroshot_classification_templates.txt").write_text("{c}\na drawing of {c}\n")
    clipkd(*setting.caching, "--output", setting.cache)
    return setting


def write_teacher(folder: Path, *, seed: int) -> Path:
    """An untrained model of the demo teacher's architecture."""
    torch.manual_seed(seed)
    folder.mkdir()
    write_open_clip(create_student(StudentConfig(model="tiny-teacher")).eval(), folder)
    return folder


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """One line of error that contains the words."""
    (line,) = [line for line in done.stderr.splitlines() if "error" in line or "Traceback" in line]
    assert (done.returncode, line.startswith("clipkd ")) == (2, True)
    assert [word for word in words if word not in line] == [], line


def end(setting: Setting, event: Event, folder: Path, arguments: list[str], *, processes: int = 1) -> tuple[int, str]:
    """Exit status and stderr of a command in which an event happens; its other processes are killed then."""
    output = setting.folder / f"output_{time.monotonic_ns()}"
    words = (*arguments, "--output", folder)
    with running(*words, environment=setting.environment, folder=output, processes=processes, event=event) as command:
        hit = command.processes[event.rank]
        hit.join(120)
        assert hit.exitcode is not None, command.stderr
        return hit.exitcode, command.stderr


def assert_same_cache(one: Path, other: Path, *, but: str = "") -> None:
    """Compare every byte of every file; of config.yaml without the output. but: a file that may differ."""
    expected, found = content_of(one), content_of(other)
    for each in (expected, found):
        each["config.yaml"] = re.sub(rb"(?m)^output:.*$", b"", each["config.yaml"])
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name] and name != but] == []


def assert_cache_survives(setting: Setting, folder: Path, events: list[Event], *, processes: tuple[int, int]) -> None:
    """Kill the command at each event, then run it to its end. processes: before and after."""
    for event in events:
        code, said = end(setting, event, folder, setting.caching, processes=processes[0])
        assert code == -signal.SIGKILL, (event, said)
        assert not (folder / "manifest.json").exists()
    done = setting.clipkd(*setting.caching, "--output", folder, processes=processes[1])
    assert f"train from it with --teacher.cache {folder}" in done.stdout
    assert_same_cache(setting.cache, folder)


KILLS = [
    Event("half", 1),  # plan.json, by which the next start recognises the folder
    Event("batch", 1),
    Event("half", 3),  # the first features
    Event("half", 5),  # the record that completes the first shard
    Event("written", 5),
    Event("half", 7),  # features of the last shard; the second is complete by then
    Event("half", 6),  # class vectors, when all shards are complete
]


def test_a_cache_killed_anywhere_and_made_again_is_the_uninterrupted_one(setting: Setting, tmp_path: Path) -> None:
    assert_cache_survives(setting, tmp_path / "cache", KILLS, processes=(1, 1))


@pytest.mark.parametrize(
    ("kill", "processes"),
    [(Event("half", 3, rank=1), (2, 1)), pytest.param(Event("half", 7), (1, 2), marks=slow)],
)
def test_two_processes_write_the_cache_of_one_and_either_finishes_what_a_kill_left(
    setting: Setting, tmp_path: Path, kill: Event, processes: tuple[int, int]
) -> None:
    assert_cache_survives(setting, tmp_path / "cache", [kill], processes=processes)


def test_damage_that_one_of_two_processes_finds_ends_both_with_a_line(setting: Setting, tmp_path: Path) -> None:
    """No image of the second shard can be decoded."""
    shard = write_data(tmp_path / "pairs", SHARDS) / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG\r\n\x1a\n", b"no image").replace(b"\xff\xd8\xff", b"no!"))
    words = (*setting.caching, "--data.path", tmp_path / "pairs", "--output", tmp_path / "cache")
    with running(*words, environment=setting.environment, folder=tmp_path / "out", processes=2) as command:
        assert command.wait(60) == 1, command.stderr
        assert [process.exitcode for process in command.processes] == [1, 1]
    assert "12 of 12 samples cannot be used" in command.stderr
    assert "Traceback" not in command.stderr


def test_a_signal_keeps_finished_shards_and_leaves_nothing_half_written(setting: Setting, tmp_path: Path) -> None:
    """The loader processes get it too."""
    folder, arguments = tmp_path / "cache", [*setting.caching, "--data.num_workers", "2"]
    code, said = end(setting, Event("half", 7, "SIGINT"), folder, arguments)
    assert code == 128 + signal.SIGINT, said
    assert "Traceback" not in said
    assert (folder / "records" / "00000.json").is_file()
    assert not (folder / "manifest.json").exists()
    first = folder / "features" / "00000.image.0.npy"
    written = first.stat().st_mtime_ns
    done = setting.clipkd(*arguments, "--output", folder)
    assert "2 of 3 shards to make" in done.stderr
    assert first.stat().st_mtime_ns == written
    assert_same_cache(setting.cache, folder, but="config.yaml")  # which names the number of loader processes


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(setting: Setting, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "64k") as small:
        done = setting.clipkd(*setting.caching, "--output", small / "cache", check=False)
        assert_refused(done, f"{small / 'cache'} lacks ", "MiB of disk", "--output", "--views", "--dtype float16")
        assert "shards to make" not in done.stderr  # the time of which is measured
        assert not list((small / "cache").rglob("*.npy"))


def test_the_same_command_rebuilds_a_damaged_cache_on_two_processes(setting: Setting, tmp_path: Path) -> None:
    """Even after a kill between the two steps that turn it into an unfinished one."""
    folder, name = tmp_path / "cache", "features/00001.image.0.npy"
    shutil.copytree(setting.cache, folder)
    flip(folder / name)
    (folder / "features" / "00002.text.0.npy").unlink()
    code, said = end(setting, Event("unlink", 2), folder, setting.caching)
    assert code == -signal.SIGKILL, said
    assert (folder / "manifest.json").exists()
    done = setting.clipkd(*setting.caching, "--output", folder, processes=2)
    assert f"rebuilding: {folder / name}" in done.stderr
    assert "2 of 3 shards to make" in done.stderr
    assert_same_cache(setting.cache, folder)


def test_a_cached_run_is_bit_by_bit_the_online_run(setting: Setting) -> None:
    """Every term, with a queue, a moving average, labels and several captions per sample."""
    assert_same_run(setting.online, setting.cached, steps=STEPS)
    rows = read_metrics(setting.cached)
    assert len({row["loss"] for row in rows}) == STEPS
    terms = {"info_nce", "gkl_kl", "kl", "features", "itc", "closed_set_kl", "icl", "teacher_logit_scale"}
    assert terms <= rows[0].keys()


def test_two_processes_train_from_a_cache_as_one_does_and_as_they_do_online(setting: Setting) -> None:
    cached = setting.run("cached_two", "--teacher.cache", setting.cache, "--teacher.models", "[]", processes=2)
    assert_same_run(setting.run("online_two", processes=2), cached, steps=STEPS)
    assert_close_runs(setting.cached, cached, world_sizes={2})


@slow
def test_a_student_with_a_frozen_text_tower_of_its_own_finds_it_in_a_cache_made_for_it(
    setting: Setting, tmp_path: Path
) -> None:
    student = create_student(StudentConfig(model="tiny-student"))
    save_file(student.model.state_dict(), tmp_path / "start.safetensors")
    options = ("--student.text", "frozen", "--student.model", f"tiny-student@{tmp_path / 'start.safetensors'}")
    training = (*setting.training, *options, "--micro_batches", 2)
    setting.clipkd(*setting.caching, *options, "--output", tmp_path / "cache")
    kinds = {path.name.split(".", 1)[1] for path in (tmp_path / "cache" / "features").iterdir()}
    assert kinds == {"samples.npy", "image.0.npy", "text.0.npy", "text.student.npy"}
    online, cached = tmp_path / "online", tmp_path / "cached"
    setting.clipkd(*training, "--output", online)
    said = setting.clipkd(*training, "--teacher.cache", tmp_path / "cache", "--output", cached).stderr
    assert "the student reads its text features too" in said
    assert_same_run(online, cached, steps=STEPS)
    plain = setting.clipkd(*training, "--teacher.cache", setting.cache, "--output", tmp_path / "run")
    assert "the student reads" not in plain.stderr  # a cache without them: the tower computes the same
    assert_same_run(online, tmp_path / "run", steps=STEPS)


def test_a_cached_run_that_was_stopped_killed_and_moved_is_the_uninterrupted_one(
    setting: Setting, tmp_path: Path
) -> None:
    run, moved = tmp_path / "run", tmp_path / "moved"
    words = [*setting.training, "--resume", "latest"]
    stop = Event("step", 2, "SIGTERM")
    code, said = end(setting, stop, run, [*words, "--teacher.cache", str(setting.cache)])
    assert (code, "stopped by SIGTERM after step 2" in said) == (143, True), said
    shutil.copytree(setting.cache, moved)
    code, said = end(setting, Event("step", 4), run, [*words, "--teacher.cache", str(moved)])
    assert code == -signal.SIGKILL, said
    assert "resumed from step 2 of 6" in said
    done = setting.clipkd(*words, "--teacher.cache", moved, "--output", run)
    assert "resumed from step 4 of 6" in done.stderr
    assert_same_run(setting.cached, run, steps=STEPS)


def test_a_cached_run_loads_no_teacher(setting: Setting, tmp_path: Path) -> None:
    """The configuration may name one that is gone."""
    gone = setting.teacher.with_name("gone")
    setting.teacher.rename(gone)
    try:
        words = (*setting.training, "--teacher.cache", setting.cache)
        setting.clipkd(*words, "--output", tmp_path / "run")
        refused = setting.clipkd(*setting.training, "--output", tmp_path / "online", check=False)
    finally:
        gone.rename(setting.teacher)
    assert_same_run(setting.online, tmp_path / "run", steps=STEPS)
    assert_refused(refused, str(setting.teacher))


def test_verify_finds_a_bit_that_changed_unseen(setting: Setting, tmp_path: Path) -> None:
    """Size and time of change are those of the intact file."""
    done = setting.clipkd("cache", "verify", setting.cache)
    assert done.stderr.count("problem") == 0
    assert "10 of 10 files have their size and SHA-256" in done.stdout  # 3 of each of 3 shards, and class vectors
    assert "48 samples usable" in done.stdout
    cache = tmp_path / "cache"
    shutil.copytree(setting.cache, cache)
    path = cache / "features" / "00001.text.0.npy"
    flip(path)
    done = setting.clipkd("cache", "verify", cache, check=False)
    (problem,) = [line for line in done.stderr.splitlines() if line.startswith("clipkd cache verify: problem: ")]
    assert (done.returncode, str(path) in problem, "Traceback" in done.stderr) == (2, True, False)
    assert "9 of 10 files have their size and SHA-256" in done.stdout


def test_check_describes_the_cache_and_lists_a_wrong_one_beside_other_problems(
    setting: Setting, tmp_path: Path
) -> None:
    words = ("check", *setting.common, "--steps", STEPS, "--output", tmp_path / "run")
    done = setting.clipkd(*words, "--teacher.cache", setting.cache)
    assert "teacher   48 samples × 2 views and 36 captions of " in done.stdout
    for part in (f", float32, from {setting.cache}\n", "finds the right caption for", "images/s"):
        assert part in done.stdout
    assert not (tmp_path / "run").exists()
    cache = tmp_path / "cache"
    shutil.copytree(setting.cache, cache)
    path = cache / "features" / "00001.image.0.npy"
    path.write_bytes(path.read_bytes()[:-1])
    wrong = ("--teacher.cache", cache, "--optim.clip_norm", -1, "--evaluation.data", "[/no/set]")
    done = setting.clipkd(*words, *wrong, check=False)
    assert done.returncode == 2
    problems = [line for line in done.stderr.splitlines() if line.startswith("clipkd check: problem: ")]
    assert len(problems) == 3
    for part in (str(path), "optim.clip_norm is -1", "/no/set"):
        assert sum(part in problem for problem in problems) == 1, part
