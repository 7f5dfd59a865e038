"""A tower in two parts: what comes before its projection, and the projection, of every kind of tower."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clipkd.models.create import build_open_clip
from clipkd.models.initial import initial_student
from clipkd.models.towers import tower_sha256
from tests.training.small_steps import lit, read

VIT: dict[str, Any] = {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16, "head_width": 32}
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1}
TIMM: dict[str, Any] = {"timm_model_name": "resnet10t", "image_size": 32}

TOWERS: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT, "text_cfg": TEXT},
    "text with a bias": {"vision_cfg": VIT, "text_cfg": TEXT | {"proj_bias": True}},
    "custom text": {"vision_cfg": VIT, "text_cfg": TEXT, "custom_text": True},
    "timm linear": {"vision_cfg": TIMM | {"timm_proj": "linear", "timm_pool": "avg"}, "text_cfg": TEXT},
    "timm mlp": {"vision_cfg": TIMM | {"timm_proj": "mlp", "timm_pool": "avg"}, "text_cfg": TEXT},
}


@pytest.mark.parametrize("name", TOWERS)
def test_both_parts_give_the_features(name: str) -> None:
    torch.manual_seed(0)
    encoder = build_open_clip(name, {"embed_dim": 24, **TOWERS[name]}).eval()
    inputs = {
        "image": torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8),
        "text": encoder.spec.tokenize(["a", "two words", "three more words"]),
    }
    for tower, encode in (("image", encoder.encode_image), ("text", encoder.encode_text)):
        encoder.freeze(tower, head=True)
        with torch.no_grad():
            expected, before = encode(inputs[tower]), encoder.encode_frozen(tower, inputs[tower])
        assert before.shape[1] != encoder.dim
        features = encoder.finish(tower, before)
        assert features.requires_grad
        assert torch.equal(features, expected)
        features.sum().backward()
        trained = {n for n, p in encoder.named_parameters() if p.requires_grad and n.split(".")[1] != "logit_scale"}
        assert {n for n, p in encoder.named_parameters() if p.grad is not None} <= trained


def test_a_projection_inside_of_the_pooling_is_out_of_reach() -> None:
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}
    encoder = build_open_clip("resnet", {"embed_dim": 24, "vision_cfg": vision, "text_cfg": TEXT})
    encoder.freeze("image", head=True)
    with pytest.raises(ValueError, match="the input of the image projection is out of reach in CLIP"):
        encoder.encode_frozen("image", torch.zeros(2, 3, 32, 32))


def test_what_is_stored_before_a_projection_does_not_depend_on_it(tmp_path: Path) -> None:
    """A timm and a transformers tower from files of weights, whose projections another seed starts elsewhere."""
    options = lit(tmp_path)
    first, second = (initial_student(read([*options, "--seed", str(seed)])) for seed in (0, 1))
    for tower in ("image", "text"):
        inputs = torch.randn(2, 3, *first.spec.size) if tower == "image" else first.spec.tokenize(["a cat", "a"])
        with torch.no_grad():
            before = [student.encode_frozen(tower, inputs) for student in (first, second)]
            features = [student.finish(tower, rows) for student, rows in zip((first, second), before, strict=True)]
        assert torch.equal(*before)
        assert not torch.equal(*features)
        assert tower_sha256(first, tower) == tower_sha256(second, tower)
        for student in (first, second):
            student.freeze(tower)  # now the features are stored
        assert tower_sha256(first, tower) != tower_sha256(second, tower)
