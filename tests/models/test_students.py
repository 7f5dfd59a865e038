"""Our own architectures, counted by hand from their widths and depths."""

from pathlib import Path

import pytest

from clipkd.config.train import StudentConfig
from clipkd.models.initial import create_student
from clipkd.models.students import count_parameters, find_student_config, tower_of


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


def test_names_tell_the_towers_apart_in_every_layout() -> None:
    towers = {
        "image": ("visual", "visual.proj", "vision_model.encoder.x", "visual_projection.weight"),
        "text": ("text", "text.text_projection", "text_projection", "transformer.resblocks.0.ln_1.bias", "ln_final"),
        None: ("logit_scale", "logit_bias"),
    }
    assert {tower: {tower_of(name) for name in names} for tower, names in towers.items()} == {t: {t} for t in towers}


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "no file"), ("{", "is not JSON"), ('{"embed_dim": 8}', r"lacks \['text_cfg', 'vision_cfg'\]")],
)
def test_a_wrong_json_file_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "mine.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"{words}"):
        find_student_config(str(path))
