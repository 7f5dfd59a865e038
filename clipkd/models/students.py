"""clipkd's student architectures, as open_clip configs (configs/*.json), and parameters per tower of any model."""

import json
import re
from pathlib import Path
from typing import Any

from torch import nn

from clipkd.config.train import Tower

PROJECTION = re.compile(
    r"visual\.(proj$|head\.|attnpool\.c_proj\.|trunk\.(head|head\.fc|head\.proj|classifier|fc)\.(weight|bias)$)"
    r"|visual_projection\.|text_projection|text\.(text_projection|proj)\b"
)
MODEL_CONFIGS = Path(__file__).parent / "configs"


def student_names() -> list[str]:
    return sorted(path.stem for path in MODEL_CONFIGS.glob("*.json"))


def find_student_config(model: str) -> tuple[str, dict[str, Any]] | None:
    """Name and open_clip config of one of clipkd's students or of a JSON file; None for any other name.

    Raises: ValueError if the file is missing, not JSON, or not an open_clip config.
    """
    path = Path(model) if model.endswith(".json") else MODEL_CONFIGS / f"{model}.json"
    if not path.is_file():
        if model.endswith(".json"):
            raise ValueError(f"no file {model}")
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if missing := {"embed_dim", "vision_cfg", "text_cfg"} - set(config):
        raise ValueError(f"{path} is not an open_clip config: it lacks {sorted(missing)}")
    return path.stem, config


def tower_of(name: str) -> Tower | None:
    """The tower of a parameter or module by its name, projections included; None for scales."""
    if name.endswith(("logit_scale", "logit_bias")):
        return None
    return "image" if name.split(".")[0] in ("visual", "vision_model", "visual_projection") else "text"


def is_projection(name: str) -> bool:
    """Whether a parameter belongs to the map from a tower's last features into the common space, by its name."""
    return PROJECTION.match(name) is not None


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the image and the text tower, with their projections, without scales."""
    counts = {"image": 0, "text": 0}
    for name, parameter in model.named_parameters():
        if tower := tower_of(name):
            counts[tower] += parameter.numel()
    return counts
