"""Image bytes → pixels: decode, one geometric augmentation per sample, then one tensor per view."""

import io

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from clipkd.views import ViewSpec

Box = tuple[float, float, float, float]
"""left, upper, right, lower in pixels of the source."""

INTERPOLATIONS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
MAX_STRETCH = 4 / 3


def decode(data: bytes, key: str, *, background: tuple[int, int, int]) -> Image.Image:
    """Encoded image → RGB, transparent pixels showing the background colour.

    Raises: ValueError naming the sample if it cannot be decoded.
    """
    try:
        image = Image.open(io.BytesIO(data))
        if image.mode.startswith("I;16"):  # Pillow would clip 16 bits to 8 instead of scaling them
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image).convert("RGB")
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"{key}: the image cannot be decoded (no format that Pillow knows)") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{key}: the image cannot be decoded ({error})") from error


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


def normalize(pixels: list[np.ndarray], spec: ViewSpec) -> Float[Tensor, "b 3 h w"]:
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().float()
    mean, std = torch.tensor(spec.mean).view(3, 1, 1), torch.tensor(spec.std).view(3, 1, 1)
    return images.mul_(1 / (255 * std)).sub_(mean / std)
