"""A cache as it lies on disk and as training reads it: its format, its rows, what it refuses, and what it notices."""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from clipkd import files
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import FeatureTerm
from clipkd.config.train import StudentConfig, TeacherConfig
from clipkd.data import Augment, BadSample, Pair, open_pairs
from clipkd.data.loader import AugmentedPairs, Collate
from clipkd.errors import RunStopped
from clipkd.models.create import create_student
from clipkd.models.encoder import Encoder
from clipkd.models.load import load_model
from clipkd.models.text_tower import text_sha256
from clipkd.teachers.cache import command as cache
from clipkd.teachers.cache.command import CacheConfig
from clipkd.teachers.cache.readme import describe_folder
from clipkd.teachers.loaded import open_teacher_cache, require_same_teachers
from clipkd.teachers.store.manifest import Manifest, fingerprint, read_manifest, to_json
from clipkd.teachers.store.reader import TeacherCache, find_faults, open_cache
from clipkd.views import View, Views
from tests.data.samples import plain_png, write_tar
from tests.teachers.test_cache import (
    SHARDS,
    World,
    copied,
    damaged_data,
    data_config,
    flip,
    for_training,
    in_this_process,
    make_world,
    members,
    pair_set,
    silent,
    with_classes,
    write_data,
    write_model,
)

cpu = pytest.fixture(scope="module", autouse=True)(in_this_process)

NUM_VIEWS = 2
UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance of neighbours between 1 and 2: the largest relative error of rounding to nearest."""

SMALLEST_STEP = 2.0**-25
"""Half the distance of float16's subnormal numbers, below 2⁻¹⁴."""


@dataclasses.dataclass(frozen=True)
class Made:
    """A cache, and what it was made with."""

    world: World
    folder: Path
    config: CacheConfig

    @property
    def manifest(self) -> Manifest:
        return read_manifest(self.folder)

    def open(self, *, student_text: str | None = None, folder: Path | None = None, **changes: Any) -> TeacherCache:
        """As a training would, whose configuration differs from the cache's in some options."""
        config = for_training(self.config, folder or self.folder, **changes)
        return open_cache(config, open_pairs(config.data), student_text=student_text, track=silent)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def made(world: World) -> Made:
    """Two teachers, two views, three shards, float32."""
    config = world.config(world.folder / "float32")
    return Made(world, cache.run(config), config)


@pytest.fixture(scope="module")
def halves(world: World) -> dict[str, Made]:
    """One sigmoid teacher, in float16 and bfloat16."""
    teacher = write_model(world.folder / "models", "sigmoid", seed=7, init_logit_bias=-5.0)
    objective = ObjectiveConfig(features=FeatureTerm(weight=1.0))
    found = {}
    for dtype in UNIT_ROUNDOFF:
        output = world.folder / dtype
        config = world.config(output, teacher=TeacherConfig(models=teacher), dtype=dtype, objective=objective)
        found[dtype] = Made(world, cache.run(config), config)
    return found


@pytest.fixture
def copy(made: Made, tmp_path: Path) -> Path:
    """To be damaged."""
    return copied(made.folder, tmp_path / "copy")


# The format


def test_the_manifest_is_read_as_it_was_written(made: Made, halves: dict[str, Made]) -> None:
    for one in (made, *halves.values()):
        found = one.manifest
        assert to_json(found) == json.loads((one.folder / "manifest.json").read_text())
        assert (found.format, found.version, found.num_views) == ("clipkd teacher cache", 1, NUM_VIEWS)
        assert (found.num_samples, found.num_unusable) == (48, 0)
        assert (one.folder / "README.md").read_text() == describe_folder(found)


