"""Bytes → pixels: decoding, one crop for all views, and augmentation and substitutes that depend on the position alone."""

import contextlib
import io
import math
import os
import struct
import subprocess
import tracemalloc
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from clipkd.config.data import DataConfig
from clipkd.data.images import Box, decode, decoding_scale, open_image, random_crop_box, reduce_scale, render
from clipkd.data.loader import MOST_TRIES, Augment, AugmentedPairs, Sample, indexed_batches
from clipkd.data.open import open_pairs
from clipkd.data.order import BatchOrder, Mixture
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import UNLABELLED, Pair, PairSet
from clipkd.errors import RunStopped
from clipkd.views import Batch, View, Views, ViewSpec
from tests.data.samples import coordinates, encode, view_spec, write_tar

WHITE = (255, 255, 255)


def decoded(data: bytes, background: tuple[int, int, int] = WHITE, key: str = "key") -> Image.Image:
    image = decode(open_image(data, key), key, background=background)
    assert image.mode == "RGB"
    return image


def pixel(data: bytes, background: tuple[int, int, int] = WHITE) -> tuple[int, ...]:
    return decoded(data, background).getpixel((0, 0))  # type: ignore[return-value]


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


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_without_a_known_range_are_refused(mode: str) -> None:
    with pytest.raises(BadSample, match="32 bits per pixel, of which nobody says what is white"):
        pixel(encode(Image.new(mode, (4, 4), 7), "TIFF"))


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_the_usual_formats_are_read(format: str) -> None:
    picture = Image.new("RGB", (8, 6), (200, 100, 50)).quantize(2) if format == "GIF" else None
    image = decoded(encode(picture or Image.new("RGB", (8, 6), (200, 100, 50)), format))
    assert image.size == (8, 6)
    assert image.getpixel((4, 3)) == pytest.approx((200, 100, 50), abs=3)


def test_of_several_pictures_in_a_file_the_first_is_taken() -> None:
    first, second = Image.new("RGB", (8, 6), (200, 0, 0)), Image.new("RGB", (8, 6), (0, 200, 0))
    for format, limit in (("MPO", 3), ("GIF", 0), ("WEBP", 3), ("PNG", 0)):
        data = encode(first, format, save_all=True, append_images=[second])
        assert pixel(data) == pytest.approx((200, 0, 0), abs=limit), format


def jpeg() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise), "JPEG")


@pytest.mark.parametrize(
    "data",
    [b"no image", jpeg()[:100], jpeg()[:1000], b"\x89PNG\r\n\x1a\n" + b"x" * 50, b"\xff\xd8\xff" + b"\0" * 9],
)
def test_bytes_that_are_no_image_are_refused_with_the_samples_name(data: bytes) -> None:
    with pytest.raises(BadSample, match=r"^shard\.tar/7: the image cannot be decoded") as caught:
        decoded(data, key="shard.tar/7")
    assert caught.value.skip[:2] == ("shard.tar/7", "undecodable image")


def test_no_bytes_are_an_empty_image() -> None:
    with pytest.raises(BadSample) as caught:
        open_image(b"", "shard.tar/7")
    assert caught.value.skip == ("shard.tar/7", "empty image", "the image has no bytes")
    assert str(caught.value) == "shard.tar/7: the image has no bytes"


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.mark.parametrize(
    "data",
    [EPS, b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS, b"%PDF-1.4\n1 0 obj\n", b"<svg/>"],
    ids=["EPS", "EPS in DOS clothes", "PDF", "SVG"],
)
def test_no_process_is_started_on_the_bytes_of_a_data_set(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    if data == EPS:
        assert Image.open(io.BytesIO(data)).format == "EPS"  # what Pillow would take it for, and run Ghostscript on
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr(os, "system", started.append)
    with pytest.raises(BadSample, match=r"^key: the image cannot be decoded \(it is none of JPEG, PNG") as caught:
        decoded(data)
    assert caught.value.skip.cause == "undecodable image"
    assert started == []


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG: length, kind, content, checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1 + width) * height) if width * height <= 100 else b""
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(100_000, 100_000), (10_000, 10_000), (1 << 16, (1 << 10) + 1), (2**31 - 1, 2**31 - 1)]
)
def test_a_small_file_that_claims_to_be_huge_is_refused_before_it_takes_memory(size: tuple[int, int]) -> None:
    assert pixel(png(2, 3)) == (0, 0, 0)  # a file made this way is read, if it tells the truth
    tracemalloc.start()
    try:
        with pytest.raises(BadSample, match=r"^shard\.tar/7: the image (is too large|has .* pixels)") as caught:
            decoded(png(*size), key="shard.tar/7")
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()
    assert caught.value.skip[:2] == ("shard.tar/7", "too many pixels")


