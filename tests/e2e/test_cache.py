"""`clipkd cache` and training from it: killed anywhere, damaged anyhow, and to the bit what it is without a cache."""

import json
import os
import random
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clipkd.config.data import DataConfig
from clipkd.config.train import StudentConfig
from clipkd.data import PairSet, open_pairs
from clipkd.data.crops import decoding_scale
from clipkd.images import open_image
from clipkd.models.create import create_student
from clipkd.models.load import load_model
from tests.e2e.cache_runs import Event, tree, with_event, write_samples, write_teacher
from tests.e2e.conftest import SMALL, Run
from tests.e2e.forked import running
from tests.e2e.test_train import ALL_TERMS, VARYING, read_metrics

slow = pytest.mark.slow

STEPS = 6
"""Two passes over 48 pairs: as many as the caches have views."""

STATE = ("model.safetensors", "ema.safetensors", "optimizer.safetensors", "memory.safetensors")


@dataclass(frozen=True)
class Setting:
    """Data, a teacher, the objective with everything, and its float32 cache of two views, made without interruption."""

    folder: Path
    clipkd: Run
    environment: dict[str, str]

    @property
    def common(self) -> list[str]:
        """Options of caching and training."""
        classes = ("--objective.closed_set.classes", str(self.folder / "classes" / "classnames.txt"))
        teacher = ("--teacher.models", str(self.teacher), "--data.path", str(self.pairs))
        return [*SMALL, *ALL_TERMS, *classes, "--data.label_key", "label", "--optim.ema_momentum", "0.9", *teacher]

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
        """Of one training, made once."""
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
    write_samples(setting.pairs)
    write_teacher(setting.teacher, seed=1)
    (setting.folder / "classes").mkdir()
    names, templates = "".join(f"thing {number}\n" for number in range(8)), "{c}\na drawing of {c}\n"
    (setting.folder / "classes" / "classnames.txt").write_text(names, encoding="utf-8")
    (setting.folder / "classes" / "zeroshot_classification_templates.txt").write_text(templates, encoding="utf-8")
    clipkd(*setting.caching, "--output", setting.cache)
    return setting


def assert_same_run(one: Path, other: Path) -> None:
    """Whatever is logged and saved, bit by bit."""
    rows = [[{k: v for k, v in row.items() if k not in VARYING} for row in read_metrics(run)] for run in (one, other)]
    assert len(rows[0]) >= STEPS
    for row, again in zip(*rows, strict=True):
        assert [name for name in row.keys() | again.keys() if row.get(name) != again.get(name)] == [], row["step"]
    step = f"step_{rows[0][-1]['step']:06d}"
    assert [path.name for path in sorted((one / "checkpoints" / step).glob("*.safetensors"))]
    for file in STATE:
        paths = [run / "checkpoints" / step / file for run in (one, other)]
        assert paths[0].exists() == paths[1].exists(), file
        if paths[0].exists():
            expected, found = map(load_file, paths)
            assert expected.keys() == found.keys()
            assert [name for name in expected if not expected[name].equal(found[name])] == [], file


def assert_refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """In one line, by which a user can mend it."""
    told = [line for line in done.stderr.splitlines() if "error" in line or "Traceback" in line]
    assert (done.returncode, len(told)) == (2, 1), done.stderr
    assert told[0].startswith("clipkd ")
    assert [word for word in words if str(word) not in told[0]] == [], told[0]


def end(setting: Setting, event: Event, folder: Path, arguments: list[str], *, processes: int = 1) -> tuple[int, str]:
    """Exit status of a command to which it happens, and what it wrote to stderr; other processes are killed with it."""
    output = setting.folder / f"output_{time.monotonic_ns()}"
    words = (*arguments, "--output", folder)
    with with_event(event, *words, environment=setting.environment, folder=output, processes=processes) as command:
        hit = command.processes[event.rank]
        hit.join(120)
        assert hit.exitcode is not None, command.stderr
        return hit.exitcode, command.stderr


def assert_same_cache(one: Path, other: Path, *, but: str = "") -> None:
    """Every byte of every file, but for one that may say something else."""
    expected, found = tree(one), tree(other)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name] and name != but] == []


