"""`clipkd cache`: what is computed once, refused, interrupted and rebuilt."""

import errno
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clipkd import cli
from clipkd.errors import RunStopped
from clipkd.models.load import load_model
from clipkd.teachers.cache import command
from clipkd.teachers.cache.command import CacheConfig
from clipkd.teachers.cache.encode import FeatureEncoder
from clipkd.teachers.store import manifest as store
from clipkd.teachers.store.manifest import Shard, read_manifest
from clipkd.teachers.store.reader import TeacherCache, find_faults
from tests.teachers.world import (
    SHARDS,
    Made,
    World,
    content_of,
    data_config,
    flip,
    with_classes,
    write_damaged_data,
    write_model,
)

# What is computed


def test_every_distinct_caption_is_encoded_once_in_the_shard_where_it_occurs_first(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    encode = FeatureEncoder.encode_texts
    monkeypatch.setattr(FeatureEncoder, "encode_texts", lambda job, texts: asked.extend(texts) or encode(job, texts))
    made = read_manifest(command.run(world.config(tmp_path / "made", views=1)))
    assert asked == list(dict.fromkeys(itertools.chain.from_iterable(world.captions)))
    assert (made.num_texts, made.num_captions) == (len(asked), sum(map(len, world.captions)))
    assert [shard.rows for shard in made.shards] == list(SHARDS)
    assert made.shards[2].texts == 0
    assert np.load(tmp_path / "made" / made.shards[2].files["text.0"].name).shape == (0, 24)


def test_features_do_not_depend_on_how_the_samples_are_cut(
    made: Made, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards of 4 samples; some bring no new caption between others that do."""
    monkeypatch.setattr("clipkd.teachers.cache.plan.LARGEST_SHARD", 4)
    command.run(world.config(tmp_path / "made"))
    one, other = (TeacherCache(folder, read_manifest(folder)) for folder in (made.folder, tmp_path / "made"))
    assert len(other.manifest.shards) == 5 + 5 + 3
    assert sum(shard.texts for shard in other.manifest.shards) == one.manifest.num_texts
    pairs = made.pairs
    for id, captions in enumerate(world.captions):
        for view, number in itertools.product(range(2), range(len(captions))):
            first, second = (stored.read(pairs.read(id), id, view, number) for stored in (one, other))
            for row, again in zip(first, second, strict=True):
                np.testing.assert_allclose(row, again, rtol=0, atol=1e-6)


def test_unusable_samples_are_counted_and_have_no_features(world: World, tmp_path: Path) -> None:
    data = data_config(write_damaged_data(tmp_path / "data"), max_skipped=0.1)
    folder = command.run(world.config(tmp_path / "made", views=1, data=data))
    manifest = read_manifest(folder)
    assert (manifest.num_samples, manifest.num_unusable) == (16, 3)
    table, images = (np.load(folder / manifest.shards[0].files[kind].name) for kind in ("samples", "image.0"))
    assert np.flatnonzero((table[:, 1:] == -1).all(1)).tolist() == [3, 9, 11]
    assert np.flatnonzero((images == 0).all((1, 2))).tolist() == [3, 9, 11]
    assert np.abs(np.linalg.norm(np.delete(images, [3, 9, 11], 0), axis=-1) - 1).max() < 1e-6
    assert find_faults(folder, manifest) == {}


def test_more_unusable_samples_than_max_skipped_allows_stop_it_every_time(world: World, tmp_path: Path) -> None:
    data = data_config(write_damaged_data(tmp_path / "data"), max_skipped=0.0)
    for named in (r", such as .*00000\.tar/003: .*", ""):
        with pytest.raises(RunStopped, match=rf"3 of 16 samples cannot be used{named}; more than data\.max_skipped"):
            command.run(world.config(tmp_path / "made", views=1, data=data))
        assert not (tmp_path / "made" / "manifest.json").exists()


def test_class_vectors_are_the_teachers_and_are_rebuilt_when_damaged(world: World, tmp_path: Path) -> None:
    config = world.config(tmp_path / "made", world.teachers["first"], views=1, objective=with_classes(tmp_path))
    folder, teacher = command.run(config), load_model(world.teachers["first"])
    with torch.no_grad():
        expected = teacher.encode_text(teacher.spec.tokenize(["a cat", "a dog", "a house"]))
    vectors = TeacherCache(folder, read_manifest(folder)).classes()
    torch.testing.assert_close(vectors, expected, rtol=0, atol=1e-6)
    before = content_of(folder)
    flip(folder / "classes.npy")
    assert list(find_faults(folder, read_manifest(folder), trust=False)) == ["classes.npy"]
    command.run(config)
    assert content_of(folder) == before


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output made --views 0", "views is 0; it must be 1 or more"),
        ("--output made --teacher.cache other", "teacher.cache is read by training; leave it out"),
        ("--output made --teacher.models [] --objective.kl.weight 0", "a cache is made with a teacher"),
        ("", "output is empty; name the folder of the cache: --output DIR"),
    ],
)
def test_options_that_make_no_cache_are_refused(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    """The output of a training configuration is its run folder, never the cache."""
    text = f"output: run\nteacher: {{models: {world.teachers['first']}}}\nobjective: {{kl: {{weight: 1}}, keys: student}}\n"
    (tmp_path / "training.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        cli.cache_command([str(tmp_path / "training.yaml"), *arguments.split()])
    assert stop.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_an_output_that_is_no_cache_stays_untouched_and_streamed_data_are_refused(world: World, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "letters.txt").write_text("mine")
    streamed = data_config(Path(f"pipe:cat {world.folder}/data/00000.tar"))
    for name, changes, message in (
        ("file", {}, r"output .*file is a file; name a folder"),
        ("folder", {}, r"folder holds letters\.txt and no plan\.json of a cache; choose another --output"),
        ("new", {"data": streamed}, r"data\.path names shards behind URLs or pipes"),
    ):
        with pytest.raises(ValueError, match=message):
            command.run(world.config(tmp_path / name, **changes))
    assert content_of(tmp_path) == {"file": b"mine", "folder/letters.txt": b"mine"}


def run_and_interrupt(config: CacheConfig, *, num_shards: int) -> None:
    """Ctrl-C as soon as so many shards are complete."""
    write_record, numbers = store.write_record, []

    def write(folder: Path, number: int, shard: Shard) -> None:
        write_record(folder, number, shard)
        numbers.append(number)
        if len(numbers) == num_shards:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "write_record", write)
        with pytest.raises(KeyboardInterrupt):
            command.run(config)


def test_a_cache_of_another_plan_is_refused_and_stays_untouched(made: Made, world: World, tmp_path: Path) -> None:
    run_and_interrupt(world.config(tmp_path / "unfinished"), num_shards=1)
    data, first, second = world.folder / "data", *world.teachers.values()
    other = write_model(tmp_path / "models", "first", seed=9)
    plans: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
        ((other, second), {}, r"other weights than .*models/first\.safetensors holds; put the weights back"),
        ((first,), {}, r"was made with 2 teachers \(teacher\.models\), now there are 1"),
        ((), {"dtype": "float16"}, r"--dtype = float32, now it is float16"),
        ((), {"views": 3}, r"--views = 2, now it is 3"),
        ((), {"data": data_config(data, min_crop=0.6)}, r"data\.min_crop = 0\.5, now it is 0\.6"),
        ((), {"dtype_of_teachers": "bf16"}, r"dtype = fp32, now it is bf16"),
        ((), {"data": data_config(data, caption_key="other")}, r"caption_key = captions, now it is other"),
    ]
    for folder, number in ((tmp_path / "unfinished", len(plans)), (made.folder, 1)):
        before = content_of(folder)
        for teachers, changes, message in plans[:number]:
            with pytest.raises(ValueError, match=message):
                command.run(world.config(folder, *teachers, **changes))
        assert content_of(folder) == before


# Interrupted, full disks, damage


def same(folder: Path, made: Made) -> bool:
    """Equal to the byte; config.yaml names the output."""
    found, expected = content_of(folder), content_of(made.folder)
    return {**found, "config.yaml": b""} == {**expected, "config.yaml": b""}


@pytest.mark.parametrize("name", ["00001.image.1.npy", "00000.json", "manifest.json", "plan.json"])
def test_a_full_disk_is_an_error_that_names_the_file_and_the_same_command_continues(
    made: Made, world: World, tmp_path: Path, name: str
) -> None:
    config, folder, sync = world.config(tmp_path / "made"), tmp_path / "made", os.fsync

    def full(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if path.name.startswith(f"{name}.") and path.suffix == ".tmp":
            assert path.stat().st_size > 0
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=name) as stop:
            command.run(config)
    assert stop.value.errno == errno.ENOSPC
    assert Path(stop.value.filename).name == name
    assert [path for path in folder.rglob("*") if path.name == name or path.suffix == ".tmp"] == []
    command.run(config)
    assert same(folder, made)


def test_a_repair_that_was_interrupted_before_the_manifest_is_finished_by_the_next_command(
    world: World, copy: Path
) -> None:
    """On another device rebuilt features differ in their last bits, and the manifest must hold their hash."""
    flip(copy / "features" / "00001.image.1.npy")
    encode = FeatureEncoder.encode
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureEncoder, "encode", lambda *arguments: encode(*arguments) * np.float32(1 + 2**-23))
        run_and_interrupt(world.config(copy), num_shards=1)
    command.run(world.config(copy))
    assert find_faults(copy, read_manifest(copy), trust=False) == {}
