"""Small students with random weights, images and captions that the export tests share."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clipkd.models.create import build_open_clip, find_architecture
from clipkd.models.encoder import Encoder
from tests.models.siglip_tower import vit_clipkd_test_siglip

CAPTIONS = [
    "a photo of a DOG, isn't it?",
    "",
    "  two\tcaf\u00e9s &amp; “tea” …\n",
    "one more word and " * 30,
    "x <|endoftext|> y ＬＯＵＤ ﬁne 👩‍👩‍👧 ΟΔΥΣΣΕΥΣ",
    "日本語 🐈 3½ " + "w" * 70,
]


def perturbed(encoder: Encoder) -> Encoder:
    """Move every parameter off its initial value, so that biases are not 0 and scales not 1."""
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return encoder.eval()


def clip_student(*, preprocess: dict[str, Any] | None = None, **changes: Any) -> Encoder:
    """The demo's student with other options."""
    config = deepcopy(find_architecture("tiny-student")[1])
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    torch.manual_seed(0)
    student = build_open_clip("student", config)
    if preprocess:
        student = build_open_clip("student", config, preprocess_config=student.preprocess_config | preprocess)
    return perturbed(student)


def siglip_student(tokenizer: Path, *, preprocess: dict[str, Any] | None = None, **text: Any) -> Encoder:
    size = {"size": (40, 40), "mode": "RGB", "resize_mode": "squash", "interpolation": "bilinear", "fill_color": 0}
    vision = {"image_size": 40, "timm_model_name": vit_clipkd_test_siglip.__name__, "timm_pool": "map"}
    tower = {"width": 32, "heads": 2, "layers": 2, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    words = {"hf_tokenizer_name": str(tokenizer), "tokenizer_kwargs": {"clean": "canonicalize"}, "vocab_size": 100}
    config = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": vision | {"timm_proj": "none"},
        "text_cfg": {"context_length": 10, "norm_kwargs": {"eps": 1e-6}, **tower, **words, **text},
    }
    torch.manual_seed(0)
    values = {"mean": (0.5, 0.4, 0.5), "std": (0.5, 0.5, 0.3), **size, **(preprocess or {})}
    return perturbed(build_open_clip("sigmoid", config, preprocess_config=values))


def odd_images() -> list[Image.Image]:
    """Landscape and portrait, with (resized − crop) of every remainder of 4, and every mode that images come in."""
    draw = np.random.default_rng(0)

    def blobs(height: int, width: int) -> Image.Image:
        small = Image.fromarray(draw.integers(0, 256, (5, 4, 3)).astype(np.uint8))
        return small.resize((width, height), Image.Resampling.BICUBIC)

    sizes = [(32, 32), (32, 33), (32, 34), (32, 35), (35, 32), (45, 45), (101, 39), (33, 95), (239, 320), (9, 11)]
    images = [blobs(*size) for size in sizes]
    images += [blobs(35, 67).convert(mode) for mode in ("L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr")]
    images[13].putalpha(blobs(35, 67).convert("L"))
    return [*images, Image.fromarray(draw.integers(0, 65536, (40, 50)).astype(np.uint16))]


def own_pixels(encoder: Encoder) -> Tensor:
    """[n, 3, h, w]: the odd images by the student's preprocessing."""
    return torch.stack([encoder.preprocess(image.convert("RGB")) for image in odd_images()])


def furthest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()
