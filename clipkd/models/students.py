"""clipkd's student architectures, as open_clip configs (configs/*.json), and the towers and projections of any model."""

import contextlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from clipkd.config.train import Tower

PROJECTION = re.compile(
    r"visual\.(proj$|head\.|attnpool\.c_proj\.|trunk\.(head|head\.fc|head\.proj|classifier|fc)\.(weight|bias)$)"
    r"|visual_projection\.|text_projection|text\.(text_projection|proj)\b"
)
PLACE = re.compile(
    r"visual\.(proj|head|trunk\.(head\.fc|head\.proj|head|classifier|fc))(?=\.|$)"
    r"|(visual_projection|text_projection|text\.text_projection|text\.proj)(?=\.|$)"
)
"""The projection itself, at the start of its parameters' names."""

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


def find_projection(model: nn.Module, tower: Tower) -> tuple[nn.Module, str]:
    """The module that holds a tower's projection, and the name of the projection in it. Raises: ValueError without one."""
    own = {name for name, _ in model.named_parameters() if tower_of(name) == tower and is_projection(name)}
    paths = {place[0] for name in own if (place := PLACE.match(name))}
    if len(paths) != 1:
        raise ValueError(
            f"the input of the {tower} projection is out of reach in {type(model).__name__} ({sorted(own)[:1]})"
        )
    owner, _, name = paths.pop().rpartition(".")
    return model.get_submodule(owner), name


def projection(model: nn.Module, tower: Tower) -> Callable[[Tensor], Tensor]:
    owner, name = find_projection(model, tower)
    found = getattr(owner, name)
    return (lambda features: features @ found) if isinstance(found, nn.Parameter) else found


@contextlib.contextmanager
def without_projection(model: nn.Module, tower: Tower) -> Iterator[None]:
    """Let a tower give the input of its projection. Raises: ValueError if it has none, or one inside of its pooling."""
    owner, name = find_projection(model, tower)
    kept = getattr(owner, name)
    # open_clip's text towers ask for None; the others call what they find.
    optional = isinstance(kept, nn.Parameter) or isinstance(owner, open_clip.CLIP | TextTransformer)
    setattr(owner, name, None if optional else nn.Identity())
    try:
        yield
    finally:
        setattr(owner, name, kept)


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters of the image and the text tower, with their projections, without scales."""
    counts = {"image": 0, "text": 0}
    for name, parameter in model.named_parameters():
        if tower := tower_of(name):
            counts[tower] += parameter.numel()
    return counts
