"""Bytes → decoded RGB: transparency, depth and formats, and damaged or malicious images."""

import contextlib
import functools
import io
import os
import struct
import subprocess
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from clipkd.images import MAX_ASPECT, REFUSED, WHITE, BadImage, formats, open_image, suffixes, to_rgb
from tests.data.samples import encode


def pixel(data: bytes, background: tuple[int, int, int] = WHITE) -> tuple[int, ...]:
    image = to_rgb(open_image(data), background=background)
    assert image.mode == "RGB"
    return image.getpixel((0, 0))  # type: ignore[return-value]


def refused(data: bytes) -> tuple[str, str]:
    """Cause and message."""
    with pytest.raises(BadImage) as caught:
        to_rgb(open_image(data))
    return caught.value.cause, str(caught.value)


def test_transparency_shows_the_background() -> None:
    blue = (0, 0, 255)
    assert pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 0)), "PNG"), blue) == (0, 0, 255)
    assert pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 255)), "PNG"), blue) == (200, 0, 0)
    half = pixel(encode(Image.new("RGBA", (2, 2), (200, 0, 0, 128)), "PNG"), blue)
    assert half == pytest.approx((200 * 128 / 255, 0, 255 * 127 / 255), abs=1)
    assert pixel(encode(Image.new("LA", (2, 2), (100, 0)), "PNG"), (9, 8, 7)) == (9, 8, 7)
    assert pixel(encode(Image.new("RGBA", (2, 2), (1, 2, 3, 0)), "WEBP", lossless=True), blue) == (0, 0, 255)


def test_a_transparent_palette_shows_the_background_and_four_inks_their_colour() -> None:
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    assert pixel(encode(palette, "PNG", transparency=1), (1, 2, 3)) == (1, 2, 3)
    assert pixel(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")) == pytest.approx((255, 0, 0), abs=3)


MODES = ("1", "L", "P", "RGB", "CMYK", "YCbCr", "HSV", "LAB", "LA", "PA", "RGBA", "La", "RGBa", "RGBX")
"""Modes that Pillow turns into RGB; LAB and PA only in some formats."""

DEEP = ("I", "F", "I;16", "I;16B")


@functools.cache
def painted(mode: str, size: tuple[int, int] = (40, 24)) -> Image.Image:
    """Every value of every band, transparency included."""
    width, height = size
    if mode in DEEP:
        values = np.linspace(0, 65535, width * height).reshape(height, width)
        kind = {"I": "<i4", "F": "<f4", "I;16": "<u2", "I;16B": ">u2"}[mode]
        return Image.frombytes(mode, size, values.astype(kind).tobytes())
    rng, bands = np.random.default_rng(0), len(Image.new(mode, (1, 1)).getbands())
    image = Image.new(mode, size)
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, (height, width), np.uint8) * 255).convert("1")
    pixels = rng.integers(0, 256, (height, width, bands), np.uint8)
    image.frombytes(pixels.tobytes()) if mode != "RGBX" else image.paste(painted("RGB", size))
    if mode in ("P", "PA"):
        image.putpalette(rng.integers(0, 256, 768, np.uint8).tolist())
    return image


def written(mode: str) -> dict[str, bytes]:
    """The image of a mode in every format that can hold it."""
    Image.init()
    found = {}
    for name in sorted(Image.SAVE.keys() - {"PDF", "PALM", *REFUSED}):
        with contextlib.suppress(OSError, ValueError, KeyError):
            found[name] = encode(painted(mode), name)
    return found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Pillow gives up some formats
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_in_every_format_reads_as_open_clip_reads_it(mode: str) -> None:
    seen = 0
    for name, data in written(mode).items():
        opened = Image.open(io.BytesIO(data))
        if opened.mode in DEEP:
            continue
        opened = opened.convert(f"{opened.mode[:-1]}A") if opened.mode in ("La", "RGBa") else opened
        try:
            expected = np.asarray(opened.convert("RGB"))
        except ValueError:  # Pillow cannot
            assert refused(data)[0] == "undecodable image"
            continue
        assert np.array_equal(np.asarray(to_rgb(open_image(data))), expected), name
        seen += 1
    assert seen >= {"PA": 0, "LAB": 0, "HSV": 0, "La": 0}.get(mode, 1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("mode", DEEP)
def test_sixteen_bits_are_scaled_in_every_format_and_more_have_no_white(mode: str) -> None:
    modes = set()
    for data in written(mode).values():
        opened = Image.open(io.BytesIO(data))
        modes.add(opened.mode)
        if opened.mode.startswith("I;16"):
            expected = np.asarray(opened).astype(np.uint16) // 257
            assert np.array_equal(np.asarray(to_rgb(open_image(data))), np.stack([expected] * 3, axis=2))
        elif opened.mode in ("I", "F"):
            assert "its pixels have 32 bits and no defined white" in refused(data)[1]
    assert modes >= ({"F"} if mode == "F" else {"I;16"} if mode != "I" else {"I"})


@pytest.mark.parametrize("size", [(MAX_ASPECT, 1), (3, 3 * MAX_ASPECT)])
def test_a_shape_that_a_resize_would_blow_up_is_refused(size: tuple[int, int]) -> None:
    assert to_rgb(open_image(encode(Image.new("RGB", size), "PNG"))).size == size
    longer = (size[0] + (size[0] > size[1]), size[1] + (size[1] > size[0]))
    assert refused(encode(Image.new("RGB", longer), "PNG"))[0] == "extreme shape"


def test_names_of_images_are_those_that_pillow_knows() -> None:
    assert {"JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"} <= {*formats()}
    assert {".jpg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm"} <= suffixes()
    assert not {".eps", ".pdf", ".txt", ".json", ".npy", ".mpg", ""} & suffixes()


@pytest.mark.parametrize(("format", "limit"), [("MPO", 3), ("GIF", 0), ("WEBP", 3), ("PNG", 0)])
def test_of_several_pictures_in_a_file_the_first_is_taken(format: str, limit: int) -> None:
    first, second = Image.new("RGB", (8, 6), (200, 0, 0)), Image.new("RGB", (8, 6), (0, 200, 0))
    data = encode(first, format, save_all=True, append_images=[second])
    assert pixel(data) == pytest.approx((200, 0, 0), abs=limit)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
FOREIGN = {
    "EPS": EPS,
    "EPS in DOS clothes": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(EPS)) + bytes(20) + EPS,
    "PDF": b"%PDF-1.4\n1 0 obj\n",
    "SVG": b"<svg/>",
    "HTML": b"<html>404</html>",
    "zeros": bytes(99),
    "HEIC": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
}


