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
from clipkd.models.encoder import Encoder

RESAMPLING = {2: "bilinear", 3: "bicubic"}  # PIL's numbers, used by transformers' image processors
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model", "vocab.txt")
FAMILIES = {"clip": ("CLIPModel", "CLIPImageProcessor"), "siglip": ("SiglipModel", "SiglipImageProcessor")}
"""model_type of config.json → classes of the model and its image processor."""


class TransformersTokenize:
    """A transformers tokenizer called like open_clip's; a class, so that it can be pickled for loader processes."""

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer, self.context_length = tokenizer, context_length

    def __call__(self, texts: list[str]) -> Int[Tensor, "b t"]:
        length = {"padding": "max_length", "truncation": True, "max_length": self.context_length}
        return self.tokenizer(texts, **length, return_tensors="pt")["input_ids"]


def load_transformers(folder: Path) -> Encoder:
    """A CLIPModel or SiglipModel folder with its tokenizer and image processor (save_pretrained of all three).

    Raises: ValueError if it is another model, lacks weights or tokenizer, or resizes by an unknown method.
    """
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise ValueError(f"{folder} holds a {config.get('model_type')!r} model; clipkd reads {' and '.join(FAMILIES)}")
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{folder} has no tokenizer (such as tokenizer.json); transformers would invent one")
    transformers.utils.logging.disable_progress_bar()
    try:
        kind = getattr(transformers, family[0])
        model, report = kind.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        processor = getattr(transformers, family[1]).from_pretrained(folder)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        raise ValueError(f"transformers cannot load {folder}: {short(error)}") from error
    if report["missing_keys"]:
        raise ValueError(f"{folder}: its weight file lacks {sorted(report['missing_keys'])[:3]} and others")
    if int(processor.resample) not in RESAMPLING:
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
                interpolation=RESAMPLING[int(processor.resample)],
                resize_mode="shortest" if processor.size.shortest_edge else "squash",
            )
        ),
        tokenize=tokenize,
        tokenizer_name=f"transformers {folder.resolve()}",
        dim=getattr(model.config, "projection_dim", None) or texts.projection_size,
    )
