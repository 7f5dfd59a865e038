"""Copy a teacher's text tower into a student, or raise an error that lists the differences."""

import dataclasses
import hashlib
import json
from typing import Any

import open_clip
import torch
from torch import Tensor

from clipkd.models.encoder import PROBES, Encoder, hash_tensors
from clipkd.models.students import tower_of

LAYOUTS = (open_clip.CLIP, open_clip.CustomTextCLIP)
"""Both have the same text tower; in the second its names begin with `text.`."""

Difference = tuple[str, Any, Any]
"""Name of an option or weight, the student's value and the teacher's."""


@torch.no_grad()
def copy_text_tower(teacher: Encoder, student: Encoder) -> None:
    """Overwrite the student's text weights with the teacher's, so that both give the same text features.

    Raises: ValueError if one is not a plain open_clip model, or towers, widths or tokens differ.
    """
    for option, encoder in (("teacher.models", teacher), ("student.model", student)):
        if not isinstance(encoder.model, LAYOUTS):
            raise ValueError(
                f"student.text is teacher, but {option} {encoder.name} is a {type(encoder.model).__name__}; it takes an "
                "open_clip model (CLIP or CustomTextCLIP): choose one, or set student.text to trained"
            )
    own, theirs = text_weights(student), text_weights(teacher)
    if found := configured_differently(student, teacher):
        listed = ", ".join(f"{what} {ours} (teacher {value})" for what, ours, value in found)
        raise ValueError(
            f"student.text is teacher, but the student {student.name} has {listed}; give it the text_cfg, embed_dim, "
            f"quick_gelu and tokenizer of {teacher.name} (student.model), or set student.text to trained"
        )
    for name, tensor in own.items():
        tensor.copy_(theirs[name])


def text_weights(encoder: Encoder) -> dict[str, Tensor]:
    """The text tower's tensors, with the same names in both layouts."""
    weights = encoder.model.state_dict()
    return {name.removeprefix("text."): tensor for name, tensor in weights.items() if tower_of(name) == "text"}


def text_sha256(encoder: Encoder) -> str:
    """Hash of all that text features depend on: weights, architecture and tokens. Equal in both layouts."""
    plain = isinstance(encoder.model, LAYOUTS)
    tokens = encoder.spec.tokenize(list(PROBES)).tolist()
    about = [text_options(encoder) if plain else encoder.architecture(), tokens]
    digest = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode())
    return hash_tensors(digest, text_weights(encoder))


def configured_differently(student: Encoder, teacher: Encoder) -> list[Difference]:
    ours, theirs = text_options(student), text_options(teacher)
    found = [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]
    names = student.spec.tokenizer_name, teacher.spec.tokenizer_name
    # Only open_clip's own tokenizers share names.
    if names[0] != names[1] and not torch.equal(*(each.spec.tokenize(list(PROBES)) for each in (student, teacher))):
        found.append(("tokenizer", *names))
    return found


def text_options(encoder: Encoder) -> dict[str, Any]:
    """The configuration of a text tower, defaults included."""
    # A model from the hub has no model_config; open_clip reads it from the hub's cache.
    config = encoder.model_config or open_clip.get_model_config(encoder.name)
    assert config is not None, encoder.name
    tower = dataclasses.asdict(open_clip.CLIPTextCfg(**config["text_cfg"]))
    options = {"embed_dim": encoder.dim, "quick_gelu": config.get("quick_gelu", False)}
    return options | {f"text_cfg.{name}": value for name, value in tower.items()}
