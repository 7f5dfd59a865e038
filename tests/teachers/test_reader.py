"""The files of a cache, and the vectors that training reads from them, against the teachers themselves."""

import hashlib
import itertools
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import FeaturesTerm
from clipkd.config.train import StudentConfig
from clipkd.data import Augment, BadSample, Pair
from clipkd.data.loader import AugmentedPairs, Collate
from clipkd.errors import RunStopped
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student
from clipkd.models.load import load_model
from clipkd.teachers.cache import command
from clipkd.teachers.cached import CachedTeachers
from clipkd.teachers.store.manifest import fingerprint, to_json
from clipkd.teachers.store.reader import TeacherCache
from clipkd.views import Batch, View, Views
from tests.teachers.world import (
    NUM_VIEWS,
    SHARDS,
    Made,
    World,
    data_config,
    members,
    write_damaged_data,
    write_data,
    write_model,
)

NO_BATCH = Batch((), (), torch.zeros(0), torch.zeros(0), ())

UNIT_ROUNDOFF = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
"""Half the distance of neighbours between 1 and 2: the largest relative error of rounding to nearest."""

SMALLEST_STEP = 2.0**-25
"""Half the distance of float16's subnormal numbers, below 2⁻¹⁴."""


@pytest.fixture(scope="module")
def halves(world: World) -> dict[str, Made]:
    """One sigmoid teacher, in float16 and bfloat16."""
    teacher = write_model(world.folder / "models", "sigmoid", seed=7, init_logit_bias=-5.0)
    objective = ObjectiveConfig(features=FeaturesTerm(weight=1.0))
    found = {}
    for dtype in UNIT_ROUNDOFF:
        config = world.config(world.folder / dtype, teacher, dtype=dtype, objective=objective)
        found[dtype] = Made(world, command.run(config), config)
    return found


def small(world: World, folder: Path, data: Path, **options: object) -> Made:
    """A cache of one teacher and one view."""
    config = world.config(folder, world.teachers["first"], views=1, data=data_config(data, **options))
    return Made(world, command.run(config), config)


# The format


def test_every_file_is_as_the_manifest_says(made: Made, halves: dict[str, Made]) -> None:
    for one, dtype in ((made, "<f4"), (halves["float16"], "<f2"), (halves["bfloat16"], "<u2")):
        listed = json.loads((one.folder / "manifest.json").read_text())
        assert to_json(one.manifest) == listed
        assert (one.manifest.version, one.manifest.num_samples, one.manifest.num_unusable) == (3, 48, 0)
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


def test_the_lines_of_the_readme_read_the_vectors_that_training_reads(made: Made, halves: dict[str, Made]) -> None:
    for one in (made, *halves.values()):
        (block,) = re.findall(r"```python\n(.*?)```", (one.folder / "README.md").read_text(), re.DOTALL)
        ending = "\nnp.save('image.npy', image); np.save('text.npy', text)\n"
        subprocess.run([sys.executable, "-c", block + ending], cwd=one.folder, check=True, timeout=60)
        image, text, *_ = TeacherCache(one.folder, one.manifest).read(one.pairs.read(2), 2, 0, 0)
        for name, expected in (("image", image), ("text", text)):
            found = np.load(one.folder / f"{name}.npy")
            (one.folder / f"{name}.npy").unlink()
            assert (found.dtype, found.tolist()) == (expected.dtype, expected.tolist())


def test_a_fingerprint_is_the_crc_of_image_and_captions() -> None:
    assert fingerprint(Pair("key", b"12345", ("6789",))) == 0xCBF43926 == zlib.crc32(b"123456789")
    assert fingerprint(Pair("key", b"12345", ("6", "789"))) == zlib.crc32(b"123456\x00789")


# Vectors


def computed(made: Made, encoder: Encoder) -> tuple[Tensor, dict[str, Tensor]]:
    """A teacher's own features [samples, views, width], and of each caption, in batches of 16 and of 9."""
    pairs, augment = made.pairs, Augment(made.config.data, Views([encoder.spec]), made.config.seed)
    views = [augment(pairs.read(id), view, id).pixels[0] for id in range(len(pairs)) for view in range(NUM_VIEWS)]
    pixels = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous()
    captions = sorted(set(itertools.chain.from_iterable(made.world.captions)))
    assert (len(pixels) % 16, len(captions) % 9) == (0, 0)
    with torch.no_grad():
        images = torch.cat([encoder.encode_image(encoder.spec.normalize(part)) for part in pixels.split(16)])
        parts = [captions[start : start + 9] for start in range(0, len(captions), 9)]
        texts = torch.cat([encoder.encode_text(encoder.spec.tokenize(part)) for part in parts])
    return images.reshape(len(pairs), NUM_VIEWS, -1), dict(zip(captions, texts, strict=True))


