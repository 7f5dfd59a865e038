"""Open and decode images for every command: formats, bounds on their size, one rule per kind of pixels. Needs no torch."""

import contextlib
import functools
import io
import os
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

REFUSED = ("EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5")
"""Formats of Pillow that are not read: EPS starts Ghostscript on the bytes, and the others hold no pixels that it decodes."""

MAX_PIXELS = 1 << 26
"""Largest width × height, 67 million: a file of a few kilobytes can claim gigabytes of pixels."""

MAX_ASPECT = 256
"""Largest ratio of the sides: resized to 512 pixels on the shorter side, an image then has MAX_PIXELS at most."""

WHITE = (255, 255, 255)


class BadImage(ValueError):
    """An image that cannot be used: the cause in one of a few words, to be counted, and a message."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


@functools.cache
def formats() -> tuple[str, ...]:
    """Formats that are read: those of Pillow and its plugins, common ones first."""
    with contextlib.suppress(ImportError):
        from pillow_heif import register_heif_opener  # type: ignore[import-not-found]

        register_heif_opener()
    Image.init()
    known = dict.fromkeys(("JPEG", "PNG", "WEBP", *(name for name in Image.ID if name != "TGA"), "TGA"))
    return tuple(name for name in known if name in Image.OPEN and name not in REFUSED)  # a TGA has no signature


@functools.cache
def suffixes() -> frozenset[str]:
    """Endings of file names that stand for an image, such as `.jpg`."""
    known = (suffix for suffix, name in Image.registered_extensions().items() if name in formats())
    return frozenset([*known, ".heic", ".heif"])  # also without the plugin: its lack is then an error that says so


def is_image(path: str) -> bool:
    """Whether Pillow knows the ending of a file's name, or else can open the file."""
    if os.path.splitext(path)[1].lower() in suffixes():
        return True
    try:
        open_image(path).close()
    except BadImage:
        return False
    return True


def open_image(source: bytes | str) -> Image.Image:
    """Read the header of an encoded image or of a file; `to_rgb` decodes the pixels.

    Raises: BadImage if the format is none of `formats`, the header is damaged or it claims a size beyond the bounds.
    """
    if source == b"":
        raise BadImage("empty image", "the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which is not used, and sizes, which are checked below
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats())
    except UnidentifiedImageError:
        raise undecodable("Pillow reads no such format; HEIC needs pillow-heif") from None
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", f"the image is too large ({error})") from None
    except Exception as error:  # Pillow's readers raise anything on damaged bytes
        raise undecodable(error) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} × {image.height}"
        raise BadImage("too many pixels", f"the image has {size} pixels, more than {MAX_PIXELS}")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise BadImage("extreme shape", f"the image has {image.width} × {image.height} pixels, beyond 1 : {MAX_ASPECT}")
    return image


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Decode an opened image to RGB; 16-bit grey is scaled to 8 bits.

    background: colour behind transparent pixels; None ignores transparency, as open_clip and the exported formats do.
    Raises: BadImage if the pixels are damaged or have 32 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert(image, background)
    except Exception as error:  # as above
        raise undecodable(error) from error


def convert(image: Image.Image, background: tuple[int, int, int] | None) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip the values to 8 bits
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no defined white; store it with 8 or 16 bits")
    if image.mode in ("La", "RGBa"):  # multiplied by their transparency
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if background is not None and image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def undecodable(reason: Exception | str) -> BadImage:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return BadImage("undecodable image", f"the image cannot be decoded ({text})")
