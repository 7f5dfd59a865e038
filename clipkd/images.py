"""Open and decode images: allowed formats, size limit, transparency, 16-bit pixels. Needs no torch."""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Formats that are read. Pillow knows more, and its EPS reader starts Ghostscript on the bytes."""

MAX_PIXELS = 1 << 26
"""Largest width × height, 67 million: a file of a few kilobytes can claim gigabytes of pixels."""

WHITE = (255, 255, 255)


class BadImage(ValueError):
    """An image that cannot be used: the cause in one of a few words, to be counted, and a message."""

    def __init__(self, cause: str, message: str) -> None:
        super().__init__(message)
        self.cause = cause


def open_image(source: bytes | str) -> Image.Image:
    """Read the header of an encoded image or of a file; `to_rgb` decodes the pixels.

    Raises: BadImage if the format is none of FORMATS, the header is damaged or it claims more than MAX_PIXELS.
    """
    if source == b"":
        raise BadImage("empty image", "the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, which is not used, and sizes, which are checked below
            image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS)
    except UnidentifiedImageError:
        raise undecodable(f"its format is none of {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels", f"the image is too large ({error})") from None
    except Exception as error:  # Pillow's readers raise anything on damaged bytes
        raise undecodable(error) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} × {image.height}"
        raise BadImage("too many pixels", f"the image has {size} pixels, more than {MAX_PIXELS}")
    return image


def to_rgb(image: Image.Image, *, background: tuple[int, int, int] = WHITE) -> Image.Image:
    """Decode an opened image to RGB. Transparent pixels show the background; 16-bit grey is scaled to 8 bits.

    Raises: BadImage if the pixels are damaged or have 32 bits.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return convert(image, background)
    except Exception as error:  # as above
        raise undecodable(error) from error


def convert(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip the values to 8 bits
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("its pixels have 32 bits and no defined white; store it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def undecodable(reason: Exception | str) -> BadImage:
    text = " ".join(str(reason).split()) or type(reason).__name__
    return BadImage("undecodable image", f"the image cannot be decoded ({text})")
