"""Making a cache: what is surveyed and cut, stored once, refused, interrupted and made anew; on tiny models and data."""

import dataclasses
import errno
import io
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import save_file

from clipkd import cli, distributed, files
from clipkd.config import train as config
from clipkd.config.data import DataConfig
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import ClosedSetTerm, SoftTargetTerm
from clipkd.config.train import StudentConfig, TeacherConfig, TrainConfig
from clipkd.data import BadSample, PairSet, open_pairs
from clipkd.errors import RunStopped
from clipkd.models.create import create_student
from clipkd.models.load import load_model
from clipkd.models.text_tower import text_sha256
from clipkd.teachers.cache import command as cache
from clipkd.teachers.cache.captions import Captions, survey
from clipkd.teachers.cache.encode import Job
from clipkd.teachers.cache.plan import cut
from clipkd.teachers.store import writer
from clipkd.teachers.store.manifest import Shard, read_manifest
from clipkd.teachers.store.reader import TeacherCache, find_faults
from tests.data.samples import encode, write_tar

SHARDS = (20, 18, 10)
"""Samples of each tar."""

TOWERS: dict[str, dict[str, Any]] = {
    "first": {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
    "second": {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 24, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    },
}


@dataclass(frozen=True)
class World:
    """Data, teachers, and what a cache of them is made with."""

    folder: Path
    teachers: dict[str, str]
    """Names with their weights."""
    captions: list[list[str]]
    """Of every sample, as they are read."""

    def taught_by(self, *names: str, **options: Any) -> TeacherConfig:
        return TeacherConfig(models=tuple(self.teachers[name] for name in names), **options)

    def config(self, output: Path, **changes: Any) -> cache.CacheConfig:
        """Two teachers, two views, float32."""
        options: dict[str, Any] = {
            "views": 2,
            "dtype": "float32",
            "seed": 3,
            "precision": "fp32",
            "teacher": self.taught_by("first", "second"),
            "objective": ObjectiveConfig(kl=SoftTargetTerm(weight=1.0, keys="student")),
            "data": data_config(self.folder / "data"),
        }
        return cache.CacheConfig(output=str(output), **(options | changes))


def data_config(path: Path, **changes: Any) -> DataConfig:
    options: dict[str, Any] = {"num_workers": 0, "min_crop": 0.5, "background": "random", "caption_key": "captions"}
    return DataConfig(path=str(path), **(options | changes))


def for_training(made: cache.CacheConfig, folder: Path | str, **changes: Any) -> TrainConfig:
    """The training that reads a cache, naming no teacher."""
    values = {item.name: getattr(made, item.name) for item in dataclasses.fields(TrainConfig)}
    values |= {"teacher": TeacherConfig(cache=str(folder)), "output": "run"}
    return TrainConfig(**(values | changes))


def captions_of(id: int) -> list[str]:
    """One to four; some stand in a sample twice, most in several, and those of the last tar all came before."""
    if id >= 38:
        return [f"a drawing of thing {id % 7}", "every sample's"]
    named = [f"a drawing of thing {id % 7}", f"sample number {id}, naïve ☃", "every sample's", "a drawing of thing 0"]
    return named[: 1 + id % 4]


def picture(id: int) -> tuple[str, bytes]:
    """Suffix and bytes: transparent, wide, and JPEGs that are decoded at half their size."""
    rng = np.random.default_rng(id)
    if id % 3 == 0:
        return "jpg", encode(Image.fromarray(rng.integers(0, 256, (90, 130, 3), np.uint8)), "JPEG")
    channels = 4 if id % 3 == 1 else 3
    return "png", encode(Image.fromarray(rng.integers(0, 256, (30, 24 + id, channels), np.uint8)), "PNG")


def members(id: int, captions: list[str] | None = None) -> list[tuple[str, bytes]]:
    suffix, content = picture(id)
    text = json.dumps({"captions": captions_of(id) if captions is None else captions, "other": f"other {id}"})
    return [(f"{id:03d}.{suffix}", content), (f"{id:03d}.json", text.encode())]


def write_data(folder: Path, sizes: tuple[int, ...] = SHARDS) -> Path:
    ends = list(itertools.accumulate(sizes))
    for number, (size, end) in enumerate(zip(sizes, ends, strict=True)):
        write_tar(folder / f"{number:05d}.tar", itertools.chain.from_iterable(map(members, range(end - size, end))))
    return folder


def write_model(folder: Path, name: str, *, seed: int, **changes: Any) -> str:
    """An untrained open_clip model: a configuration and weights."""
    path = folder / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(TOWERS.get(name, TOWERS["first"]) | changes))
    torch.manual_seed(seed)
    encoder = create_student(StudentConfig(model=str(path)))
    weights = folder / f"{name}.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in encoder.model.state_dict().items()}, weights)
    return f"{path}@{weights}"


