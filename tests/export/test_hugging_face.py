"""Folders for transformers: stock AutoModel and AutoProcessor give the student's features; what does not fit is refused."""

import json
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModel, AutoProcessor, AutoTokenizer, CLIPTextModelWithProjection

from clipkd.export.hugging_face import find_family, write_hugging_face
from clipkd.export.tokenizer import CHECKED
from clipkd.models.create import build_open_clip, find_architecture
from clipkd.models.encoder import Encoder
from clipkd.models.load import load_model
from tests.models.siglip_tower import vit_clipkd_test_siglip

CAPTIONS = [
    "a photo of a DOG, isn't it?",
    "",
    "  two\tcaf\u00e9s &amp; “tea” …\n",
    "one more word and " * 30,
    "x <|endoftext|> y ＬＯＵＤ ﬁne 👩‍👩‍👧 ΟΔΥΣΣΕΥΣ",
]
CONFIGS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "quick_gelu": {"quick_gelu": True},
    "thin text": {"text_cfg": {"width": 32, "layers": 2}, "vision_cfg": {"mlp_ratio": 3.0}},
    "custom_text": {"custom_text": True},
    "tanh, epsilon": {
        "vision_cfg": {"act_kwargs": {"approximate": "tanh"}, "norm_kwargs": {"eps": 1e-3}},
        "text_cfg": {"norm_kwargs": {"eps": 1e-6}},
    },
    "fixed positions, vector scale": {"vision_cfg": {"pos_embed_type": "sin_cos_2d"}, "nonscalar_logit_scale": True},
    "eos": {"text_cfg": {"pool_type": "eos", "eos_id": 49407}},
}