def assert_cache_survives(setting: Setting, folder: Path, events: list[Event], *, processes: tuple[int, int]) -> None:
    """Killed at each event, then made to its end. processes: before and after."""
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
    shard = write_samples(tmp_path / "pairs") / "00001.tar"
    shard.write_bytes(shard.read_bytes().replace(b"\x89PNG\r\n\x1a\n", b"no image"))
    words = (*setting.caching, "--data.path", tmp_path / "pairs", "--output", tmp_path / "cache")
    with running(*words, environment=setting.environment, folder=tmp_path / "out", processes=2) as command:
        assert command.wait(60) == 1, command.stderr
        assert [process.exitcode for process in command.processes] == [1, 1]
    assert "12 of 12 samples cannot be used" in command.stderr
    assert "Traceback" not in command.stderr


@pytest.mark.slow
@pytest.mark.parametrize("number", range(2))
def test_kills_at_random_times_change_nothing(setting: Setting, tmp_path: Path, number: int) -> None:
    rng, folder, kills = random.Random(number), tmp_path / "cache", 0
    processes, words = 1 + number % 2, (*setting.caching, "--output", folder, "--data.num_workers", number // 2 * 2)
    for attempt in range(5):
        output = tmp_path / f"out_{attempt}"
        with running(*words, environment=setting.environment, folder=output, processes=processes) as command:
            time.sleep(rng.uniform(0.3, 2.5) if attempt else 1.0)
            command.signal(signal.SIGKILL)
            for process in command.processes:
                process.join()
            kills += command.poll() == -signal.SIGKILL
    assert kills >= 1
    setting.clipkd(*words)
    assert_same_cache(setting.cache, folder, but="config.yaml")  # which names the number of loader processes


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(signal.SIGINT, 2, id="SIGINT to loader processes too"),
        pytest.param(signal.SIGTERM, 0, id="SIGTERM", marks=slow),
    ],
)
def test_a_signal_keeps_finished_shards_and_leaves_nothing_half_written(
    setting: Setting, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    folder, what = tmp_path / "cache", "SIGINT" if number == signal.SIGINT else "SIGTERM"
    arguments = [*setting.caching, "--data.num_workers", str(workers)]
    code, said = end(setting, Event("half", 7, what), folder, arguments)
    assert code == 128 + number, said
    assert "Traceback" not in said
    assert (folder / "records" / "00000.json").is_file()
    assert not (folder / "manifest.json").exists()
    first = folder / "features" / "00000.image.0.npy"
    written = first.stat().st_mtime_ns
    done = setting.clipkd(*arguments, "--output", folder)
    assert "2 of 3 shards to make" in done.stderr
    assert first.stat().st_mtime_ns == written
    assert_same_cache(setting.cache, folder, but="config.yaml")  # which names the number of loader processes


class tmpfs:
    """A small disk of its own, while it lasts."""

    def __init__(self, folder: Path, size: str) -> None:
        self.folder, self.size = folder, size

    def __enter__(self) -> Path:
        self.folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self.size}", "tmpfs", self.folder]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("needs the right to mount a tmpfs")
        return self.folder

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", self.folder], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_computed(setting: Setting, tmp_path: Path) -> None:
    with tmpfs(tmp_path / "small", "64k") as small:
        done = setting.clipkd(*setting.caching, "--output", small / "cache", check=False)
        assert_refused(done, f"{small / 'cache'} lacks ", "MiB of disk", "--output", "--views", "--dtype float16")
        assert "shards to make" not in done.stderr  # the time of which is measured
        assert not list((small / "cache").rglob("*.npy"))


@pytest.mark.parametrize(
    "number",
    [
        pytest.param(1, id="plan", marks=slow),
        pytest.param(3, id="features"),
        pytest.param(14, id="class vectors", marks=slow),
    ],
)
def test_a_disk_that_fills_up_is_said_and_the_same_command_goes_on(
    setting: Setting, tmp_path: Path, number: int
) -> None:
    with tmpfs(tmp_path / "small", "2m") as small:
        full = Event("write", number, "fill", path=str(small / "other"))
        code, said = end(setting, full, small / "cache", setting.caching)
        told = said.splitlines()[-1]
        name = {1: "plan.json", 3: "features/00000.image.0.npy", 14: "classes.npy"}[number]
        assert (code, told.count(str(small / "cache" / name))) == (1, 1), said
        assert "No space left on device" in told
        assert "; free space, then give the same command again" in told
        assert not list(small.rglob("*.tmp"))
        assert not (small / "cache" / name).exists()
        (small / "other").unlink()
        setting.clipkd(*setting.caching, "--output", small / "cache")
        assert_same_cache(setting.cache, small / "cache")


