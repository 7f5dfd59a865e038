"""Student architectures of our own, as open_clip configs (configs/*.json), and what a model weighs per tower."""

import json
from pathlib import Path
from typing import Any, Literal

from torch import nn

MODEL_CONFIGS = Path(__file__).parent / "configs"


def student_names() -> list[str]:
    return sorted(path.stem for path in MODEL_CONFIGS.glob("*.json"))


def find_student_config(model: str) -> tuple[str, dict[str, Any]] | None:
    """Name and open_clip model config of one of ours or of a JSON file; None for any other name.

    Raises: ValueError if the file is missing, not JSON, or not an open_clip config.
    """
    path = Path(model) if model.endswith(".json") else MODEL_CONFIGS / f"{model}.json"
    if not path.is_file():
        if model.endswith(".json"):
            raise ValueError(f"student.model: no file {model}")
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"student.model: {path} is not JSON ({error})") from error
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - set(config):
        raise ValueError(f"student.model: {path} is not an open_clip config: it lacks {sorted(missing)}")
    return path.stem, config


def tower_of(name: str) -> Literal["image", "text"] | None:
    """Of a parameter or a module by its name in the model, projections into the joint space included; None for scales."""
    if name.endswith(("logit_scale", "logit_bias")):
        return None
    return "image" if name.split(".")[0] in ("visual", "vision_model", "visual_projection") else "text"


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the image tower and the text tower, projections into the joint space included, scales left out."""
    counts = {"image": 0, "text": 0}
    for name, parameter in model.named_parameters():
        if tower := tower_of(name):
            counts[tower] += parameter.numel()
    return counts
