"""One crop for all views, and JPEGs decoded no larger than the crop needs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from clipkd.data.crops import Box, decoding_scale, random_crop_box, reduce_scale, render
from clipkd.images import open_image, to_rgb
from clipkd.views import ViewSpec
from tests.data.samples import coordinates, encode, view_spec


@pytest.mark.parametrize("size", [(64, 48), (1, 1), (1000, 3), (3, 1000)])
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
        stretches.append((right - left) / width / ((lower - upper) / height))  # relative: a panorama stays one
        lefts.append(left / width)
    assert min_area * (1 - 1e-9) <= min(areas) < min_area + 0.05 < 0.98 < max(areas) <= 1 + 1e-9
    assert 3 / 4 - 1e-9 <= min(stretches) < 1 < max(stretches) <= 4 / 3 + 1e-9
    assert max(lefts) > 0.02


def test_a_crop_is_rendered_from_its_own_place() -> None:
    pixels = render(coordinates(64, 64), (32.0, 0.0, 64.0, 16.0), wide(8, 6))
    assert (pixels.shape, pixels.dtype) == ((8, 6, 3), np.uint8)
    # The mean of a linear ramp is its middle: x = 48 of 64, y = 8 of 64.
    assert pixels[..., 0].mean() == pytest.approx(47.5 / 63 * 255, abs=2)
    assert pixels[..., 1].mean() == pytest.approx(7.5 / 63 * 255, abs=2)


def wide(height: int, width: int) -> ViewSpec:
    return replace(view_spec(1), size=(height, width))


def reduced(data: bytes, box: Box, spec: ViewSpec) -> tuple[Image.Image, Box]:
    """Decoded as a training sample is, and the box in it."""
    image = open_image(data)
    box = reduce_scale(image, box, decoding_scale(image, box, spec))
    return to_rgb(image), box


@pytest.mark.parametrize(
    ("height", "width", "scale"),
    [
        *((60, 60, 8), (61, 61, 4), (120, 120, 4), (121, 121, 2), (240, 240, 2), (241, 241, 1), (2000, 2000, 1)),
        *((60, 80, 8), (60, 81, 4), (61, 80, 4), (1, 321, 1)),
    ],
)
def test_a_jpeg_is_decoded_as_small_as_a_view_allows(height: int, width: int, scale: int) -> None:
    image, box = reduced(encode(coordinates(640, 480), "JPEG"), (0.0, 0.0, 640.0, 480.0), wide(height, width))
    assert image.size == (640 // scale, 480 // scale)
    assert box == (0, 0, 640 / scale, 480 / scale)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF"])
def test_other_formats_are_decoded_at_full_size(format: str) -> None:
    picture, options = coordinates(640, 480), {"lossless": True} if format == "WEBP" else {}
    image, box = reduced(encode(picture, format, **options), (1.0, 2.0, 639.0, 477.0), view_spec(8))
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
        image = open_image(encode(Image.new("L", (width, height)), "JPEG"))
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


@pytest.mark.parametrize("size", [(1024, 768), (1025, 769), (1031, 775)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 512.0, 512.0), (512.0, 256.0, 1024.0, 768.0), (333.0, 111.0, 850.0, 641.0)])
def test_a_reduced_crop_shows_the_place_it_was_taken_from(size: tuple[int, int], box: Box) -> None:
    image, own = reduced(encode(coordinates(*size), "JPEG", quality=95), box, view_spec(64))
    assert image.size == (math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    pixels = render(image, own, view_spec(64)).astype(float)
    # Colours are linear in the place, so the crop's mean colour gives its middle: to a quarter of a reduced pixel.
    for channel in (0, 1):
        middle = 0.5 + pixels[..., channel].mean() / 255 * (size[channel] - 1)
        assert middle == pytest.approx((box[channel] + box[2 + channel]) / 2, abs=2)
