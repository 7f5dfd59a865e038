"""Write a student as a transformers model (CLIPModel or SiglipModel) with tokenizer and image processor."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.model import CLIPTextCfg
from tokenizers import Tokenizer

from clipkd import files
from clipkd.errors import short
from clipkd.export.tokenizer import END, START, convert_tokenizer, sees_padding
from clipkd.models.create import find_text_tower
from clipkd.models.encoder import Encoder
from clipkd.models.families import FAMILIES, RESAMPLING, find_family, misfit, rename

EXACT = Path(__file__).with_name("image_processing_exact.py")
"""Copied into the folder: an image processor that gives open_clip's pixels; users must trust its code."""

ACTIVATIONS = {"QuickGELU": "quick_gelu", "GELU": "gelu", "GELUTanh": "gelu_pytorch_tanh"}


def write_hugging_face(encoder: Encoder, folder: Path) -> None:
    """Write config.json, model.safetensors, tokenizer.json and the files that AutoModel, AutoTokenizer and AutoProcessor read.

    encoder: in eval mode. CLIPModel has no logit bias: a sigmoid student's is kept in config.json, where softmax ignores it.
    The default image processor differs by grey levels and, at some sizes, by a pixel of crop. The one in exact/ gives
    open_clip's pixels; it has its own folder because transformers asks for trust wherever it finds code.

    Raises: ValueError if no transformers model or tokenizer.json can hold the student.
    """
    family = find_family(encoder)
    tokenizer = convert_tokenizer(encoder)
    settings = tokenizer_settings(encoder, tokenizer)
    model = build(encoder, family, special_ids(encoder, tokenizer, settings))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    files.write_tensors(folder / "model.safetensors", model.state_dict(), metadata={"format": "pt"})
    exact, images = folder / "exact", image_settings(encoder, family)
    exact.mkdir(exist_ok=True)
    shutil.copyfile(EXACT, exact / EXACT.name)
    own = {"auto_map": {"AutoImageProcessor": f"{EXACT.stem}.ExactImageProcessor"}}
    for place, image_processor in ((folder, images), (exact, images | own)):
        tokenizer.save(str(place / "tokenizer.json"))
        files.write_json(place / "tokenizer_config.json", settings)
        files.write_json(place / "preprocessor_config.json", image_processor)
        processor = {"image_processor": image_processor, "processor_class": FAMILIES[family].processor}
        files.write_json(place / "processor_config.json", processor)