def test_the_same_command_rebuilds_a_damaged_cache_on_two_processes(setting: Setting, tmp_path: Path) -> None:
    """Even after a kill between the two steps that turn it into an unfinished one."""
    folder, name = tmp_path / "cache", "features/00001.image.0.npy"
    shutil.copytree(setting.cache, folder)
    flip(folder / name)
    code, said = end(setting, Event("unlink", 2), folder, setting.caching)
    assert code == -signal.SIGKILL, said
    assert (folder / "manifest.json").exists()
    done = setting.clipkd(*setting.caching, "--output", folder, processes=2)
    assert f"rebuilding: {folder / name}" in done.stderr
    assert_same_cache(setting.cache, folder)


def flip(path: Path) -> None:
    """One bit of its last byte but 100."""
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_a_cached_run_is_bit_by_bit_the_online_run(setting: Setting) -> None:
    """Every term, with a queue, a moving average, labels and several captions per sample."""
    assert_same_run(setting.online, setting.cached)
    rows = read_metrics(setting.cached)
    assert len({row["loss"] for row in rows}) == STEPS
    terms = {"info_nce", "gkl_kl", "kl", "features", "itc", "closed_set_kl", "icl", "teacher_logit_scale"}
    assert terms <= rows[0].keys()


def test_two_processes_train_from_a_cache_as_one_does_and_as_they_do_online(setting: Setting) -> None:
    cached = setting.run("cached_two", "--teacher.cache", setting.cache, "--teacher.models", "[]", processes=2)
    assert_same_run(setting.run("online_two", processes=2), cached)
    one, two = read_metrics(setting.cached), read_metrics(cached)
    assert [row["world_size"] for row in (one[0], two[0])] == [1, 2]
    for name in one[0].keys() - VARYING:
        assert [row[name] for row in one] == pytest.approx([row[name] for row in two], rel=1e-5, abs=1e-5), name


@slow
def test_the_student_reads_the_frozen_teachers_text_features_too_in_micro_batches(
    setting: Setting, tmp_path: Path
) -> None:
    """With student.text teacher: the cache of any other student holds them."""
    student, teacher = (
        create_student(StudentConfig(model=f"demo-{who}")).model_config for who in ("student", "teacher")
    )
    assert student is not None
    assert teacher is not None
    (tmp_path / "mixed.json").write_text(json.dumps({**student, "text_cfg": teacher["text_cfg"]}))
    options = ("--student.model", tmp_path / "mixed.json", "--student.text", "teacher", "--micro_batches", 2)
    online, cached = tmp_path / "online", tmp_path / "cached"
    setting.clipkd(*setting.training, *options, "--output", online)
    said = setting.clipkd(*setting.training, *options, "--teacher.cache", setting.cache, "--output", cached).stderr
    assert "the student reads its text features too" in said
    assert_same_run(online, cached)


@slow
def test_a_student_with_a_frozen_text_tower_of_its_own_finds_it_in_a_cache_made_for_it(
    setting: Setting, tmp_path: Path
) -> None:
    student = create_student(StudentConfig(model="demo-student"))
    save_file(student.model.state_dict(), tmp_path / "start.safetensors")
    options = ("--student.text", "frozen", "--student.model", f"demo-student@{tmp_path / 'start.safetensors'}")
    setting.clipkd(*setting.caching, *options, "--output", tmp_path / "cache")
    kinds = {path.name.split(".", 1)[1] for path in (tmp_path / "cache" / "features").iterdir()}
    assert kinds == {"samples.npy", "image.0.npy", "text.0.npy", "text.student.npy"}
    online, cached = tmp_path / "online", tmp_path / "cached"
    setting.clipkd(*setting.training, *options, "--output", online)
    said = setting.clipkd(*setting.training, *options, "--teacher.cache", tmp_path / "cache", "--output", cached).stderr
    assert "the student reads its text features too" in said
    assert_same_run(online, cached)
    plain = setting.clipkd(*setting.training, *options, "--teacher.cache", setting.cache, "--output", tmp_path / "run")
    assert "the student reads" not in plain.stderr  # a cache without them: the tower is asked, with the same result
    assert_same_run(online, tmp_path / "run")


