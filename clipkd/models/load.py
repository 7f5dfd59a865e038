"""The only door to open_clip and transformers: a name or a folder → Encoder, with its own weights and preprocessing."""

import difflib
import json
import pickle
import tempfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from safetensors import SafetensorError
from torch import Tensor

from clipkd.config.train import StudentConfig, TrainConfig
from clipkd.models import run_folder, students
from clipkd.models.encoder import Encoder
from clipkd.models.hugging_face import load_transformers
from clipkd.models.onnx import load_onnx
from clipkd.models.onnx_student import SUFFIXES, find_formats

PROBES = ("A photo of a DOG, (two cats!) &amp; a naïve  “fish” in 2024; it's über-cool…", "one more word and " * 30)
"""Texts on which tokenizers differ that differ at all: case, marks, entities, spaces, numbers, length."""

UNLOADABLE = (RuntimeError, OSError, TypeError, KeyError, SafetensorError, pickle.UnpicklingError, EOFError)
"""What libraries raise for damaged weight files, and for weights of another architecture."""


def initial_student(config: TrainConfig) -> Encoder:
    """The student at step 0, seeded, in train mode, with the logit bias and the frozen text tower that the options ask for."""
    torch.manual_seed(config.seed)
    bias = config.objective.logit_scale.bias_init if config.objective.needs_bias else None
    student = create_student(config.student, logit_bias=bias).train()
    if config.student.text != "trained":
        student.freeze_text()
    return student


def create_student(config: StudentConfig, *, logit_bias: float | None = None) -> Encoder:
    """A student by name, with the weights that NAME@WEIGHTS names or freshly initialised from torch's random state.

    logit_bias: the initial bias that a student gets if its architecture has none.
    Raises: ValueError for an unknown name or tag, or weights that want another activation.
    """
    architecture, _, weights = config.model.partition("@")
    name, model_config = find_architecture(architecture, option="student.model: ")
    student = build_open_clip(name, model_config, pretrained=weights or None, option="student.model")
    if logit_bias is not None and student.logit_bias is None:
        # Added after the weights are loaded: open_clip would start a bias that they lack at 0, whatever the config says.
        student.model.logit_bias = torch.nn.Parameter(torch.tensor(logit_bias))
        student.model_config = {**model_config, "init_logit_bias": logit_bias}
    return student


def load_model(model: str, *, pretrained: str | None = None, ema: bool = False) -> Encoder:
    """A model with its trained weights, on the CPU, in eval mode.

    model: an open_clip name with `pretrained` (tag or file), or both as NAME@PRETRAINED, local-dir:FOLDER, hf-hub:REPO,
    a transformers CLIPModel or SiglipModel folder, an open_clip folder (such as clipkd exports), a run folder or a
    checkpoint of one (`ema` picks its average). Of a folder with several formats, hf:FOLDER, onnx:FOLDER, onnx-fp16:FOLDER
    and onnx-int8:FOLDER pick one.
    Raises: ValueError if it is unknown, lacks weights, tokenizer or preprocessing, or would run with another activation.
    """
    folder = Path(model.removeprefix("local-dir:"))
    if ema and not (folder.is_dir() and run_folder.is_run(folder)):
        raise ValueError(f"{model} is no run or checkpoint of clipkd, so it has no moving average; ask for its weights")
    format, _, exported = model.partition(":")
    if format.startswith("onnx") and format not in SUFFIXES and exported:
        raise ValueError(f"{model}: there is no format {format!r}; choose from hf, {', '.join(SUFFIXES)}")
    if model.startswith("local-dir:") or folder.is_dir() or format in ("hf", *SUFFIXES):
        if pretrained:
            raise ValueError(f"{model} carries its own weights; leave pretrained={pretrained!r} out")
        encoder = load_export(Path(exported), format) if format in ("hf", *SUFFIXES) else load_folder(folder, ema=ema)
    elif model.startswith("hf-hub:"):
        encoder = load_open_clip(model)
    else:
        model, _, weights = model.partition("@")
        if weights and pretrained:
            raise ValueError(f"{model} is given the weights {weights!r} and {pretrained!r}; name them once")
        pretrained = pretrained or weights or None
        name, model_config = find_architecture(model)
        if pretrained is None:
            tags = list_pretrained_tags_by_model(name)
            raise ValueError(f"{model} alone has random weights; name its weights as well, one of {tags} or a file")
        encoder = build_open_clip(name, model_config, pretrained=pretrained, option="pretrained")
    return encoder.eval()


