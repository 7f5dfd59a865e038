"""The student at step 0: its architecture, the weights that each tower starts from, and what of it is frozen."""

import itertools
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from clipkd.config.objective import INITIAL_LOGIT_BIAS
from clipkd.config.train import StudentConfig, Tower, TrainConfig, split_weights
from clipkd.errors import short
from clipkd.models.create import LOADING_ERRORS, agreement, build_open_clip, find_architecture, find_weight_file
from clipkd.models.encoder import Encoder
from clipkd.models.families import FAMILIES
from clipkd.models.hugging_face import read_config
from clipkd.models.load import load_model, split_prefix
from clipkd.models.students import is_projection, tower_of
from clipkd.models.towers import copy_tower, resample
from clipkd.models.weights import read_weights

NOT_OF_A_TOWER = re.compile(
    r"(^|\.)(_?fc|classifier|head|head_dist|pooler|cls|lm_head|position_ids|logit_scale|logit_bias|num_batches_tracked)(\.|$)"
)
"""Weights of other tasks' heads, scales and counters, which may stay unused."""


def initial_student(config: TrainConfig) -> Encoder:
    """The student at step 0, seeded, in train mode, with the configured weights, logit bias and frozen parts.

    Towers that start as the teacher's are copied when the teacher is loaded.
    Raises: ValueError naming the option.
    """
    torch.manual_seed(config.seed)
    bias = INITIAL_LOGIT_BIAS if config.objective.needs_bias else None
    student = create_student(config.student, logit_bias=bias)
    for tower, source in (flagged_weights(student) | config.student.weights()).items():
        if source != "teacher":
            try:
                load_tower(student, tower, source)
            except ValueError as error:
                raise ValueError(f"student.{tower}_weights: {error}") from error
    if (
        not student.loaded
        and not config.student.weights()
        and (config.optim.fresh_lr, config.optim.layer_decay) != (1, 1)
    ):
        raise ValueError(
            "optim.fresh_lr and optim.layer_decay need a student with initial weights (student.image_weights …)"
        )
    for tower, mode in config.student.frozen().items():
        student.freeze(tower, head=mode == "head")
    return student.train()


def create_student(config: StudentConfig, *, logit_bias: float | None = None) -> Encoder:
    """A student by NAME@WEIGHTS or folder; without weights it is initialised from torch's random state.

    logit_bias: initial bias of a student whose architecture has none.
    Raises: ValueError for an unknown name or tag, or weights trained with another activation.
    """
    try:
        architecture, weights = split_weights(config.model)
        prefix, folder = split_prefix(architecture)
        if prefix or folder.is_dir():
            student = load_model(architecture)
            student.name = folder.name
            if student.model_config is None:
                raise ValueError(f"{architecture} is no run and no open_clip folder, and nothing else can be trained")
        else:
            name, model_config = find_architecture(architecture)
            student = build_open_clip(name, model_config, pretrained=weights)
        if prefix or folder.is_dir() or weights:
            student.loaded = {name for name, _ in student.model.named_parameters()}
    except ValueError as error:
        raise ValueError(f"student.model: {error}") from error
    if logit_bias is not None and student.logit_bias is None:
        # Added after the weights are loaded: open_clip would start a bias that they lack at 0, whatever the config says.
        student.model.logit_bias = nn.Parameter(torch.tensor(logit_bias))
        student.model_config = {**(student.model_config or {}), "init_logit_bias": logit_bias}
    return student


def flagged_weights(student: Encoder) -> dict[Tower, str]:
    """The weights that a student's JSON asks for with timm_model_pretrained and hf_model_pretrained, unless it has weights."""
    config, found = student.model_config or {}, dict[Tower, str]()
    if student.loaded:
        return found
    if config["vision_cfg"].get("timm_model_pretrained"):
        found["image"] = config["vision_cfg"]["timm_model_name"]
    if config["text_cfg"].get("hf_model_pretrained"):
        found["text"] = config["text_cfg"]["hf_model_name"]
    return found


@torch.no_grad()
def load_tower(student: Encoder, tower: Tower, source: str) -> None:
    """Start a tower from a file of its weights, a timm or transformers name, or a model that `load_model` takes.

    Raises: ValueError if there is no such source, or its weights are not those of this tower.
    """
    file, prepared = find_weight_file(source), dict[str, Any]()
    if file is not None:
        fill(student, tower, read_weights(Path(file)), source)
        if tower == "image" and (trunk := timm_name(student)):
            prepared = timm_preprocessing(trunk, "" if file == source else source.partition("@")[0], file)
    elif tower == "image" and not Path(source).exists() and timm.is_model(source.partition(".")[0]):
        fill(student, tower, from_library(source, lambda: timm.create_model(source, pretrained=True)), source)
        name, _, tag = source.partition(".")
        prepared = timm_preprocessing(name, tag, source)
    elif tower == "text" and is_text_encoder(source):
        from transformers import AutoModel

        fill(
            student, tower, from_library(source, lambda: AutoModel.from_pretrained(source, dtype=torch.float32)), source
        )
    else:
        copy_tower(load_model(source), student, tower, option=f"it is {source}")
    if prepared:
        student.prepare_images({**student.preprocess_config, **prepared})


