"""What a cache is refused for: another format, other data, another augmentation, other teachers or classes."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clipkd.teachers.cache import command
from tests.data.samples import write_tar
from tests.teachers.world import Made, World, data_config, members, with_classes, write_model


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_only_the_augmentation_it_was_made_with_is_accepted(made: Made, copy: Path) -> None:
    data = made.config.data
    others: list[tuple[dict[str, Any], str]] = [
        ({"data": dataclasses.replace(data, min_crop=0.6)}, r"data\.min_crop = 0\.5, now it is 0\.6"),
        ({"data": dataclasses.replace(data, background="white")}, r"data\.background = random, now it is white"),
    ]
    for changes, message in others:
        with pytest.raises(ValueError, match=message):
            made.open(**changes)
    edited(copy, lambda manifest: manifest["augmentation"].update(version=1))
    with pytest.raises(ValueError, match=r"copy was made with augmentation version = 1, now it is \d+"):
        made.open(folder=copy)
    made.open(batch_size=16, steps=5)


def test_only_a_finished_manifest_of_this_version_is_accepted(made: Made, copy: Path, tmp_path: Path) -> None:
    path = copy / "manifest.json"
    content = path.read_bytes()
    edited(copy, lambda manifest: manifest.update(version=1))
    with pytest.raises(ValueError, match=r"manifest\.json has version 1, this clipkd reads 3; make the cache again"):
        made.open(folder=copy)
    broken: list[Callable[[dict[str, Any]], Any]] = [
        lambda manifest: manifest.pop("version"),
        lambda manifest: manifest["shards"][0].pop("first"),
        lambda manifest: manifest.update(classes=3),
        lambda manifest: manifest["shards"][0]["files"]["samples"].update(name="../samples.npy"),
    ]
    damaged = [content[: len(content) // 2], b"[]", b"\xff\xfe"]
    for change in (*broken, *damaged):
        path.write_bytes(content if callable(change) else change)
        if callable(change):
            edited(copy, change)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; remove .* and make the cache again"):
            made.open(folder=copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"copy is not finished; run the same clipkd cache command again"):
        made.open(folder=copy)
    (copy / "plan.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copy holds no manifest\.json"):
        made.open(folder=copy)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for a teacher cache"):
        made.open(folder=tmp_path / "nowhere")


@pytest.fixture
def own_data(made: Made) -> Iterator[Path]:
    """The folder that the cache was made from, restored afterwards."""
    folder = made.world.folder / "data"
    kept = shutil.copytree(folder, made.world.folder / "kept")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


def test_other_data_are_refused_by_the_name_of_their_file(made: Made, own_data: Path) -> None:
    made.open()
    first = list(itertools.chain.from_iterable(members(id) for id in reversed(range(20))))
    before = (own_data / "00000.tar").read_bytes()
    write_tar(own_data / "00000.tar", first)
    with pytest.raises(ValueError, match=r"data/00000\.tar does not hold the samples that .*data/00000\.tar held"):
        made.open()
    (own_data / "00000.tar").write_bytes(before)
    write_tar(own_data / "00003.tar", members(50))
    with pytest.raises(ValueError, match=r"data\.path holds 4 files, .*float32 was made from 3; .*00003\.tar is new"):
        made.open()
    (own_data / "00003.tar").unlink()
    (own_data / "00002.tar").rename(own_data / "2")
    with pytest.raises(ValueError, match=r"data\.path holds 2 files, .*float32 was made from 3; .*2\.tar is missing"):
        made.open()
    (own_data / "2").rename(own_data / "00002.tar")
    with pytest.raises(ValueError, match=r"caption_key = captions, now it is other"):
        made.open(data=dataclasses.replace(made.config.data, caption_key="other"))
    made.open()


def test_data_that_were_moved_are_the_same_and_streamed_data_are_refused(made: Made, tmp_path: Path) -> None:
    moved = shutil.copytree(made.world.folder / "data", tmp_path / "moved")
    made.open(data=dataclasses.replace(made.config.data, path=str(moved)))
    path = f"pipe:cat {made.world.folder}/data/00000.tar"
    with pytest.raises(ValueError, match=r"teacher\.cache works with local data; data\.path names shards behind URLs"):
        made.open(data=dataclasses.replace(made.config.data, path=path))


def test_only_the_teachers_it_was_made_with_may_be_named(made: Made, tmp_path: Path) -> None:
    first, second = made.world.teachers.values()
    model, _, weights = first.partition("@")
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    assert len(made.open(first, second).models) == 2
    made.open(f"{model}@{moved}", second)
    other = write_model(tmp_path, "other", seed=11)
    wrong: list[tuple[tuple[str, ...], Any, str]] = [
        ((first,), "fp32", r"float32 holds 2 teachers, teacher\.models names 1"),
        ((other, second), "fp32", r"but teacher\.models\[0\] has other weights, .*other\.safetensors"),
        ((first, first), "fp32", r"but teacher\.models\[1\] has other weights, .*first\.safetensors"),
        (
            ("ViT-B-32@openai", second),
            "fp32",
            r"but teacher\.models\[0\] has other weights, ViT-B-32@openai; leave it out",
        ),
        ((first, second), "bf16", r"made with teacher\.dtype fp32, now it is bf16"),
    ]
    for teachers, dtype, message in wrong:
        with pytest.raises(ValueError, match=message):
            made.open(*teachers, dtype=dtype)
    filled = made.open().fill_in(made.training())
    assert filled.teacher.names == (first, second)


def test_a_cache_without_the_class_vectors_of_the_closed_set_is_refused(
    world: World, made: Made, tmp_path: Path
) -> None:
    objective, first = with_classes(tmp_path), world.teachers["first"]
    data = data_config(world.folder / "data")
    config = world.config(tmp_path / "made", first, views=1, objective=objective, data=data)
    one = Made(world, command.run(config), config)
    assert one.open().class_vectors(objective.closed_set).shape == (3, 24)
    message = r"holds no class vectors for objective\.closed_set's classes and templates"
    single = world.config(tmp_path / "single", first, views=1, data=data)
    with pytest.raises(ValueError, match=f"single {message}"):
        Made(world, command.run(single), single).open(objective=objective)
    with pytest.raises(ValueError, match=r"objective\.closed_set learns from one teacher"):
        made.open(objective=objective)
    (tmp_path / "classes.txt").write_text("cat\ndog\nhorse\n")
    with pytest.raises(ValueError, match=f"made {message}"):
        one.open()
