"""Load transformers folders (CLIPModel, SiglipModel) with their tokenizer and image processor."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from torch import Tensor

from clipkd.errors import short
from clipkd.models.create import build_open_clip
from clipkd.models.encoder import Encoder
from clipkd.models.families import FAMILIES, RESAMPLING, counterpart

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
PLAIN_TEXTS = ["a photo of a cat", "two dogs, running", ""]
"""Texts in which transformers and open_clip, which clean others differently, find the same tokens of CLIP's."""


class TransformersTokenize:
    """A transformers tokenizer called like open_clip's; a class, so that it can be pickled for loader processes."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Int[Tensor, "b t"]:
        length = {"padding": "max_length", "truncation": True, "max_length": self.context_length}
        return self.tokenizer(texts, **length, return_tensors="pt")["input_ids"]


def read_config(folder: Path) -> dict[str, Any] | None:
    """config.json of a transformers folder; None without one."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def load_transformers(folder: Path) -> Encoder:
    """A CLIPModel or SiglipModel folder with its tokenizer and image processor (save_pretrained of all three).

    Raises: ValueError if it is another model, lacks weights or tokenizer, or resizes by an unknown method.
    """
    import transformers

    config = read_config(folder) or {}
    family = FAMILIES.get(str(config.get("model_type")))
    if family is None:
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model; clipkd reads {' and '.join(FAMILIES)}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer (such as tokenizer.json); transformers would invent one")
    transformers.utils.logging.disable_progress_bar()
    try:
        kind = getattr(transformers, family.model)
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        processor = getattr(transformers, family.image_processor).from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"transformers cannot load {folder}: {short(error)}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder}: its weight file lacks {sorted(report['missing_keys'])[:3]} and others")
    interpolation = next((name for name, number in RESAMPLING.items() if number == int(processor.resample)), None)
    if interpolation is None:
        raise ValueError(f"{folder}: its image processor resizes by method {processor.resample}; known: {RESAMPLING}")
    for option in ("do_resize", "do_rescale", "do_normalize"):
        if not getattr(processor, option, True):
            raise ValueError(f"{folder}: its image processor has {option} false; clipkd always does it")
    texts = model.config.text_config
    tokenize = TransformersTokenize(tokenizer, texts.max_position_embeddings)
    try:
        tokenize(["a"])
    except (ValueError, KeyError) as error:  # a tokenizer without a padding token
        raise ValueError(f"{folder}: its tokenizer cannot be used: {short(error)}") from error
    if len(tokenizer) > texts.vocab_size:
        raise ValueError(f"{folder}: its tokenizer knows {len(tokenizer)} tokens, its text tower {texts.vocab_size}")

    def text_tower(clip: Any, texts: Tensor) -> Tensor:
        # No attention mask. CLIP: attention is causal, and the pooled token stands before the padding. SigLIP was
        # trained on padded texts without one.
        return clip.get_text_features(input_ids=texts).pooler_output

    return Encoder(
        model,
        name=str(folder),
        image_tower=lambda clip, images: clip.get_image_features(pixel_values=images).pooler_output,
        text_tower=text_tower,
        short_text_tower=text_tower if config["model_type"] == "clip" else None,  # SigLIP attends to its padding
        preprocess_config=asdict(
            PreprocessCfg(
                size=model.config.vision_config.image_size,
                mean=tuple(processor.image_mean),
                std=tuple(processor.image_std),
                interpolation=interpolation,
                resize_mode="shortest" if processor.size.shortest_edge else "squash",
            )
        ),
        tokenize=tokenize,
        tokenizer_name=f"transformers {folder.resolve()}",
        dim=getattr(model.config, "projection_dim", None) or texts.projection_size,
    )


def as_open_clip(encoder: Encoder) -> Encoder:
    """A transformers CLIPModel as an open_clip model of equal features; any other model unchanged.

    Raises: ValueError if it has an activation, a tokenizer or an epsilon that open_clip's CLIP lacks.
    """
    if type(encoder.model).__name__ != "CLIPModel":
        return encoder
    clip: Any = encoder.model
    vision, text = clip.config.vision_config, clip.config.text_config
    if vision.hidden_act != text.hidden_act or text.hidden_act not in ("gelu", "quick_gelu"):
        raise ValueError(
            f"{encoder.name}: its activations are {vision.hidden_act} and {text.hidden_act}; open_clip has one, GELU"
        )
    sizes = [
        {
            "layers": tower.num_hidden_layers,
            "width": tower.hidden_size,
            "mlp_ratio": tower.intermediate_size / tower.hidden_size,
        }
        for tower in (vision, text)
    ]
    head = {"head_width": vision.hidden_size // vision.num_attention_heads}
    pixels = {"image_size": vision.image_size, "patch_size": vision.patch_size}
    tokens = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size}
    config = {
        "embed_dim": clip.config.projection_dim,
        "quick_gelu": text.hidden_act == "quick_gelu",
        "vision_cfg": {**sizes[0], **head, **pixels},
        "text_cfg": {**sizes[1], "heads": text.num_attention_heads, **tokens},
    }
    found = build_open_clip(Path(encoder.name).name, config, preprocess_config=encoder.preprocess_config).eval()
    theirs, weights = clip.state_dict(), dict[str, Tensor]()
    for name in found.model.state_dict():
        target = counterpart(name, "clip") or name
        letters = "qkv" if "{qkv}" in target else "q"
        parts = [theirs[target.removesuffix("{T}").replace("{qkv}", letter)] for letter in letters]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        weights[name] = tensor.T if target.endswith("{T}") else tensor
    found.model.load_state_dict(weights)
    with torch.no_grad():
        theirs, ours = (model.encode_text(model.spec.tokenize(PLAIN_TEXTS)) for model in (encoder, found))
    if not torch.allclose(theirs, ours, atol=1e-4):
        raise ValueError(
            f"{encoder.name}: its tokenizer is not CLIP's, or its texts end in another token; open_clip's CLIP cannot hold it"
        )
    return found
