"""Image bytes → pixels: one geometric augmentation per sample, then decode and resize for each view.

AUGMENTATION_VERSION in loader.py counts up with every change that gives other pixels or captions.
"""

import io
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from clipkd.data.skips import BadSample
from clipkd.views import ViewSpec

Box = tuple[float, float, float, float]
"""left, upper, right, lower in pixels of the source."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What may be in a data set. Not all that Pillow knows: its EPS reader would start Ghostscript on the bytes."""

MAX_PIXELS = 1 << 26
"""Of an image, 67 million: a few kilobytes can claim to be gigabytes of pixels."""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_STRETCH = 4 / 3


def open_image(data: bytes, key: str) -> Image.Image:
    """An image whose size is known and whose pixels are not decoded yet.

    Raises: BadSample if the bytes are no image of these formats or claim too many pixels.
    """
    if not data:
        raise BadSample(key, "empty image", "the image has no bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of sizes, which are looked at here, and of metadata, which nobody reads
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        known = ", ".join(FORMATS)
        raise BadSample(key, "undecodable image", f"the image cannot be decoded (it is none of {known})") from None
    except Image.DecompressionBombError as error:
        raise BadSample(key, "too many pixels", f"the image is too large ({error})") from None
    except Exception as error:  # whatever a reader stumbles over, it is in these bytes
        raise undecodable(key, error) from error
    if image.width * image.height > MAX_PIXELS:
        size = f"{image.width} × {image.height}"
        raise BadSample(key, "too many pixels", f"the image has {size} pixels, more than {MAX_PIXELS}")
    return image


def decode(image: Image.Image, key: str, *, background: tuple[int, int, int]) -> Image.Image:
    """An opened image → RGB, transparent pixels showing the background colour. Raises: BadSample."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return to_rgb(image, background)
    except Exception as error:  # as above
        raise undecodable(key, error) from error


def undecodable(key: str, error: Exception) -> BadSample:
    reason = " ".join(str(error).split()) or type(error).__name__
    return BadSample(key, "undecodable image", f"the image cannot be decoded ({reason})")


def to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("32 bits per pixel, of which nobody says what is white")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
    return image.convert("RGB")


def decoding_scale(image: Image.Image, box: Box, spec: ViewSpec) -> int:
    """How many times smaller an opened JPEG may be decoded (8, 4, 2 or 1) so that the crop still has the view's pixels.

    Decoding is most of the work on an image, and what it leaves out here would be averaged away. It depends on one view
    alone: what a model sees must not change with the models beside it.
    """
    height, width = spec.size
    crop_width, crop_height = box[2] - box[0], box[3] - box[1]
    possible = (8, 4, 2) if image.format == "JPEG" else ()
    return next((s for s in possible if crop_width >= s * width and crop_height >= s * height), 1)


def reduce_scale(image: Image.Image, box: Box, scale: int) -> Box:
    """Have an opened JPEG decoded at 1/scale; returns the box in its new size."""
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    left, upper, right, lower = box  # an odd last column becomes one that is only partly there: sizes are rounded up
    return (left / scale, upper / scale, right / scale, lower / scale)


def random_crop_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """A crop of `min_area`…1 of the area, stretched by up to 4:3 against the image's own aspect ratio.

    Inception's random resized crop as CLIP trains with it, except that the ratio is relative: a wide image is not
    cut down to 4:3 first, so that its caption still describes what is left.
    """
    area = rng.uniform(min_area, 1.0)
    stretch = min(np.log(MAX_STRETCH), -np.log(area))  # a wider crop would leave the image
    aspect = np.exp(stretch * rng.uniform(-1, 1))
    crop_width, crop_height = width * np.sqrt(area * aspect), height * np.sqrt(area / aspect)
    left, upper = rng.uniform(0, 1) * (width - crop_width), rng.uniform(0, 1) * (height - crop_height)
    return (left, upper, min(left + crop_width, width), min(upper + crop_height, height))


def render(image: Image.Image, box: Box, spec: ViewSpec) -> np.ndarray:
    """The crop at the view's resolution, uint8 [h, w, 3]."""
    height, width = spec.size
    return np.asarray(image.resize((width, height), INTERPOLATIONS[spec.interpolation], box=box))
