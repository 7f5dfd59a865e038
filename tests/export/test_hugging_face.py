"""Folders for transformers: stock AutoModel and AutoProcessor give the student's features; what does not fit is refused."""

from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from clipkd.export.artefacts import TRANSFORMERS
from clipkd.export.hugging_face import write_hugging_face
from clipkd.export.tokenizer import CHECKED
from clipkd.models.encoder import Encoder
from clipkd.models.families import find_family
from clipkd.models.load import load_model
from tests.export.students import CAPTIONS, clip_student, furthest, odd_images, own_pixels, siglip_student

CONFIGS: dict[str, dict[str, Any]] = {
    "gelu, bias": {"init_logit_bias": -9.5},
    "quick_gelu, thin text": {
        "quick_gelu": True,
        "text_cfg": {"width": 32, "layers": 2},
        "vision_cfg": {"mlp_ratio": 3.0},
    },
    "custom_text, squash": {"custom_text": True, "preprocess": {"resize_mode": "squash"}},
    "tanh, epsilon, eos": {
        "vision_cfg": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
        "text_cfg": {"norm_kwargs": {"eps": 1e-6}, "pool_type": "eos", "eos_id": 49407},
    },
    "fixed positions, vector scale": {"vision_cfg": {"pos_embed_type": "sin_cos_2d"}, "nonscalar_logit_scale": True},
}


@pytest.fixture(scope="module")
def plain() -> Encoder:
    return clip_student()


