"""Write a student as a folder that open_clip loads as local-dir:FOLDER or, once uploaded, hf-hub:REPO."""

from pathlib import Path

from clipkd import files
from clipkd.models.encoder import Encoder


def write_open_clip(encoder: Encoder, folder: Path) -> None:
    """Write open_clip_config.json, open_clip_model.safetensors and, for a transformers tokenizer, its files."""
    if "hf_tokenizer_name" in (encoder.model_config or {})["text_cfg"]:
        encoder.spec.tokenize.tokenizer.save_pretrained(folder)  # type: ignore[attr-defined]
    config = {"model_cfg": encoder.model_config, "preprocess_cfg": encoder.preprocess_config}
    files.write_json(folder / "open_clip_config.json", config)
    files.write_tensors(folder / "open_clip_model.safetensors", encoder.model.state_dict())