def test_every_file_has_the_shape_type_size_and_digest_that_the_manifest_says(
    made: Made, halves: dict[str, Made]
) -> None:
    for one, dtype in ((made, "<f4"), (halves["float16"], "<f2"), (halves["bfloat16"], "<u2")):
        listed = json.loads((one.folder / "manifest.json").read_text())
        dims = {str(n): teacher["dim"] for n, teacher in enumerate(listed["teachers"])}
        seen, texts = set[str](), 0
        for number, shard in enumerate(listed["shards"]):
            assert (shard["rows"], shard["first_text"]) == (SHARDS[number], texts)
            texts += shard["texts"]
            for kind, file in shard["files"].items():
                path = one.folder / file["name"]
                assert file["name"] == f"features/{number:05d}.{kind}.npy"
                content, array = path.read_bytes(), np.load(path)
                assert (len(content), hashlib.sha256(content).hexdigest()) == (file["bytes"], file["sha256"])
                side, _, teacher = kind.partition(".")
                expected = {
                    "samples": (shard["rows"], array.shape[1]),
                    "image": (shard["rows"], NUM_VIEWS, dims.get(teacher)),
                    "text": (shard["texts"], dims.get(teacher)),
                }[side]
                assert tuple(file["shape"]) == array.shape == expected
                assert file["dtype"] == array.dtype.str == ("<i8" if kind == "samples" else dtype)
                seen.add(file["name"])
        assert seen == {f"features/{path.name}" for path in (one.folder / "features").iterdir()}
        assert texts == len(set(itertools.chain.from_iterable(one.world.captions)))


def python_of(readme: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return block


def test_the_lines_of_the_readme_read_the_vectors_that_training_reads(made: Made, halves: dict[str, Made]) -> None:
    for one in (made, *halves.values()):
        block = python_of((one.folder / "README.md").read_text())
        code = [line for line in block.splitlines() if line.strip() and not line.startswith("import")]
        assert len(code) <= 5
        ending = "\nnp.save('image.npy', image); np.save('text.npy', text)\n"
        subprocess.run([sys.executable, "-c", block + ending], cwd=one.folder, check=True, timeout=60)
        stored = TeacherCache(one.folder, one.manifest)
        image, text, *_ = stored.read(pair_set(one.config.data).read(2), 2, 0, 0)
        for name, expected in (("image", image), ("text", text)):
            found = np.load(one.folder / f"{name}.npy")
            (one.folder / f"{name}.npy").unlink()
            assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())


def test_the_readmes_widening_of_bfloat16_is_torchs(halves: dict[str, Made]) -> None:
    """All 65,536 of them, by their bits; 0x3F80 is 1 and 0xC000 is -2."""
    readme = (halves["bfloat16"].folder / "README.md").read_text()
    (line,) = re.findall(r"`(\(image\.astype.*?)`", readme)
    image = np.arange(1 << 16, dtype=np.uint16)
    found = eval(line, {"np": np, "image": image})
    assert (found[0x3F80], found[0xC000]) == (1.0, -2.0)
    expected = torch.from_numpy(image).view(torch.bfloat16).float()
    assert np.array_equal(found.view(np.uint32), expected.numpy().view(np.uint32))
    assert "astype" not in (halves["float16"].folder / "README.md").read_text()


# Its rows


def asked(made: Made, encoder: Encoder) -> tuple[Tensor, dict[str, Tensor]]:
    """Features [samples, views, width] and of each caption, by a teacher itself: in batches of 16 and of 9."""
    pairs, augment = pair_set(made.config.data), Augment(made.config.data, Views([encoder.spec]), made.config.seed)
    views = [augment(pairs.read(id), view, id).pixels[0] for id in range(len(pairs)) for view in range(NUM_VIEWS)]
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
    captions = sorted(set(itertools.chain.from_iterable(made.world.captions)))
    assert (len(pixels) % 16, len(captions) % 9) == (0, 0)
    with torch.no_grad():
        images = torch.cat([encoder.encode_image(encoder.spec.normalize(part)) for part in pixels.split(16)])
        parts = [captions[start : start + 9] for start in range(0, len(captions), 9)]
        texts = torch.cat([encoder.encode_text(encoder.spec.tokenize(part)) for part in parts])
    return images.reshape(len(pairs), NUM_VIEWS, -1), dict(zip(captions, texts, strict=True))