def every_row(made: Made, stored: TeacherCache) -> Iterator[tuple[int, int, str, tuple[np.ndarray, ...]]]:
    """Sample, view, caption and what is read, in an order that jumps between shards."""
    pairs = made.pairs
    for id in np.random.default_rng(0).permutation(len(pairs)).tolist():
        pair = pairs.read(id)
        for view in range(NUM_VIEWS):
            for number, caption in enumerate(made.world.captions[id]):
                yield id, view, caption, stored.read(pair, id, view, number)


def test_every_view_and_caption_has_the_features_that_the_teachers_compute_to_the_bit(made: Made) -> None:
    teachers = made.open()
    encoders = [load_model(teacher) for teacher in made.world.teachers.values()]
    oracle = [computed(made, encoder) for encoder in encoders]
    count = 0
    for id, view, caption, rows in every_row(made, teachers.stored):
        expected = [part for images, texts in oracle for part in (images[id, view], texts[caption])]
        assert all(torch.equal(torch.from_numpy(row.copy()), part) for row, part in zip(rows, expected, strict=True))
        count += 1
    assert count == NUM_VIEWS * sum(map(len, made.world.captions))
    assert teachers.stored.kinds == ["image.0", "text.0", "image.1", "text.1"]
    for encoder, known, scale in zip(encoders, teachers.models, teachers.scales, strict=True):
        assert torch.equal(scale, encoder.logit_scale)
        assert (known.dim, known.name, known.logit_bias) == (encoder.dim, encoder.name, None)


@pytest.mark.parametrize("dtype", UNIT_ROUNDOFF)
def test_half_precision_is_the_nearest_and_training_gets_it_with_unit_norm(halves: dict[str, Made], dtype: str) -> None:
    """Rounding moves x by at most u·|x|, so the norm by at most u; scaling it back moves each number by about u·|x| more."""
    one, roundoff = halves[dtype], UNIT_ROUNDOFF[dtype]
    teachers = CachedTeachers(TeacherCache(one.folder, one.manifest))
    encoder = load_model(one.manifest.teachers[0].model)
    images, texts = computed(one, encoder)
    rows: list[list[np.ndarray]] = [[], []]
    exact: list[list[Tensor]] = [[], []]
    for id, view, caption, read in every_row(one, teachers.stored):
        for side, expected in enumerate((images[id, view], texts[caption])):
            rows[side].append(read[side])
            exact[side].append(expected)
    raw = [torch.from_numpy(np.stack(side)) for side in rows]
    (teacher,) = teachers.features(NO_BATCH._replace(features=tuple(raw)), [])
    for side, found in enumerate((teacher.image, teacher.text)):
        wanted, rounded = torch.stack(exact[side]), teachers.stored.as_float(raw[side])
        assert torch.equal(rounded, wanted.to(getattr(torch, dtype)).float())
        assert ((rounded - wanted).abs() <= roundoff * wanted.abs() + SMALLEST_STEP).all()
        assert not torch.equal(rounded, wanted)
        assert ((found - wanted).abs() <= 2.1 * roundoff * wanted.abs() + 2 * SMALLEST_STEP + 1e-7).all()
        assert (found.norm(dim=-1) - 1).abs().max().item() < 3e-7
    assert teacher.logit_bias is not None
    assert teacher.logit_bias.item() == -5.0
    assert torch.equal(teacher.logit_scale, encoder.logit_scale)


def test_a_batch_of_the_loader_brings_the_rows_of_its_views_and_captions(made: Made) -> None:
    """Later passes see the stored views again in order."""
    stored, pairs = TeacherCache(made.folder, made.manifest), made.pairs
    specs = Views([load_model(made.world.teachers["first"]).spec])
    dataset = AugmentedPairs(
        pairs, Augment(made.config.data, specs, seed=9), stored
    )  # another run's, on the cache's crops
    crops = Augment(made.config.data, specs, made.config.seed)
    positions = [(0, 0), (1, 47), (2, 20), (3, 19), (4, 47), (5, 0)]
    samples = [dataset[position] for position in positions]
    batch = Collate(specs)(samples)
    assert [part.shape for part in batch.features] == [(6, 24), (6, 24), (6, 16), (6, 16)]
    for row, (view, id) in enumerate(positions):
        number = made.world.captions[id].index(samples[row].caption)
        expected = stored.read(pairs.read(id), id, view % NUM_VIEWS, number)
        assert [part[row].tolist() for part in batch.features] == [part.tolist() for part in expected]
        (seen,) = crops.pixels(pairs.read(id), view % NUM_VIEWS, id, seed=made.config.seed)
        assert np.array_equal(samples[row].pixels[0], seen)
    first, second = CachedTeachers(stored).features(batch, [])
    assert torch.equal(first.image, batch.features[0])
    assert torch.equal(second.text, batch.features[3])


