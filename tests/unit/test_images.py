"""Bytes → pixels: decoding, one crop for all views, and augmentation that depends on the sample alone."""

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from samples import coordinates, encode, tokenize, view_spec, write_tar

from clipkd.config import DataConfig
from clipkd.data.images import decode, normalize, random_crop_box, render
from clipkd.data.loader import AugmentedPairs, BatchOrder, Collate, training_batches
from clipkd.data.sources import UNLABELLED, Pair, open_source
from clipkd.views import Batch, ViewSpec

WHITE = (255, 255, 255)


def pixel(data: bytes, background: tuple[int, int, int] = WHITE) -> tuple[int, ...]:
    image = decode(data, "key", background=background)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


def test_transparency_shows_the_background() -> None:
    blue = (0, 0, 255)
    assert pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 0)), "PNG"), blue) == (0, 0, 255)
    assert pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 255)), "PNG"), blue) == (200, 0, 0)
    half = pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 128)), "PNG"), blue)
    assert half == pytest.approx((200 * 128 / 255, 0, 255 * 127 / 255), abs=1)
    assert pixel(encode(Image.new("LA", (2, 2), (100, 0)), "PNG"), (9, 8, 7)) == (9, 8, 7)
    assert pixel(encode(Image.new("RGBA", (2, 2), (1, 2, 3, 0)), "WEBP", lossless=True), blue) == (0, 0, 255)


def test_palettes_keep_their_colours_and_their_transparent_entry() -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(encode(image, "PNG")) == (10, 200, 30)
    assert pixel(encode(image, "PNG", transparency=1), (1, 2, 3)) == (1, 2, 3)
    assert pixel(encode(image, "GIF")) == (10, 200, 30)


def test_grey_black_and_white_and_four_inks_become_rgb() -> None:
    assert pixel(encode(Image.new("L", (2, 2), 77), "PNG")) == (77, 77, 77)
    assert pixel(encode(Image.new("1", (2, 2), 1), "PNG")) == (255, 255, 255)
    assert pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")) == pytest.approx((255, 0, 0), abs=3)


@pytest.mark.parametrize("value", [0, 257 * 40, 257 * 128, 65535])
def test_sixteen_bit_grey_keeps_its_brightness(value: int) -> None:
    image = Image.fromarray(np.full((4, 4), value, np.uint16))
    assert pixel(encode(image, "PNG")) == pytest.approx((value / 257,) * 3, abs=1)


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), "JPEG")


@pytest.mark.parametrize(
    "data",
    [b"", b"no image", jpeg()[:100], jpeg()[:1000], b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"\xff\xd8\xff" + b"\0" * 9],
)
def test_bytes_that_are_no_image_are_refused_with_the_samples_name(data: bytes) -> None:
    with pytest.raises(ValueError, match=r"^shard\.tar at byte 7: the image cannot be decoded"):
        decode(data, "shard.tar at byte 7", background=WHITE)


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    whole = [encode(noise, "PNG"), encode(noise, "JPEG"), encode(noise, "WEBP"), encode(noise.quantize(), "GIF")]
    refused = 0
    for trial in range(400):
        data = bytearray(whole[trial % len(whole)])
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(0, 256)
        try:
            decode(bytes(data), "key", background=WHITE)
        except ValueError:
            refused += 1
    assert 0 < refused < 400


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (1000, 3), (3, 1000), (224, 224)])
@pytest.mark.parametrize("min_area", [0.08, 0.5, 0.9])
def test_a_crop_stays_inside_and_is_large_enough(size: tuple[int, int], min_area: float) -> None:
    width, height = size
    rng = np.random.default_rng(0)
    areas, stretches, lefts = [], [], []
    for _ in range(500):
        left, upper, right, lower = random_crop_box(width, height, min_area, rng)
        assert 0 <= left < right <= width
        assert 0 <= upper < lower <= height
        areas.append((right - left) * (lower - upper) / (width * height))
        stretches.append((right - left) / width / ((lower - upper) / height))
        lefts.append(left / width)
    assert min(areas) >= min_area * (1 - 1e-9)
    assert max(areas) <= 1 + 1e-9
    assert min(areas) < min_area + 0.05 < 0.98 < max(areas)
    assert 3 / 4 - 1e-9 <= min(stretches) < 1 < max(stretches) <= 4 / 3 + 1e-9
    assert max(lefts) > 0.02


