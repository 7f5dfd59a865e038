"""What of open_clip's architectures fits transformers' CLIPModel and SiglipModel, and where their weights go."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from torch import Tensor

from clipkd.models.encoder import Encoder

RESAMPLING = {"bilinear": 2, "bicubic": 3}  # PIL's numbers

Allowed = Mapping[str, tuple[Any, ...] | None]
"""Values that a field may have; None: any, since it becomes a size, is read from the tower itself, or is not looked at."""


@dataclass(frozen=True)
class Family:
    """What a transformers model can be. A field of open_clip's configs that is not named must have its default."""

    model: str
    processor: str
    image_processor: str
    image_tower: str
    vision: Allowed
    text: Allowed
    rules: tuple[tuple[str, str], ...]
    """open_clip's names → transformers'. {qkv} is cut in three, {T} transposed."""


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
SIZES = dict.fromkeys(("layers", "width", "mlp_ratio", "act_kwargs", "norm_kwargs"))
VISION = dict.fromkeys(
    (
        *("head_width", "patch_size", "image_size", "patch_dropout", "attn_pooler_queries", "attn_pooler_heads"),
        *("timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path"),
    )
)
WORDS = dict.fromkeys(
    (
        *("context_length", "vocab_size", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "heads"),
        *("pad_id", "eos_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type"),
    )
)
FAMILIES = {
    "clip": Family(
        model="CLIPModel",
        processor="CLIPProcessor",
        image_processor="CLIPImageProcessor",
        image_tower="VisionTransformer",
        vision={**SIZES, **VISION, "pos_embed_type": ("learnable", "sin_cos_2d")},
        text={**SIZES, **WORDS, "pool_type": ("argmax", "eos")},
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
        vision={**SIZES, **VISION, "timm_model_name": None, "timm_pool": ("map",), "timm_proj": ("none",)},
        text={**SIZES, **WORDS, "no_causal_mask": (True,), "pool_type": ("last",), "proj_bias": (True,)},
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
KEYS = ("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text")
SCALES = ("init_logit_scale", "init_logit_bias", "nonscalar_logit_scale")


def find_family(encoder: Encoder) -> str:
    """Which transformers model has the student's architecture and preprocessing: clip or siglip.

    Raises: ValueError that names the first option that the nearer of them lacks.
    """
    config = encoder.model_config
    if config is None:
        raise ValueError(f"{encoder.name} is not an open_clip model; clipkd exports students of open_clip architecture")
    vision, text = CLIPVisionCfg(**config["vision_cfg"]), CLIPTextCfg(**config["text_cfg"])
    name = "siglip" if vision.timm_model_name and vision.timm_pool == "map" else "clip"
    family, tower, preprocessing = FAMILIES[name], type(encoder.model.visual).__name__, encoder.preprocess_config

    if extra := sorted(set(config) - {*KEYS, *SCALES}):
        raise misfit(encoder, name, f"its config has {extra[0]}")
    for part, found, allowed in (("vision_cfg", vision, family.vision), ("text_cfg", text, family.text)):
        for field in fields(found):
            value, values = getattr(found, field.name), allowed.get(field.name, (field.default,))
            if values is not None and value not in values:
                raise misfit(encoder, name, f"{part}.{field.name} is {value!r}")
    if type(encoder.model) not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise misfit(encoder, name, f"it is a {type(encoder.model).__name__}")
    if tower != family.image_tower:
        raise misfit(encoder, name, f"its image tower is a {tower}")
    height, width = encoder.spec.size
    if height != width or not isinstance(vision.patch_size, int):
        raise misfit(
            encoder, name, f"its images are {height} × {width}, its patches {vision.patch_size}, not all square"
        )
    if text.hf_tokenizer_name and text.pool_type == "argmax":
        raise misfit(encoder, name, f"it pools at the highest id of the tokenizer {text.hf_tokenizer_name!r}")
    if text.pool_type == "eos" and text.eos_id == 2:
        raise misfit(encoder, name, "text_cfg.eos_id is 2, which transformers takes for the highest id")
    for option, values in {
        "resize_mode": ("shortest", "squash"),
        "interpolation": tuple(RESAMPLING),
        "mode": ("RGB",),
    }.items():
        if preprocessing[option] not in values:
            raise misfit(encoder, name, f"{option} is {preprocessing[option]!r}, not {' or '.join(values)}")
    return name


def misfit(encoder: Encoder, family: str, what: str) -> ValueError:
    return ValueError(
        f"{encoder.name}: {what}; transformers' {FAMILIES[family].model} cannot do that; use --to open_clip or --to onnx"
    )


def rename(encoder: Encoder, family: str) -> dict[str, Tensor]:
    """The student's weights under transformers' names and in its shapes."""
    found: dict[str, list[Tensor]] = {}
    for name, tensor in encoder.model.state_dict().items():
        matches = ((re.fullmatch(pattern, name), target) for pattern, target in FAMILIES[family].rules)
        target = next((match.expand(target) for match, target in matches if match), None)
        if target is None:
            raise misfit(encoder, family, f"its weight {name} has no place")
        weight = tensor.detach().float()
        if "position_embedding" in target:
            weight = weight.reshape(-1, weight.shape[-1])  # timm has a batch of one before it
        if "{qkv}" in target:
            for letter, part in zip("qkv", weight.chunk(3), strict=True):
                found[target.replace("{qkv}", letter)] = [part]
        else:
            found.setdefault(target.removesuffix("{T}"), []).append(weight.T if target.endswith("{T}") else weight)
    # Two of timm's weights, of queries and of keys and values, make one of transformers'.
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in found.items()}