def every_row(made: Made, stored: TeacherCache) -> Iterator[tuple[int, int, int, tuple[np.ndarray, ...]]]:
    """Sample, view, caption number and what is read, in an order that jumps between shards."""
    pairs = pair_set(made.config.data)
    for id in np.random.default_rng(0).permutation(len(pairs)).tolist():
        pair = pairs.read(id)
        assert list(pair.captions) == made.world.captions[id]
        for view in range(NUM_VIEWS):
            for number in range(len(pair.captions)):
                yield id, view, number, stored.read(pair, id, view, number)


def test_every_view_and_caption_has_the_features_that_the_teachers_compute_to_the_bit(made: Made) -> None:
    stored = made.open()
    oracle = [asked(made, load_model(teacher)) for teacher in made.config.teacher.names]
    count = 0
    for id, view, number, rows in every_row(made, stored):
        expected = [
            part for images, texts in oracle for part in (images[id, view], texts[made.world.captions[id][number]])
        ]
        assert [torch.equal(torch.from_numpy(row.copy()), part) for row, part in zip(rows, expected, strict=True)] == [
            True
        ] * 4
        count += 1
    assert count == NUM_VIEWS * sum(map(len, made.world.captions))
    assert stored.kinds == ["image.0", "text.0", "image.1", "text.1"]
    for teacher, known in zip(made.config.teacher.names, stored.teachers, strict=True):
        encoder = load_model(teacher)
        assert torch.equal(known.logit_scale, encoder.logit_scale)
        assert (known.dim, known.name, known.logit_bias) == (encoder.dim, encoder.name, None)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_half_precision_is_the_nearest_and_training_gets_it_with_unit_norm(halves: dict[str, Made], dtype: str) -> None:
    """Rounding moves x by at most u·|x|, so the norm by at most u; scaling it back moves each number by about u·|x| more."""
    one, roundoff = halves[dtype], UNIT_ROUNDOFF[dtype]
    stored = one.open()
    images, texts = asked(one, load_model(one.config.teacher.names[0]))
    rows: list[list[np.ndarray]] = [[], []]
    exact: list[list[Tensor]] = [[], []]
    for id, view, number, read in every_row(one, stored):
        for side, expected in enumerate((images[id, view], texts[one.world.captions[id][number]])):
            rows[side].append(read[side])
            exact[side].append(expected)
    raw = [torch.from_numpy(np.stack(side)) for side in rows]
    (teacher,) = stored.features(raw, torch.device("cpu"))
    for side, found in enumerate((teacher.image, teacher.text)):
        wanted, rounded = torch.stack(exact[side]), stored.as_float(raw[side])
        assert torch.equal(rounded, wanted.to(getattr(torch, dtype)).float())
        assert ((rounded - wanted).abs() <= roundoff * wanted.abs() + SMALLEST_STEP).all()
        assert not torch.equal(rounded, wanted)
        assert ((found - wanted).abs() <= 2.1 * roundoff * wanted.abs() + 2 * SMALLEST_STEP + 1e-7).all()
        assert (found.norm(dim=-1) - 1).abs().max().item() < 3e-7
    assert teacher.logit_bias is not None
    assert teacher.logit_bias.item() == -5.0
    assert torch.equal(teacher.logit_scale, load_model(one.config.teacher.names[0]).logit_scale)


def test_first_and_last_rows_of_each_file_are_found_at_their_offsets(made: Made) -> None:
    stored, pairs = made.open(), pair_set(made.config.data)
    for shard in made.manifest.shards:
        files = {kind: np.load(made.folder / file.name) for kind, file in shard.files.items()}
        for row in (0, shard.rows - 1):
            pair = pairs.read(shard.first + row)
            for view in (0, NUM_VIEWS - 1):
                image = stored.read(pair, shard.first + row, view, 0)[0]
                assert image.tolist() == files["image.0"][row, view].tolist()
            assert files["samples"][row, 0] == fingerprint(pair)
        for row in (0, shard.texts - 1) if shard.texts else ():
            assert stored.vector(shard.files["text.1"], row).tolist() == files["text.1"][row].tolist()
    last = made.manifest.shards[1]
    for row in (last.rows * NUM_VIEWS, 10**6):
        with pytest.raises(RunStopped, match=rf"image\.0\.npy cannot be read any more \(it ends before row {row}\)"):
            stored.vector(last.files["image.0"], row)


