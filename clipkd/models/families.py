"""Which open_clip architectures fit transformers' CLIPModel and SiglipModel, and how their weights are renamed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from clipkd.models.encoder import Encoder

RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


@dataclass(frozen=True)
class Family:
    """A transformers model and the students that it can hold."""

    model: str
    processor: str
    image_processor: str
    image_tower: str
    vision: Mapping[str, tuple[Any, ...]]
    """Field of open_clip's CLIPVisionCfg → values that fit. Other fields show in the weights or in the parity check."""
    text: Mapping[str, tuple[Any, ...]]
    rules: tuple[tuple[str, str], ...]
    """Pattern of open_clip's name → transformers' name. {qkv}: split into q, k, v; {T}: transpose."""


def block_rules(source: str, target: str, *, timm: bool = False) -> tuple[tuple[str, str], ...]:
    norm, qkv, out, up, down = r"ln_([12])", r"attn\.in_proj_", r"attn\.out_proj\.", r"mlp\.c_fc\.", r"mlp\.c_proj\."
    if timm:
        norm, qkv, out, up, down = r"norm([12])", r"attn\.qkv\.", r"attn\.proj\.", r"mlp\.fc1\.", r"mlp\.fc2\."
    number, layer = source + r"\.(\d+)\.", target + r".encoder.layers.\1."
    return (
        (number + norm + r"\.(\w+)", layer + r"layer_norm\2.\3"),
        (number + qkv + r"(\w+)", layer + r"self_attn.{qkv}_proj.\2"),
        (number + out + r"(\w+)", layer + r"self_attn.out_proj.\2"),
        (number + up + r"(\w+)", layer + r"mlp.fc1.\2"),
        (number + down + r"(\w+)", layer + r"mlp.fc2.\2"),
    )


VIT, TEXT, TRUNK = "vision_model", r"(?:text\.)?", r"visual\.trunk\."
EMBEDDINGS = (
    (TEXT + r"token_embedding\.weight", "text_model.embeddings.token_embedding.weight"),
    (TEXT + "positional_embedding", "text_model.embeddings.position_embedding.weight"),
    (TEXT + r"ln_final\.(\w+)", r"text_model.final_layer_norm.\1"),
    *block_rules(TEXT + r"transformer\.resblocks", "text_model"),
    (r"(logit_scale|logit_bias)", r"\1"),
)
FAMILIES = {
    "clip": Family(
        model="CLIPModel",
        processor="CLIPProcessor",
        image_processor="CLIPImageProcessor",
        image_tower="VisionTransformer",
        vision={"timm_model_name": (None,), "pool_type": ("tok",), "final_ln_after_pool": (False,)},
        text={"hf_model_name": (None,), "no_causal_mask": (False,), "pool_type": ("argmax", "eos")},
        rules=(
            (r"visual\.class_embedding", f"{VIT}.embeddings.class_embedding"),
            (r"visual\.conv1\.weight", f"{VIT}.embeddings.patch_embedding.weight"),
            (r"visual\.positional_embedding", f"{VIT}.embeddings.position_embedding.weight"),
            (r"visual\.ln_pre\.(\w+)", rf"{VIT}.pre_layrnorm.\1"),
            (r"visual\.ln_post\.(\w+)", rf"{VIT}.post_layernorm.\1"),
            (r"visual\.proj", "visual_projection.weight{T}"),
            *block_rules(r"visual\.transformer\.resblocks", VIT),
            (TEXT + "text_projection", "text_projection.weight{T}"),
            *EMBEDDINGS,
        ),
    ),
    "siglip": Family(
        model="SiglipModel",
        processor="SiglipProcessor",
        image_processor="SiglipImageProcessor",
        image_tower="TimmModel",
        vision={"timm_pool": ("map",), "timm_proj": ("none",)},
        text={"hf_model_name": (None,), "no_causal_mask": (True,), "pool_type": ("last",), "proj_bias": (True,)},
        rules=(
            (TRUNK + r"patch_embed\.proj\.(\w+)", rf"{VIT}.embeddings.patch_embedding.\1"),
            (TRUNK + r"pos_embed", f"{VIT}.embeddings.position_embedding.weight"),
            (TRUNK + r"norm\.(\w+)", rf"{VIT}.post_layernorm.\1"),
            *block_rules(TRUNK + "blocks", VIT, timm=True),
            (TRUNK + r"attn_pool\.latent", f"{VIT}.head.probe"),
            (TRUNK + r"attn_pool\.q\.(\w+)", rf"{VIT}.head.attention.in_proj_\1"),
            (TRUNK + r"attn_pool\.kv\.(\w+)", rf"{VIT}.head.attention.in_proj_\1"),
            (TRUNK + r"attn_pool\.proj\.(\w+)", rf"{VIT}.head.attention.out_proj.\1"),
            (TRUNK + r"attn_pool\.norm\.(\w+)", rf"{VIT}.head.layernorm.\1"),
            (TRUNK + r"attn_pool\.mlp\.(.+)", rf"{VIT}.head.mlp.\1"),
            (TEXT + r"text_projection\.(\w+)", r"text_model.head.\1"),
            *EMBEDDINGS,
        ),
    ),
}
PREPROCESSING = {"resize_mode": ("shortest", "squash"), "interpolation": tuple(RESAMPLING), "mode": ("RGB",)}


