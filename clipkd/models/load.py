"""Load a model with its trained weights by name or folder: open_clip, transformers, ONNX, clipkd's runs."""

import json
from pathlib import Path

import open_clip
from open_clip.pretrained import list_pretrained_tags_by_model

from clipkd.config.train import split_weights
from clipkd.errors import require, short
from clipkd.models import run_folder
from clipkd.models.create import (
    LOADING_ERRORS,
    build_open_clip,
    find_architecture,
    find_weight_file,
    load_weights,
    wrap_open_clip,
)
from clipkd.models.encoder import Encoder
from clipkd.models.hugging_face import load_transformers
from clipkd.models.onnx import load_onnx
from clipkd.models.onnx_student import SUFFIXES, find_formats
from clipkd.models.weights import require_content

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".onnx")


def load_model(model: str, *, ema: bool = False) -> Encoder:
    """A model with its trained weights, on the CPU, in eval mode.

    model: an open_clip name with a tag or file of weights as NAME@WEIGHTS, local-dir:FOLDER, hf-hub:REPO, a transformers
    CLIPModel or SiglipModel folder, an open_clip folder (such as clipkd exports), a run folder or a checkpoint of one
    (`ema` picks its average). hf:FOLDER, onnx:FOLDER, onnx-fp16:FOLDER and onnx-int8:FOLDER pick a format of an export.
    Raises: ValueError if it is unknown, lacks weights, tokenizer or preprocessing, or would run with another activation.
    """
    prefix, folder = split_prefix(model)
    if ema and not run_folder.is_run(folder):
        raise ValueError(f"{model} is no run or checkpoint of clipkd, so it has no moving average; ask for its weights")
    if model.startswith("hf-hub:"):
        encoder = load_open_clip(model)
    elif prefix or folder.is_dir():
        encoder = load_folder(folder, prefix, ema=ema)
    else:
        encoder = load_named(model)
    return encoder.eval()


def split_prefix(model: str) -> tuple[str, Path]:
    """local-dir, hf or one of ONNX's formats ("" for none), and the folder after it."""
    prefix, _, path = model.partition(":")
    return (prefix, Path(path)) if prefix in ("local-dir", "hf", *SUFFIXES) else ("", Path(model))


def load_named(model: str) -> Encoder:
    """NAME@WEIGHTS; weights: a tag or a file."""
    model, weights = split_weights(model)
    name, model_config = find_architecture(model)
    if not weights:
        tags = list_pretrained_tags_by_model(name)
        raise ValueError(f"{model} alone has random weights; name its weights as {model}@TAG, one of {tags} or a file")
    return build_open_clip(name, model_config, pretrained=weights)


def load_folder(folder: Path, format: str, *, ema: bool) -> Encoder:
    """A folder in a format (hf or one of ONNX's), or of any kind, recognised by its files."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if format in SUFFIXES:
        return load_onnx(folder, format)
    for file in weight_files(str(folder)):
        require_content(file)
    if format == "hf":
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} has no config.json, so it is no transformers model; clipkd export … --to hf")
        return load_transformers(folder)
    if run_folder.is_run(folder):
        return load_checkpoint(run_folder.resolve(folder), ema=ema)
    if (folder / "open_clip_config.json").is_file():
        return load_open_clip(f"local-dir:{folder}")
    if (folder / "config.json").is_file():
        return load_transformers(folder)
    if formats := find_formats(folder):
        return load_onnx(folder, formats[0])
    raise ValueError(
        f"{folder} is no model that clipkd knows: no open_clip_config.json (open_clip), config.json (transformers), "
        "onnx/ (ONNX) or checkpoints (a run)"
    )


def load_checkpoint(folder: Path, *, ema: bool) -> Encoder:
    """The student of a training checkpoint, or its moving average."""
    student = run_folder.read_state(folder)["identity"]["student"]
    encoder = build_open_clip(student["name"], student["model_cfg"], preprocess_config=student["preprocess_cfg"])
    if ema and not (folder / "ema.safetensors").is_file():
        raise ValueError(f"{folder} keeps no moving average; it was trained with optim.ema_momentum 0")
    path, prefix = ("ema.safetensors", "") if ema else ("model.safetensors", "student.")
    run_folder.load_into(encoder, folder / path, prefix)
    return encoder


def load_open_clip(model: str) -> Encoder:
    """local-dir:FOLDER or hf-hub:REPO. Raises: ValueError without weights, where open_clip alone would warn and go random."""
    local, model_config = model.startswith("local-dir:"), None
    try:
        network = open_clip.create_model(model_name=model, load_weights=not local, require_pretrained=not local)
        if local:
            files = weight_files(model)
            require(bool(files), "it has no weights")
            load_weights(network, min(files, key=lambda file: (not file.name.startswith("open_clip"), file.suffix)))
            path = Path(model.removeprefix("local-dir:")) / "open_clip_config.json"
            model_config = json.loads(path.read_text(encoding="utf-8"))["model_cfg"]
        tokenizer = open_clip.get_tokenizer(model_name=model)
    except (*LOADING_ERRORS, ValueError) as error:
        raise ValueError(f"open_clip cannot load {model}: {short(error)}") from error
    return wrap_open_clip(network, tokenizer, name=model, model_config=model_config)


def weight_files(model: str) -> list[Path]:
    """The local weight files of a model that `load_model` takes; none for a hub's name or a folder that is gone."""
    name, weights = split_weights(model)
    if weights:
        return [Path(file)] if (file := find_weight_file(weights)) else []
    _, folder = split_prefix(name)
    if run_folder.is_run(folder):
        return [run_folder.resolve(folder) / "model.safetensors"]
    places = (folder, folder / "onnx")
    return sorted(file for place in places for file in place.glob("*") if file.suffix in WEIGHT_SUFFIXES)