def test_a_fingerprint_is_the_crc_of_image_and_captions() -> None:
    assert fingerprint(Pair("key", b"12345", ("6789",))) == 0xCBF43926 == zlib.crc32(b"123456789")
    assert fingerprint(Pair("key", b"12345", ("6", "789"))) == zlib.crc32(b"123456\x00789")


def test_a_batch_of_the_loader_brings_the_rows_of_its_views_and_captions(made: Made) -> None:
    """Later passes see the stored views again in order."""
    stored, pairs = made.open(), pair_set(made.config.data)
    specs = Views([load_model(made.config.teacher.names[0]).spec])
    dataset = AugmentedPairs(pairs, Augment(made.config.data, specs, made.config.seed), stored)
    positions = [(0, 0), (1, 47), (2, 20), (3, 19), (4, 47), (5, 0)]
    samples = [dataset[position] for position in positions]
    batch = Collate(specs)(samples)
    assert [part.shape for part in batch.features] == [(6, 24), (6, 24), (6, 16), (6, 16)]
    for row, (view, id) in enumerate(positions):
        number = made.world.captions[id].index(samples[row].caption)
        expected = stored.read(pairs.read(id), id, view % NUM_VIEWS, number)
        assert [part[row].tolist() for part in batch.features] == [part.tolist() for part in expected]
    first, second = stored.features(batch.features, torch.device("cpu"))
    assert torch.equal(first.image, batch.features[0])
    assert torch.equal(second.text, batch.features[3])


def test_pixels_come_again_after_all_views_and_captions_are_drawn_anew(made: Made) -> None:
    pairs, specs = pair_set(made.config.data), Views([load_model(made.config.teacher.names[0]).spec])
    augment = Augment(made.config.data, specs, made.config.seed)
    drawn = set[tuple[int, ...]]()
    for id in range(len(pairs)):
        pair = pairs.read(id)
        samples = [augment(pair, view, id, num_views=NUM_VIEWS) for view in range(6)]
        free = [augment(pair, view, id) for view in range(6)]
        for view in range(6):
            assert np.array_equal(samples[view].pixels[0], samples[view % NUM_VIEWS].pixels[0])
            assert np.array_equal(samples[view].pixels[0], free[view % NUM_VIEWS].pixels[0])
            assert samples[view].caption_number == free[view].caption_number
            assert samples[view].caption == pair.captions[samples[view].caption_number]
        assert not np.array_equal(free[0].pixels[0], free[1].pixels[0])
        assert not np.array_equal(free[0].pixels[0], free[2].pixels[0])
        if len(pair.captions) == 4:
            drawn.add(tuple(sample.caption_number for sample in samples))
    assert len(drawn) > 5
    assert any(numbers[:2] != numbers[2:4] for numbers in drawn)


# Samples that cannot be used, or are others now


