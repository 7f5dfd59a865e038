"""A student as the folder that open_clip loads as local-dir:FOLDER or, uploaded, hf-hub:REPO."""

import json
from pathlib import Path

import torch

from clipkd import files
from clipkd.models.encoder import Encoder
from clipkd.models.load import load_open_clip


def write_open_clip(encoder: Encoder, folder: Path) -> None:
    """open_clip_config.json and open_clip_model.safetensors, loaded back with stock open_clip.

    Raises: RuntimeError if open_clip loads other weights or preprocessing than were written.
    """
    if "hf_tokenizer_name" in (encoder.model_config or {})["text_cfg"]:
        encoder.spec.tokenize.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    config = {"model_cfg": encoder.model_config, "preprocess_cfg": encoder.preprocess_config}
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files.write_tensors(folder / "open_clip_model.safetensors", encoder.model.state_dict())
    check_open_clip(encoder, folder)


def check_open_clip(encoder: Encoder, folder: Path) -> None:
    """Weights bit-equal, the same preprocessing."""
    loaded = load_open_clip(f"local-dir:{folder}")
    expected, found = encoder.model.state_dict(), loaded.model.state_dict()
    equal = expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    if not (equal and encoder.spec.images == loaded.spec.images):
        raise RuntimeError(f"{folder}: open_clip loads another model than was exported; please report this")