def make_world(folder: Path) -> World:
    write_data(folder / "data")
    teachers = {name: write_model(folder / "models", name, seed=seed) for seed, name in enumerate(TOWERS)}
    return World(folder, teachers, [captions_of(id) for id in range(sum(SHARDS))])


def pair_set(options: DataConfig) -> PairSet:
    pairs = open_pairs(options)
    assert isinstance(pairs, PairSet)
    return pairs


def in_this_process() -> Iterator[None]:
    """Commands run here, on the CPU whatever there is, and leave nothing of Accelerate's state behind.

    open_clip's vocabulary is unpacked once for each context: that takes longer than all else.
    """
    kept: dict[str, dict[str, Any]] = {}
    make = open_clip.SimpleTokenizer.__init__

    def make_once(tokenizer: open_clip.SimpleTokenizer, *arguments: Any, **options: Any) -> None:
        key = repr((arguments, options))
        if key not in kept:
            make(tokenizer, *arguments, **options)
            kept[key] = dict(vars(tokenizer))
        vars(tokenizer).update(kept[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        patch.setattr(open_clip.SimpleTokenizer, "__init__", make_once)
        AcceleratorState._reset_state(reset_partial_state=True)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def silent(items: Any, _title: str, _total: int) -> Iterator[Any]:
    return iter(items)


def content_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".verified.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


cpu = pytest.fixture(scope="module", autouse=True)(in_this_process)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world: World) -> Path:
    """A cache that was never interrupted."""
    return cache.run(world.config(world.folder / "whole"))


@pytest.fixture
def unestimated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the two batches that say how long it will take."""
    monkeypatch.setattr(cache, "estimate_seconds", lambda *_, **__: 0.0)


# What is cut and surveyed


@pytest.mark.parametrize(
    ("sizes", "num_views", "expected"),
    [
        ([5], 1, [5]),
        ([4096, 4097], 1, [4096, 2048, 2049]),
        ([10_000], 4, [3333, 3333, 3334]),
        ([10_000], 8, [2000] * 5),
        ([3, 2], 1 << 15, [1] * 5),
    ],
)
def test_shards_of_the_data_are_cut_into_equal_parts(sizes: list[int], num_views: int, expected: list[int]) -> None:
    stretches = cut(sized([sizes]), num_views)
    assert [rows for _, rows in stretches] == expected
    assert [first for first, _ in stretches] == [0, *itertools.accumulate(expected)][:-1]


def sized(sources: list[list[int]]) -> Any:
    return SimpleNamespace(sources=[SimpleNamespace(shard_sizes=np.array(sizes)) for sizes in sources])


def test_stretches_cover_every_id_once_and_none_lies_in_two_shards_of_the_data() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        sources = [rng.integers(1, 20_000, rng.integers(1, 5)).tolist() for _ in range(rng.integers(1, 4))]
        num_views = int(rng.integers(1, 40))
        stretches = cut(sized(sources), num_views)
        assert [first for first, _ in stretches] == [0, *itertools.accumulate(rows for _, rows in stretches)][:-1]
        place = iter(stretches)
        for size in itertools.chain(*sources):
            parts: list[int] = []
            while sum(parts) < size:
                parts.append(next(place)[1])
            assert sum(parts) == size
            assert max(parts) - min(parts) <= 1
            assert max(parts) <= 4096
            assert max(parts) * num_views <= 1 << 14
        assert list(place) == []


class Told:
    """Captions on the spot; None cannot be read. `read_captions` counts."""

    def __init__(self, captions: list[list[str] | None]) -> None:
        self.captions = captions

    def read_captions(self, index: int) -> tuple[str, ...]:
        found = self.captions[index]
        if found is None:
            raise BadSample(str(index), "no caption", "has none")
        return tuple(found)


def surveyed(captions: list[list[str] | None], sizes: list[int]) -> tuple[Any, Captions, list[Shard]]:
    """Pairs, their captions, and shards of so many samples as they are planned, counted here by a dictionary."""
    pairs: Any = Told(captions)
    starts = [0, *itertools.accumulate(sizes)][:-1]
    found, shards = survey(pairs, list(zip(starts, sizes, strict=True))), []
    known: dict[str, int] = {}
    for first, rows in zip(starts, sizes, strict=True):
        before = len(known)
        for text in itertools.chain.from_iterable(part or [] for part in captions[first : first + rows]):
            known.setdefault(text, len(known))
        shards.append(Shard(first, rows, before, len(known) - before))
    return pairs, found, shards


def test_captions_are_numbered_as_a_dictionary_would_number_them() -> None:
    """Several per sample, repeated in samples, in shards and across, and samples without any that can be read."""
    rng = np.random.default_rng(1)
    for trial in range(60):
        sizes = rng.integers(1, 7, rng.integers(1, 6)).tolist()
        words = [f"word {number}" for number in range(rng.integers(1, 30))]
        captions: list[list[str] | None] = [
            None if rng.random() < 0.2 else rng.choice(words, rng.integers(1, 5)).tolist() for _ in range(sum(sizes))
        ]
        if trial == 0:
            captions = [None] * sum(sizes)
        pairs, found, shards = surveyed(captions, sizes)
        known: dict[str, int] = {}
        for text in itertools.chain.from_iterable(part or [] for part in captions):
            known.setdefault(text, len(known))
        assert (len(found.firsts), len(found.rows)) == (len(known), sum(len(part or []) for part in captions))
        texts = [text for shard in shards for text in found.read_texts(shard, pairs)]
        assert texts == list(known)
        for shard in shards:
            own = captions[shard.first : shard.first + shard.rows]
            most = max(1, *(len(part or []) for part in own)) if own else 1
            rows = [[*(known[text] for text in part or []), *[-1] * (most - len(part or []))] for part in own]
            assert found.table(shard).tolist() == rows


def test_captions_that_are_all_equal_are_one_text() -> None:
    pairs, found, shards = surveyed([["same", "same"], ["same"], None, ["same"]], [2, 2])
    assert found.rows.tolist() == [0, 0, 0, 0]
    assert found.firsts.tolist() == [0]
    assert found.starts.tolist() == [0, 2, 3, 3, 4]
    assert found.table(shards[0]).tolist() == [[0, 0], [0, -1]]
    assert found.table(shards[1]).tolist() == [[-1], [0]]
    assert [found.read_texts(shard, pairs) for shard in shards] == [["same"], []]


@pytest.mark.usefixtures("unestimated")
def test_every_distinct_caption_is_encoded_once_in_the_shard_where_it_is_met_first(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []
    encode_texts = Job.encode_texts

    def count(job: Job, texts: list[str]) -> list[np.ndarray]:
        asked.append(texts)
        return encode_texts(job, texts)

    monkeypatch.setattr(Job, "encode_texts", count)
    made = read_manifest(cache.run(world.config(tmp_path / "made", views=1)))
    distinct = list(dict.fromkeys(itertools.chain.from_iterable(world.captions)))
    assert list(itertools.chain.from_iterable(asked)) == distinct
    assert (made.num_texts, made.num_captions) == (len(distinct), sum(map(len, world.captions)))
    assert [shard.rows for shard in made.shards] == list(SHARDS)
    assert made.shards[2].texts == 0
    assert np.load(tmp_path / "made" / made.shards[2].files["text.0"].name).shape == (0, 24)


# Samples that cannot be used


def damaged_data(folder: Path) -> Path:
    """Sample 3 has no picture, 9 no caption but blanks, 11 a caption that is no text."""
    parts = [members(id) for id in range(16)]
    parts[3][0] = (parts[3][0][0], b"no picture")
    parts[9] = members(9, ["  ", ""])
    parts[11][1] = (parts[11][1][0], b"{")
    write_tar(folder / "00000.tar", itertools.chain.from_iterable(parts))
    return folder


def test_samples_that_cannot_be_used_are_counted_and_have_no_rows(world: World, tmp_path: Path) -> None:
    data = data_config(damaged_data(tmp_path / "data"), max_skipped=0.1)
    folder = cache.run(world.config(tmp_path / "made", views=1, data=data))
    manifest = read_manifest(folder)
    assert (manifest.num_samples, manifest.num_unusable) == (16, 3)
    table, images = (np.load(folder / manifest.shards[0].files[kind].name) for kind in ("samples", "image.0"))
    assert np.flatnonzero((table[:, 1:] == -1).all(1)).tolist() == [3, 9, 11]
    assert np.flatnonzero((images == 0).all((1, 2))).tolist() == [3, 9, 11]
    assert np.abs(np.linalg.norm(np.delete(images, [3, 9, 11], 0), axis=-1) - 1).max() < 1e-6
    assert find_faults(folder, manifest, track=silent) == {}


def test_more_unusable_samples_than_max_skipped_allows_stop_it_every_time(world: World, tmp_path: Path) -> None:
    data = data_config(damaged_data(tmp_path / "data"), max_skipped=0.0)
    for _ in range(2):
        with pytest.raises(RunStopped, match=r"3 of .*00000\.tar/003: .*data\.max_skipped"):
            cache.run(world.config(tmp_path / "made", views=1, data=data))
        assert not (tmp_path / "made" / "manifest.json").exists()


# What it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "made", "--views", "0"], "views is 0; it must be 1 or more"),
        (["--output", "made", "--teacher.models", "[]"], "objective.kl needs a teacher"),
        (["--output", "made", "--teacher.cache", "other"], "teacher.cache is read by training; leave it out"),
        (["--output", "made", "--dtype", "float64"], "float64"),
        ([], "output is empty; name the folder of the cache: --output DIR"),
        (["--output", ""], "output is empty; name the folder of the cache: --output DIR"),
    ],
)
def test_options_that_make_no_cache_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """The output is never that of a training configuration, which is a run's."""
    training = for_training(
        world.config(tmp_path / "made"), "", teacher=world.taught_by("first"), output="runs/training"
    )
    config.save(training, tmp_path / "training.yaml")
    assert "output: runs/training" in (tmp_path / "training.yaml").read_text()
    with pytest.raises(SystemExit) as stop:
        cli.cache_command([str(tmp_path / "training.yaml"), *arguments])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_cache_without_any_teacher_is_refused(world: World, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a cache is made with a teacher: set teacher\.model"):
        world.config(tmp_path / "made", teacher=TeacherConfig(), objective=ObjectiveConfig())


def test_an_output_that_is_no_cache_is_left_alone(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letters.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"output .*file is a file; name a folder"):
        cache.run(world.config(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"folder is no cache: it holds letters\.txt; choose another --output"):
        cache.run(world.config(tmp_path / "folder"))
    assert content_of(tmp_path) == {"file": b"mine", "folder/letters.txt": b"mine"}


def test_streamed_shards_are_refused(world: World, tmp_path: Path) -> None:
    data = data_config(Path(f"pipe:cat {world.folder}/data/00000.tar"))
    with pytest.raises(ValueError, match=r"data\.path names shards behind URLs or pipes"):
        cache.run(world.config(tmp_path / "made", data=data))
    assert not (tmp_path / "made").exists()


def other_weights(world: World, folder: Path) -> dict[str, Any]:
    first = write_model(folder / "models", "first", seed=9)
    return {"teacher": TeacherConfig(models=(first, world.teachers["second"]))}


OTHER_PLANS: dict[str, tuple[Any, str]] = {
    "weights": (
        other_weights,
        r"other weights than those of .*models/first\.safetensors; put them back, or make another cache",
    ),
    "dtype": (lambda *_: {"dtype": "float16"}, r"--dtype = float32, now it is float16"),
    "views": (lambda *_: {"views": 3}, r"--views = 2, now it is 3"),
    "seed": (lambda *_: {"seed": 4}, r"with seed = 3, now it is 4"),
    "min_crop": (
        lambda world, _: {"data": data_config(world.folder / "data", min_crop=0.6)},
        r"data\.min_crop = 0\.5, now it is 0\.6",
    ),
    "teacher dtype": (
        lambda world, _: {"teacher": world.taught_by("first", "second", dtype="bf16")},
        r"dtype = fp32, now it is bf16",
    ),
    "teachers in another order": (
        lambda world, _: {"teacher": world.taught_by("second", "first")},
        r"other weights than those of .*second\.safetensors",
    ),
    "one teacher less": (
        lambda world, _: {"teacher": world.taught_by("first")},
        r"was made with 2 teachers \(teacher.models\), now there are 1",
    ),
    "another caption": (
        lambda world, _: {"data": data_config(world.folder / "data", caption_key="other")},
        r"caption_key = captions, now it is other",
    ),
}


def run_and_interrupt(made: cache.CacheConfig, *, num_shards: int) -> None:
    """Ctrl-C as soon as so many shards are done."""
    write_record, numbers = writer.write_record, []

    def write(folder: Path, number: int, shard: Shard) -> None:
        write_record(folder, number, shard)
        numbers.append(number)
        if len(numbers) == num_shards:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "write_record", write)
        with pytest.raises(KeyboardInterrupt):
            cache.run(made)


@pytest.fixture(scope="module")
def unfinished(world: World) -> Path:
    """The first of three shards is done."""
    run_and_interrupt(world.config(world.folder / "unfinished"), num_shards=1)
    return world.folder / "unfinished"


STATES = [*[(name, "unfinished") for name in OTHER_PLANS], ("weights", "whole"), ("dtype", "whole")]


@pytest.mark.parametrize(("name", "state"), STATES)
def test_a_cache_of_another_plan_is_refused_and_left_as_it_is(
    world: World, tmp_path: Path, name: str, state: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(state)
    change, message = OTHER_PLANS[name]
    before = content_of(folder)
    with pytest.raises(ValueError, match=message):
        cache.run(world.config(folder, **change(world, tmp_path)))
    assert content_of(folder) == before


# Interrupted, full disks, damage


@pytest.mark.usefixtures("unestimated")
def test_an_interrupted_cache_goes_on_to_the_bytes_of_one_that_was_not(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = world.config(tmp_path / "made"), tmp_path / "made"
    run_and_interrupt(made, num_shards=2)
    assert {path.name for path in folder.iterdir()} >= {"plan.json", "records", "features", "config.yaml"}
    assert sorted(path.name for path in (folder / "records").iterdir()) == ["00000.json", "00001.json"]
    for place in (folder, folder / "features", folder / "records"):
        (place / "left.npy.tmp").write_bytes(b"half")
    encoded: list[int] = []
    encode_images = Job.encode_images
    monkeypatch.setattr(Job, "encode_images", lambda job, batch: encoded.append(1) or encode_images(job, batch))
    cache.run(made)
    assert len(encoded) == 1
    found, expected = content_of(folder), content_of(whole)
    found.pop("config.yaml")
    expected.pop("config.yaml")  # names the output
    assert found == expected
    names = {"manifest.json", "README.md", "samples", "image.0", "text.0", "image.1", "text.1"}
    assert {name if "/" not in name else name[15:-4] for name in found} == names


@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("name", ["00001.image.1.npy", "00000.json", "manifest.json", "plan.json", "00002.text.0.npy"])
def test_a_full_disk_is_told_with_the_file_which_is_not_left_half_written_and_the_cache_goes_on(
    world: World, whole: Path, tmp_path: Path, name: str
) -> None:
    made, folder = world.config(tmp_path / "made"), tmp_path / "made"
    sync = os.fsync

    def full(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.name.startswith(f"{name}.") and path.suffix == ".tmp":
            assert path.stat().st_size > 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=name) as stop:
            cache.run(made)
    assert stop.value.errno == errno.ENOSPC
    assert Path(stop.value.filename).name == name
    assert [path for path in folder.rglob("*") if path.name == name or path.name.startswith(f"{name}.")] == []
    cache.run(made)
    assert content_of(folder).items() >= {k: v for k, v in content_of(whole).items() if k != "config.yaml"}.items()


def test_an_array_that_does_not_fit_on_the_disk_leaves_no_file(tmp_path: Path) -> None:
    class Full(io.BytesIO):
        def write(self, content: Any) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    def write(file: Any) -> None:
        file.write(b"first half")
        Full().write(b"second half")

    with pytest.raises(OSError, match=r"No space left on device: '.*features/0\.npy'") as stop:
        files.write_whole(tmp_path / "features" / "0.npy", write)
    assert stop.value.errno == errno.ENOSPC
    assert list((tmp_path / "features").iterdir()) == []


def flip(path: Path, offset: int = -1) -> None:
    """One bit; size and time of change stay."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def copied(folder: Path, to: Path) -> Path:
    for name, content in content_of(folder).items():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        (to / name).write_bytes(content)
    return to


@pytest.mark.usefixtures("unestimated")
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "flipped, with records that a kill has left"])
def test_the_same_command_makes_a_damaged_shard_of_a_finished_cache_anew(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    folder = copied(whole, tmp_path / "made")
    path = folder / "features" / "00001.image.1.npy"
    if damage.startswith("flipped"):
        flip(path)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    if damage.endswith("left"):  # between the manifest and the removal of what led to it
        for number, shard in enumerate(read_manifest(folder).shards):
            writer.write_record(folder, number, shard)
    encoded: list[int] = []
    encode_images = Job.encode_images
    monkeypatch.setattr(Job, "encode_images", lambda job, batch: encoded.append(1) or encode_images(job, batch))
    for number in (1, 1):  # the second time nothing is left to do
        cache.run(world.config(folder))
        assert len(encoded) == number
        assert content_of(folder) == content_of(whole)


@pytest.mark.usefixtures("unestimated")
def test_a_repair_is_finished_by_the_main_process_without_waiting_for_others(
    world: World, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They do not come there: what it gathered would be an answer to another question."""
    folder = copied(whole, tmp_path / "made")
    flip(folder / "features" / "00001.image.1.npy")
    finish, gather = cache.finish, distributed.gather_objects
    asked: list[object] = []

    def finish_alone(*arguments: Any) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed, "gather_objects", lambda value: asked.append(value) or gather(value))
            finish(*arguments)

    monkeypatch.setattr(cache, "finish", finish_alone)
    cache.run(world.config(folder))
    assert content_of(folder) == content_of(whole)
    assert asked == []


@pytest.mark.usefixtures("unestimated")
def test_a_repair_that_was_interrupted_before_the_manifest_is_finished_by_the_next_command(
    world: World, whole: Path, tmp_path: Path
) -> None:
    """On another device the features made anew differ in their last bits, and the manifest must say so."""
    folder = copied(whole, tmp_path / "made")
    flip(folder / "features" / "00001.image.1.npy")
    store = Job.store
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "store", lambda *arguments: store(*arguments) * np.float32(1 + 2**-23))
        run_and_interrupt(world.config(folder), num_shards=1)
    cache.run(world.config(folder))
    assert find_faults(folder, read_manifest(folder), track=silent, trust=False) == {}


# Class vectors, students


def with_classes(world: World, folder: Path) -> ObjectiveConfig:
    (folder / "classes.txt").write_text("cat\ndog\nhouse\n")
    term = ClosedSetTerm(weight=1.0, classes=str(folder / "classes.txt"), templates=("a {c}",), class_prior=False)
    return ObjectiveConfig(closed_set=term)


@pytest.mark.usefixtures("unestimated")
def test_class_vectors_are_the_teachers_and_made_anew_when_damaged(world: World, tmp_path: Path) -> None:
    made = world.config(
        tmp_path / "made", views=1, teacher=world.taught_by("first"), objective=with_classes(world, tmp_path)
    )
    folder = cache.run(made)
    teacher = load_model(world.teachers["first"])
    with torch.no_grad():
        expected = teacher.encode_text(teacher.spec.tokenize(["a cat", "a dog", "a house"]))
    vectors = TeacherCache(folder, read_manifest(folder)).classes()
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    before = content_of(folder)
    flip(folder / "classes.npy")
    assert list(find_faults(folder, read_manifest(folder), track=silent, trust=False)) == ["classes.npy"]
    cache.run(made)
    assert content_of(folder) == before


@pytest.mark.usefixtures("unestimated")
def test_a_frozen_text_tower_is_stored_unless_a_teacher_has_it(world: World, tmp_path: Path) -> None:
    mine = write_model(tmp_path, "mine", seed=5)
    stored = {}
    for name, weights in (("mine", mine), ("theirs", world.teachers["first"])):
        student = StudentConfig(model=weights, text="frozen")
        folder = cache.run(world.config(tmp_path / name / "made", views=1, student=student))
        stored[name] = read_manifest(folder)
    assert stored["theirs"].student is None
    assert stored["mine"].student is not None
    assert stored["mine"].student.text_sha256 == text_sha256(load_model(mine))
    kinds = {"samples", "image.0", "text.0", "image.1", "text.1"}
    assert {name: set(made.shards[0].files) for name, made in stored.items()} == {
        "mine": kinds | {"text.student"},
        "theirs": kinds,
    }


@pytest.mark.usefixtures("unestimated")
def test_features_do_not_depend_on_how_the_samples_are_cut(world: World, whole: Path, tmp_path: Path) -> None:
    """One sample each, two images at a time; many bring no new caption between others that do."""
    made = world.config(tmp_path / "made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipkd.teachers.cache.plan.LARGEST_SHARD", 1)
        cache.run(made)
    one, other = (TeacherCache(folder, read_manifest(folder)) for folder in (whole, tmp_path / "made"))
    texts = [shard.texts for shard in other.manifest.shards]
    assert [shard.rows for shard in other.manifest.shards] == [1] * sum(SHARDS)
    assert any(texts[texts.index(0) :])
    assert sum(texts) == one.manifest.num_texts
    pairs = pair_set(made.data)
    for id, captions in enumerate(world.captions):
        for view, number in itertools.product(range(2), range(len(captions))):
            first, second = (stored.read(pairs.read(id), id, view, number) for stored in (one, other))
            assert [row.tolist() for row in first] == [row.tolist() for row in second]