def test_training_puts_the_samples_in_place_of_unusable_ones_that_it_would_put_without_a_cache(
    world: World, tmp_path: Path
) -> None:
    data = data_config(damaged_data(tmp_path / "data"), max_skipped=0.1)
    config = world.config(tmp_path / "made", views=1, teacher=world.taught_by("first"), data=data)
    one = Made(world, cache.run(config), config)
    stored, pairs = one.open(), pair_set(data)
    augment = Augment(data, Views([load_model(config.teacher.names[0]).spec]), config.seed)
    online, cached = AugmentedPairs(pairs, augment), AugmentedPairs(pairs, augment, stored)
    skipped = set[str]()
    for id in range(16):
        expected, found = online[0, id], cached[0, id]
        assert (found.id, found.caption, found.skipped) == (expected.id, expected.caption, expected.skipped)
        assert np.array_equal(found.pixels[0], expected.pixels[0])
        assert (found.id != id) == bool(found.skipped) == (id in (3, 9, 11))
        skipped |= {skip.cause for skip in found.skipped}
        own = stored.read(pairs.read(found.id), found.id, 0, found.caption_number)
        assert [row.tolist() for row in found.features] == [row.tolist() for row in own]
    assert skipped == {"undecodable image", "empty caption", "unreadable caption"}
    mended = pairs.read(4)
    for id in (3, 9, 11):
        with pytest.raises(BadSample, match=r"004: could not be used when .*made was made") as bad:
            stored.read(mended, id, 0, 0)
        assert bad.value.skip.cause == "not cached"


def small(world: World, folder: Path, path: Path, **options: Any) -> Made:
    config = world.config(folder, views=1, teacher=world.taught_by("first"), data=data_config(path, **options))
    return Made(world, cache.run(config), config)


def test_a_sample_of_a_tar_that_was_changed_in_place_ends_the_run_when_it_is_read(world: World, tmp_path: Path) -> None:
    """Same places and sizes in the tar: opening it finds nothing."""
    tar = write_data(tmp_path / "data", (8,)) / "00000.tar"
    one = small(world, tmp_path / "made", tar.parent)
    content, changed = tar.read_bytes(), members(5)
    assert content.count(changed[0][1]) == 1
    tar.write_bytes(content.replace(changed[0][1], changed[0][1][:-1] + b"?"))
    assert tar.stat().st_size == len(content)
    stored, pairs = one.open(), pair_set(one.config.data)
    for id in range(8):
        if id != 5:
            stored.read(pairs.read(id), id, 0, 0)
    with pytest.raises(RunStopped, match=r"00000\.tar/005 is not the sample that .*made was made from"):
        stored.read(pairs.read(5), 5, 0, 0)
    tar.write_bytes(content.replace(b"sample number 5", b"sample number 6"))
    with pytest.raises(RunStopped, match=r"00000\.tar/005 .*its captions were changed"):
        one.open().read(pair_set(one.config.data).read(5), 5, 0, 0)


def test_an_image_file_of_a_table_that_was_replaced_ends_the_run_when_it_is_read(world: World, tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"{number}.png").write_bytes(plain_png(number))
    rows = [f"{number}.png,number {number}\n" for number in range(8)]
    (tmp_path / "table.csv").write_text("".join(["image,caption\n", *rows]))
    one = small(world, tmp_path / "made", tmp_path / "table.csv", format="csv", caption_key="caption")
    (tmp_path / "6.png").write_bytes(plain_png(99))
    stored, pairs = one.open(), pair_set(one.config.data)
    stored.read(pairs.read(5), 5, 0, 0)
    with pytest.raises(RunStopped, match=r"table\.csv row 6: 6\.png is not the sample that .*made was made from"):
        stored.read(pairs.read(6), 6, 0, 0)
    (tmp_path / "table.csv").write_text("".join(["image,caption\n", *reversed(rows)]))
    with pytest.raises(ValueError, match=r"table\.csv does not hold the samples that .*table\.csv held"):
        one.open()


