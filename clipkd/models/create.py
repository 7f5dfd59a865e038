"""Create open_clip models from a configuration: students, and the networks that weights are loaded into."""

import difflib
import json
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict, load_big_vision_weights
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from torch import Tensor

from clipkd import files
from clipkd.errors import short
from clipkd.models import students
from clipkd.models.encoder import PROBES, Encoder
from clipkd.models.weights import read_weights

LOADING_ERRORS = (RuntimeError, OSError, TypeError, KeyError, SafetensorError, pickle.UnpicklingError, EOFError)
"""Exceptions of torch, safetensors and open_clip for damaged weight files and for weights of another architecture."""

PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")
"""What a tag of open_clip says of the images that its weights were trained on."""


def find_architecture(model: str) -> tuple[str, dict[str, Any]]:
    """Name and open_clip config of one of clipkd's students, of a JSON file or of an open_clip model.

    Raises: ValueError with the nearest known names if there is none.
    """
    if found := students.find_student_config(model):
        return found
    name = model.replace("/", "-")
    if model_config := open_clip.get_model_config(name):
        return name, model_config
    near = difflib.get_close_matches(model, {*open_clip.list_models(), *students.student_names()}, n=3)
    hint = (
        f"did you mean {' or '.join(map(repr, near))}?"
        if near
        else "name a folder that exists, or a model of open_clip.list_models()"
    )
    raise ValueError(f"no model {model!r}, and no such folder; {hint}")


def check_weights(name: str, model_config: dict[str, Any], pretrained: str) -> dict[str, Any]:
    """How images were prepared for the weights of a tag, or of a file that was trained like all tags or like TAG@FILE.

    Raises: ValueError for an unknown tag or file, another activation, or a file when the tags differ.
    """
    tags = list_pretrained_tags_by_model(name) if open_clip.get_model_config(name) == model_config else []
    tag, at, _ = pretrained.partition("@")
    file = find_weight_file(pretrained)
    known = tags if file == pretrained else [tag] if get_pretrained_cfg(name, tag) and (file or not at) else None
    if known is None:
        raise ValueError(f"{name} has no weights {pretrained!r}, and no such file exists; tags: {tags}")
    configs = {tag: get_pretrained_cfg(name, tag) for tag in known}
    prepared = agreement(name, pretrained, configs, (*PREPROCESSING, "quick_gelu"))
    if not prepared:
        return {}
    wanted, configured = bool(prepared.pop("quick_gelu")), model_config.get("quick_gelu", False)
    other = f"{name}-quickgelu" if wanted else name.removesuffix("-quickgelu")
    if wanted != configured and other != name:
        raise ValueError(
            f"{name} with weights {pretrained!r}: they were trained with {'QuickGELU' if wanted else 'GELU'}, the config "
            f"says {'QuickGELU' if configured else 'GELU'}; use the model {other!r} (4 points of top-1 otherwise)"
        )
    return prepared


def find_weight_file(weights: str) -> str | None:
    """FILE of FILE or TAG@FILE; None for a tag."""
    return next((file for file in (weights, weights.partition("@")[2]) if Path(file).is_file()), None)


def agreement(name: str, file: str, configs: Mapping[str, Mapping[str, Any]], options: Sequence[str]) -> dict[str, Any]:
    """The options' values in the configs of all tags of an architecture; empty without tags.

    Raises: ValueError if they differ, with a tag for each value.
    """
    found: dict[str, Any] = {}
    for option in options if configs else ():
        choices: dict[Any, str] = {}
        for tag, config in configs.items():
            choices.setdefault(config.get(option), tag)
        if len(choices) > 1:
            listed = ", ".join(f"{tag} ({option} {value})" for value, tag in choices.items())
            raise ValueError(
                f"the published weights of {name} differ in {option}, so {file} does not say what it needs; name the tag that "
                f"it was trained like as TAG@{file}, TAG one of {listed}"
            )
        (found[option],) = choices
    return found


def build_open_clip(
    name: str,
    model_config: dict[str, Any],
    *,
    pretrained: str | None = None,
    preprocess_config: dict[str, Any] | None = None,
) -> Encoder:
    """An open_clip model from its config dictionary, initialised at random or from a tag or file of weights.

    The dictionary may hold a preprocess_cfg of its own, beside what open_clip puts there.
    """
    model_config = dict(model_config)
    preprocess_config = preprocess_config or model_config.pop("preprocess_cfg", None)
    prepared = {} if pretrained is None else check_weights(name, model_config, pretrained)
    file = find_weight_file(pretrained or "")
    with tempfile.TemporaryDirectory() as folder:
        # open_clip takes configs by name only, and a student's config must not replace a known one of the same name.
        registered = name if open_clip.get_model_config(name) == model_config else f"clipkd-{name}"
        if registered != name:
            path = Path(folder) / f"{registered}.json"
            path.write_text(json.dumps(model_config), encoding="utf-8")
            open_clip.add_model_config(path)
        try:
            model = open_clip.create_model(
                model_name=registered,
                pretrained=None if file else pretrained,
                force_preprocess_cfg=prepared | (preprocess_config or {}),
                pretrained_text=False,
                require_pretrained=pretrained is not None and not file,
            )
            if file:
                load_weights(model, Path(file))
            tokenizer = open_clip.get_tokenizer(model_name=registered)
        except (*LOADING_ERRORS, ValueError, AssertionError, AttributeError) as error:
            reason = short(error) or "the weights are of another architecture"
            raise ValueError(f"open_clip cannot make {name!r} with weights {pretrained!r}: {reason}") from error
    return wrap_open_clip(model, tokenizer, name=name, model_config=model_config)