@pytest.mark.parametrize("data", FOREIGN.values(), ids=FOREIGN)
def test_other_formats_are_refused_and_no_process_is_started(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    formats()  # whose plugins may look for programs
    if data == EPS:
        assert Image.open(io.BytesIO(data)).format == "EPS"  # for which Pillow would run Ghostscript
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **_: started.append(arguments))
    monkeypatch.setattr(os, "system", started.append)
    cause, message = refused(data)
    assert cause == "undecodable image"
    assert message == "the image cannot be decoded (Pillow reads no such format; HEIC needs pillow-heif)"
    assert started == []


def chunk(kind: bytes, content: bytes) -> bytes:
    """Of a PNG: length, kind, content, checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(1 + width) * height) if width * height <= 100 else b""
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    "size", [(100_000, 100_000), (9_000, 9_000), (1 << 16, (1 << 10) + 1), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)]
)
def test_a_small_file_that_claims_too_many_pixels_is_refused_before_it_takes_memory(size: tuple[int, int]) -> None:
    assert pixel(png(2, 3)) == (0, 0, 0)  # a file made this way is read if its header is true
    assert open_image(png(1 << 16, 1 << 10)).size == (65536, 1024)  # as many pixels as allowed
    tracemalloc.start()
    try:
        assert refused(png(*size))[0] == "too many pixels"
        assert tracemalloc.get_traced_memory()[1] < 1e6
    finally:
        tracemalloc.stop()


@functools.cache
def originals() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    smooth = np.linspace(0, 255, 41 * 30 * 3).reshape(30, 41, 3)
    image = Image.fromarray((smooth * 0.7 + rng.uniform(0, 70, smooth.shape)).astype(np.uint8))
    large, palette, alpha = image.resize((200, 150)), image.quantize(16), image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray((smooth[..., 0] * 257).astype(np.uint16))
    return {
        "jpeg": encode(large, "JPEG"),
        "progressive": encode(large, "JPEG", progressive=True),
        "mpo": encode(image, "MPO", save_all=True, append_images=[image]),
        "png": encode(image, "PNG"),
        "png alpha": encode(alpha, "PNG"),
        "png 16 bits": encode(deep, "PNG"),
        "webp": encode(large, "WEBP"),
        "gif": encode(palette, "GIF"),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
    }


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(data)
    kind = int(rng.integers(5))
    if kind == 0:
        return bytes(changed[: rng.integers(0, len(changed))])
    if kind == 1:  # anywhere
        for place in rng.integers(0, len(changed), rng.integers(1, 30)).tolist():
            changed[place] = int(rng.integers(256))
    elif kind == 2:  # in the header
        for place in rng.integers(0, min(64, len(changed)), rng.integers(1, 6)).tolist():
            changed[place] = int(rng.choice([0, 1, 127, 128, 255]))
    elif kind == 3:  # sizes
        place, order = int(rng.integers(0, min(64, len(changed) - 4))), rng.choice(["<I", ">I"])
        changed[place : place + 4] = struct.pack(order, rng.choice([0, 1, 65535, 2**31 - 1, 2**32 - 1]))
    else:
        first, last = sorted(rng.integers(0, len(changed), 2).tolist())
        changed[first:last] = b"" if rng.integers(2) else changed[first:last] * 2
    return bytes(changed)


@pytest.mark.parametrize("name", originals())
def test_random_damage_raises_bad_images_and_nothing_else(name: str) -> None:
    data, rng = originals()[name], np.random.default_rng((5, *name.encode()))
    to_rgb(open_image(data))
    bad = []
    for _ in range(30):
        try:
            to_rgb(open_image(damaged(data, rng)))
        except BadImage as error:
            bad.append(error)
    assert len(bad) >= 3
    assert {error.cause for error in bad} <= {"empty image", "undecodable image", "too many pixels", "extreme shape"}
    assert all("\n" not in str(error) and len(str(error)) < 500 for error in bad)
