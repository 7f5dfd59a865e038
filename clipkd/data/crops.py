"""Crops: one random box per sample, and the pixels of each view in it.

A change that gives other pixels must raise AUGMENTATION_VERSION in loader.py.
"""

import numpy as np
from PIL import Image

from clipkd.views import ViewSpec

Box = tuple[float, float, float, float]
"""left, upper, right, lower in pixels of the source."""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_STRETCH = 4 / 3


def random_crop_box(width: int, height: int, min_area: float, rng: np.random.Generator) -> Box:
    """Draw a crop of `min_area`…1 of the area, stretched by up to 4:3 against the image's own aspect ratio.

    Inception's random resized crop as CLIP trains with it, except that the ratio is relative: a wide image is not
    cut down to 4:3 first, so that its caption still describes the crop.
    """
    area = rng.uniform(min_area, 1.0)
    stretch = min(np.log(MAX_STRETCH), -np.log(area))  # a wider crop would leave the image
    aspect = np.exp(stretch * rng.uniform(-1, 1))
    crop_width, crop_height = width * np.sqrt(area * aspect), height * np.sqrt(area / aspect)
    left, upper = rng.uniform(0, 1) * (width - crop_width), rng.uniform(0, 1) * (height - crop_height)
    return (left, upper, min(left + crop_width, width), min(upper + crop_height, height))


def decoding_scale(image: Image.Image, box: Box, spec: ViewSpec) -> int:
    """The largest of 8, 4, 2, 1 by which a JPEG can be reduced in decoding so that the crop has the pixels of the view.

    Decoding is most of the work on an image. The scale depends on one view alone: the pixels that a model sees must not
    change with the models beside it.
    """
    height, width = spec.size
    crop_width, crop_height = box[2] - box[0], box[3] - box[1]
    possible = (8, 4, 2) if image.format == "JPEG" else ()
    return next((s for s in possible if crop_width >= s * width and crop_height >= s * height), 1)


def reduce_scale(image: Image.Image, box: Box, scale: int) -> Box:
    """Set an opened JPEG to be decoded at 1/scale; returns the box in the reduced pixels."""
    if scale > 1:
        image.draft(None, (image.width // scale, image.height // scale))
    left, upper, right, lower = box  # the reduced size is rounded up: an odd last column is only partly covered
    return (left / scale, upper / scale, right / scale, lower / scale)


def render(image: Image.Image, box: Box, spec: ViewSpec) -> np.ndarray:
    """The crop at the view's resolution, uint8 [h, w, 3]."""
    height, width = spec.size
    return np.asarray(image.resize((width, height), INTERPOLATIONS[spec.interpolation], box=box))
