"""Inputs and outputs of models: resolution, normalisation and tokens of each model, batches, features."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Shaped, UInt8
from torch import Tensor


@dataclass(frozen=True)
class ViewSpec:
    """Preprocessing of one model: image → pixels, caption → tokens."""

    size: tuple[int, int]
    """Height and width, pixels."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    interpolation: str
    """bicubic or bilinear."""
    tokenize: Callable[[list[str]], Int[Tensor, "b t"]]
    tokenizer_name: str
    """Equal names mean equal tokens, which are then made once."""

    @property
    def pixels(self) -> tuple[object, ...]:
        """Equal for models with the same pixels before normalisation."""
        return self.size, self.interpolation

    @property
    def images(self) -> tuple[object, ...]:
        """Equal for models with the same normalised images."""
        return *self.pixels, self.mean, self.std

    def normalize(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (self.mean, self.std))
        return pixels.float().mul_(1 / (255 * std)).sub_(mean / std)


class View(NamedTuple):
    """One model's inputs for one batch."""

    images: Float[Tensor, "b 3 h w"]
    texts: Int[Tensor, "b t"]
    text_features: Float[Tensor, "b d"] | None = None
    """Features of a frozen text tower, if they are known already."""

    def split(self, parts: int) -> list["View"]:
        """Split into parts whose sizes differ by at most one."""
        known = [None] * parts if self.text_features is None else self.text_features.tensor_split(parts)
        return [
            View(*part)
            for part in zip(self.images.tensor_split(parts), self.texts.tensor_split(parts), known, strict=True)
        ]


class Batch(NamedTuple):
    """One process's share of a global batch; inputs that several models share are stored once."""

    pixels: tuple[UInt8[Tensor, "b 3 h w"], ...]
    """Not normalised, 8 bits per value: a quarter of the traffic of floats between processes and to a GPU."""
    texts: tuple[Int[Tensor, "b t"], ...]
    ids: Int[Tensor, "b"]
    """Equal ids mean the same sample."""
    labels: Int[Tensor, "b"]
    """Class of each sample; −1 without a label."""
    keys: tuple[str, ...]
    """Origin of each sample: shard and key, file or row."""
    skipped: tuple[tuple[str, str, str], ...] = ()
    """Key, cause and message of every sample that was replaced because it could not be used."""
    shards_opened: int = 0
    """Streamed shards opened for this batch."""
    place: tuple[int, int] | None = None
    """Of streamed shards: the reader of this batch, and the position of the first shard it has not given completely."""
    features: tuple[Shaped[Tensor, "b d"], ...] = ()
    """Stored features of frozen models, one tensor per kind, in the dtype on disk; empty if they are computed."""


class Views:
    """Views of all models: the student first, then the teachers."""

    def __init__(self, specs: Sequence[ViewSpec]) -> None:
        self.specs = specs
        self.pixel_specs = list({spec.pixels: spec for spec in specs}.values())
        """One spec per kind of pixels, the student's first."""
        self.token_specs = list({spec.tokenizer_name: spec for spec in specs}.values())
        """One spec per tokenizer."""

    def of(self, batch: Batch, device: torch.device | str) -> list[View]:
        """One view per model, on the device; models with equal inputs share their tensors."""
        pixels = [part.to(device, non_blocking=True) for part in batch.pixels]
        texts = [part.to(device, non_blocking=True) for part in batch.texts]
        tokenizers = [spec.tokenizer_name for spec in self.token_specs]
        kinds = [spec.pixels for spec in self.pixel_specs]
        images: dict[tuple[object, ...], Tensor] = {}
        views: list[View] = []
        for spec in self.specs:
            if spec.images not in images:
                images[spec.images] = spec.normalize(pixels[kinds.index(spec.pixels)])
            views.append(View(images[spec.images], texts[tokenizers.index(spec.tokenizer_name)]))
        return views


class Features(NamedTuple):
    """One model's output for one batch: unit-norm float32 features and the multiplier of their cosines."""

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None = None
    """Added to the logits of sigmoid models; it does not change a softmax."""

    def detach(self) -> "Features":
        bias = None if self.logit_bias is None else self.logit_bias.detach()
        return Features(self.image.detach(), self.text.detach(), self.logit_scale.detach(), bias)


def join(parts: Sequence[Features]) -> Features:
    """Concatenate one model's features of the parts of a batch."""
    image, text = torch.cat([part.image for part in parts]), torch.cat([part.text for part in parts])
    return parts[0]._replace(image=image, text=text)
