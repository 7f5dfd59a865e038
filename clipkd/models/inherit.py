"""`clipkd inherit`: cut a student out of a teacher, some of its blocks, heads and channels (TinyCLIP, arXiv 2309.12314)."""

import math
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipkd import files
from clipkd.config.train import Tower
from clipkd.errors import require
from clipkd.models.cost import count_cost
from clipkd.models.create import build_open_clip, find_text_tower
from clipkd.models.encoder import Encoder
from clipkd.models.hugging_face import as_open_clip
from clipkd.models.load import load_model
from clipkd.models.students import tower_of

AXES = {
    r"(class_embedding|ln_\w+\.\w+|ls_\d\.gamma|attn\.out_proj\.bias|mlp\.c_proj\.bias)": "c",
    r"(conv1\.weight)": "c...",
    r"((text\.)?positional_embedding|visual\.positional_embedding|token_embedding\.weight|text_projection\.weight)": ".c",
    r"(visual\.proj|(text\.)?text_projection)": "c.",
    r"attn\.in_proj_weight": "ac",
    r"attn\.in_proj_bias": "a",
    r"attn\.out_proj\.weight": "ch",
    r"mlp\.c_fc\.weight": "mc",
    r"mlp\.c_fc\.bias": "m",
    r"mlp\.c_proj\.weight": "cm",
}
"""End of a weight's name → what its axes count: c channels of the tower; within a block h heads' channels, a those of query,
key and value, m hidden units of the MLP; a dot for axes that stay."""

BLOCK = re.compile(r"(.*resblocks\.)(\d+)\.(.*)")


@dataclass(frozen=True, kw_only=True)
class InheritConfig:
    teacher: str
    """The model to cut: NAME@WEIGHTS of open_clip, an open_clip folder, a transformers CLIPModel folder, or a run."""
    depth: tuple[int, ...] | int = ()
    """Blocks to keep in both towers, or in the image and the text tower: every k-th from the first. Empty keeps all."""
    width: tuple[int, ...] | int = ()
    """Channels to keep in both towers, or in the image and the text tower: multiples of the width of a head. Empty keeps all."""
    output: str
    """File NAME.json to write, an open_clip config; its weights go to NAME.safetensors beside it."""

    def sizes(self, option: str) -> dict[Tower, int | None]:
        given = getattr(self, option)
        values = given if isinstance(given, tuple) else (given,)
        require(
            len(values) <= 2, f"{option} is {list(values)}; name one number, or those of the image and the text tower"
        )
        image, text = (values * 2)[:2] if values else (None, None)
        return {"image": image, "text": text}


def inherit(config: InheritConfig) -> list[str]:
    """Write the student; returns what to print. Raises: ValueError for a teacher or size that cannot be cut."""
    path = Path(config.output)
    require(path.suffix == ".json", f"output is {config.output}; name a file NAME.json")
    depths, widths = config.sizes("depth"), config.sizes("width")
    student = cut(as_open_clip(load_model(config.teacher)), depths, widths, name=path.stem)
    files.write_json(path, {**(student.model_config or {}), "preprocess_cfg": student.preprocess_config})
    weights = path.with_suffix(".safetensors")
    files.write_tensors(weights, student.model.state_dict())
    cost = count_cost(student)
    sizes = ", ".join(
        f"{tower} {cost['parameters'][tower] / 1e6:.2f}M parameters, {cost['macs'][tower] / 1e6:.1f}M MACs"
        for tower in ("image", "text")
    )
    return [sizes, f"train it with --student.model {path}@{weights}"]