def test_with_all_of_the_area_the_crop_is_the_whole_image() -> None:
    for seed in range(20):
        assert random_crop_box(64, 48, 1.0, np.random.default_rng(seed)) == (0, 0, 64, 48)


def test_a_crop_is_a_function_of_the_random_state() -> None:
    boxes = [random_crop_box(64, 48, 0.5, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert boxes[0] == boxes[1] != boxes[2]


def test_a_crop_is_rendered_from_its_own_place() -> None:
    pixels = render(coordinates(64, 64), (32.0, 0.0, 64.0, 16.0), view_spec(8))
    assert pixels.shape == (8, 8, 3)
    assert pixels.dtype == np.uint8
    # The mean of a linear ramp is its middle: x = 48 of 64, y = 8 of 64.
    assert pixels[..., 0].mean() == pytest.approx(47.5 / 63 * 255, abs=2)
    assert pixels[..., 1].mean() == pytest.approx(7.5 / 63 * 255, abs=2)


def test_a_view_may_be_wider_than_high() -> None:
    spec = replace(view_spec(8), size=(4, 6))
    assert render(coordinates(), (0.0, 0.0, 64.0, 48.0), spec).shape == (4, 6, 3)


def test_pixels_are_normalised_per_channel_by_hand() -> None:
    spec = replace(view_spec(1), mean=(0.5, 0.0, 0.25), std=(0.5, 2.0, 0.25))
    images = normalize([np.array([[[255, 51, 0]]], np.uint8), np.array([[[0, 0, 255]]], np.uint8)], spec)
    expected = torch.tensor([[1.0, 0.1, -1.0], [-1.0, 0.0, 3.0]]).view(2, 3, 1, 1)
    torch.testing.assert_close(images, expected)
    assert images.is_contiguous()


class Ramps:
    """Pairs whose colours say where a crop was taken, every one alike but for its captions and label."""

    def __init__(self, *, transparent: bool = False) -> None:
        image = coordinates()
        if transparent:
            image.putalpha(0)
        self.image = encode(image, "PNG")

    def __len__(self) -> int:
        return 12

    def read(self, index: int) -> Pair:
        captions = (f"a{index:02}", f"b{index:02}", f"c{index:02}")
        return Pair(f"ramp {index}", self.image, captions, label=100 - index if index % 3 else UNLABELLED)


def batches(
    *,
    student: ViewSpec | None = None,
    teachers: Sequence[ViewSpec] = (),
    seed: int = 0,
    num_workers: int = 0,
    background: str = "white",
    transparent: bool = False,
    start: int = 0,
    stop: int = 6,
) -> list[Batch]:
    config = DataConfig(path="x", min_crop=0.3, num_workers=num_workers, background=background)  # type: ignore[arg-type]
    order = BatchOrder(12, batch_size=4, seed=seed, start=start, stop=stop, rank=0, world_size=1)
    loaded: Iterator[Batch] = training_batches(
        Ramps(transparent=transparent),
        config,
        student=student or view_spec(8),
        teachers=teachers,
        order=order,
        pin_memory=False,
    )
    return list(loaded)


def test_student_and_teacher_see_the_same_crop_at_their_own_resolutions() -> None:
    seen = []
    for batch in batches(student=view_spec(8), teachers=[view_spec(24, mean=0.5, std=0.25)]):
        assert batch.student.images.shape == (4, 3, 8, 8)
        assert batch.teachers[0].images.shape == (4, 3, 24, 24)
        teacher = batch.teachers[0].images * 0.25 + 0.5
        for ours, theirs in zip(batch.student.images, teacher, strict=True):
            middle = [image[channel].mean().item() for channel in (0, 1) for image in (ours, theirs)]
            spread = [(image[0, :, -1] - image[0, :, 0]).mean().item() for image in (ours, theirs)]
            assert middle[0] == pytest.approx(middle[1], abs=2 / 255)
            assert middle[2] == pytest.approx(middle[3], abs=2 / 255)
            # From the middle of the first pixel to that of the last: 7/8 and 23/24 of the crop's width.
            assert spread[0] / (7 / 8) == pytest.approx(spread[1] / (23 / 24), abs=0.03)
            seen.append((round(middle[0], 3), round(middle[2], 3)))
    assert len(set(seen)) > 20  # the crops do differ


def test_views_that_agree_share_their_tensors() -> None:
    (batch,) = batches(student=view_spec(8), teachers=[view_spec(8)], stop=1)
    assert batch.teachers[0].images is batch.student.images
    assert batch.teachers[0].texts is batch.student.texts


@pytest.mark.parametrize(
    "other",
    [
        view_spec(9),
        view_spec(8, mean=0.1),
        view_spec(8, std=0.5),
        replace(view_spec(8), interpolation="bicubic"),
    ],
)
def test_views_that_differ_in_any_way_are_made_apart(other: ViewSpec) -> None:
    assert len(Collate(view_spec(8), [other]).pixel_specs) == 2
    (batch,) = batches(student=view_spec(8), teachers=[other], stop=1)
    assert batch.teachers[0].images.shape != batch.student.images.shape or not torch.equal(
        batch.teachers[0].images, batch.student.images
    )
    assert batch.teachers[0].texts is batch.student.texts  # the same tokenizer all the same


def test_another_tokenizer_makes_the_teachers_own_tokens_of_the_same_captions() -> None:
    teacher = replace(view_spec(8), tokenizer_name="shifted", tokenize=lambda texts: tokenize(texts) + 1000)
    (batch,) = batches(teachers=[teacher], stop=1)
    assert torch.equal(batch.teachers[0].texts, batch.student.texts + 1000)
    assert batch.teachers[0].images is batch.student.images


def test_of_two_teachers_the_one_that_agrees_shares_and_the_other_gets_its_own() -> None:
    other = replace(view_spec(12), tokenizer_name="shifted", tokenize=lambda texts: tokenize(texts) + 1000)
    (batch,) = batches(student=view_spec(8), teachers=[other, view_spec(8)], stop=1)
    different, alike = batch.teachers
    assert alike.images is batch.student.images
    assert alike.texts is batch.student.texts
    assert (different.images.shape, batch.student.images.shape) == ((4, 3, 12, 12), (4, 3, 8, 8))
    assert torch.equal(different.texts, batch.student.texts + 1000)


def test_two_teachers_that_agree_share_what_the_student_does_not() -> None:
    (batch,) = batches(student=view_spec(8), teachers=[view_spec(12), view_spec(12)], stop=1)
    assert batch.teachers[0].images is batch.teachers[1].images
    assert batch.teachers[0].images.shape == (4, 3, 12, 12)
    assert len(Collate(view_spec(8), [view_spec(12), view_spec(12)]).pixel_specs) == 2


def test_without_a_teacher_there_is_no_second_view() -> None:
    (batch,) = batches(stop=1)
    assert batch.teachers == ()
    assert batch.student.images.dtype == torch.float32


def test_every_image_keeps_a_caption_of_its_own() -> None:
    letters = set()
    for batch in batches():
        for tokens, index in zip(batch.student.texts.tolist(), batch.ids.tolist(), strict=True):
            caption = "".join(map(chr, tokens)).strip()
            assert int(caption[1:]) == index
            letters.add(caption[0])
    assert letters == {"a", "b", "c"}


def test_every_image_keeps_the_label_of_its_own() -> None:
    seen = {}
    for batch in batches():
        assert batch.labels.dtype == torch.int64
        seen |= dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
    assert seen == {0: -1, 1: 99, 2: 98, 3: -1, 4: 96, 5: 95, 6: -1, 7: 93, 8: 92, 9: -1, 10: 90, 11: 89}


def test_augmentation_is_a_function_of_seed_epoch_and_index() -> None:
    spec = view_spec(8)

    def sample(seed: int, epoch: int, index: int) -> tuple[bytes, str]:
        pairs = AugmentedPairs(Ramps(), DataConfig(path="x", min_crop=0.3), [spec], seed)
        pixels, caption, returned, _ = pairs[epoch, index]
        assert returned == index
        return pixels[0].tobytes(), caption[0]

    np.random.default_rng(0).random(5)
    first = sample(0, 1, 2)
    torch.manual_seed(1)
    assert sample(0, 1, 2) == first
    others = {sample(0, 0, 2)[0], sample(0, 2, 2)[0], sample(1, 1, 2)[0], sample(0, 1, 3)[0], sample(0, 2, 1)[0]}
    assert first[0] not in others
    assert len(others) == 5


@pytest.mark.parametrize("background", ["white", "random"])
def test_batches_are_the_same_with_any_number_of_loader_processes(background: str) -> None:
    alone, with_two = (
        batches(teachers=[view_spec(12)], num_workers=workers, background=background, transparent=True)
        for workers in (0, 2)
    )
    assert len(alone) == len(with_two) == 6
    for a, b in zip(alone, with_two, strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.student.images, b.student.images)
        assert torch.equal(a.student.texts, b.student.texts)
        assert torch.equal(a.teachers[0].images, b.teachers[0].images)


def test_a_run_started_at_a_step_sees_the_batches_of_the_whole_run() -> None:
    for a, b in zip(batches()[4:], batches(start=4), strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert torch.equal(a.student.images, b.student.images)
        assert torch.equal(a.student.texts, b.student.texts)


def test_random_backgrounds_are_one_colour_per_sample_and_white_is_white() -> None:
    colours = {
        tuple(image.unique(dim=-1).flatten().tolist()) for b in batches(transparent=True) for image in b.student.images
    }
    assert colours == {(1.0,) * (3 * 8)}
    seen = []
    for batch in batches(transparent=True, background="random", teachers=[view_spec(4)]):
        for ours, theirs in zip(batch.student.images, batch.teachers[0].images, strict=True):
            colour = ours[:, 0, 0]
            assert torch.equal(ours, colour.view(3, 1, 1).expand(3, 8, 8))
            assert torch.equal(theirs, colour.view(3, 1, 1).expand(3, 4, 4))
            seen.append(tuple(colour.tolist()))
    assert len(set(seen)) == len(seen) == 24


def test_a_corrupt_image_in_a_shard_is_named_by_shard_and_place(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"broken"), ("0.txt", b"a caption")])
    pairs = AugmentedPairs(open_source(DataConfig(path=str(path))), DataConfig(path=str(path)), [view_spec(8)], 0)
    with pytest.raises(ValueError, match=r"a\.tar at byte 512: the image cannot be decoded"):
        pairs[0, 0]


def test_crops_of_a_wide_image_keep_its_aspect_ratio_within_four_thirds() -> None:
    # Relative to the image: a panorama of 10:1 stays one, so that its caption still describes it.
    for seed in range(50):
        left, upper, right, lower = random_crop_box(1000, 100, 0.5, np.random.default_rng(seed))
        assert math.log(7.4) < math.log((right - left) / (lower - upper)) < math.log(13.4)


def test_decoding_reads_the_whole_image_before_its_bytes_go_away() -> None:
    data = io.BytesIO(encode(coordinates(), "PNG"))
    image = decode(data.getvalue(), "key", background=WHITE)
    assert np.array_equal(np.asarray(image), np.asarray(coordinates()))
