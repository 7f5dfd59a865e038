"""What a model wants to see: its own resolution, normalisation and tokens. Shared by the data and the models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class ViewSpec:
    """How one model's inputs are made from an image and a caption."""

    size: tuple[int, int]
    """Height and width, pixels."""
    mean: tuple[float, float, float]
    """Per channel, of pixels in [0, 1]."""
    std: tuple[float, float, float]
    interpolation: str
    """bicubic or bilinear."""
    tokenize: Callable[[list[str]], Int[Tensor, "b t"]]
    tokenizer_name: str
    """Equal names mean equal tokens, so that they are made once."""

    def same_pixels(self, other: "ViewSpec") -> bool:
        return (self.size, self.mean, self.std, self.interpolation) == (
            other.size,
            other.mean,
            other.std,
            other.interpolation,
        )


class View(NamedTuple):
    """One batch as one model sees it."""

    images: Float[Tensor, "b 3 h w"]
    texts: Int[Tensor, "b t"]

    def to(self, device) -> "View":
        return View(*(tensor.to(device, non_blocking=True) for tensor in self))


class Batch(NamedTuple):
    """One process's share of a global batch."""

    student: View
    teachers: tuple[View, ...]
    ids: Int[Tensor, "b"]
    """Index of each sample in its source."""
    labels: Int[Tensor, "b"]
    """Class of each sample; −1 where it has none."""


class Features(NamedTuple):
    """What one model says about one batch: unit-norm float32 features and its multiplier of their cosines."""

    image: Float[Tensor, "b d"]
    text: Float[Tensor, "b d"]
    logit_scale: Float[Tensor, ""]
    logit_bias: Float[Tensor, ""] | None = None
    """Added to the logits of sigmoid models; a softmax does not see it."""

    def detach(self) -> "Features":
        bias = None if self.logit_bias is None else self.logit_bias.detach()
        return Features(self.image.detach(), self.text.detach(), self.logit_scale.detach(), bias)
