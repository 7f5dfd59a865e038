"""A trained student → a folder that other people's software loads, checked after writing."""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from clipkd import checkpoint, models
from clipkd.models import Encoder


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    checkpoint: str
    """A run folder (its newest checkpoint), one checkpoint of it, or an open_clip folder."""
    to: Literal["open_clip"] = "open_clip"
    """Format: a folder that open_clip loads as local-dir:FOLDER or, uploaded, hf-hub:REPO."""
    output: str
    """Folder to write; must not exist yet."""
    weights: Literal["student", "ema"] = "student"
    """The student's weights or their moving average."""


def export(config: ExportConfig) -> Path:
    """config.checkpoint → config.output, whole or not at all.

    Projections and scales that only training needs are left out. The folder is loaded back with stock open_clip before
    it gets its name: weights must be bit-equal, embeddings equal to 1e-6.

    Raises: ValueError if the output exists, or the model is not one of open_clip's.
    """
    output = Path(config.output)
    if output.exists():
        raise ValueError(f"{output} exists already; remove it or choose another --output")
    if not Path(config.checkpoint).is_dir():
        raise ValueError(f"no checkpoint {config.checkpoint}; name a run folder, a checkpoint or a model folder")
    encoder = models.load(config.checkpoint, ema=config.weights == "ema")
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_open_clip(encoder, temporary)
        verify_open_clip(encoder, temporary)
        os.replace(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return output


def write_open_clip(encoder: Encoder, folder: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors.

    Raises: ValueError if the model is not one of open_clip's.
    """
    if encoder.model_config is None:
        raise ValueError(f"{encoder.name} is not an open_clip model; clipkd exports students of open_clip architecture")
    if "hf_tokenizer_name" in encoder.model_config["text_cfg"]:
        encoder.spec.tokenize.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    config = {"model_cfg": encoder.model_config, "preprocess_cfg": encoder.preprocess_config}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    checkpoint.write_tensors(folder / "open_clip_model.safetensors", encoder.model.state_dict())


def verify_open_clip(encoder: Encoder, folder: Path) -> None:
    """Load the folder with stock open_clip: weights bit-equal, embeddings to float32 rounding, the same preprocessing."""
    loaded = models.load_open_clip(f"local-dir:{folder}").eval()
    expected, found = encoder.model.state_dict(), loaded.model.state_dict()
    equal = expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    images = torch.rand(2, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of a cat", "a drawing of two dogs"]
    with torch.inference_mode():
        ours = (encoder.encode_image(images), encoder.encode_text(encoder.spec.tokenize(prompts)))
        theirs = (loaded.encode_image(images), loaded.encode_text(loaded.spec.tokenize(prompts)))
    close = all(torch.allclose(a, b, rtol=0, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    if not (equal and close and encoder.spec.images == loaded.spec.images):
        raise RuntimeError(f"{folder}: open_clip loads another model than was exported; please report this")
