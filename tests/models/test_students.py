"""Our own architectures, counted by hand from their widths and depths."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from clipkd.config.train import StudentConfig
from clipkd.models.load import create_student
from clipkd.models.students import count_parameters, find_student_config, student_names, tower_of


def transformer(width: int, layers: int) -> int:
    """Attention 4 w² + 4 w, a feed-forward part four times as wide 8 w² + 5 w, two layer norms 4 w."""
    return layers * (12 * width**2 + 13 * width)


def test_vit_t_16_has_as_many_weights_as_its_shape_says() -> None:
    patches = 14 * 14
    image = 3 * 16 * 16 * 192 + 192 + (patches + 1) * 192 + 2 * 192 + transformer(192, 12) + 2 * 192 + 192 * 512
    text = 49_408 * 384 + 77 * 384 + transformer(384, 12) + 2 * 384 + 384 * 512
    counts = count_parameters(create_student(StudentConfig(model="ViT-T-16")).model)
    assert counts == {"image": image, "text": text}
    assert (round(image / 1e6, 1), round(text / 1e6, 1)) == (5.6, 40.5)


def test_scales_are_no_part_of_a_tower() -> None:
    model = nn.Module()
    model.visual, model.transformer = nn.Linear(3, 5), nn.Linear(2, 2, bias=False)
    model.vision_model, model.visual_projection = nn.Linear(1, 7, bias=False), nn.Linear(1, 2, bias=False)
    model.logit_scale, model.logit_bias = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(1))
    assert count_parameters(model) == {"image": 20 + 7 + 2, "text": 4}


def test_names_tell_the_towers_apart_in_every_layout() -> None:
    towers = {
        "image": ("visual", "visual.proj", "vision_model.encoder.x", "visual_projection.weight"),
        "text": ("text", "text.text_projection", "text_projection", "transformer.resblocks.0.ln_1.bias", "ln_final"),
        None: ("logit_scale", "logit_bias"),
    }
    assert {tower: {tower_of(name) for name in names} for tower, names in towers.items()} == {t: {t} for t in towers}


def test_the_shipped_architectures_are_listed_and_found() -> None:
    assert {"ViT-T-16", "demo-student", "demo-teacher"} <= set(student_names())
    for name in student_names():
        found = find_student_config(name)
        assert found is not None
        assert found[0] == name
        assert {"embed_dim", "vision_cfg", "text_cfg"} <= set(found[1])
    assert find_student_config("ViT-B-16") is None


def test_a_json_file_is_an_architecture_of_its_own_name(tmp_path: Path) -> None:
    config = {"embed_dim": 8, "vision_cfg": {}, "text_cfg": {}}
    (tmp_path / "mine.json").write_text(json.dumps(config))
    assert find_student_config(str(tmp_path / "mine.json")) == ("mine", config)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file"), ("{", "is not JSON"), ('{"embed_dim": 8}', r"lacks \['text_cfg', 'vision_cfg'\]")],
)
def test_a_wrong_json_file_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"student\.model: .*{words}"):
        find_student_config(str(path))