def test_sixty_seven_million_pixels_are_not_too_many() -> None:
    assert open_image(png(1 << 16, 1 << 10), "key").size == (65536, 1024)


def test_what_pillow_warns_of_does_not_surface() -> None:
    data = png(2, 3, chunk(b"acTL", struct.pack(">II", 0, 0)))  # an animation of no frames
    with pytest.warns(UserWarning, match="Invalid APNG"):
        Image.open(io.BytesIO(data))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert pixel(data) == (0, 0, 0)
    assert seen == []


def test_random_damage_raises_bad_samples_and_nothing_else() -> None:
    rng = np.random.default_rng(1)
    noise = Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    whole = [
        encode(noise, "PNG"),
        encode(noise, "JPEG"),
        encode(noise.convert("CMYK"), "JPEG"),
        encode(noise, "WEBP"),
        encode(noise.quantize(), "GIF"),
        encode(noise, "BMP"),
        encode(noise, "TIFF"),
        encode(noise, "TIFF", compression="tiff_lzw"),
        encode(noise, "MPO", save_all=True, append_images=[noise]),
    ]
    augment = Augment(DataConfig(path="x"), Views([view_spec(4)]), seed=0)
    for data in whole:
        augment(Pair("key", data, ("a",)), 0, 0)
    skips = []
    for trial in range(400):
        data = bytearray(whole[trial % len(whole)])
        for place in rng.integers(0, len(data) if trial % 3 else min(len(data), 200), 4):
            data[place] = rng.integers(0, 256)
        if trial % 5 == 0:
            del data[int(rng.integers(len(data))) :]
        try:
            augment(Pair("key", bytes(data), ("a",)), 0, trial)
        except BadSample as bad:
            skips.append(bad.skip)
    assert {skip.key for skip in skips} == {"key"}
    assert {skip.cause for skip in skips} <= {"undecodable image", "too many pixels", "empty image"}
    assert 0 < len(skips) < 400


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


def reduced(data: bytes, box: Box, spec: ViewSpec) -> tuple[Image.Image, Box]:
    """Decoded as a training sample is, and the box in it."""
    image = open_image(data, "key")
    box = reduce_scale(image, box, decoding_scale(image, box, spec))
    return decode(image, "key", background=WHITE), box


def wide(height: int, width: int) -> ViewSpec:
    return replace(view_spec(1), size=(height, width))


