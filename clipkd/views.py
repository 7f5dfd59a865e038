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

    def normalize(self, pixels: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        factor, shift = (each.to(pixels.device, non_blocking=True) for each in (1 / (255 * std), mean / std))
        return pixels.float().mul_(factor).sub_(shift)


class View(NamedTuple):
    """One model's inputs for one batch."""

    images: UInt8[Tensor, "b 3 h w"] | Float[Tensor, "b 3 h w"]
    """Pixels as bytes, a quarter of the memory of floats; the model normalises them. Floats are normalised already."""
    texts: Int[Tensor, "b t"]
    frozen_image: Float[Tensor, "b w"] | None = None
    """What a frozen image tower gives, if it is known already: features, or the input of a projection that trains."""
    frozen_text: Float[Tensor, "b w"] | None = None

    def split(self, parts: int) -> list["View"]:
        """Split into parts whose sizes differ by at most one."""
        split = ([None] * parts if rows is None else rows.tensor_split(parts) for rows in self)
        return [View(*part) for part in zip(*split, strict=True)]


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
    num_read: int = 0
    """Samples read for this batch, with the skipped ones; streamed shards are read ahead."""
    shards_opened: int = 0
    """Streamed shards opened for this batch."""
    place: tuple[int, int] | None = None
    """Of streamed shards: the reader of this batch, and the position of the first shard it has not given completely."""
    features: tuple[Shaped[Tensor, "b d"], ...] = ()
    """Stored features of frozen models, one tensor per kind, in the dtype on disk; empty if they are computed."""

    def to(self, device: torch.device | str) -> "Batch":
        """The batch with its tensors on a device; returns before pinned ones have arrived."""

        def move(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return tuple(tensor.to(device, non_blocking=True) for tensor in tensors)

        (ids, labels), pixels, texts = move((self.ids, self.labels)), move(self.pixels), move(self.texts)
        return self._replace(ids=ids, labels=labels, pixels=pixels, texts=texts, features=move(self.features))


class Views:
    """Views of all models: the student first, then the teachers."""

    def __init__(self, specs: Sequence[ViewSpec], *, images_alone: bool = False, images_stored: bool = False) -> None:
        """images_alone: without captions no text tower runs; text features have width 0. images_stored: the student needs
        no pixels, as a cache holds what its frozen image tower gives.
        """
        self.specs, self.images_alone = specs, images_alone
        self.pixel_specs = list({spec.pixels: spec for spec in specs[images_stored:]}.values())
        """One spec per kind of pixels, the student's first."""
        self.token_specs = list({spec.tokenizer_name: spec for spec in specs}.values())
        """One spec per tokenizer."""

    def of(self, batch: Batch) -> list[View]:
        """One view per model; models with equal inputs share their tensors."""
        images = dict(zip([spec.pixels for spec in self.pixel_specs], batch.pixels, strict=True))
        texts = dict(zip([spec.tokenizer_name for spec in self.token_specs], batch.texts, strict=True))
        nothing = torch.empty(len(batch.ids), 0, device=batch.ids.device)
        known = nothing if self.images_alone else None
        return [
            View(images.get(spec.pixels, nothing), texts[spec.tokenizer_name], frozen_text=known) for spec in self.specs
        ]


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