@slow
def test_two_teachers_of_other_resolutions_on_large_jpegs(setting: Setting, clip_folder: Path, tmp_path: Path) -> None:
    """Which student and first teacher decode at other scales: 8 for 32 pixels, 4 for 48. The second is held in bf16."""
    write_samples(tmp_path / "pairs", jpeg=True)
    pairs = open_pairs(DataConfig(path=str(tmp_path / "pairs"), caption_key="captions", num_workers=0))
    assert isinstance(pairs, PairSet)
    image = open_image(pairs.read(0).image, "first")
    specs = [create_student(StudentConfig(model="demo-student")).spec, load_model(str(clip_folder)).spec]
    assert [decoding_scale(image, (10.0, 10.0, 470.0, 350.0), spec) for spec in specs] == [8, 4]

    options = [*SMALL, "--data.path", tmp_path / "pairs", "--objective.kl.weight", 1, "--objective.keys", "student"]
    options += ["--teacher.models", clip_folder, setting.teacher]
    cache = tmp_path / "cache"
    setting.clipkd("cache", *options, "--views", 2, "--dtype", "float32", "--output", cache)
    train = ("train", *options, "--steps", STEPS)
    setting.clipkd(*train, "--output", tmp_path / "online")
    setting.clipkd(*train, "--teacher.cache", cache, "--output", tmp_path / "cached")
    assert_same_run(tmp_path / "online", tmp_path / "cached")


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
    assert_same_run(setting.cached, run)