def load_weights(model: Any, path: Path) -> None:
    """Load a file of weights into an open_clip model as open_clip does, positions resampled to the model's size.

    Raises: ValueError or RuntimeError if it is unusable or of another architecture.
    """
    if path.suffix in (".npz", ".npy"):
        load_big_vision_weights(model, str(path))
        return
    tensors = convert_state_dict(model, read_weights(path))
    if "positional_embedding" in tensors and not hasattr(model, "positional_embedding"):
        tensors = convert_to_custom_text_state_dict(tensors)
    for scalar in ("logit_scale", "logit_bias"):
        if scalar in tensors and getattr(model, scalar, None) is not None:  # numbers, or vectors of one
            tensors[scalar] = tensors[scalar].reshape(getattr(model, scalar).shape)
    tensors.pop("text.transformer.embeddings.position_ids", None)  # of earlier transformers
    resize_pos_embed(tensors, model)
    resize_text_pos_embed(tensors, model)
    model.load_state_dict(tensors, strict=True)


def wrap_open_clip(model: Any, tokenizer: Any, *, name: str, model_config: dict[str, Any] | None) -> Encoder:
    """Raises: ValueError if the towers do not run, or their features differ in width."""
    preprocess_config = deepcopy(open_clip.get_model_preprocess_cfg(model))
    size = preprocess_config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    try:  # a config whose parts do not fit fails here, not after the data has been opened
        with torch.no_grad():
            text = model.eval().encode_text(tokenizer(["a"]))
            image = model.encode_image(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError) as error:  # timm asserts
        raise ValueError(f"{name}: its towers do not run: {short(error)}") from error
    if not (isinstance(image, Tensor) and isinstance(text, Tensor)):
        raise ValueError(f"{name}: its towers return tokens beside features; leave output_tokens out of its config")
    dim, image_dim = text.shape[-1], image.shape[-1]
    if image_dim != dim:
        raise ValueError(f"{name}: its image features have width {image_dim}, its text features {dim}")
    return Encoder(
        model,
        name=name,
        short_text_tower=encode_short if can_be_shortened(model) else None,
        preprocess_config=preprocess_config,
        tokenize=tokenizer,
        tokenizer_name=tokenizer_name(tokenizer),
        dim=dim,
        model_config=deepcopy(model_config),
    )


def can_be_shortened(model: Any) -> bool:
    """Whether a text tower has a causal mask that encode_short can cut, and its feature is a token before the padding."""
    tower, _ = find_text_tower(model)
    pooled = getattr(tower, "text_pool_type", getattr(tower, "pool_type", None))  # CLIP's name, CustomTextCLIP's
    causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    return causal and pooled in ("argmax", "eos") and type(model) in (open_clip.CLIP, open_clip.CustomTextCLIP)


def find_text_tower(model: Any) -> tuple[Any, str]:
    """The module that holds an open_clip model's positional embedding and mask, and its prefix in parameter names."""
    return (model, "") if hasattr(model, "positional_embedding") else (getattr(model, "text", model), "text.")


def encode_short(model: Any, texts: Tensor) -> Tensor:
    """open_clip's text tower with its positional embedding and causal mask cut to the texts' length."""
    (tower, prefix), length = find_text_tower(model), texts.shape[1]
    cut = {
        f"{prefix}positional_embedding": tower.positional_embedding[:length],
        f"{prefix}attn_mask": tower.attn_mask[:length, :length],
    }
    found = torch.func.functional_call(model, cut, (), {"text": texts})
    return found["text_features"] if isinstance(found, dict) else found[1]


def tokenizer_name(tokenizer: Any) -> str:
    """Equal for open_clip's BPE tokenizers of one context length; for any other it tells the tokens of PROBES."""
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        usual = open_clip.SimpleTokenizer(context_length=tokenizer.context_length)
        if torch.equal(usual(list(PROBES)), tokenizer(list(PROBES))):  # same vocabulary, cleaning and truncation
            return f"CLIP BPE, {tokenizer.context_length} tokens"
    about = [tokenizer(list(PROBES)).tolist(), getattr(tokenizer, "vocab_size", None)]
    return f"{type(tokenizer).__name__} {files.sha256_of(about)[:8]}"