@torch.no_grad()
def cut(teacher: Encoder, depths: dict[Tower, int | None], widths: dict[Tower, int | None], *, name: str) -> Encoder:
    """A model of the teacher's blocks and channels. Raises: ValueError unless both towers are open_clip's transformers."""
    config = {**(teacher.model_config or {})}
    weights = {n: tensor for n, tensor in teacher.model.state_dict().items() if tower_of(n) is None}
    for tower in ("image", "text"):
        part = "vision_cfg" if tower == "image" else "text_cfg"
        blocks = find_blocks(teacher, tower)
        heads, old = blocks[0].attn.num_heads, blocks[0].attn.embed_dim
        depth, width = depths[tower] or len(blocks), widths[tower] or old
        if not (0 < depth <= len(blocks) and 0 < width <= old and width % (old // heads) == 0):
            raise ValueError(
                f"the {tower} tower of {teacher.name} has {len(blocks)} blocks and {old} channels in heads of {old // heads}; "
                f"{depth} blocks and {width} channels cannot be cut from it: take no more, in whole heads"
            )
        own = {n: tensor for n, tensor in teacher.model.state_dict().items() if tower_of(n) == tower}
        weights |= narrowed(with_blocks(own, len(blocks), depth), old, width, heads)
        config[part] = {**config[part], "layers": depth, "width": width}
        config[part] |= {"head_width": old // heads} if tower == "image" else {"heads": width * heads // old}
    student = build_open_clip(name, config, preprocess_config=teacher.preprocess_config)
    student.model.load_state_dict(weights)
    return student.eval()


def find_blocks(teacher: Encoder, tower: Tower) -> Any:
    """Raises: ValueError if a tower is no transformer of open_clip."""
    model: Any = teacher.model
    owner = getattr(model, "visual", None) if tower == "image" else find_text_tower(model)[0]
    blocks = getattr(getattr(owner, "transformer", None), "resblocks", None)
    if blocks is None or not hasattr(blocks[0], "attn") or teacher.model_config is None:
        raise ValueError(
            f"the {tower} tower of {teacher.name} is a {type(owner).__name__}; only a ViT or text transformer of open_clip or of "
            "transformers' CLIPModel can be cut"
        )
    return blocks


def with_blocks(weights: dict[str, Tensor], old: int, depth: int) -> dict[str, Tensor]:
    """Every k-th block from the first, renumbered."""
    kept = {place * old // depth: place for place in range(depth)}
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        block = BLOCK.fullmatch(name)
        if block is None:
            found[name] = tensor
        elif int(block[2]) in kept:
            found[f"{block[1]}{kept[int(block[2])]}.{block[3]}"] = tensor
    return found


def narrowed(weights: dict[str, Tensor], old: int, width: int, heads: int) -> dict[str, Tensor]:
    """The channels, heads and hidden units with the largest weights (sum of squares over all that reads or writes them)."""
    if width == old:
        return weights
    axes = {name: axes_of(name) for name in weights}
    importance: dict[str, Tensor | float] = defaultdict(float)
    for name, tensor in weights.items():
        for axis, kind in enumerate(axes[name]):
            if kind != ".":
                own = (
                    tensor.float().square().movedim(axis, 0).flatten(1).sum(dim=1)
                    if tensor.ndim > 1
                    else tensor.float().square()
                )
                own = own.unflatten(0, (3, old)).sum(dim=0) if kind == "a" else own
                importance[group(name, kind)] += own
    kept: dict[str, Tensor] = {}
    for key, values in importance.items():
        assert isinstance(values, Tensor)
        if key.endswith("h"):  # all of a head or nothing
            values = values.unflatten(0, (heads, -1)).sum(dim=1)
            best = values.topk(width * heads // old).indices.sort().values
            kept[key] = (best[:, None] * (old // heads) + torch.arange(old // heads)).flatten()
        else:
            number = width if key == "c" else math.floor(len(values) * width / old)
            kept[key] = values.topk(number).indices.sort().values
    found: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        for axis, kind in enumerate(axes[name]):
            if kind != ".":
                index = kept[group(name, kind)]
                index = torch.cat([index + part * old for part in range(3)]) if kind == "a" else index
                tensor = tensor.index_select(axis, index)
        found[name] = tensor
    return found


def group(name: str, kind: str) -> str:
    """What is cut together: channels in the entire tower, heads and hidden units in each block."""
    block = BLOCK.fullmatch(name)
    return "c" if kind == "c" or block is None else f"{block[2]} {kind.replace('a', 'h')}"


def axes_of(name: str) -> str:
    for pattern, axes in AXES.items():
        if re.search(rf"(^|\.){pattern}$", name):
            return axes
    raise ValueError(f"the weight {name} belongs to no known part of a transformer; only depth can be cut here")