def timm_name(student: Encoder) -> str:
    """Architecture of a timm image tower; empty for others."""
    return (student.model_config or {})["vision_cfg"].get("timm_model_name", "").partition(".")[0]


def timm_preprocessing(architecture: str, tag: str, file: str) -> dict[str, Any]:
    """How images were prepared for timm's weights of that tag, or for all of them. Raises: ValueError if they differ."""
    names = timm.list_pretrained(f"{architecture}.{tag or '*'}")
    configs = {n.partition(".")[2]: config.to_dict() for n in names if (config := timm.get_pretrained_cfg(n))}
    return agreement(architecture, file, configs, ("mean", "std", "interpolation"))


def is_text_encoder(source: str) -> bool:
    """Whether a folder or a name on the hub is one of a transformers model other than a CLIP."""
    if Path(source).is_dir():
        config = read_config(Path(source))
        return config is not None and config.get("model_type") not in FAMILIES
    return "@" not in source and ":" not in source and not Path(source).exists()


def from_library(source: str, load: Callable[[], Any]) -> dict[str, Tensor]:
    try:
        return load().state_dict()
    except (*LOADING_ERRORS, ValueError, ImportError) as error:
        raise ValueError(f"{source} cannot be loaded: {short(error)}") from error


def fill(student: Encoder, tower: Tower, tensors: dict[str, Tensor], source: str) -> None:
    """Load a tower's weights under names of other libraries; account for every weight on both sides in `student.notes`.

    Raises: ValueError unless all of the tower but its projection, and all weights but other heads, are used.
    """
    own = {name: tensor for name, tensor in student.model.state_dict().items() if tower_of(name) == tower}
    names, how = match_names(own, tensors)
    missing = [name for name in own if name not in names and not name.endswith("num_batches_tracked")]
    lacking = [name for name in missing if not is_projection(name)]
    if lacking:
        raise ValueError(
            f"{source} has {len(names)} of the {len(own)} weights of {student.name}'s {tower} tower and lacks {lacking[0]}; "
            "name weights of the same architecture"
        )
    unused = [name for name in tensors if name not in names.values()]
    full = any(name.startswith("visual.") for name in tensors)  # a CLIP, whose other tower is not asked for
    strange = [name for name in unused if not NOT_OF_A_TOWER.search(name) and not (full and tower_of(name) != tower)]
    if strange:
        raise ValueError(
            f"{source} has {len(strange)} weights that {student.name}'s {tower} tower lacks, such as {strange[0]}; name weights "
            "of the same architecture"
        )
    resized = []
    for name, theirs in names.items():
        try:
            found = resample(tensors[theirs], own[name].shape, name)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        resized += [f"{name} {list(tensors[theirs].shape)}"] if found is not tensors[theirs] else []
        own[name].copy_(found)
    student.loaded |= names.keys()
    parts = [f"{len(names)} weights of {source}, matched by {how}", listed("resampled", resized)]
    parts += [
        listed("left at random", [name for name in missing if is_projection(name)]),
        listed("not used", [name for name in unused if not name.endswith("num_batches_tracked")]),
    ]
    student.notes.append(f"{tower} tower: {'; '.join(filter(None, parts))}")


def listed(what: str, names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{what}: {', '.join(names[:3])}{more}" if names else ""


def match_names(own: dict[str, Tensor], tensors: dict[str, Tensor]) -> tuple[dict[str, str], str]:
    """Name in the student → name in the source, and how it was found.

    By name, once one prefix is removed and one added; if no name agrees, by order, where shapes and last parts must agree.
    """

    def renamed(removed: str, added: str) -> dict[str, str]:
        pairs = ((added + name.removeprefix(removed), name) for name in tensors if name.startswith(removed))
        return {ours: theirs for ours, theirs in pairs if ours in own}

    best = max((renamed(*pair) for pair in itertools.product(prefixes(tensors), prefixes(own))), key=len)
    if best:
        return best, "name"
    ours = [name for name in own if not is_projection(name) and not NOT_OF_A_TOWER.search(name)]
    theirs = [name for name in tensors if not NOT_OF_A_TOWER.search(name)]
    pairs = [*zip(ours, theirs, strict=False)]
    alike = all(own[a].shape == tensors[b].shape and a.rpartition(".")[2] == b.rpartition(".")[2] for a, b in pairs)
    return (dict(pairs), "order") if alike and len(ours) == len(theirs) else ({}, "name")


def prefixes(names: Iterable[str]) -> list[str]:
    """Nothing, and the first one or two parts of the names."""
    parts = [name.split(".") for name in names]
    return list(dict.fromkeys(["", *(".".join(part[:n]) + "." for part in parts for n in (1, 2) if len(part) > n)]))