def load_folder(folder: Path, *, ema: bool) -> Encoder:
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
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


def load_export(folder: Path, format: str) -> Encoder:
    """One format of an exported folder. Raises: ValueError if it has none such."""
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}")
    if format != "hf":
        return load_onnx(folder, format)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no transformers model; clipkd export … --to hf")
    return load_transformers(folder)


def load_checkpoint(folder: Path, *, ema: bool) -> Encoder:
    """The student of a training checkpoint, or its moving average."""
    state = run_folder.read_state(folder)
    student = state["identity"]["student"]
    encoder = build_open_clip(student["name"], student["model_cfg"], preprocess_config=student["preprocess_cfg"])
    if ema and not (folder / "ema.safetensors").is_file():
        raise ValueError(f"{folder} keeps no moving average; it was trained with optim.ema_momentum 0")
    path, prefix = ("ema.safetensors", "") if ema else ("model.safetensors", "student.")
    run_folder.load_into(encoder, folder / path, prefix)
    return encoder


def build_open_clip(
    name: str,
    model_config: dict[str, Any],
    *,
    pretrained: str | None = None,
    option: str = "",
    preprocess_config: dict[str, Any] | None = None,
) -> Encoder:
    """An open_clip model from its config dictionary, initialised at random or from a tag or file of weights."""
    if pretrained is not None:
        check_weights(name, model_config, pretrained, option)
    with tempfile.TemporaryDirectory() as folder:
        # open_clip takes configs by name only, and an own config must not replace a known one of the same name.
        registered = name if open_clip.get_model_config(name) == model_config else f"clipkd-{name}"
        if registered != name:
            path = Path(folder) / f"{registered}.json"
            path.write_text(json.dumps(model_config), encoding="utf-8")
            open_clip.add_model_config(path)
        try:
            model = open_clip.create_model(
                model_name=registered,
                pretrained=pretrained,
                force_preprocess_cfg=preprocess_config,
                pretrained_text=False,
                require_pretrained=pretrained is not None,
            )
            tokenizer = open_clip.get_tokenizer(model_name=registered)
        except (*UNLOADABLE, AssertionError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300] or "the weights are of another architecture"
            raise ValueError(f"open_clip cannot make {name!r} with weights {pretrained!r}: {reason}") from error
    return wrap_open_clip(model, tokenizer, name=name, model_config=model_config)


def load_open_clip(model: str) -> Encoder:
    """local-dir:FOLDER or hf-hub:REPO. Without weights open_clip warns and goes on with random ones; here that is an error."""
    try:
        network = open_clip.create_model(model_name=model, require_pretrained=True)
        tokenizer = open_clip.get_tokenizer(model_name=model)
    except (*UNLOADABLE, ValueError) as error:
        raise ValueError(f"open_clip cannot load {model}: {error}") from error
    model_config = None
    if model.startswith("local-dir:"):
        config = json.loads((Path(model.removeprefix("local-dir:")) / "open_clip_config.json").read_text())
        model_config = config["model_cfg"]
    return wrap_open_clip(network, tokenizer, name=model, model_config=model_config)