@pytest.fixture(scope="module")
def folder(plain: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`plain` as transformers reads it."""
    folder = tmp_path_factory.mktemp("plain")
    write_hugging_face(plain, folder)
    return folder


def unit(output: Any) -> Tensor:
    return F.normalize(output.pooler_output, dim=-1)


@torch.inference_mode()
def differences(encoder: Encoder, folder: Path) -> SimpleNamespace:
    """Largest differences of stock transformers and of `load_model` from the student; the transformers model."""
    write_hugging_face(encoder, folder)
    model, loaded = AutoModel.from_pretrained(folder).eval(), load_model(str(folder))
    exact = AutoProcessor.from_pretrained(folder / "exact", trust_remote_code=True)
    pixels, tokens = own_pixels(encoder), encoder.spec.tokenize(CAPTIONS)
    inputs = exact(text=CAPTIONS, images=odd_images(), padding="max_length", truncation=True, return_tensors="pt")
    theirs = inputs.pop("pixel_values")
    image, text = encoder.encode_image(pixels), encoder.encode_text(tokens)
    assert torch.equal(own_pixels(loaded), pixels)
    return SimpleNamespace(
        pixels=furthest(pixels, theirs),
        image=furthest(image, unit(model.get_image_features(theirs))),
        text=furthest(text, unit(model.get_text_features(**inputs))),
        loaded_image=furthest(image, loaded.encode_image(pixels)),
        loaded_text=furthest(text, loaded.encode_text(loaded.spec.tokenize(CAPTIONS))),
        scale=furthest(encoder.logit_scale.log(), model.logit_scale.squeeze()),
        model=model,
    )


def assert_equal(found: SimpleNamespace) -> None:
    assert max(found.pixels, found.image, found.text, found.scale, found.loaded_image, found.loaded_text) < 1e-6


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_gives_the_students_features(tmp_path: Path, name: str) -> None:
    student = clip_student(**CONFIGS[name])
    found = differences(student, tmp_path)
    assert type(found.model).__name__ == "CLIPModel"
    assert_equal(found)
    if "bias" in name:  # CLIPModel has none, so the config keeps it
        assert found.model.config.logit_bias == pytest.approx(student.logit_bias.item()) != 0  # type: ignore[union-attr]


@pytest.mark.parametrize("tanh", [False, True])
def test_stock_transformers_gives_a_siglip_students_features(tmp_path: Path, siglip_folder: Path, tanh: bool) -> None:
    mode = {"resize_mode": "shortest" if tanh else "squash"}
    student = siglip_student(
        siglip_folder, preprocess=mode, **({"act_kwargs": {"approximate": "tanh"}} if tanh else {})
    )
    found = differences(student, tmp_path)
    assert type(found.model).__name__ == "SiglipModel"
    assert found.model.config.text_config.hidden_act == ("gelu_pytorch_tanh" if tanh else "gelu")
    assert found.model.config.vision_config.hidden_act == "gelu"
    assert_equal(found)
    assert found.model.logit_bias.item() == student.logit_bias.item() != 0  # type: ignore[union-attr]


def test_a_siglip_tower_with_the_tokenizer_of_clip_sees_its_padding(tmp_path: Path, siglip_folder: Path) -> None:
    student = siglip_student(siglip_folder, hf_tokenizer_name=None, tokenizer_kwargs={}, vocab_size=49408)
    assert differences(student, tmp_path).text < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a cat!", padding="max_length")["input_ids"] == [49406, 320, 2368, 256, 49407, 0, 0, 0, 0, 0]
    assert tokenizer.model_input_names == ["input_ids"]  # a mask would hide the padding that it was trained on


@torch.inference_mode()
def test_every_padding_of_a_causal_tower_gives_the_same_features(folder: Path, plain: Encoder) -> None:
    model, processor = AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)
    captions = ["a cat", "", "two small dogs, “asleep”"]
    expected = plain.encode_text(plain.spec.tokenize(captions))
    for padding, length in ((True, 9), ("max_length", 12)):
        tokens = processor(text=captions, padding=padding, truncation=True, return_tensors="pt")
        assert tokens["input_ids"].shape == (3, length)
        assert furthest(expected, unit(model.get_text_features(**tokens))) < 1e-6
    assert processor.tokenizer.model_max_length == 12
    assert processor.tokenizer(CAPTIONS[4])["input_ids"].count(49407) == 1  # the one at the end, not the caption's


def test_autotokenizer_uses_the_file_unchanged(folder: Path) -> None:
    file, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), AutoTokenizer.from_pretrained(folder)
    file.no_padding()
    texts = [*CHECKED, *CAPTIONS]
    assert tokenizer(texts, truncation=True)["input_ids"] == [file.encode(text).ids for text in texts]


@torch.inference_mode()
def test_the_default_image_processor_is_close(folder: Path, plain: Encoder) -> None:
    processor = AutoProcessor.from_pretrained(folder)
    assert type(processor).__name__ == "CLIPProcessor"
    images = [image.convert("RGB") for image in odd_images()]  # it puts transparency on white, open_clip drops it
    expected, found = own_pixels(plain), processor(images=images, return_tensors="pt")["pixel_values"]
    features = plain.encode_image(expected), plain.encode_image(found)
    assert F.cosine_similarity(*features).min() > 0.999
    assert (expected - found).abs().mean() < 0.05


def test_the_files_are_those_that_keep_formats_knows(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files <= {"model.safetensors", *TRANSFORMERS}


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_cfg", "final_ln_after_pool", True),
        ("vision_cfg", "pool_type", "avg"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "hf_model_name", "roberta-base"),
        ("vision_cfg", "timm_proj", "linear"),  # from here on of SiglipModel
        ("text_cfg", "proj_bias", False),
    ],
)
def test_an_option_that_transformers_lacks_is_refused_by_name(
    plain: Encoder, siglip_folder: Path, part: str, field: str, value: Any
) -> None:
    is_siglip = field in ("timm_proj", "proj_bias")
    student, model = (siglip_student(siglip_folder), "SiglipModel") if is_siglip else (deepcopy(plain), "CLIPModel")
    student.model_config[part][field] = value  # type: ignore[index]
    words = rf"{part}\.{field} is {value!r}; transformers' {model} cannot do that; use --to open_clip or --to onnx"
    with pytest.raises(ValueError, match=words):
        find_family(student)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 16, "image_size": 32}},
            "its image tower is a ModifiedResNet",
        ),
        ({"vision_cfg": {"image_size": [32, 48]}}, "its images are 32 × 48, its patches 8, not all square"),
        ({"text_cfg": {"pool_type": "eos", "eos_id": 2}}, "eos_id is 2, which transformers takes for the highest id"),
        ({"preprocess": {"resize_mode": "longest"}}, "resize_mode is 'longest', not shortest or squash"),
        ({"vision_cfg": {"ls_init_value": 0.1}}, r"its weight .*ls_1\.gamma has no counterpart"),
        ({"text_cfg": {"proj_bias": True}}, "has no counterpart"),
        ({"vision_cfg": {"no_ln_pre": True}}, r"do not fit .*Missing key.*pre_layrnorm\.weight"),
    ],
)
def test_a_student_that_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"{words}.*; transformers' CLIPModel cannot do that"):
        write_hugging_face(clip_student(**changes), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_other_classes_tokenizers_and_activations_are_refused(
    tmp_path: Path, plain: Encoder, siglip_folder: Path
) -> None:
    with pytest.raises(ValueError, match="pools at the highest id of the tokenizer"):
        find_family(clip_student(text_cfg={"hf_tokenizer_name": str(siglip_folder), "vocab_size": 100}))
    student = deepcopy(plain)
    student.model.visual.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"its activation is ReLU\(\)"):
        write_hugging_face(student, tmp_path)
    student.model.__class__ = type("CoCa", (open_clip.CLIP,), {})
    with pytest.raises(ValueError, match="it is a CoCa"):
        find_family(student)