def tokenizer_settings(encoder: Encoder, tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer_config.json, with the class that uses tokenizer.json unchanged; CLIPTokenizer would clean texts differently."""
    tokenize: Any = encoder.spec.tokenize
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": tokenize.context_length,
        "clean_up_tokenization_spaces": False,
        # SigLIP was trained on padding without a mask; transformers would add one.
        "model_input_names": ["input_ids"] if sees_padding(encoder) else ["input_ids", "attention_mask"],
    }
    if isinstance(tokenize, open_clip.SimpleTokenizer):
        # Special tokens spelled out in a caption were ordinary text in training.
        pad = (tokenizer.padding or {})["pad_token"]
        return settings | {"bos_token": START, "eos_token": END, "pad_token": pad, "split_special_tokens": True}
    outer = tokenize.tokenizer
    special = {name: getattr(outer, name, None) for name in outer.SPECIAL_TOKENS_ATTRIBUTES}
    sides = {name: getattr(outer, name) for name in ("padding_side", "truncation_side", "split_special_tokens")}
    return settings | sides | {name: str(token) for name, token in special.items() if isinstance(token, str)}


def special_ids(encoder: Encoder, tokenizer: Tokenizer, settings: Mapping[str, Any]) -> dict[str, int | None]:
    """Start, end and padding ids for CLIPTextConfig and SiglipTextConfig; CLIPModel pools at the first end token."""
    names = {f"{name}_token_id": settings.get(f"{name}_token") for name in ("bos", "eos", "pad")}
    ids = {name: None if token is None else tokenizer.token_to_id(token) for name, token in names.items()}
    text = CLIPTextCfg(**(encoder.model_config or {})["text_cfg"])
    return ids | ({"eos_token_id": text.eos_id} if text.pool_type == "eos" else {})


def image_settings(encoder: Encoder, family: str) -> dict[str, Any]:
    """preprocessor_config.json."""
    height, width = encoder.spec.size
    area = {"height": height, "width": width}
    if encoder.preprocess_config["resize_mode"] == "shortest":
        kind, resize = FAMILIES["clip"], {"size": {"shortest_edge": height}, "crop_size": area, "do_center_crop": True}
    else:
        kind, resize = FAMILIES[family], {"size": area, "do_center_crop": False}
    return {
        "image_processor_type": kind.image_processor,
        **resize,
        **dict.fromkeys(("do_convert_rgb", "do_resize", "do_rescale", "do_normalize"), True),
        "resample": RESAMPLING[encoder.spec.interpolation],
        "rescale_factor": 1 / 255,
        "image_mean": list(encoder.spec.mean),
        "image_std": list(encoder.spec.std),
    }


def build(encoder: Encoder, family: str, tokens: Mapping[str, int | None]) -> Any:
    """The transformers model with the student's weights.

    Raises: ValueError if a weight of either side has no counterpart.
    """
    import transformers

    model: Any = encoder.model
    texts, _ = find_text_tower(model)
    text = {
        **tower_settings(encoder, family, texts.transformer.resblocks, texts.ln_final),
        **tokens,
        "vocab_size": texts.token_embedding.num_embeddings,
        "max_position_embeddings": texts.positional_embedding.shape[0],
    }
    dims: dict[str, Any] = {}
    if family == "clip":
        visual, patches = model.visual, model.visual.conv1
        vision = tower_settings(encoder, family, visual.transformer.resblocks, visual.ln_post)
        dims["projection_dim"] = vision["projection_dim"] = text["projection_dim"] = encoder.dim
    else:
        trunk, patches = model.visual.trunk, model.visual.trunk.patch_embed.proj
        vision = tower_settings(encoder, family, trunk.blocks, trunk.norm)
        text["projection_size"] = encoder.dim
    vision |= {"image_size": encoder.spec.size[0], "patch_size": patches.kernel_size[0]}

    weights = rename(encoder, family)
    if family == "siglip":
        weights.setdefault("logit_bias", torch.zeros(1))  # trained with a softmax, which ignores it
    elif "logit_bias" in weights:
        dims["logit_bias"] = weights.pop("logit_bias").item()
    kind = getattr(transformers, FAMILIES[family].model)
    found = kind(kind.config_class(text_config=text, vision_config=vision, **dims)).eval()
    for name in weights.keys() & {"logit_scale", "logit_bias"}:  # scalar or [1], depending on the side
        weights[name] = weights[name].reshape(getattr(found, name).shape)
    try:
        found.load_state_dict(weights)
    except RuntimeError as error:
        raise misfit(encoder, family, f"its weights do not fit ({short(error)})") from error
    return found


def tower_settings(encoder: Encoder, family: str, blocks: Any, norm: Any) -> dict[str, Any]:
    """Fields of a tower's transformers config, read from its modules: defaults of configs change, modules do not."""
    mlp = blocks[0].mlp
    up, activation = (mlp.c_fc, mlp.gelu) if hasattr(mlp, "c_fc") else (mlp.fc1, mlp.act)
    kind = ACTIVATIONS.get(type(activation).__name__)
    if getattr(activation, "approximate", "none") == "tanh":
        kind = "gelu_pytorch_tanh"
    if kind is None:
        raise misfit(encoder, family, f"its activation is {activation}")
    return {
        "hidden_size": norm.normalized_shape[0],
        "intermediate_size": up.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "hidden_act": kind,
        "layer_norm_eps": norm.eps,
    }
