"""A tower of one model in another: the same features, or an error that names both values."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from clipkd.models.create import build_open_clip
from clipkd.models.encoder import Encoder
from clipkd.models.hugging_face import as_open_clip
from clipkd.models.load import load_model as load
from clipkd.models.students import MODEL_CONFIGS, tower_of
from clipkd.models.towers import copy_tower

CAPTIONS = ["a photo of a cat", "Two dogs, running!", "far too long for the context of this small model, " * 3, ""]
CONFIG: dict[str, Any] = json.loads((MODEL_CONFIGS / "tiny-student.json").read_text())
ADVICE = "give it the text_cfg, embed_dim, quick_gelu and tokenizer of teacher"


def make(seed: int, name: str = "student", *, text: dict[str, Any] | None = None, **options: Any) -> Encoder:
    torch.manual_seed(seed)
    config = {**CONFIG, **options, "text_cfg": {**CONFIG["text_cfg"], **(text or {})}}
    return build_open_clip(name, config)


def make_teacher(**options: Any) -> Encoder:
    vision = {**CONFIG["vision_cfg"], "width": 96, "layers": 3}
    return make(1, "teacher", vision_cfg=vision, **options).eval().requires_grad_(False)


@pytest.mark.parametrize("student_layout", [False, True], ids=["student CLIP", "student CustomTextCLIP"])
@pytest.mark.parametrize("teacher_layout", [False, True], ids=["teacher CLIP", "teacher CustomTextCLIP"])
def test_the_copy_gives_the_teachers_text_features_bit_by_bit(student_layout: bool, teacher_layout: bool) -> None:
    student, teacher = make(0, custom_text=student_layout), make_teacher(custom_text=teacher_layout)
    kinds = {False: open_clip.CLIP, True: open_clip.CustomTextCLIP}
    assert [type(each.model) for each in (student, teacher)] == [kinds[student_layout], kinds[teacher_layout]]
    tokens = student.spec.tokenize(CAPTIONS)
    image = {n: t.clone() for n, t in student.model.state_dict().items() if tower_of(n) != "text"}
    with torch.no_grad():
        expected = teacher.encode_text(tokens)
        assert not torch.allclose(student.eval().encode_text(tokens), expected, atol=0.1)
    copy_tower(teacher, student, "text", option="student.text is teacher")
    student.train().freeze("text")
    assert torch.equal(student.encode_text(tokens), expected)
    assert all(torch.equal(student.model.state_dict()[name], tensor) for name, tensor in image.items())
    assert {"logit_scale", "visual.proj"} <= image.keys()
    with torch.no_grad():  # a copy: the teacher may be rounded, the student may not follow
        next(p for name, p in teacher.model.named_parameters() if tower_of(name) == "text").zero_()
    assert torch.equal(student.encode_text(tokens), expected)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": {"width": 32}}, "the student student has text_cfg.width 32 (teacher: 64); "),
        ({"text": {"heads": 4}}, "has text_cfg.heads 4 (teacher: 2); "),  # the same weights, other features
        (
            {"text": {"layers": 2, "context_length": 10}},
            "has text_cfg.context_length 10 (teacher: 12), text_cfg.layers 2 (teacher: 1), tokenizer CLIP BPE, 10 tokens "
            "(teacher: CLIP BPE, 12 tokens); ",
        ),
        ({"embed_dim": 64}, "has embed_dim 64 (teacher: 128); "),
        ({"quick_gelu": True}, "has quick_gelu True (teacher: False); "),
    ],
    ids=str,
)
def test_a_tower_of_another_shape_is_refused_with_both_values(options: dict[str, Any], words: str) -> None:
    student, teacher = make(0, **options), make_teacher()
    before = student.weights_sha256()
    with pytest.raises(ValueError, match=r"^student\.text is teacher, but ") as refused:
        copy_tower(teacher, student, "text", option="student.text is teacher")
    assert words in str(refused.value)
    assert f"{ADVICE} (student.model), or change student.text" in str(refused.value)
    assert student.weights_sha256() == before


def test_other_tokens_are_refused_another_name_for_the_same_is_not() -> None:
    student, teacher = make(0), make_teacher()
    theirs, name = teacher.spec.tokenize, teacher.spec.tokenizer_name
    teacher.spec = dataclasses.replace(teacher.spec, tokenizer_name="HFTokenizer 12")
    copy_tower(teacher, student, "text", option="student.text is teacher")
    teacher.spec = dataclasses.replace(teacher.spec, tokenize=lambda texts: theirs([f"! {text}" for text in texts]))
    with pytest.raises(ValueError, match=rf"has tokenizer {name} \(teacher: HFTokenizer 12\); {ADVICE}"):
        copy_tower(teacher, student, "text", option="student.text is teacher")
    teacher.spec = dataclasses.replace(teacher.spec, tokenize=lambda texts: theirs(texts)[:, :5])
    with pytest.raises(ValueError, match="tokenizer"):
        copy_tower(teacher, student, "text", option="student.text is teacher")


def test_a_transformers_clip_gives_its_text_tower_a_siglip_does_not(clip_folder: Path, siglip_folder: Path) -> None:
    teacher = load(str(clip_folder))
    student = build_open_clip("student", as_open_clip(teacher).model_config or {}).eval()
    copy_tower(teacher, student, "text", option="student.text is teacher")
    with torch.no_grad():
        features = [model.encode_text(model.spec.tokenize(CAPTIONS[:3])) for model in (teacher, student)]
    torch.testing.assert_close(*features, rtol=0, atol=1e-6)
    with pytest.raises(
        ValueError, match=r"is teacher, but .*siglip is a SiglipModel; it takes an open_clip model"
    ) as refused:
        copy_tower(load(str(siglip_folder)), make(0), "text", option="student.text is teacher")
    assert "change student.text" in str(refused.value)


def test_a_teacher_from_the_hub_is_compared_by_the_config_that_lies_there(monkeypatch: pytest.MonkeyPatch) -> None:
    student, teacher = make(0), make_teacher()
    stored = {**CONFIG, "text_cfg": {**CONFIG["text_cfg"], "heads": 1}}
    teacher.model_config, teacher.name = None, "hf-hub:someone/clip"
    monkeypatch.setattr(open_clip, "get_model_config", {"hf-hub:someone/clip": stored}.get)
    with pytest.raises(ValueError, match=r"has text_cfg\.heads 2 \(hf-hub:someone/clip: 1\)"):
        copy_tower(teacher, student, "text", option="student.text is teacher")
    stored["text_cfg"]["heads"] = 2
    copy_tower(teacher, student, "text", option="student.text is teacher")
