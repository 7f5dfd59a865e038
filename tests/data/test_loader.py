"""Augmentation, substitutes and batches as functions of the seed and the position alone."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer, canonicalize_text

from clipkd.config.data import DataConfig
from clipkd.data import loader
from clipkd.data.loader import Augment, AugmentedPairs
from clipkd.data.open import open_feed
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import UNLABELLED, Pair, PairSet
from clipkd.views import Batch, View, Views, ViewSpec
from tests.data.samples import as_process, coordinates, encode, train_config, view_spec


class Ramps:
    """Pairs whose colours say where a crop was taken; every second of three has a label."""

    def __init__(self, *, transparent: bool = False, bad: Sequence[int] = (), num_pairs: int = 12) -> None:
        """bad: pairs that cannot be used: in turn without bytes, no image, unreadable."""
        image = coordinates()
        if transparent:
            image.putalpha(0)
        self.image, self.bad = encode(image, "PNG"), bad
        self.shard_sizes = np.array([num_pairs])
        self.left_out, self.damaged = Skips(), list[Skip]()
        self.asked: list[int] = []

    def read(self, index: int, *, image: bool = True) -> Pair:
        self.asked.append(index)
        key, data = f"ramp {index}", self.image
        if index in self.bad:
            if index % 3 == 2:
                raise BadSample(key, "no caption", "has no .txt")
            data = (b"", b"broken")[index % 3]
        captions = (f"a{index:02}", f"b{index:02}", f"c{index:02}")
        return Pair(key, data, captions, label=label_of(index))


def label_of(index: int) -> int:
    return 100 - index if index % 3 else UNLABELLED


CAUSES = ("empty image", "undecodable image", "no caption")
MESSAGES = ("the image has no bytes", "the image cannot be decoded", "has no .txt")
"""Of the bad ones among the ramps, by their number modulo 3."""


class Seen(NamedTuple):
    """One batch and every model's view of it."""

    batch: Batch
    student: View
    teachers: tuple[View, ...]


def batches(
    source: Ramps | None = None,
    *,
    student: ViewSpec | None = None,
    teachers: Sequence[ViewSpec] = (),
    num_workers: int = 0,
    background: str = "white",
    start: int = 0,
    process: tuple[int, int] = (0, 1),
) -> list[Seen]:
    """Six batches of 4, that is two passes, from step `start` on."""
    data = DataConfig(path="x", min_crop=0.3, num_workers=num_workers, background=background)  # type: ignore[arg-type]
    views, pairs = Views([student or view_spec(8), *teachers]), PairSet([source or Ramps()], [data])  # type: ignore[list-item]
    with as_process(*process):
        feed = open_feed(pairs, train_config(data), views, start=start)
    with feed:
        loaded = [next(feed) for _ in range(6 - start)]
        with pytest.raises(StopIteration):
            next(feed)
    seen = []
    for batch in loaded:
        first, *others = (
            view._replace(images=spec.normalize(view.images))
            for spec, view in zip(views.specs, views.of(batch), strict=True)
        )
        seen.append(Seen(batch, first, tuple(others)))
    return seen