@pytest.mark.parametrize(
    ("spec", "scale"),
    [
        (view_spec(60), 8),  # 480 = 8 × 60 exactly
        (view_spec(61), 4),
        (view_spec(120), 4),
        (view_spec(121), 2),
        (view_spec(240), 2),
        (view_spec(241), 1),
        (view_spec(2000), 1),
        (wide(60, 80), 8),
        (wide(60, 81), 4),
        (wide(61, 80), 4),
        (wide(1, 321), 1),
    ],
)
def test_a_jpeg_is_decoded_as_small_as_a_view_allows(spec: ViewSpec, scale: int) -> None:
    data = encode(coordinates(640, 480), "JPEG")
    image, box = reduced(data, (0.0, 0.0, 640.0, 480.0), spec)
    assert image.size == (640 // scale, 480 // scale)
    assert box == (0, 0, 640 / scale, 480 / scale)


@pytest.mark.parametrize(("size", "scale"), [(256, 8), (255, 4), (128, 4), (127, 2), (64, 2), (63, 1), (32, 1), (5, 1)])
def test_what_the_crop_holds_decides_and_not_the_image(size: int, scale: int) -> None:
    data = encode(coordinates(640, 480), "JPEG")
    image, box = reduced(data, (320.0, 160.0, 320.0 + size, 160.0 + size), view_spec(32))
    assert image.size == (640 // scale, 480 // scale)
    assert box == (320 / scale, 160 / scale, (320 + size) / scale, (160 + size) / scale)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_other_formats_are_decoded_whole(format: str) -> None:
    picture = coordinates(640, 480)
    image, box = reduced(
        encode(picture, format, **({"lossless": True} if format == "WEBP" else {})),
        (1.0, 2.0, 639.0, 477.0),
        view_spec(8),
    )
    assert box == (1, 2, 639, 477)
    assert np.array_equal(np.asarray(image), np.asarray(picture))


def random_cases(count: int) -> list[tuple[int, int, Box, ViewSpec]]:
    """Sizes, crops and views of which about half allow a smaller decoding."""
    rng = np.random.default_rng(3)
    cases = []
    for _ in range(count):
        width, height = rng.integers(100, 1100, 2).tolist()
        box = random_crop_box(width, height, 0.3, rng)
        cases.append((width, height, box, wide(*rng.integers(8, 150, 2).tolist())))
    return cases


def test_a_reduced_crop_never_has_fewer_pixels_than_a_view_and_stays_inside() -> None:
    scales = set()
    for width, height, box, spec in random_cases(300):
        image = open_image(encode(Image.new("L", (width, height)), "JPEG"), "key")
        left, upper, right, lower = reduce_scale(image, box, decoding_scale(image, box, spec))
        scale = round(width / image.width)
        scales.add(scale)
        assert image.size == (math.ceil(width / scale), math.ceil(height / scale))
        assert 0 <= left < right <= image.width
        assert 0 <= upper < lower <= image.height
        assert scale == 1 or (lower - upper >= spec.size[0] and right - left >= spec.size[1])
        # At half that size a view would have had too few.
        least = min((box[3] - box[1]) / spec.size[0], (box[2] - box[0]) / spec.size[1])
        assert scale == 8 or least < 2 * scale
    assert scales == {1, 2, 4, 8}


def test_the_pixels_of_a_view_do_not_depend_on_the_views_beside_it() -> None:
    specs = [view_spec(30), wide(61, 40), view_spec(121), view_spec(8)]
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


def cmyk(image: Image.Image) -> Image.Image:
    return image.convert("CMYK")


def grey(image: Image.Image) -> Image.Image:
    return image.convert("L")


@pytest.mark.parametrize("convert", [None, grey, cmyk])
@pytest.mark.parametrize("progressive", [False, True])
def test_a_reduced_crop_looks_like_the_whole_one_from_the_same_place(
    convert: Callable[[Image.Image], Image.Image] | None, progressive: bool
) -> None:
    means, largest, num_reduced = [], 0, 0
    for width, height, box, spec in random_cases(25):
        picture = coordinates(width, height)
        data = encode(convert(picture) if convert else picture, "JPEG", quality=95, progressive=progressive)
        whole = decoded(data)
        image, own = reduced(data, box, spec)
        num_reduced += image.size != whole.size
        difference = np.abs(render(image, own, spec).astype(int) - render(whole, box, spec))
        means.append(difference.mean())
        largest = max(largest, difference.max())
    assert num_reduced > 10
    # Of 255, on these ramps: the worst crop's mean differs by 0.93 and the worst pixel by 4; by 0.30 and 2 if the box is
    # placed by the decoder's scale exactly.
    assert np.max(means) < 1
    assert largest <= 4


@pytest.mark.parametrize("size", [(1024, 768), (1025, 769), (1031, 775)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 512.0, 512.0), (512.0, 256.0, 1024.0, 768.0), (333.0, 111.0, 850.0, 641.0)])
def test_a_reduced_crop_shows_the_place_it_was_taken_from(size: tuple[int, int], box: Box) -> None:
    data = encode(coordinates(*size), "JPEG", quality=95)
    image, own = reduced(data, box, view_spec(64))
    assert image.size == (math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    pixels = render(image, own, view_spec(64)).astype(float)
    # Colours are linear in the place, so the crop's mean colour tells its middle: to a quarter of a reduced pixel.
    for channel in (0, 1):
        middle = 0.5 + pixels[..., channel].mean() / 255 * (size[channel] - 1)
        assert middle == pytest.approx((box[channel] + box[2 + channel]) / 2, abs=2)


class Ramps:
    """Pairs whose colours say where a crop was taken, every one alike but for its captions and label."""

    def __init__(self, *, transparent: bool = False, bad: Sequence[int] = (), num_pairs: int = 12) -> None:
        """bad: which of them cannot be used: every third has no bytes, is no image, cannot be read."""
        image = coordinates()
        if transparent:
            image.putalpha(0)
        self.image, self.bad = encode(image, "PNG"), bad
        self.shard_sizes = np.array([num_pairs])
        self.left_out, self.damaged = Skips(), list[Skip]()
        self.asked: list[int] = []

    def fingerprint(self) -> str:
        return ""

    def read(self, index: int) -> Pair:
        self.asked.append(index)
        key, image = f"ramp {index}", self.image
        if index in self.bad:
            if index % 3 == 2:
                raise BadSample(key, "no caption", "has no .txt")
            image = (b"", b"broken")[index % 3]
        captions = (f"a{index:02}", f"b{index:02}", f"c{index:02}")
        return Pair(key, image, captions, label=100 - index if index % 3 else UNLABELLED)


CAUSES = ("empty image", "undecodable image", "no caption")
"""Of the bad ones among the ramps, by their number modulo 3."""


class Seen(NamedTuple):
    """One batch and what each model sees of it."""

    batch: Batch
    student: View
    teachers: tuple[View, ...]


def batches(
    *,
    student: ViewSpec | None = None,
    teachers: Sequence[ViewSpec] = (),
    seed: int = 0,
    num_workers: int = 0,
    background: str = "white",
    source: Ramps | None = None,
    start: int = 0,
    stop: int = 6,
    rank: int = 0,
    world_size: int = 1,
) -> list[Seen]:
    config = DataConfig(path="x", min_crop=0.3, num_workers=num_workers, background=background)  # type: ignore[arg-type]
    source = source or Ramps()
    mixture = Mixture([source.shard_sizes], weights=[1.0], seed=seed)
    order = BatchOrder(mixture, batch_size=4, start=start, stop=stop, rank=rank, world_size=world_size)
    views = Views([student or view_spec(8), *teachers])
    feed = indexed_batches(PairSet([source], [config]), config, views, order, pin_memory=False)
    with contextlib.closing(feed):
        loaded = [next(feed) for _ in range(len(order))]
        with pytest.raises(StopIteration):
            next(feed)
    split = [(batch, views.of(batch, "cpu")) for batch in loaded]
    return [Seen(batch, first, tuple(others)) for batch, (first, *others) in split]


def assert_same(ours: Sequence[Seen], theirs: Sequence[Seen]) -> None:
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.batch.ids.tolist() == b.batch.ids.tolist()
        assert a.batch.labels.tolist() == b.batch.labels.tolist()
        assert (a.batch.keys, a.batch.skipped) == (b.batch.keys, b.batch.skipped)
        for one, other in zip((a.student, *a.teachers), (b.student, *b.teachers), strict=True):
            assert torch.equal(one.images, other.images)
            assert torch.equal(one.texts, other.texts)


def test_student_and_teacher_see_the_same_crop_at_their_own_resolutions() -> None:
    seen = []
    for _, student, (other,) in batches(student=view_spec(8), teachers=[view_spec(24, mean=0.5, std=0.25)]):
        assert student.images.shape == (4, 3, 8, 8)
        assert other.images.shape == (4, 3, 24, 24)
        teacher = other.images * 0.25 + 0.5
        for ours, theirs in zip(student.images, teacher, strict=True):
            middle = [image[channel].mean().item() for channel in (0, 1) for image in (ours, theirs)]
            spread = [(image[0, :, -1] - image[0, :, 0]).mean().item() for image in (ours, theirs)]
            assert middle[0] == pytest.approx(middle[1], abs=2 / 255)
            assert middle[2] == pytest.approx(middle[3], abs=2 / 255)
            # From the middle of the first pixel to that of the last: 7/8 and 23/24 of the crop's width.
            assert spread[0] / (7 / 8) == pytest.approx(spread[1] / (23 / 24), abs=0.03)
            seen.append((round(middle[0], 3), round(middle[2], 3)))
    assert len(set(seen)) > 20  # the crops do differ


def test_pixels_travel_as_bytes_once_for_models_that_see_the_same() -> None:
    (seen,) = batches(student=view_spec(8), teachers=[view_spec(8, mean=0.5), view_spec(24)], stop=1)
    assert sorted(part.shape for part in seen.batch.pixels) == [(4, 3, 8, 8), (4, 3, 24, 24)]
    assert {part.dtype for part in seen.batch.pixels} == {torch.uint8}


def test_every_image_keeps_a_caption_and_a_key_of_its_own() -> None:
    letters = set()
    for batch, student, _ in batches():
        assert batch.keys == tuple(f"ramp {index}" for index in batch.ids.tolist())
        for tokens, index in zip(student.texts.tolist(), batch.ids.tolist(), strict=True):
            caption = "".join(map(chr, tokens)).strip()
            assert int(caption[1:]) == index
            letters.add(caption[0])
    assert letters == {"a", "b", "c"}


def test_every_image_keeps_the_label_of_its_own() -> None:
    seen = {}
    for batch, _, _ in batches():
        assert batch.labels.dtype == torch.int64
        seen |= dict(zip(batch.ids.tolist(), batch.labels.tolist(), strict=True))
    assert seen == {0: -1, 1: 99, 2: 98, 3: -1, 4: 96, 5: 95, 6: -1, 7: 93, 8: 92, 9: -1, 10: 90, 11: 89}


def augmented(source: Ramps, seed: int = 0) -> AugmentedPairs:
    config = DataConfig(path="x", min_crop=0.3)
    return AugmentedPairs(PairSet([source], [config]), Augment(config, Views([view_spec(8)]), seed))


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
def test_batches_are_the_same_with_any_number_of_loader_processes(background: str) -> None:
    alone, with_two = (
        batches(teachers=[view_spec(12)], num_workers=workers, background=background, source=Ramps(transparent=True))
        for workers in (0, 2)
    )
    assert len(alone) == 6
    assert_same(alone, with_two)


def test_a_run_started_at_a_step_sees_the_batches_of_the_whole_run() -> None:
    assert_same(batches()[4:], batches(start=4))


def test_random_backgrounds_are_one_colour_per_sample_and_white_is_white() -> None:
    source = Ramps(transparent=True)
    colours = {
        tuple(image.unique(dim=-1).flatten().tolist()) for b in batches(source=source) for image in b.student.images
    }
    assert colours == {(1.0,) * (3 * 8)}
    seen = []
    for _, student, (teacher,) in batches(source=source, background="random", teachers=[view_spec(4)]):
        for ours, theirs in zip(student.images, teacher.images, strict=True):
            colour = ours[:, 0, 0]
            assert torch.equal(ours, colour.view(3, 1, 1).expand(3, 8, 8))
            assert torch.equal(theirs, colour.view(3, 1, 1).expand(3, 4, 4))
            seen.append(tuple(colour.tolist()))
    assert len(set(seen)) == len(seen) == 24


def test_a_feed_counts_passes_through_the_data() -> None:
    config, source = DataConfig(path="x", num_workers=0), Ramps()
    for weight, epochs in ((1.0, [0, 1, 2.5]), (0.5, [0, 2, 5])):
        order = BatchOrder(Mixture([source.shard_sizes], weights=[weight], seed=0), batch_size=4, start=0, stop=9)
        feed = indexed_batches(PairSet([source], [config]), config, Views([view_spec(8)]), order, pin_memory=False)
        assert [feed.epoch(step) for step in (0, 3, 7.5)] == epochs  # type: ignore[arg-type]


BAD = (0, 1, 5, 7)


@pytest.mark.parametrize("bad", [BAD, (2,), tuple(range(1, 12))])
def test_bad_samples_are_named_and_replaced_and_the_good_ones_stay_as_they_were(bad: tuple[int, ...]) -> None:
    clean, mended = batches(), batches(source=Ramps(bad=bad))
    for before, after in zip(clean, mended, strict=True):
        wanted = before.batch.ids.tolist()
        assert after.student.images.shape == (4, 3, 8, 8)
        assert after.student.texts.shape == (4, 4)
        assert not set(after.batch.ids.tolist()) & set(bad)
        assert len(after.batch.skipped) >= sum(index in bad for index in wanted)
        assert {f"ramp {index}" for index in wanted if index in bad} <= {key for key, _, _ in after.batch.skipped}
        for key, cause, message in after.batch.skipped:
            index = int(key.removeprefix("ramp "))
            assert index in bad
            assert cause == CAUSES[index % 3]
            assert message.startswith(("the image has no bytes", "the image cannot be decoded", "has no .txt"))
        for place, index in enumerate(wanted):
            if index not in bad:
                assert int(after.batch.ids[place]) == index
                assert after.batch.keys[place] == before.batch.keys[place]
                assert torch.equal(after.student.images[place], before.student.images[place])
                assert torch.equal(after.student.texts[place], before.student.texts[place])
            else:  # key, label and caption are those of the substitute
                substitute = int(after.batch.ids[place])
                assert after.batch.keys[place] == f"ramp {substitute}"
                assert int(after.batch.labels[place]) == (100 - substitute if substitute % 3 else -1)
                assert int("".join(map(chr, after.student.texts[place].tolist()))[1:]) == substitute


def test_with_one_good_sample_every_place_is_taken_by_it() -> None:
    for batch, student, _ in batches(source=Ramps(bad=range(1, 4), num_pairs=4)):
        assert batch.ids.tolist() == [0] * 4
        assert batch.keys == ("ramp 0",) * 4
        assert len(batch.skipped) >= 3
        assert {key for key, _, _ in batch.skipped} <= {"ramp 1", "ramp 2", "ramp 3"}
        assert student.images.shape == (4, 3, 8, 8)


def test_what_is_skipped_is_what_was_tried_in_that_order() -> None:
    source = Ramps(bad=tuple(range(1, 12)))
    taken = augmented(source)[3, 5]
    assert source.asked[0] == 5
    assert source.asked[-1] == taken.id == 0
    assert [skip.key for skip in taken.skipped] == [f"ramp {index}" for index in source.asked[:-1]]
    assert augmented(Ramps())[3, 5].skipped == ()


def test_a_substitute_depends_on_the_position_alone() -> None:
    def substitutes(seed: int, order: Sequence[int]) -> list[int]:
        pairs = augmented(Ramps(bad=BAD, num_pairs=100), seed)
        drawn = {view: pairs[view, 5] for view in order}
        return [drawn[view].id for view in range(40)]

    first = substitutes(0, range(40))
    assert first == substitutes(0, np.random.default_rng(0).permutation(40).tolist())
    assert first != substitutes(1, range(40))
    # Each view draws anew from all that are good: of forty draws among 96, some 33 differ.
    assert 25 < len(set(first)) <= 40
    other = augmented(Ramps(bad=BAD, num_pairs=100))
    assert first != [other[view, 7].id for view in range(40)]


def test_substitutes_are_the_same_for_any_number_of_processes_and_from_any_step() -> None:
    whole = batches(source=Ramps(bad=BAD))
    assert sum(len(seen.batch.skipped) for seen in whole) > 6
    assert_same(whole, batches(source=Ramps(bad=BAD), num_workers=2))
    assert_same(whole[3:], batches(source=Ramps(bad=BAD), start=3))
    halves = [batches(source=Ramps(bad=BAD), rank=rank, world_size=2) for rank in range(2)]
    for together, *parts in zip(whole, *halves, strict=True):
        assert [part.batch.ids.numel() for part in parts] == [2, 2]
        assert torch.equal(together.batch.ids, torch.cat([part.batch.ids for part in parts]))
        assert torch.equal(together.student.images, torch.cat([part.student.images for part in parts]))
        assert torch.equal(together.student.texts, torch.cat([part.student.texts for part in parts]))
        assert together.batch.keys == sum((part.batch.keys for part in parts), ())
        assert together.batch.skipped == sum((part.batch.skipped for part in parts), ())


def test_where_nothing_can_be_used_the_run_stops_and_names_the_last_it_tried() -> None:
    source = Ramps(bad=range(12))
    with pytest.raises(RunStopped) as caught:
        augmented(source)[0, 4]
    assert len(source.asked) == MOST_TRIES == 100
    message = ("the image has no bytes", "the image cannot be decoded", "has no .txt")[source.asked[-1] % 3]
    start = f"100 samples in a row cannot be used, the last of them ramp {source.asked[-1]}: {message}"
    assert str(caught.value).startswith(start)


class Late(Ramps):
    """Nothing can be used before the hundredth reading."""

    def read(self, index: int) -> Pair:
        if len(self.asked) == MOST_TRIES - 1:
            self.bad = ()
        return super().read(index)


def test_99_bad_ones_in_a_row_do_not_stop_the_run() -> None:
    assert len(augmented(Late(bad=range(12)))[0, 4].skipped) == 99


def test_a_corrupt_image_in_a_shard_is_named_by_shard_and_key(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.jpg", b"broken"), ("0.txt", b"a caption")])
    config = DataConfig(path=str(path))
    pairs = open_pairs(config)
    assert isinstance(pairs, PairSet)
    with pytest.raises(BadSample, match=r"a\.tar/0: the image cannot be decoded") as caught:
        Augment(config, Views([view_spec(8)]), seed=0)(pairs.read(0), 0, 0)
    assert caught.value.skip[:2] == (f"{path}/0", "undecodable image")


def test_crops_of_a_wide_image_keep_its_aspect_ratio_within_four_thirds() -> None:
    # Relative to the image: a panorama of 10:1 stays one, so that its caption still describes it.
    for seed in range(50):
        left, upper, right, lower = random_crop_box(1000, 100, 0.5, np.random.default_rng(seed))
        assert math.log(7.4) < math.log((right - left) / (lower - upper)) < math.log(13.4)


def test_decoding_gives_every_pixel_of_the_image() -> None:
    assert np.array_equal(np.asarray(decoded(encode(coordinates(), "PNG"))), np.asarray(coordinates()))


def test_a_sample_of_a_large_jpeg_shows_the_crop_that_was_drawn() -> None:
    config = DataConfig(path="x", min_crop=0.3)
    views = Views([view_spec(16), view_spec(48)])
    augment = Augment(config, views, seed=0)
    jpeg, whole = (encode(coordinates(800, 600), format) for format in ("JPEG", "PNG"))
    for view in range(10):
        taken: list[Sample] = [augment(Pair("key", data, ("a",)), view, 3) for data in (jpeg, whole)]
        for ours, theirs in zip(*(sample.pixels for sample in taken), strict=True):
            assert np.abs(ours.astype(int) - theirs).mean() < 3