def wrap_open_clip(model: Any, tokenizer: Any, *, name: str, model_config: dict[str, Any] | None) -> Encoder:
    preprocess_config = deepcopy(open_clip.get_model_preprocess_cfg(model))
    size = preprocess_config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    try:
        with torch.no_grad():
            dim = model.eval().encode_text(tokenizer(["a"])).shape[-1]
            image_dim = model.encode_image(torch.zeros(1, 3, height, width)).shape[-1]
    except RuntimeError as error:  # a config whose parts do not fit shows here, not after the data has been opened
        raise ValueError(f"{name}: its towers do not run: {' '.join(str(error).split())[:300]}") from error
    if image_dim != dim:
        raise ValueError(f"{name}: its image features have width {image_dim}, its text features {dim}")
    return Encoder(
        model,
        name=name,
        image_tower=lambda clip, images: clip.encode_image(images),
        text_tower=lambda clip, texts: clip.encode_text(texts),
        short_text_tower=encode_short if may_be_cut(model) else None,
        preprocess_config=preprocess_config,
        tokenize=tokenizer,
        tokenizer_name=tokenizer_name(tokenizer),
        dim=dim,
        model_config=deepcopy(model_config),
    )


def may_be_cut(model: Any) -> bool:
    """Whether a text tower has the causal mask and the embeddings that encode_short knows how to cut."""
    tower, _ = find_text_tower(model)
    causal = getattr(tower, "attn_mask", None) is not None and getattr(tower, "cls_emb", None) is None
    return causal and type(model) in (open_clip.CLIP, open_clip.CustomTextCLIP)


def find_text_tower(model: Any) -> tuple[Any, str]:
    """Where an open_clip model keeps its positional embedding and mask, and what its names begin with."""
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
    if isinstance(tokenizer, open_clip.SimpleTokenizer):
        usual = open_clip.SimpleTokenizer(context_length=tokenizer.context_length)
        if torch.equal(usual(list(PROBES)), tokenizer(list(PROBES))):  # not another vocabulary, cleaning or cutting
            return f"CLIP BPE, {tokenizer.context_length} tokens"
    return f"{type(tokenizer).__name__} {id(tokenizer)}"  # never taken for another's


def check_weights(name: str, model_config: dict[str, Any], pretrained: str, option: str) -> None:
    """Raises: ValueError for an unknown tag, or a tag whose weights were trained with the other activation."""
    tag = get_pretrained_cfg(name, pretrained)
    if not tag:
        if Path(pretrained).is_file():
            return
        tags = list_pretrained_tags_by_model(name)
        raise ValueError(f"{option}: {name} has no weights {pretrained!r}, and no such file exists; tags: {tags}")
    wanted, configured = tag.get("quick_gelu", False), model_config.get("quick_gelu", False)
    other = f"{name}-quickgelu" if wanted else name.removesuffix("-quickgelu")
    if wanted != configured and other != name:
        raise ValueError(
            f"{name} with weights {pretrained!r}: they were trained with {'QuickGELU' if wanted else 'GELU'}, the config "
            f"says {'QuickGELU' if configured else 'GELU'}; use the model {other!r} (4 points of top-1 otherwise)"
        )


def find_architecture(model: str, *, option: str = "") -> tuple[str, dict[str, Any]]:
    """Name and open_clip config of one of our students, of a JSON file or of an open_clip model.

    Raises: ValueError with the nearest known names if there is none.
    """
    if found := students.find_student_config(model):
        return found
    name = model.replace("/", "-")
    if model_config := open_clip.get_model_config(name):
        return name, model_config
    near = difflib.get_close_matches(model, {*open_clip.list_models(), *students.student_names()}, n=3)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "see open_clip.list_models()"
    raise ValueError(f"{option}no model {model!r}, and no such folder; {hint}")


def imagenet_prompts() -> tuple[list[str], list[str]]:
    """OpenAI's curated names of the 1,000 classes, in order of synset id, and the 80 templates with placeholder {c}."""
    return list(open_clip.IMAGENET_CLASSNAMES), [template("{c}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def imagenet_synsets() -> list[str]:
    """Synset ids of the 1,000 classes, in order."""
    from timm.data.imagenet_info import ImageNetInfo

    return ImageNetInfo("imagenet-1k").label_names()
