"""Students cut out of a teacher."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkd.config.train import StudentConfig, TrainConfig
from clipkd.models.create import build_open_clip
from clipkd.models.encoder import Encoder
from clipkd.models.hugging_face import as_open_clip
from clipkd.models.inherit import InheritConfig, cut, inherit
from clipkd.models.initial import initial_student
from clipkd.models.load import load_model
from clipkd.models.students import MODEL_CONFIGS

KEPT: dict[Any, int | None] = {"image": None, "text": None}
CAPTIONS = ["a photo of a cat", "Two dogs, running!", "far too long for the context of this small model, " * 3]


def make(**options: Any) -> Encoder:
    torch.manual_seed(4)
    plain = json.loads((MODEL_CONFIGS / "tiny-student.json").read_text())
    vision = {"image_size": 32, "layers": 4, "width": 64, "head_width": 16, "patch_size": 16}
    text = {**plain["text_cfg"], "width": 48, "heads": 3, "layers": 3}
    return build_open_clip("teacher", {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text, **options}).eval()


@torch.no_grad()
def features(encoder: Encoder) -> list[torch.Tensor]:
    pixels = torch.randn(3, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(1))
    return [encoder.encode_image(pixels), encoder.encode_text(encoder.spec.tokenize(CAPTIONS))]


def distance(a: Encoder, b: Encoder) -> float:
    return max((ours - theirs).abs().max().item() for ours, theirs in zip(features(a), features(b), strict=True))


@pytest.mark.parametrize("custom_text", [False, True])
def test_full_depth_and_width_are_the_teacher_also_through_the_files(custom_text: bool, tmp_path: Path) -> None:
    teacher = make(custom_text=custom_text, quick_gelu=True)
    teacher.prepare_images({**teacher.preprocess_config, "mean": (0.1, 0.2, 0.3), "resize_mode": "squash"})
    from clipkd.export.artefacts import write_open_clip

    (tmp_path / "teacher").mkdir()
    write_open_clip(teacher, tmp_path / "teacher")
    lines = inherit(InheritConfig(teacher=str(tmp_path / "teacher"), output=str(tmp_path / "cut.json")))
    assert re.fullmatch(r"image 0\.\d\dM parameters, \d\.\dM MACs, text 2\.\d\dM .*", lines[0])
    model = f"{tmp_path / 'cut.json'}@{tmp_path / 'cut.safetensors'}"
    assert model in lines[1]
    student = initial_student(TrainConfig(student=StudentConfig(model=model))).eval()
    assert distance(student, teacher) < 1e-6
    assert student.logit_scale == teacher.logit_scale
    assert dataclasses.astuple(student.spec)[:4] == dataclasses.astuple(teacher.spec)[:4]
    assert student.preprocess_config["resize_mode"] == "squash"
    assert "preprocess_cfg" not in (student.model_config or {})


def test_blocks_that_do_nothing_may_go() -> None:
    """Every second block of the image tower adds nothing; without them the features stay."""
    teacher = make()
    with torch.no_grad():
        for block in list(teacher.model.visual.transformer.resblocks)[1::2]:  # type: ignore[union-attr, arg-type]
            for part in (block.attn.out_proj, block.mlp.c_proj):  # type: ignore[union-attr]
                part.weight.zero_()
                part.bias.zero_()
    student = cut(teacher, {"image": 2, "text": None}, KEPT, name="student")
    assert student.model_config is not None
    assert student.model_config["vision_cfg"]["layers"] == 2
    assert distance(student, teacher) < 1e-6
    assert distance(cut(teacher, {"image": 1, "text": None}, KEPT, name="student"), teacher) > 1e-3


def test_heads_and_hidden_units_without_weight_may_go() -> None:
    """Channels of the residual stream are normalised together, so those of a tower cannot go unseen; the rest can."""
    teacher = make()
    from clipkd.models import inherit as module

    weights = {n.removeprefix("visual."): t.clone() for n, t in teacher.model.state_dict().items() if "visual" in n}
    prefix = "transformer.resblocks.0."
    head = slice(16, 32)  # the second of four
    for name in ("in_proj_weight", "in_proj_bias"):
        for part in range(3):
            weights[f"{prefix}attn.{name}"][part * 64 + 16 : part * 64 + 32] = 0
    weights[f"{prefix}attn.out_proj.weight"][:, head] = 0
    weights[f"{prefix}mlp.c_fc.weight"][5] = 0
    weights[f"{prefix}mlp.c_proj.weight"][:, 5] = 0
    weights[f"{prefix}mlp.c_fc.bias"][5] = 0
    channels = torch.arange(64)
    weights["conv1.weight"][channels % 4 == 1] *= 1e-3  # 16 channels of little weight at one place
    found = module.narrowed({f"visual.{n}": t for n, t in weights.items()}, 64, 48, 4)
    block = f"visual.{prefix}"
    assert found[f"{block}attn.in_proj_weight"].shape == (3 * 48, 48)
    kept = [0, *range(2, 4)]
    wide = weights[f"{prefix}attn.in_proj_bias"].unflatten(0, (3, 4, 16))
    assert torch.equal(found[f"{block}attn.in_proj_bias"].unflatten(0, (3, 3, 16)), wide[:, kept])
    assert found[f"{block}mlp.c_fc.weight"].shape == (192, 48)
    assert found[f"{block}mlp.c_fc.weight"].square().sum(dim=1).min() > 0


def test_a_narrow_student_has_the_shape_and_the_teachers_numbers(tmp_path: Path) -> None:
    teacher = make()
    student = cut(teacher, {"image": 2, "text": 1}, {"image": 32, "text": 16}, name="student")
    config = student.model_config or {}
    assert (config["vision_cfg"]["width"], config["vision_cfg"]["head_width"], config["text_cfg"]["heads"]) == (
        32,
        16,
        1,
    )
    theirs = set(teacher.model.visual.conv1.weight.flatten().tolist())  # type: ignore[union-attr, operator]
    assert set(student.model.visual.conv1.weight.flatten().tolist()) < theirs  # type: ignore[union-attr, operator]
    assert all(torch.isfinite(each).all() for each in features(student))


@torch.no_grad()
def test_a_transformers_clip_becomes_an_open_clip_model_of_equal_features(clip_folder: Path) -> None:
    theirs = load_model(str(clip_folder))
    ours = as_open_clip(theirs)
    assert distance(ours, theirs) < 1e-6
    assert ours.logit_scale == theirs.logit_scale
    assert ours.spec.mean == theirs.spec.mean
    assert distance(cut(ours, KEPT, KEPT, name="student"), theirs) < 1e-6


def test_what_cannot_be_cut_is_refused(siglip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"image tower .*only a ViT or text transformer"):
        cut(load_model(str(siglip_folder)), KEPT, KEPT, name="student")
    for sizes in ({"image": 5, "text": None}, {"image": 0, "text": 9}):
        with pytest.raises(ValueError, match="cannot be cut from it: take no more"):
            cut(make(), sizes, KEPT, name="student")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 blocks and 40 channels cannot be cut"):
        cut(make(), KEPT, {"image": 40, "text": None}, name="student")
    with pytest.raises(ValueError, match=r"name a file NAME\.json"):
        inherit(InheritConfig(teacher="x", output=str(tmp_path / "student")))
    with pytest.raises(ValueError, match="name one number, or those of"):
        InheritConfig(teacher="x", output="a.json", depth=(1, 2, 3)).sizes("depth")
