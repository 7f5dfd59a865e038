"""Encoder: unit-norm features, logit scale and preprocessing of any CLIP."""

import contextlib
import hashlib
import re
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor, nn

from clipkd.config.train import Tower
from clipkd.models.students import is_projection, projection, tower_of, without_projection
from clipkd.views import Features, View, ViewSpec

PROBES = ("A photo of a DOG, (two cats!) &amp; a naïve  “fish” in 2024; it's über-cool…", "one more word and " * 30)
"""Texts that tell tokenizers apart: case, punctuation, entities, spaces, numbers, length."""

ACTIVATIONS = ("ReLU", "ReLU6", "SiLU", "Hardswish")


class Encoder(nn.Module):
    """Any CLIP behind one interface: two towers into one space, a logit scale, and the preprocessing of its weights."""

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        preprocess_config: dict[str, Any],
        tokenize: Callable[[list[str]], Int[Tensor, "b t"]],
        tokenizer_name: str,
        dim: int,
        model_config: dict[str, Any] | None = None,
        image_tower: Callable[[Any, Tensor], Tensor] = lambda model, images: model.encode_image(images),
        text_tower: Callable[[Any, Tensor], Tensor] = lambda model, texts: model.encode_text(texts),
        short_text_tower: Callable[[Any, Tensor], Tensor] | None = None,
    ) -> None:
        """short_text_tower: a text tower for fewer tokens than the context, for towers that do not attend to padding."""
        super().__init__()
        self.model, self.name, self.dim = model, name, dim
        self.dtype, self.memory_format = torch.float32, torch.contiguous_format
        self.frozen: dict[Tower, Literal["frozen", "head"]] = {}
        """Towers that do not train, or of which the projection alone does."""
        self.loaded: set[str] = set()
        """Names of the parameters that started from weights."""
        self.notes: list[str] = []
        """Where the weights of each tower came from."""
        self.image_tower, self.text_tower, self.short_text_tower = image_tower, text_tower, short_text_tower
        self.model_config = model_config
        """open_clip's model_cfg where the model is one of open_clip's."""
        self.tokenize, self.tokenizer_name = tokenize, tokenizer_name
        self.prepare_images(preprocess_config)

    def prepare_images(self, preprocess_config: dict[str, Any]) -> None:
        """Set how images are prepared, in training and in evaluation."""
        self.preprocess_config = preprocess_config
        """open_clip's preprocess_cfg."""
        size = preprocess_config["size"]
        self.spec = ViewSpec(
            size=(size, size) if isinstance(size, int) else tuple(size),
            mean=tuple(preprocess_config["mean"]),
            std=tuple(preprocess_config["std"]),
            interpolation=preprocess_config["interpolation"],
            tokenize=self.tokenize,
            tokenizer_name=self.tokenizer_name,
        )
        transform = image_transform_v2(PreprocessCfg(**preprocess_config), is_train=False)
        self.preprocess = cast("Callable[[Any], Tensor]", transform)
        """PIL image → [3, h, w], the deterministic transform of evaluation."""

    @property
    def logit_bias(self) -> Float[Tensor, ""] | None:
        """Bias that a sigmoid model (SigLIP) adds to its logits; None for others."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else bias.float().reshape(())

    @property
    def logit_scale(self) -> Float[Tensor, ""]:
        """Multiplier of the cosines: 1 / temperature."""
        return self.model.logit_scale.exp().float().reshape(())  # type: ignore[union-attr, operator, return-value]

    def encode_image(self, images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Of normalised images, or of bytes, which are normalised here."""
        return self.encode(self.image_tower, self.prepare(images))

    def prepare(self, images: Float[Tensor, "b 3 h w"] | UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        images = images.contiguous(memory_format=self.memory_format)
        return (self.spec.normalize(images) if images.dtype == torch.uint8 else images).to(self.dtype)

    def encode_text(self, texts: Int[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        return self.encode(self.text_tower, texts)

    def encode(self, tower: Callable[[Any, Tensor], Tensor], inputs: Tensor) -> Float[Tensor, "b d"]:
        # Weights held in half precision need no autocast, which would compute float16 in bfloat16.
        own = self.dtype != torch.float32
        with torch.autocast(inputs.device.type, enabled=False) if own else contextlib.nullcontext():
            return F.normalize(tower(self.model, inputs).float(), dim=-1)

    def encode_frozen(self, tower: Tower, inputs: Tensor) -> Float[Tensor, "b w"]:
        """What a frozen tower gives, to be stored: features, or the input of a projection that trains.

        Raises: ValueError if that input is out of reach.
        """
        if self.frozen[tower] == "frozen":
            return self.encode_image(inputs) if tower == "image" else self.encode_text(inputs)
        with without_projection(self.model, tower):
            if tower == "text":
                return self.text_tower(self.model, inputs).float()
            return self.image_tower(self.model, self.prepare(inputs)).float()

    def finish(self, tower: Tower, stored: Float[Tensor, "b w"]) -> Float[Tensor, "b d"]:
        """Features from what `encode_frozen` gave."""
        if self.frozen.get(tower) != "head":
            return stored
        return F.normalize(projection(self.model, tower)(stored).float(), dim=-1)

    def encode_prompts(self, texts: Int[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        """encode_text without the padding behind the longest text, for texts much shorter than the context.

        A causal tower never attends to it, so features are equal to rounding at a fraction of the work.
        """
        if self.short_text_tower is None:
            return self.encode_text(texts)
        return self.encode_short(texts[:, : longest_text(texts)])

    def encode_short(self, texts: Int[Tensor, "b t"]) -> Float[Tensor, "b d"]:
        assert self.short_text_tower is not None
        return self.encode(self.short_text_tower, texts)

    def freeze(self, tower: Tower, *, head: bool = False) -> None:
        """Stop a tower's gradients and keep it in eval mode, also when the rest trains; with `head` its projection trains.

        Raises: ValueError if there is no projection to train.
        """
        own = [(name, parameter) for name, parameter in self.model.named_parameters() if tower_of(name) == tower]
        trained = [name for name, _ in own if head and is_projection(name)]
        if head and not trained:
            raise ValueError(
                f"student.{tower} is head, but {self.name} has no projection behind its {tower} tower; set frozen"
            )
        for name, parameter in own:
            parameter.requires_grad_(name in trained)
        self.frozen[tower] = "head" if head else "frozen"
        self.train(self.training)

    def train(self, mode: bool = True) -> "Encoder":
        super().train(mode)
        for name, part in self.model.named_children():
            if tower_of(name) in self.frozen:
                part.eval()
        return self

    def hold_in(self, dtype: torch.dtype) -> "Encoder":
        """Weights in another dtype, to save memory; for inference. Features stay float32.

        The logit scale keeps float32: bfloat16 would round exp(4.605) = 100 to 98.9.
        """
        self.dtype = dtype
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.is_floating_point() and not name.endswith(("logit_scale", "logit_bias")):
                tensor.data = tensor.data.to(dtype)
        return self

    def prefer_channels_last(self) -> "Encoder":
        """Hold the weights of a convolutional tower in the layout in which convolutions are fastest."""
        if sum(isinstance(part, nn.Conv2d) for part in self.model.modules()) > 1:  # a plain ViT has one
            self.memory_format = torch.channels_last
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def features(self, view: View) -> Features:
        image = self.encode_image(view.images) if view.frozen_image is None else self.finish("image", view.frozen_image)
        text = self.encode_text(view.texts) if view.frozen_text is None else self.finish("text", view.frozen_text)
        return Features(image, text, self.logit_scale, self.logit_bias)

    def architecture(self) -> list[Any]:
        """Everything but the weights that features depend on: modules, activations, heads, pooling, configuration."""
        config = getattr(self.model, "config", None)
        configured = dict(self.model_config or (config.to_dict() if config is not None else {}))
        configured.pop("_name_or_path", None)
        names = ("num_heads", "n_head", "pool_type", "text_pool_type", "eos_id", "text_eos_id")
        found = ((name, getattr(module, name, None)) for module in self.model.modules() for name in names)
        parts = [(name, value) for name, value in found if isinstance(value, int | str)]
        return [re.sub(r" at 0x[0-9a-f]+", "", repr(self.model)), configured, parts]

    @property
    def activation(self) -> str:
        """Classes of the activations in both towers, such as QuickGELU; empty if they are unknown."""
        names = {type(module).__name__.removesuffix("Activation") for module in self.model.modules()}
        return ", ".join(sorted(name for name in names if "GELU" in name or name in ACTIVATIONS))

    def describe_inputs(self) -> str:
        """Size, interpolation, mean, std and activation: what a number depends on besides the weights."""
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.spec.mean, self.spec.std))
        size = f"{self.spec.size[0]} × {self.spec.size[1]} px {self.spec.interpolation}"
        parts = [size, self.preprocess_config["resize_mode"], f"mean {mean}", f"std {std}", self.activation]
        return ", ".join(filter(None, parts))

    def weights_sha256(self) -> str:
        """Hash of all weights and buffers with their names."""
        return hash_tensors(hashlib.sha256(), self.model.state_dict())


def hash_tensors(digest: Any, tensors: dict[str, Tensor]) -> str:
    """Update a hash with names and content, in order of the names; return it in hexadecimal."""
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def longest_text(texts: Int[Tensor, "b t"]) -> int:
    """Number of tokens of the longest text. Padding repeats a row's last token; one is kept, as it may be the end token."""
    is_padding = (texts == texts[:, -1:]).flip(1).cumprod(dim=1).sum(dim=1)
    return int(texts.shape[1] - is_padding.min() + 1)
