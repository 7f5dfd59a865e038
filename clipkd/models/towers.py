"""Copy a tower of one model into another, or raise an error that lists the differences."""

import dataclasses
import hashlib
import json
import math
from typing import Any

import open_clip
import torch
import torch.nn.functional as F
from timm.layers.patch_embed import resample_patch_embed
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from clipkd.config.train import Tower
from clipkd.models.create import PREPROCESSING
from clipkd.models.encoder import PROBES, Encoder, hash_tensors
from clipkd.models.hugging_face import as_open_clip
from clipkd.models.students import is_projection, tower_of

LAYOUTS = (open_clip.CLIP, open_clip.CustomTextCLIP)
"""Both have the same text tower; in the second its names begin with `text.`."""

Difference = tuple[str, Any, Any]
"""Name of an option or weight, the student's value and the teacher's."""


@torch.no_grad()
def copy_tower(source: Encoder, student: Encoder, tower: Tower, *, option: str) -> None:
    """Overwrite a student's tower with a model's, so that both give the same features; images are prepared alike.

    option: how messages begin, such as "student.text is teacher".
    Raises: ValueError if one is not a plain open_clip model, or towers, widths or tokens differ.
    """
    source = as_open_clip(source)
    for role, encoder in (("", source), ("student.model ", student)):
        if not isinstance(encoder.model, LAYOUTS):
            raise ValueError(
                f"{option}, but {role}{encoder.name} is a {type(encoder.model).__name__}; it takes an open_clip model (CLIP or "
                f"CustomTextCLIP): choose one, or change {option.split()[0]}"
            )
    own, theirs = tower_weights(student, tower), tower_weights(source, tower)
    if found := configured_differently(student, source, tower):
        listed = ", ".join(f"{what} {ours} ({source.name}: {value})" for what, ours, value in found)
        raise ValueError(
            f"{option}, but the student {student.name} has {listed}; give it the {'vision' if tower == 'image' else tower}_cfg, "
            f"embed_dim, quick_gelu and tokenizer of {source.name} (student.model), or change {option.split()[0]}"
        )
    for name, tensor in own.items():
        tensor.copy_(resample(theirs[name], tensor.shape, name))
    student.loaded |= {name for name, _ in student.model.named_parameters() if tower_of(name) == tower}
    student.notes.append(f"{tower} tower: the weights of {source.name}")
    if tower == "image":
        kept = {name: source.preprocess_config[name] for name in PREPROCESSING}
        student.prepare_images({**student.preprocess_config, **kept})


def resample(tensor: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Weights for another size of image, patch or text: positions of images bicubically, of texts cut or linearly, patch
    embeddings by the pseudo-inverse of the resize (FlexiViT); any others as they are.

    Raises: ValueError if the shapes differ otherwise.
    """
    length, old = shape[-2] if len(shape) > 1 else 0, tensor.shape
    if old == shape:
        return tensor
    if tensor.ndim == 4 and old[:2] == shape[:2] and name.endswith(("conv1.weight", "patch_embed.proj.weight")):
        return resample_patch_embed(tensor, list(shape[2:]))
    if name.endswith(("positional_embedding", "pos_embed")) and (old[:-2], old[-1]) == (shape[:-2], shape[-1]):
        if tower_of(name) == "text":
            cut = tensor[:length].T[None]
            return (cut if length <= old[0] else F.interpolate(cut, size=length, mode="linear"))[0].T
        prefix = old[-2] - math.isqrt(old[-2]) ** 2
        side = math.isqrt(length - prefix)
        if side**2 + prefix == length:
            flat = tensor.reshape(1, *old[-2:])
            return resample_abs_pos_embed(flat, new_size=[side, side], num_prefix_tokens=prefix).reshape(shape)
    raise ValueError(f"{name} has shape {list(old)} there and {list(shape)} in the student; the architectures differ")


def tower_weights(encoder: Encoder, tower: Tower, *, projection: bool = True) -> dict[str, Tensor]:
    """A tower's tensors, with the same names in both layouts, with or without its projection."""
    weights = encoder.model.state_dict()
    own = [name for name in weights if tower_of(name) == tower and (projection or not is_projection(name))]
    return {name.removeprefix("text."): weights[name] for name in own}


def tower_sha256(encoder: Encoder, tower: Tower) -> str:
    """Hash of all that a tower's features depend on, or of a frozen one what `encode_frozen` gives: weights, architecture,
    and tokens or pixels. Equal in both layouts.
    """
    options = tower_options(encoder, tower) if isinstance(encoder.model, LAYOUTS) else encoder.architecture()
    inputs = encoder.spec.tokenize(list(PROBES)).tolist() if tower == "text" else encoder.preprocess_config
    head = encoder.frozen.get(tower) == "head"
    about, weights = [options, inputs, *["head"] * head], tower_weights(encoder, tower, projection=not head)
    digest = hashlib.sha256(json.dumps(about, default=str, sort_keys=True).encode())
    return hash_tensors(digest, weights)


def configured_differently(student: Encoder, source: Encoder, tower: Tower) -> list[Difference]:
    ours, theirs = tower_options(student, tower), tower_options(source, tower)
    found = [(name, ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]]
    names = student.spec.tokenizer_name, source.spec.tokenizer_name
    # Only open_clip's own tokenizers share names.
    same = names[0] == names[1] or torch.equal(*(each.spec.tokenize(list(PROBES)) for each in (student, source)))
    return found if same or tower == "image" else [*found, ("tokenizer", *names)]


def tower_options(encoder: Encoder, tower: Tower) -> dict[str, Any]:
    """The configuration of a tower, defaults included; positions follow another image size."""
    # A model from the hub has no model_config; open_clip reads it from the hub's cache.
    config = encoder.model_config or open_clip.get_model_config(encoder.name)
    assert config is not None, encoder.name
    part, kind = ("vision_cfg", open_clip.CLIPVisionCfg) if tower == "image" else ("text_cfg", open_clip.CLIPTextCfg)
    options = {"embed_dim": encoder.dim, "quick_gelu": config.get("quick_gelu", False)}
    options |= {f"{part}.{name}": value for name, value in dataclasses.asdict(kind(**config[part])).items()}
    ignored = (
        "vision_cfg.image_size",
        "vision_cfg.patch_size",
        "vision_cfg.timm_model_pretrained",
        "text_cfg.hf_model_pretrained",
    )
    return {name: value for name, value in options.items() if name not in ignored}