@slow
def test_a_cached_run_goes_on_with_its_own_features_only(setting: Setting, half: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(setting.cached, run)
    setting.clipkd(*setting.caching, "--views", 1, "--output", tmp_path / "one_view")
    words = (*setting.training, "--output", run, "--resume", "latest")
    before = tree(run)
    for options, told in (
        (("--teacher.cache", half), ("teacher_cache.dtype = float32, now it is float16",)),
        (("--teacher.cache", tmp_path / "one_view"), ("teacher_cache.num_views = 2, now it is 1",)),
        ((), ("teacher_cache.dtype = float32, now it is None",)),
    ):
        assert_refused(setting.clipkd(*words, *options, check=False), "was made with ", *told)
        assert tree(run) == before
    online = tmp_path / "online"
    shutil.copytree(setting.online, online)
    words = (*setting.training, "--output", online, "--resume", "latest", "--teacher.cache", setting.cache)
    assert_refused(
        setting.clipkd(*words, check=False),
        "was made with teacher_cache.dtype = None, now it is float32",
    )


def test_a_cached_run_loads_no_teacher(setting: Setting, tmp_path: Path) -> None:
    """It is not there any more; the configuration may name it still."""
    gone = setting.teacher.with_name("gone")
    setting.teacher.rename(gone)
    try:
        words = (*setting.training, "--teacher.cache", setting.cache)
        setting.clipkd(*words, "--output", tmp_path / "run")
        refused = setting.clipkd(*setting.training, "--output", tmp_path / "online", check=False)
    finally:
        gone.rename(setting.teacher)
    assert_same_run(setting.online, tmp_path / "run")
    assert_refused(refused, str(setting.teacher))


@pytest.fixture(scope="module")
def half(setting: Setting) -> Path:
    """The cache in float16."""
    folder = setting.folder / "half"
    setting.clipkd(*setting.caching, "--dtype", "float16", "--output", folder)
    return folder


@slow
@pytest.mark.parametrize(("dtype", "of_the_loss", "of_a_term"), [("float16", 2e-5, 5e-4), ("bfloat16", 4e-4, 9e-3)])
def test_half_precision_moves_the_losses_a_little(
    setting: Setting, half: Path, tmp_path: Path, dtype: str, of_the_loss: float, of_a_term: float
) -> None:
    """Bounds: four times what was measured. kl, most moved, is 0.005: two almost equal distributions."""
    cache = half
    if dtype == "bfloat16":
        cache = tmp_path / "cache"
        setting.clipkd(*setting.caching, "--dtype", dtype, "--output", cache)
    assert setting.clipkd("cache", "verify", cache, "--recompute", 4).returncode == 0
    setting.clipkd(*setting.training, "--teacher.cache", cache, "--output", tmp_path / "run")
    online, found = read_metrics(setting.online), read_metrics(tmp_path / "run")
    losses = [abs(one["loss"] / other["loss"] - 1) for one, other in zip(found, online, strict=True)]
    assert (len(losses), 0 < max(losses) < of_the_loss) == (STEPS, True), losses
    terms = {name: abs(found[0][name] / online[0][name] - 1) for name in ("gkl", "kl", "features", "closed_set")}
    assert 0 < max(terms.values()) < of_a_term, terms


def test_a_damaged_cache_is_refused_by_the_name_of_the_file(setting: Setting, tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    shutil.copytree(setting.cache, cache)
    path = cache / "features" / "00000.samples.npy"
    flip(path)
    words = (*setting.common, "--steps", STEPS, "--teacher.cache", cache, "--output", run)
    assert_refused(setting.clipkd("train", *words, check=False), str(path))
    assert not run.exists()
    (cache / "manifest.json").unlink()
    assert_refused(setting.clipkd("cache", "verify", cache, check=False), f"{cache} is not finished")


def test_verify_computes_features_again_and_finds_a_bit_that_changed_unseen(setting: Setting, tmp_path: Path) -> None:
    """Size and time of change are those of the intact file."""
    done = setting.clipkd("cache", "verify", setting.cache, "--recompute", 8)
    assert done.stderr.count("problem") == 0
    assert "10 of 10 files have their size and SHA-256" in done.stdout  # 3 of each of 3 shards, and class vectors
    assert "48 samples usable" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "recomputed" in line]
    assert line.startswith("8 samples recomputed, 2 views each: largest difference ")
    assert float(line.split()[8].rstrip(",")) < 1e-6
    cache = tmp_path / "cache"
    shutil.copytree(setting.cache, cache)
    path = cache / "features" / "00001.text.0.npy"
    stat = path.stat()
    flip(path)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    done = setting.clipkd("cache", "verify", cache, check=False)
    (problem,) = [line for line in done.stderr.splitlines() if line.startswith("clipkd cache verify: problem: ")]
    assert (done.returncode, str(path) in problem, "Traceback" in done.stderr) == (2, True, False)
    assert "9 of 10 files have their size and SHA-256" in done.stdout


@slow
def test_another_teacher_at_the_same_path_is_named_by_its_weight_file(setting: Setting, tmp_path: Path) -> None:
    teacher, cache, run = tmp_path / "teacher", tmp_path / "cache", tmp_path / "run"
    shutil.copytree(setting.teacher, teacher)
    words = ("--teacher.models", teacher)
    setting.clipkd(*setting.caching, *words, "--output", cache)
    shutil.rmtree(teacher)
    weights = write_teacher(teacher, seed=2) / "open_clip_model.safetensors"
    before = tree(cache)
    for options in (
        (*setting.training, "--teacher.cache", cache, "--output", run),
        (*setting.caching, "--output", cache),
    ):
        refused = setting.clipkd(*options, *words, check=False)
        assert_refused(refused, str(cache), str(weights), "other weights")
    assert not run.exists()
    assert tree(cache) == before
    assert setting.clipkd("cache", "verify", cache).returncode == 0  # loads no teacher
    verified = setting.clipkd("cache", "verify", cache, "--recompute", 8, check=False)
    assert verified.returncode == 2
    assert f"nothing was recomputed: {cache} was made with other weights than {weights} holds" in verified.stderr


def test_check_describes_the_cache_and_lists_a_wrong_one_beside_other_problems(
    setting: Setting, tmp_path: Path
) -> None:
    words = ("check", *setting.common, "--steps", STEPS, "--output", tmp_path / "run")
    done = setting.clipkd(*words, "--teacher.cache", setting.cache)
    (line,) = [
        line for line in done.stdout.splitlines() if line.startswith("teacher   ") and str(setting.cache) in line
    ]
    assert "48 samples × 2 views and 100 captions of " in line
    assert line.endswith(f", float32, from {setting.cache}")
    assert "finds the caption of" in done.stdout
    assert "images/s" in done.stdout
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