# What it refuses


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_only_the_augmentation_it_was_made_with_is_accepted(made: Made, copy: Path) -> None:
    data = made.config.data
    others: list[tuple[dict[str, Any], str]] = [
        ({"seed": 4}, "made with seed = 3, now it is 4"),
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


def test_only_a_finished_manifest_of_this_format_and_version_is_accepted(
    made: Made, copy: Path, tmp_path: Path
) -> None:
    whole = (copy / "manifest.json").read_bytes()
    wrong: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
        (
            lambda manifest: manifest.update(version=2),
            r"manifest\.json is version 2 of 'clipkd teacher cache'.* reads 1",
        ),
        (lambda manifest: manifest.update(format="letters"), "version 1 of 'letters'"),
        (lambda manifest: manifest.pop("version"), r"manifest\.json is damaged .*; remove .* and make the cache again"),
        (lambda manifest: manifest.pop("shards"), r"manifest\.json is damaged"),
        (lambda manifest: manifest["shards"][0].pop("first"), r"manifest\.json is damaged"),
        (lambda manifest: manifest.update(classes=3), r"manifest\.json is damaged"),
    ]
    for change, message in wrong:
        edited(copy, change)
        with pytest.raises(ValueError, match=message):
            made.open(folder=copy)
        (copy / "manifest.json").write_bytes(whole)
    for content in (whole[: len(whole) // 2], b"", b"[]", b"\xff\xfe"):
        (copy / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"manifest\.json is damaged .*; remove .* and make the cache again"):
            made.open(folder=copy)
    (copy / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"copy holds no manifest\.json"):
        made.open(folder=copy)
    (copy / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"copy is not finished; give its clipkd cache command"):
        made.open(folder=copy)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for a teacher cache"):
        made.open(folder=tmp_path / "nowhere")


@pytest.fixture
def own_data(made: Made) -> Iterator[Path]:
    """The very folder that the cache was made from, put back afterwards."""
    folder = made.world.folder / "data"
    kept = copied(folder, made.world.folder / "kept")
    yield folder
    shutil.rmtree(folder)
    shutil.copytree(kept, folder)


def test_other_data_is_refused_by_the_name_of_its_file(made: Made, own_data: Path) -> None:
    made.open()
    first = list(itertools.chain.from_iterable(members(id) for id in reversed(range(20))))
    before = (own_data / "00000.tar").read_bytes()
    write_tar(own_data / "00000.tar", first)
    with pytest.raises(ValueError, match=r"data/00000\.tar does not hold the samples that .*data/00000\.tar held"):
        made.open()
    (own_data / "00000.tar").write_bytes(before)
    write_tar(own_data / "00003.tar", members(50))
    with pytest.raises(ValueError, match=r"data\.path holds 4 files, .*float32 was made from 3"):
        made.open()
    (own_data / "00003.tar").unlink()
    (own_data / "00002.tar").rename(own_data / "2")
    with pytest.raises(ValueError, match=r"data\.path holds 2 files, .*float32 was made from 3"):
        made.open()
    (own_data / "2").rename(own_data / "00002.tar")
    with pytest.raises(ValueError, match=r"caption_key = captions, now it is other"):
        made.open(data=dataclasses.replace(made.config.data, caption_key="other"))
    made.open()


def test_data_that_was_moved_is_the_same_data(made: Made, tmp_path: Path) -> None:
    """As a resumed run takes it: by what it holds, not by where it lies."""
    moved = shutil.copytree(made.world.folder / "data", tmp_path / "moved")
    stored = made.open(data=dataclasses.replace(made.config.data, path=str(moved)))
    pairs = pair_set(made.config.data)
    assert len(stored.read(pairs.read(0), 0, 0, 0)) == 4


def test_streamed_data_is_refused(made: Made) -> None:
    path = f"pipe:cat {made.world.folder}/data/00000.tar"
    with pytest.raises(ValueError, match=r"teacher\.cache works with local data; data\.path names shards behind URLs"):
        made.open(data=dataclasses.replace(made.config.data, path=path))


def test_only_the_teachers_it_was_made_with_may_be_named(made: Made, tmp_path: Path) -> None:
    first, second = made.config.teacher.names

    def open_with(*models: str, dtype: Any = "fp32") -> TeacherCache:
        cache = made.open()
        teacher = TeacherConfig(models=models, dtype=dtype)
        require_same_teachers(dataclasses.replace(made.config, teacher=teacher), cache)
        return cache

    assert len(open_with(first, second).teachers) == 2
    architecture, weights = first.split("@")
    moved = shutil.copy(weights, tmp_path / "moved.safetensors")
    assert len(open_with(f"{architecture}@{moved}", second).teachers) == 2
    for models in ((first,), (first, second, second)):
        with pytest.raises(ValueError, match=rf"float32 holds 2 teachers, teacher\.models names {len(models)}"):
            open_with(*models)
    other = write_model(tmp_path, "other", seed=11)
    with pytest.raises(ValueError, match=r"but teacher\.models\[0\] is .*other\.safetensors with other weights"):
        open_with(other, second)
    with pytest.raises(ValueError, match=r"but teacher\.models\[1\] is .*first\.safetensors with other weights"):
        open_with(first, first)
    with pytest.raises(ValueError, match=r"but teacher\.models\[0\] is ViT-B-32@openai; leave it out"):
        open_with("ViT-B-32@openai", second)
    with pytest.raises(ValueError, match=r"made with teacher\.dtype fp32, now it is bf16"):
        open_with(first, second, dtype="bf16")
    content = Path(weights).read_bytes()
    flip(Path(weights))
    with pytest.raises(ValueError, match=r"but teacher\.models\[0\] is .*first\.safetensors with other weights"):
        open_with(first, second)
    Path(weights).write_bytes(content)
    open_with(first, second)


def test_a_cache_without_the_class_vectors_of_the_closed_set_is_refused(
    world: World, made: Made, tmp_path: Path
) -> None:
    def open_with(one: Made, objective: ObjectiveConfig) -> TeacherCache:
        config = for_training(one.config, one.folder, objective=objective)
        assert config.student.model is not None
        student = create_student(StudentConfig(model=world.teachers["first"].split("@")[0]))
        return open_teacher_cache(config, open_pairs(config.data), student)

    objective = with_classes(world, tmp_path)
    config = world.config(tmp_path / "made", views=1, teacher=world.taught_by("first"), objective=objective)
    one = Made(world, cache.run(config), config)
    assert open_with(one, objective).classes().shape == (3, 24)
    message = r"holds no class vectors for objective\.closed_set's classes and templates"
    single = world.config(tmp_path / "single", views=1, teacher=world.taught_by("first"))
    with pytest.raises(ValueError, match=f"single {message}"):
        open_with(Made(world, cache.run(single), single), objective)
    (tmp_path / "classes.txt").write_text("cat\ndog\nhorse\n")
    with pytest.raises(ValueError, match=f"made {message}"):
        open_with(one, objective)
    with pytest.raises(ValueError, match=r"objective\.closed_set learns from one teacher"):
        open_with(made, objective)


# Damage


def test_damaged_files_are_named(made: Made, copy: Path) -> None:
    path = copy / "features" / "00001.text.1.npy"
    content = path.read_bytes()
    made.open(folder=copy)
    damages: list[tuple[Callable[[], Any], str]] = [
        (lambda: path.unlink(), r"there is no .*00001\.text\.1\.npy; 1 of 15 files of the cache are damaged"),
        (
            lambda: path.write_bytes(content[:-1]),
            rf"npy has {len(content) - 1:,} bytes instead of {len(content):,}; 1 of 15",
        ),
        (lambda: path.write_bytes(content + b"0"), rf"npy has {len(content) + 1:,} bytes instead of {len(content):,}"),
        (lambda: flip(path, 200), r"00001\.text\.1\.npy is not what was written \(its SHA-256 is another\)"),
    ]
    for damage, message in damages:
        damage()
        if path.exists():
            os.utime(path)
        with pytest.raises(ValueError, match=message):
            made.open(folder=copy)
        path.write_bytes(content)
        made.open(folder=copy)


def test_a_file_that_goes_while_training_reads_ends_the_run_with_its_name(made: Made, copy: Path) -> None:
    stored, pair = made.open(folder=copy), pair_set(made.config.data).read(0)
    path = copy / "features" / "00000.image.0.npy"
    path.write_bytes(path.read_bytes()[:130])
    with pytest.raises(RunStopped, match=r"00000\.image\.0\.npy cannot be read any more \(it ends before row 0\)"):
        stored.read(pair, 0, 0, 0)
    path.unlink()
    with pytest.raises(RunStopped, match=r"00000\.image\.0\.npy cannot be read any more .*; see clipkd cache verify"):
        stored.read(pair, 0, 0, 0)


def test_unchanged_files_are_hashed_once_and_a_hidden_change_is_found_without_trust(
    made: Made, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256 = files.sha256

    def count(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr(files, "sha256", count)
    manifest, names = made.manifest, sorted(Path(file.name).name for file in made.manifest.files())

    def faults(*, trust: bool = True) -> tuple[list[str], list[str]]:
        hashed.clear()
        found = [Path(name).name for name in find_faults(copy, manifest, track=silent, trust=trust)]
        return found, sorted(hashed)

    path = copy / "features" / "00002.image.1.npy"
    assert faults() == ([], names)
    assert faults() == ([], [])
    assert faults(trust=False) == ([], names)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert faults() == ([], [path.name])
    assert faults() == ([], [])
    kept = path.stat().st_mtime_ns
    flip(path)
    assert path.stat().st_mtime_ns == kept
    assert faults() == ([path.name], [path.name])  # by the second time of change, which nobody can set
    assert faults(trust=False) == ([path.name], names)
    assert faults() == ([path.name], [path.name])
    flip(path)
    assert faults() == ([], [path.name])
    for content in ("", "[]", "{", json.dumps({path.name: 3})):
        (copy / ".verified.json").write_text(content)
        assert faults() == ([], names)


# Text towers that are not trained


def test_a_frozen_students_text_features_are_found_by_its_text_tower(world: World, tmp_path: Path) -> None:
    mine = write_model(tmp_path, "mine", seed=5)
    student = StudentConfig(model=mine, text="frozen")
    config = world.config(tmp_path / "made", views=1, student=student)
    one = Made(world, cache.run(config), config)
    encoder = create_student(student)
    stored = one.open(student_text=text_sha256(encoder))
    assert stored.student_kind == "text.student"
    assert stored.kinds == ["image.0", "text.0", "image.1", "text.1", "text.student"]
    assert_texts_are(encoder, stored, one)
    assert one.open(student_text=text_sha256(load_model(write_model(tmp_path, "other", seed=6)))).student_kind is None
    for student_text in (None, ""):
        stored = one.open(student_text=student_text)
        assert (stored.student_kind, stored.kinds[-1]) == (None, "text.1")
        view = View(torch.zeros(1, 3, 32, 32), torch.zeros(1, 12, dtype=torch.int64))
        assert stored.with_student_text(view, []) is view


def test_the_teachers_own_text_tower_is_found_as_the_teachers(made: Made) -> None:
    for number, teacher in enumerate(made.config.teacher.names):
        encoder = load_model(teacher)
        stored = made.open(student_text=text_sha256(encoder))
        assert (stored.student_kind, len(stored.kinds)) == (f"text.{number}", 4)
        assert_texts_are(encoder, stored, made)


def assert_texts_are(encoder: Encoder, stored: TeacherCache, one: Made) -> None:
    """The student's, for the first caption of each sample, bit by bit."""
    pairs = pair_set(one.config.data)
    rows = [stored.read(pairs.read(id), id, 0, 0) for id in range(len(pairs))]
    kinds = [torch.from_numpy(np.stack(kind)) for kind in zip(*rows, strict=True)]
    tokens = encoder.spec.tokenize([captions[0] for captions in one.world.captions])
    view = stored.with_student_text(View(torch.zeros(len(pairs), 3, 32, 32), tokens), kinds)
    with torch.no_grad():
        expected = encoder.eval().encode_text(tokens)
    assert view.text_features is not None
    assert torch.equal(view.text_features, expected)
    assert torch.equal(view.texts, tokens)