def perturbed(encoder: Encoder) -> Encoder:
    """Biases that are not 0 and scales that are not 1, so that each of them shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.model.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return encoder.eval()


def clip_config(changes: dict[str, Any]) -> dict[str, Any]:
    config = deepcopy(find_architecture("demo-student")[1])
    for key, value in changes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    return config


def clip_student(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return perturbed(build_open_clip("student", clip_config(changes)))


def siglip_student(tokenizer: Path, *, preprocess: dict[str, Any] | None = None, **text: Any) -> Encoder:
    size = {"size": (40, 40), "mode": "RGB", "resize_mode": "squash", "interpolation": "bilinear", "fill_color": 0}
    config = {
        "embed_dim": 32,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 40,
            "timm_model_name": vit_clipkd_test_siglip.__name__,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 10,
            "vocab_size": 100,
            "hf_tokenizer_name": str(tokenizer),
            "tokenizer_kwargs": {"clean": "canonicalize"},
            "width": 32,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-6},
            **text,
        },
    }
    torch.manual_seed(0)
    values = {"mean": (0.5, 0.4, 0.5), "std": (0.5, 0.5, 0.3), **size, **(preprocess or {})}
    return perturbed(build_open_clip("sigmoid", config, preprocess_config=values))


@pytest.fixture(scope="module")
def plain() -> Encoder:
    return clip_student()


def odd_images() -> list[Image.Image]:
    """Landscape and portrait, with (resized − crop) of every remainder of 4, and every mode that images come in."""
    draw = np.random.default_rng(0)

    def blobs(height: int, width: int) -> Image.Image:
        small = Image.fromarray(draw.integers(0, 256, (5, 4, 3)).astype(np.uint8))
        return small.resize((width, height), Image.Resampling.BICUBIC)

    sizes = [(32, 32), (32, 33), (32, 34), (32, 35), (35, 32), (45, 45), (101, 39), (33, 95), (239, 320), (9, 11)]
    images = [blobs(*size) for size in sizes]
    images += [blobs(35, 67).convert(mode) for mode in ("L", "P", "CMYK", "RGBA", "LA", "1", "YCbCr")]
    images[13].putalpha(blobs(35, 67).convert("L"))
    return [*images, Image.fromarray(draw.integers(0, 65536, (40, 50)).astype(np.uint16))]


def own_pixels(encoder: Encoder, images: list[Image.Image]) -> Tensor:
    return torch.stack([encoder.preprocess(image.convert("RGB")) for image in images])


def unit(output: Any) -> Tensor:
    return F.normalize(output.pooler_output, dim=-1)


def furthest(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return (ours - theirs).abs().max().item()


@torch.inference_mode()
def differences(encoder: Encoder, folder: Path) -> SimpleNamespace:
    """Of pixels, image and text features, between the student and the folder in stock transformers."""
    write_hugging_face(encoder, folder)
    model = AutoModel.from_pretrained(folder).eval()
    exact = AutoProcessor.from_pretrained(folder / "exact", trust_remote_code=True)
    images = odd_images()
    expected = own_pixels(encoder, images)
    inputs = exact(text=CAPTIONS, images=images, padding="max_length", truncation=True, return_tensors="pt")
    pixels = inputs.pop("pixel_values")
    return SimpleNamespace(
        pixels=furthest(expected, pixels),
        image=furthest(encoder.encode_image(expected), unit(model.get_image_features(pixels))),
        text=furthest(encoder.encode_text(encoder.spec.tokenize(CAPTIONS)), unit(model.get_text_features(**inputs))),
        scale=furthest(encoder.logit_scale, model.logit_scale.exp().squeeze()),
        model=model,
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_stock_transformers_gives_the_students_features(tmp_path: Path, name: str) -> None:
    found = differences(clip_student(**CONFIGS[name]), tmp_path)
    assert type(found.model).__name__ == "CLIPModel"
    assert found.pixels == 0
    assert found.image < 1e-6
    assert found.text < 1e-6
    assert found.scale < 1e-5


@pytest.mark.parametrize("tanh", [False, True])
def test_stock_transformers_gives_a_siglip_students_features(tmp_path: Path, siglip_folder: Path, tanh: bool) -> None:
    student = siglip_student(siglip_folder, **({"act_kwargs": {"approximate": "tanh"}} if tanh else {}))
    found = differences(student, tmp_path)
    assert type(found.model).__name__ == "SiglipModel"
    assert found.model.config.text_config.hidden_act == ("gelu_pytorch_tanh" if tanh else "gelu")
    assert found.model.config.vision_config.hidden_act == "gelu"
    assert found.pixels == 0
    assert found.image < 1e-6
    assert found.text < 1e-6
    assert found.scale < 1e-5
    assert found.model.logit_bias.item() == student.logit_bias.item() != 0  # type: ignore[union-attr]


def test_a_siglip_tower_with_the_tokenizer_of_clip_sees_its_padding(tmp_path: Path, siglip_folder: Path) -> None:
    student = siglip_student(siglip_folder, hf_tokenizer_name=None, tokenizer_kwargs={}, vocab_size=49408)
    assert differences(student, tmp_path).text < 1e-6
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a cat!", padding="max_length")["input_ids"] == [49406, 320, 2368, 256, 49407, 0, 0, 0, 0, 0]
    assert tokenizer.model_input_names == ["input_ids"]  # a mask would hide the padding that it was trained on


@torch.inference_mode()
def test_every_padding_of_a_causal_tower_gives_the_same_features(tmp_path: Path, plain: Encoder) -> None:
    write_hugging_face(plain, tmp_path)
    model, processor = AutoModel.from_pretrained(tmp_path).eval(), AutoProcessor.from_pretrained(tmp_path)
    captions = ["a cat", "", "two small dogs, “asleep”"]
    expected = plain.encode_text(plain.spec.tokenize(captions))
    for padding, length in ((True, 9), ("max_length", 12)):
        tokens = processor(text=captions, padding=padding, truncation=True, return_tensors="pt")
        assert tokens["input_ids"].shape == (3, length)
        assert furthest(expected, unit(model.get_text_features(**tokens))) < 1e-6
    assert processor.tokenizer.model_max_length == 12
    assert processor.tokenizer(CAPTIONS[4])["input_ids"].count(49407) == 1  # the one at the end, not the caption's


def test_autotokenizer_takes_the_file_as_it_is(tmp_path: Path, plain: Encoder) -> None:
    write_hugging_face(plain, tmp_path)
    file, tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), AutoTokenizer.from_pretrained(tmp_path)
    file.no_padding()
    texts = [*CHECKED, *CAPTIONS]
    assert tokenizer(texts, truncation=True)["input_ids"] == [file.encode(text).ids for text in texts]


@torch.inference_mode()
def test_the_default_image_processor_is_close(tmp_path: Path, plain: Encoder) -> None:
    write_hugging_face(plain, tmp_path)
    processor = AutoProcessor.from_pretrained(tmp_path)
    assert (type(processor).__name__, type(processor.image_processor).__name__) == (
        "CLIPProcessor",
        "CLIPImageProcessor",
    )
    images = [image.convert("RGB") for image in odd_images()]  # it puts transparency on white, open_clip drops it
    expected, found = own_pixels(plain, images), processor(images=images, return_tensors="pt")["pixel_values"]
    features = plain.encode_image(expected), plain.encode_image(found)
    assert F.cosine_similarity(*features).min() > 0.999
    assert (expected - found).abs().mean() < 0.05


def test_clipkd_loads_the_folder_as_the_same_model(tmp_path: Path, plain: Encoder, siglip_folder: Path) -> None:
    squashed = clip_student()
    squashed = build_open_clip(
        "squashed", squashed.model_config or {}, preprocess_config={**plain.preprocess_config, "resize_mode": "squash"}
    )
    cropped = siglip_student(siglip_folder, preprocess={"resize_mode": "shortest"})
    for name, student in (
        ("clip", plain),
        ("squashed clip", squashed.eval()),
        ("siglip", siglip_student(siglip_folder)),
        ("cropped siglip", cropped),
    ):
        folder = tmp_path / name
        folder.mkdir()
        write_hugging_face(student, folder)
        loaded = load_model(str(folder))
        pixels = own_pixels(student, odd_images())
        assert torch.equal(own_pixels(loaded, odd_images()), pixels)
        with torch.inference_mode():
            assert furthest(student.encode_image(pixels), loaded.encode_image(pixels)) < 1e-6
            ours, theirs = (model.encode_text(model.spec.tokenize(CAPTIONS)) for model in (student, loaded))
        assert furthest(ours, theirs) < 1e-6
        processor = AutoProcessor.from_pretrained(folder / "exact", trust_remote_code=True)
        found = processor(images=odd_images(), return_tensors="pt")["pixel_values"]
        assert furthest(pixels, found) < 1e-6


def test_one_tower_alone_loads_with_its_projection(tmp_path: Path, plain: Encoder) -> None:
    write_hugging_face(plain, tmp_path)
    tower = CLIPTextModelWithProjection.from_pretrained(tmp_path).eval()
    tokens = plain.spec.tokenize(CAPTIONS)
    with torch.inference_mode():
        found = F.normalize(tower(tokens).text_embeds, dim=-1)
        assert furthest(plain.encode_text(tokens), found) < 1e-6


def test_everyone_may_read_the_files(tmp_path: Path, plain: Encoder) -> None:
    write_hugging_face(plain, tmp_path)
    processor = ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    exact = ("exact/image_processing_exact.py", *(f"exact/{name}" for name in processor))
    files = {str(path.relative_to(tmp_path)): path for path in tmp_path.rglob("*") if path.is_file()}
    assert files.keys() == {"config.json", "model.safetensors", *processor, *exact}
    assert {oct(path.stat().st_mode & 0o777) for path in files.values()} == {"0o644"}


def test_the_bias_of_a_sigmoid_student_stays_readable(tmp_path: Path) -> None:
    student = clip_student(init_logit_bias=-9.5)
    found = differences(student, tmp_path)
    assert found.image < 1e-6
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["logit_bias"] == pytest.approx(student.logit_bias.item()) != 0  # type: ignore[union-attr]
    assert found.model.config.logit_bias == config["logit_bias"]


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_cfg", "ls_init_value", 0.1),
        ("vision_cfg", "attentional_pool", True),
        ("vision_cfg", "no_ln_pre", True),
        ("vision_cfg", "final_ln_after_pool", True),
        ("vision_cfg", "pool_type", "avg"),
        ("vision_cfg", "output_tokens", True),
        ("vision_cfg", "block_type", "custom"),
        ("vision_cfg", "qk_norm", True),
        ("vision_cfg", "scaled_cosine_attn", True),
        ("vision_cfg", "scale_heads", True),
        ("vision_cfg", "scale_fc", True),
        ("vision_cfg", "timm_model_name", "vit_clipkd_test_siglip"),
        ("text_cfg", "no_causal_mask", True),
        ("text_cfg", "pool_type", "last"),
        ("text_cfg", "embed_cls", True),
        ("text_cfg", "proj_bias", True),
        ("text_cfg", "proj_type", "none"),
        ("text_cfg", "ls_init_value", 0.1),
        ("text_cfg", "qk_norm", True),
        ("text_cfg", "hf_model_name", "roberta-base"),
    ],
)
def test_an_option_that_clipmodel_lacks_is_refused_by_name(plain: Encoder, part: str, field: str, value: Any) -> None:
    student = deepcopy(plain)
    student.model_config = clip_config({part: {field: value}})
    words = rf"{part}\.{field} is {value!r}; transformers' CLIPModel cannot do that; use --to open_clip or --to onnx"
    with pytest.raises(ValueError, match=words):
        find_family(student)


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_cfg", "timm_proj", "linear"),
        ("text_cfg", "no_causal_mask", False),
        ("text_cfg", "pool_type", "argmax"),
        ("text_cfg", "proj_bias", False),
    ],
)
def test_an_option_that_siglipmodel_lacks_is_refused_by_name(
    siglip_folder: Path, part: str, field: str, value: Any
) -> None:
    student = siglip_student(siglip_folder)
    student.model_config[part][field] = value  # type: ignore[index]
    with pytest.raises(ValueError, match=rf"{part}\.{field} is {value!r}; transformers' SiglipModel cannot do that"):
        find_family(student)


def test_a_key_beside_the_towers_is_refused(plain: Encoder) -> None:
    student = deepcopy(plain)
    student.model_config = {**clip_config({}), "multimodal_cfg": {}}
    with pytest.raises(ValueError, match="its config has multimodal_cfg"):
        find_family(student)
    assert find_family(plain) == "clip"


def test_real_towers_of_other_kinds_are_refused(plain: Encoder) -> None:
    resnet = clip_student(vision_cfg={"layers": [1, 1, 1, 1], "width": 16, "image_size": 32})
    with pytest.raises(ValueError, match="its image tower is a ModifiedResNet"):
        find_family(resnet)
    mixed = deepcopy(plain)
    mixed.model.__class__ = type("CoCa", (open_clip.CLIP,), {})
    with pytest.raises(ValueError, match="it is a CoCa"):
        find_family(mixed)
    mixed.model_config = None
    with pytest.raises(ValueError, match="is not an open_clip model"):
        find_family(mixed)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("resize_mode", "longest", "resize_mode is 'longest', not shortest or squash"),
        ("interpolation", "random", "interpolation is 'random', not bilinear or bicubic"),
    ],
)
def test_other_preprocessing_is_refused(plain: Encoder, option: str, value: str, words: str) -> None:
    student = deepcopy(plain)
    student.preprocess_config = {**student.preprocess_config, option: value}
    with pytest.raises(ValueError, match=words):
        find_family(student)


def test_images_that_are_not_square_are_refused() -> None:
    with pytest.raises(ValueError, match="its images are 32 × 48, its patches 8, not all square"):
        find_family(clip_student(vision_cfg={"image_size": [32, 48]}))


def test_pooling_at_the_highest_id_of_a_foreign_tokenizer_is_refused(siglip_folder: Path) -> None:
    student = clip_student(text_cfg={"hf_tokenizer_name": str(siglip_folder), "vocab_size": 100})
    with pytest.raises(ValueError, match="pools at the highest id of the tokenizer"):
        find_family(student)
    student = clip_student(text_cfg={"pool_type": "eos", "eos_id": 2})
    with pytest.raises(ValueError, match="eos_id is 2, which transformers takes for the highest id"):
        find_family(student)


def test_a_weight_without_a_place_is_refused(tmp_path: Path, plain: Encoder) -> None:
    student = deepcopy(plain)
    student.model.visual.extra = torch.nn.Linear(2, 2)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"its weight visual\.extra\.weight has no place"):
        write_hugging_face(student, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_place_without_a_weight_is_refused(tmp_path: Path) -> None:
    student = clip_student(vision_cfg={"norm_kwargs": {"bias": False}})
    with pytest.raises(ValueError, match=r"its weights do not fit .*Missing key.*pre_layrnorm\.bias"):
        write_hugging_face(student, tmp_path)


def test_what_no_config_says_shows_in_the_features(tmp_path: Path, plain: Encoder) -> None:
    student = deepcopy(plain)
    student.model.visual.transformer.resblocks[1].mlp.gelu = torch.nn.ReLU()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"its features there differ by .*, more than 1e-05"):
        write_hugging_face(student, tmp_path)
    student.model.visual.transformer.resblocks[0].mlp.gelu = torch.nn.ReLU()  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"its activation is ReLU\(\)"):
        write_hugging_face(student, tmp_path)