# Samples that cannot be used, or have changed


def test_training_replaces_unusable_samples_as_it_would_without_a_cache(world: World, tmp_path: Path) -> None:
    one = small(world, tmp_path / "made", write_damaged_data(tmp_path / "data"), max_skipped=0.1)
    stored, pairs = TeacherCache(one.folder, one.manifest), one.pairs
    augment = Augment(one.config.data, Views([load_model(world.teachers["first"]).spec]), one.config.seed)
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
    with pytest.raises(BadSample, match=r"004: could not be used when .*made was made") as bad:
        stored.read(pairs.read(4), 3, 0, 0)
    assert bad.value.skip.cause == "not cached"


def test_a_sample_of_a_tar_that_was_changed_in_place_ends_the_run_when_it_is_read(world: World, tmp_path: Path) -> None:
    """Same places and sizes in the tar: opening it finds nothing."""
    tar = write_data(tmp_path / "data", (8,)) / "00000.tar"
    one = small(world, tmp_path / "made", tar.parent)
    content, (_, picture) = tar.read_bytes(), members(5)[0]
    for changed in (
        content.replace(picture, picture[:-1] + b"?"),
        content.replace(b"sample number 5", b"sample number 6"),
    ):
        assert changed != content
        tar.write_bytes(changed)
        stored, pairs = one.open().stored, one.pairs
        stored.read(pairs.read(4), 4, 0, 0)
        with pytest.raises(RunStopped, match=r"00000\.tar/005 is not the sample that .*made was made from"):
            stored.read(pairs.read(5), 5, 0, 0)


def test_a_file_that_disappears_while_training_reads_ends_the_run_with_its_name(made: Made, copy: Path) -> None:
    stored, pair = made.open(folder=copy).stored, made.pairs.read(0)
    path = copy / "features" / "00000.image.0.npy"
    path.write_bytes(path.read_bytes()[:130])
    with pytest.raises(RunStopped, match=r"00000\.image\.0\.npy cannot be read \(it ends before row 0\)"):
        stored.read(pair, 0, 0, 0)
    path.unlink()
    with pytest.raises(RunStopped, match=r"00000\.image\.0\.npy cannot be read .*; see clipkd cache verify"):
        stored.read(pair, 0, 0, 0)


# Text towers that are not trained


def test_a_frozen_students_text_features_are_stored_unless_a_teacher_has_them_and_are_found_by_its_text_tower(
    made: Made, world: World, tmp_path: Path
) -> None:
    mine = write_model(tmp_path, "mine", seed=5)
    captions = [captions[0] for captions in world.captions]
    for model, kind in ((mine, "text.student"), (world.teachers["second"], "text.1")):
        frozen = StudentConfig(model=model, text="frozen")
        config = world.config(tmp_path / kind, views=1, student=frozen)
        one, pairs = Made(world, command.run(config), config), made.pairs
        assert set(one.manifest.shards[0].files) == {"samples", "image.0", "text.0", "image.1", "text.1", kind}
        student = create_student(StudentConfig(model=model)).eval()
        student.freeze("text")
        teachers, tokens = one.open(student=student), student.spec.tokenize(captions)
        assert teachers.stored.student == {"text": kind}
        assert "the student reads its text features too" in teachers.describe()
        rows = [teachers.stored.read(pairs.read(id), id, 0, 0) for id in range(len(pairs))]
        kinds = tuple(torch.from_numpy(np.stack(kind)) for kind in zip(*rows, strict=True))
        view = View(torch.zeros(len(pairs), 3, 32, 32), tokens)
        found = teachers.student_view(NO_BATCH._replace(features=kinds), view).frozen_text
        assert found is not None
        with torch.no_grad():
            assert torch.equal(found, student.encode_text(tokens))
        if model == mine:
            assert made.open(student=student).student_view(NO_BATCH, view) == view  # that cache lacks its tower