def assert_same(ours: Sequence[Seen], theirs: Sequence[Seen]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert a.batch.ids.tolist() == b.batch.ids.tolist()
        assert a.batch.labels.tolist() == b.batch.labels.tolist()
        assert (a.batch.keys, a.batch.skipped) == (b.batch.keys, b.batch.skipped)
        for one, other in zip((a.student, *a.teachers), (b.student, *b.teachers), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.texts, other.texts)


def test_student_and_teacher_see_the_same_crop_at_their_own_resolutions() -> None:
    seen = []
    for batch, student, (other,) in batches(student=view_spec(8), teachers=[view_spec(24, mean=0.5, std=0.25)]):
        assert [part.shape for part in batch.pixels] == [(4, 3, 8, 8), (4, 3, 24, 24)]
        assert {part.dtype for part in batch.pixels} == {torch.uint8}
        for ours, theirs in zip(student.images, other.images * 0.25 + 0.5, strict=True):
            middle = [image[channel].mean().item() for channel in (0, 1) for image in (ours, theirs)]
            spread = [(image[0, :, -1] - image[0, :, 0]).mean().item() for image in (ours, theirs)]
            assert middle[0] == pytest.approx(middle[1], abs=2 / 255)
            assert middle[2] == pytest.approx(middle[3], abs=2 / 255)
            # From the middle of the first pixel to that of the last: 7/8 and 23/24 of the crop's width.
            assert spread[0] / (7 / 8) == pytest.approx(spread[1] / (23 / 24), abs=0.03)
            seen.append((round(middle[0], 3), round(middle[2], 3)))
    assert len(set(seen)) > 20  # the crops differ


def test_the_pixels_of_a_view_do_not_depend_on_the_views_beside_it() -> None:
    specs = [view_spec(30), view_spec(61), view_spec(121), view_spec(8)]
    config, data = DataConfig(path="x", min_crop=0.5), encode(coordinates(640, 480), "JPEG")
    pair = Pair("key", data, ("one", "two", "three"))
    together = [Augment(config, Views(specs), seed=3)(pair, view, 7) for view in range(5)]
    for number, spec in enumerate(specs):
        for view, sample in enumerate(together):
            alone = Augment(config, Views([spec]), seed=3)(pair, view, 7)
            assert np.array_equal(alone.pixels[0], sample.pixels[number])
            assert (alone.caption, alone.caption_number) == (sample.caption, sample.caption_number)
    assert {sample.caption for sample in together} == {pair.captions[sample.caption_number] for sample in together}
    assert len({sample.caption_number for sample in together}) > 1


class TwoViews:
    num_views, seed = 2, 0

    def read(self, pair: Pair, id: int, view: int, caption_number: int) -> tuple[np.ndarray, ...]:
        raise NotImplementedError


def test_pixels_repeat_after_the_stored_views_and_captions_do_not() -> None:
    augment = Augment(DataConfig(path="x", min_crop=0.3), Views([view_spec(8)]), seed=0)
    taken = [augment(Ramps().read(1), view, 1, stored=TwoViews()) for view in range(8)]
    for view, sample in enumerate(taken):
        assert np.array_equal(sample.pixels[0], taken[view % 2].pixels[0])
    assert not np.array_equal(taken[0].pixels[0], taken[1].pixels[0])
    assert len({sample.caption for sample in taken[::2]}) > 1


def clean_siglip(texts: list[str]) -> torch.Tensor:
    return SimpleTokenizer()([canonicalize_text(text) for text in texts])  # without punctuation


@pytest.mark.parametrize(
    ("tokenize", "empty", "full"),
    [
        (SimpleTokenizer(), ["&nbsp;", "&amp;nbsp;", "&#xFEFF;"], ["a", "7", "猫", "🎉", "&amp;", "!!!"]),
        (clean_siglip, ["!!!", "-?"], ["a", "7", "猫", "&nbsp;"]),
    ],
    ids=["clip", "siglip"],
)
def test_a_caption_of_which_a_tokenizer_leaves_nothing_is_empty(
    tokenize: Any, empty: list[str], full: list[str]
) -> None:
    views = Views([view_spec(8, tokenizer_name="other"), replace(view_spec(8), tokenize=tokenize)])
    augment, image = Augment(DataConfig(path="x"), views, seed=0), encode(coordinates(), "PNG")
    for caption in (*empty, "\ufeff", "\u200b\u200d", "\u3000\u00a0\u2028"):
        with pytest.raises(BadSample) as caught:
            augment(Pair("key", image, (caption,)), 0, 0)
        assert caught.value.skip.cause == "empty caption"
        assert len(augment.pixels(Pair("key", image, (caption,)), 0, 0, seed=0)) == 1  # a cache stores them
    for caption in (*full, ""):  # of images alone
        assert augment(Pair("key", image, (caption,)), 0, 0).caption == caption


def augmented(source: Ramps, seed: int = 0) -> AugmentedPairs:
    config = DataConfig(path="x", min_crop=0.3)
    return AugmentedPairs(PairSet([source], [config]), Augment(config, Views([view_spec(8)]), seed))  # type: ignore[list-item]


def test_augmentation_is_a_function_of_seed_view_index_and_id() -> None:
    def sample(seed: int, view: int, index: int) -> tuple[bytes, str]:
        taken = augmented(Ramps(), seed)[view, index]
        assert taken.id == index
        return taken.pixels[0].tobytes(), taken.caption[0]

    np.random.default_rng(0).random(5)
    first = sample(0, 1, 2)
    torch.manual_seed(1)
    assert sample(0, 1, 2) == first
    others = {sample(0, 0, 2)[0], sample(0, 2, 2)[0], sample(1, 1, 2)[0], sample(0, 1, 3)[0], sample(0, 2, 1)[0]}
    assert first[0] not in others
    assert len(others) == 5


@pytest.mark.parametrize("background", ["white", "random"])
def test_transparent_pixels_show_white_or_one_colour_per_sample(background: str) -> None:
    source = Ramps(transparent=True)
    options = {"background": background, "teachers": [view_spec(4)]}
    seen = batches(source, **options)  # type: ignore[arg-type]
    assert_same(seen, batches(source, num_workers=2, **options))  # type: ignore[arg-type]
    colours = []
    for _, student, (teacher,) in seen:
        for ours, theirs in zip(student.images, teacher.images, strict=True):
            colour = ours[:, 0, 0]
            assert torch.equal(ours, colour.view(3, 1, 1).expand(3, 8, 8))
            assert torch.equal(theirs, colour.view(3, 1, 1).expand(3, 4, 4))
            colours.append(tuple(colour.tolist()))
    assert len(colours) == 24
    assert len(set(colours)) == (24 if background == "random" else 1)
    assert background == "random" or colours[0] == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(("weight", "epochs"), [(1.0, [0, 1, 2.5]), (0.5, [0, 2, 5])])
def test_a_feed_counts_passes_through_the_data(weight: float, epochs: list[float]) -> None:
    data = DataConfig(path="x", num_workers=0, weight=weight)
    feed = open_feed(PairSet([Ramps()], [data]), train_config(data), Views([view_spec(8)]))  # type: ignore[list-item]
    assert [feed.epoch(step) for step in (0, 3, 7.5)] == epochs  # type: ignore[arg-type]


BAD = (0, 1, 5, 7)


@pytest.mark.parametrize("bad", [BAD, (2,), tuple(range(1, 12))])
def test_bad_samples_are_named_and_replaced_and_the_good_ones_stay_as_they_were(bad: tuple[int, ...]) -> None:
    letters = set[str]()
    for before, after in zip(batches(), batches(Ramps(bad=bad)), strict=True):
        wanted = before.batch.ids.tolist()
        assert not set(after.batch.ids.tolist()) & set(bad)
        assert len(after.batch.skipped) == after.batch.num_read - len(wanted) >= sum(index in bad for index in wanted)
        assert {f"ramp {index}" for index in wanted if index in bad} <= {key for key, _, _ in after.batch.skipped}
        for key, cause, message in after.batch.skipped:
            index = int(key.removeprefix("ramp "))
            assert index in bad
            assert cause == CAUSES[index % 3]
            assert message.startswith(MESSAGES[index % 3])
        for place, (index, found) in enumerate(zip(wanted, after.batch.ids.tolist(), strict=True)):
            if index not in bad:
                assert found == index
                assert torch.equal(after.student.images[place], before.student.images[place])
                assert torch.equal(after.student.texts[place], before.student.texts[place])
            caption = "".join(map(chr, after.student.texts[place].tolist()))
            assert (after.batch.keys[place], int(caption[1:])) == (f"ramp {found}", found)
            assert int(after.batch.labels[place]) == label_of(found)
        letters |= {chr(tokens[0]) for tokens in before.student.texts.tolist()}
    assert letters == {"a", "b", "c"}


def test_substitutes_are_the_same_for_any_number_of_processes_and_from_any_step() -> None:
    whole = batches(Ramps(bad=BAD))
    assert sum(len(seen.batch.skipped) for seen in whole) > 6
    assert_same(whole, batches(Ramps(bad=BAD), num_workers=2))
    assert_same(whole[3:], batches(Ramps(bad=BAD), start=3))
    halves = [batches(Ramps(bad=BAD), process=(rank, 2)) for rank in range(2)]
    for together, *parts in zip(whole, *halves, strict=True):
        assert torch.equal(together.batch.ids, torch.cat([part.batch.ids for part in parts]))
        assert torch.equal(together.student.images, torch.cat([part.student.images for part in parts]))
        assert torch.equal(together.student.texts, torch.cat([part.student.texts for part in parts]))
        assert together.batch.keys == sum((part.batch.keys for part in parts), ())
        assert together.batch.skipped == sum((part.batch.skipped for part in parts), ())


@pytest.mark.parametrize(
    ("workers", "free", "processes", "ahead"),
    [
        *((1, 1000, 1, 4), (2, 1000, 1, 4), (2, 1000, 2, 4), (2, 61, 1, 2), (2, 1000, 20, 1), (8, 100, 1, 1)),
        *((2, 40, 1, 1), (2, 39, 1, None), (0, 0, 1, 0), (2, 79, 2, None)),
        (60, 10_000, 1, 1),  # 60 × 10 MiB of at most 1 GiB
    ],
)
def test_loader_processes_are_as_far_ahead_as_bytes_and_shared_memory_allow(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, workers: int, free: int, processes: int, ahead: int | None
) -> None:
    """Batches of 10 MiB; free: MiB in the shared memory."""
    monkeypatch.setattr(loader, "SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free << 20))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    if ahead is None:
        with pytest.raises(
            ValueError, match=rf"{tmp_path} has [\d.]+ MiB free per process, 2 .* 40\.0 MiB .*--shm-size"
        ):
            loader.loader_options(workers, 10 << 20, pin_memory=False)
    else:
        assert loader.loader_options(workers, 10 << 20, pin_memory=False).get("prefetch_factor", 0) == ahead