def find_family(encoder: Encoder) -> str:
    """The transformers model that fits the student's architecture and preprocessing: clip or siglip.

    Raises: ValueError that names the first option that does not fit.
    """
    config = encoder.model_config
    assert config is not None
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    name = "siglip" if vision.timm_model_name and vision.timm_pool == "map" else "clip"
    family, kind, tower = FAMILIES[name], type(encoder.model), type(encoder.model.visual).__name__
    (height, width), patch = encoder.spec.size, vision.patch_size

    for part, found, allowed in (("vision_cfg", vision, family.vision), ("text_cfg", text, family.text)):
        for field, values in allowed.items():
            if (value := getattr(found, field)) not in values:
                raise misfit(encoder, name, f"{part}.{field} is {value!r}")
    for option, values in PREPROCESSING.items():
        if (value := encoder.preprocess_config[option]) not in values:
            raise misfit(encoder, name, f"{option} is {value!r}, not {' or '.join(values)}")
    if kind not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise misfit(encoder, name, f"it is a {kind.__name__}")
    if tower != family.image_tower:
        raise misfit(encoder, name, f"its image tower is a {tower}")
    if height != width or not isinstance(patch, int):
        raise misfit(encoder, name, f"its images are {height} × {width}, its patches {patch}, not all square")
    if text.hf_tokenizer_name and text.pool_type == "argmax":
        raise misfit(encoder, name, f"it pools at the highest id of the tokenizer {text.hf_tokenizer_name!r}")
    if text.pool_type == "eos" and text.eos_id == 2:
        raise misfit(encoder, name, "text_cfg.eos_id is 2, which transformers takes for the highest id")
    return name


def misfit(encoder: Encoder, family: str, what: str) -> ValueError:
    model = FAMILIES[family].model
    return ValueError(f"{encoder.name}: {what}; transformers' {model} cannot do that; use --to open_clip or --to onnx")


def counterpart(name: str, family: str) -> str | None:
    """transformers' name of one of open_clip's weights, with the marks of `Family.rules`."""
    matches = ((re.fullmatch(pattern, name), target) for pattern, target in FAMILIES[family].rules)
    return next((match.expand(target) for match, target in matches if match), None)


def rename(encoder: Encoder, family: str) -> dict[str, Tensor]:
    """The student's weights with transformers' names and shapes."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in encoder.model.state_dict().items():
        target = counterpart(name, family)
        if target is None:
            raise misfit(encoder, family, f"its weight {name} has no counterpart")
        weight = tensor.detach().float()
        if "position_embedding" in target:
            weight = weight.reshape(-1, weight.shape[-1])  # timm's has a batch axis of 1
        if "{qkv}" in target:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                found[target.replace("{qkv}", letter)] = [part]
        else:
            found.setdefault(target.removesuffix("{T}"), []).append(weight.T if target.endswith("{T}") else weight)
    # timm keeps the attention pool's q and kv weights separate, transformers keeps them together.
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}
