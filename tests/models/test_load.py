"""Encoders from names and folders, and errors where other libraries would use the wrong weights."""

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transformer import QuickGELU
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clipkd import files
from clipkd.config.data import DataConfig
from clipkd.config.train import StudentConfig
from clipkd.data.loader import Augment, Collate
from clipkd.data.sources import Pair
from clipkd.models.create import check_weights, tokenizer_name
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student
from clipkd.models.load import load_model as load
from clipkd.models.students import MODEL_CONFIGS
from clipkd.training import checkpoint
from clipkd.views import View, Views
from tests.data.samples import encode

CAPTIONS = [
    "a photo of a cat",
    "Two dogs, running!",
    "a caption far too long for the context of this small model, " * 3,
]


def student(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return create_student(StudentConfig(model="tiny-student")).eval()


def weights(encoder: Encoder) -> dict[str, Tensor]:
    return dict(encoder.model.state_dict())


def assert_same_weights(a: Encoder, b: Encoder) -> None:
    assert weights(a).keys() == weights(b).keys()
    assert [name for name, value in weights(a).items() if not torch.equal(value, weights(b)[name])] == []


def images(encoder: Encoder, num: int = 2) -> Tensor:
    return torch.randn(num, 3, *encoder.spec.size, generator=torch.Generator().manual_seed(1))


def test_a_student_follows_from_its_name_and_the_seed() -> None:
    assert_same_weights(student(1), student(1))
    assert student(1).weights_sha256() == student(1).weights_sha256()
    assert student(1).weights_sha256() != student(2).weights_sha256()
    shape = json.loads((MODEL_CONFIGS / "tiny-student.json").read_text())
    size = shape["vision_cfg"]["image_size"]
    assert (student().dim, student().spec.size) == (shape["embed_dim"], (size, size))
    assert student().model_config == shape


@torch.no_grad()
def test_features_are_open_clips_own_normalised() -> None:
    encoder = student()
    view = images(encoder)
    texts = encoder.spec.tokenize(CAPTIONS)
    torch.testing.assert_close(
        encoder.encode_image(view), encoder.model.encode_image(view, normalize=True), rtol=0, atol=1e-6
    )  # type: ignore[operator]
    torch.testing.assert_close(
        encoder.encode_text(texts), encoder.model.encode_text(texts, normalize=True), rtol=0, atol=1e-6
    )  # type: ignore[operator]
    assert encoder.encode_text(texts).norm(dim=1).tolist() == pytest.approx([1.0] * 3, abs=1e-6)
    assert encoder.logit_scale.item() == pytest.approx(1 / 0.07, rel=1e-6)
    assert texts.shape == (3, encoder.model_config["text_cfg"]["context_length"])  # type: ignore[index]


def test_a_students_json_leaves_the_known_model_of_its_name_alone(tmp_path: Path) -> None:
    config = json.loads((MODEL_CONFIGS / "tiny-student.json").read_text())
    (tmp_path / "ViT-B-32.json").write_text(json.dumps({**config, "embed_dim": 24}))
    assert create_student(StudentConfig(model=str(tmp_path / "ViT-B-32.json"))).dim == 24
    assert open_clip.get_model_config("ViT-B-32")["embed_dim"] == 512  # type: ignore[index]


def test_a_student_may_start_from_a_weight_file(tmp_path: Path) -> None:
    save_file(weights(student(5)), tmp_path / "start.safetensors")
    started = create_student(StudentConfig(model=f"tiny-student@{tmp_path / 'start.safetensors'}"))
    assert_same_weights(started, student(5))
    torch.manual_seed(0)
    save_file(weights(create_student(StudentConfig(model="tiny-teacher"))), tmp_path / "other.safetensors")
    for model, words in (
        ("tiny-student@none.safetensors", "tiny-student has no weights 'none.safetensors'"),
        (f"tiny-student@{tmp_path / 'other.safetensors'}", "'tiny-student' with weights .*other.safetensors"),
        ("ViT-T-17", "no model 'ViT-T-17'.*did you mean 'ViT-T-16'"),
        ("ViT-B-16@openai", ".*trained with QuickGELU"),
    ):
        with pytest.raises(ValueError, match=rf"^student\.model: .*{words}"):
            create_student(StudentConfig(model=model))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("ViT-B-33@openai", r"no model 'ViT-B-33', and no such folder; did you mean .*'ViT-B-32'"),
        ("zzzzzz", r"no model 'zzzzzz', and no such folder; name a folder"),
        ("ViT-B-32", r"ViT-B-32 alone has random weights; .*'laion2b_s34b_b79k'"),
        (
            "ViT-B-32@laion9b",
            r"ViT-B-32 has no weights 'laion9b', and no such file exists; tags: .*'laion2b_s34b_b79k'",
        ),
        ("ViT-L-14@openai", r"trained with QuickGELU, the config says GELU; use the model 'ViT-L-14-quickgelu'"),
        ("ViT-L/14@openai", r"trained with QuickGELU, the config says GELU; use the model 'ViT-L-14-quickgelu'"),
        ("local-dir:no/such/folder", r"no folder no/such/folder"),
    ],
)
def test_a_wrong_name_or_tag_is_refused_with_the_right_one(model: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        load(model)


def named_instead(model: str, tag: str) -> str | None:
    """The model that an error about the activation names; None without an error."""
    try:
        check_weights(model, open_clip.get_model_config(model) or {}, tag)
    except ValueError as error:
        return re.findall(r"use the model '(.*?)'", str(error))[0]
    return None


def test_where_the_activation_is_wrong_the_model_named_instead_takes_the_weights() -> None:
    instead = {(model, tag): named_instead(model, tag) for model, tag in open_clip.list_pretrained()}
    assert sum(other is not None for other in instead.values()) > 20
    for (model, tag), other in instead.items():
        if other is not None:
            assert open_clip.get_model_config(other) is not None, other
            assert named_instead(other, tag) is None, f"{model} with {tag}"


def export(encoder: Encoder, folder: Path) -> Path:
    """An open_clip folder, with a normalisation that no default has."""
    folder.mkdir()
    preprocess = {**encoder.preprocess_config, "mean": [0.1, 0.2, 0.3], "interpolation": "bilinear"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": encoder.model_config, "preprocess_cfg": preprocess})
    )
    save_file(weights(encoder), folder / "open_clip_model.safetensors")
    return folder


def test_an_open_clip_folder_brings_its_weights_and_its_preprocessing(tmp_path: Path) -> None:
    folder = export(student(3), tmp_path / "model")
    assert_same_weights(load(f"local-dir:{folder}"), student(3))
    encoder = load(str(folder))
    assert_same_weights(encoder, student(3))
    assert not encoder.training
    assert (encoder.spec.mean, encoder.spec.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
    assert encoder.spec.tokenizer_name == student().spec.tokenizer_name
    (folder / "open_clip_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"open_clip cannot load local-dir:.*model"):
        load(f"local-dir:{folder}")
    with pytest.raises(ValueError, match=r"no open_clip_config\.json .* config\.json .* checkpoints"):
        load(str(tmp_path))


def test_a_run_gives_its_student_or_its_average(tmp_path: Path) -> None:
    distiller, average = torch.nn.Module(), student(7)
    distiller.student, distiller.image_projection = student(6), torch.nn.Linear(3, 3)
    identity = {
        "name": "tiny-student",
        "model_cfg": distiller.student.model_config,
        "preprocess_cfg": distiller.student.preprocess_config,
    }
    optimizer = torch.optim.AdamW(distiller.parameters())
    parts = {"model": distiller, "optimizer": optimizer, "memory": {}, "state": {"identity": {"student": identity}}}
    with_average = checkpoint.save(tmp_path / "a", 1, ema=average, **parts)
    without = checkpoint.save(tmp_path / "b", 1, ema=None, **parts)
    assert_same_weights(load(str(tmp_path / "a")), distiller.student)
    assert_same_weights(load(str(with_average)), distiller.student)
    assert_same_weights(load(str(tmp_path / "a"), ema=True), average)
    with pytest.raises(ValueError, match="keeps no moving average"):
        load(str(without), ema=True)


@torch.no_grad()
def test_a_transformers_folder_gives_transformers_own_features(clip_folder: Path) -> None:
    encoder = load(str(clip_folder))
    model, tokenizer = CLIPModel.from_pretrained(clip_folder).eval(), CLIPTokenizer.from_pretrained(clip_folder)
    assert (encoder.dim, encoder.spec.size, encoder.spec.mean) == (8, (48, 48), (0.1, 0.2, 0.3))
    assert encoder.spec.interpolation == "bilinear"
    assert not encoder.training
    view = images(encoder, 3)
    tokens = tokenizer(CAPTIONS, padding=True, truncation=True, return_tensors="pt")
    theirs = model(pixel_values=view, **tokens)
    assert (encoder.encode_image(view) - theirs.image_embeds).abs().max() < 1e-6
    assert (encoder.encode_text(encoder.spec.tokenize(CAPTIONS)) - theirs.text_embeds).abs().max() < 1e-6
    ours = encoder.logit_scale * encoder.encode_image(view) @ encoder.encode_text(encoder.spec.tokenize(CAPTIONS)).T
    torch.testing.assert_close(ours, theirs.logits_per_image, rtol=0, atol=1e-4)
    assert theirs.image_embeds.std(dim=0).min() > 1e-3


def drop_projection(folder: Path) -> None:
    kept = files.read_tensors(folder / "model.safetensors")
    del kept["visual_projection.weight"]
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def call_it_bert(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop_projection, r"its weight file lacks \['visual_projection\.weight'\]"),
        (call_it_bert, "holds a 'bert' model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "transformers cannot load"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "transformers cannot load"),
        (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "has no tokenizer"),
    ],
)
def test_a_damaged_transformers_folder_is_refused(
    clip_folder: Path, tmp_path: Path, damage: Callable[[Path], Any], words: str
) -> None:
    folder = shutil.copytree(clip_folder, tmp_path / "partial")
    (folder / "processor_config.json").unlink(missing_ok=True)
    damage(folder)
    with pytest.raises(ValueError, match=rf"partial.*{words}|{words}.*partial"):
        load(str(folder))


def test_a_student_gets_a_logit_bias_beside_its_pretrained_weights(tmp_path: Path) -> None:
    """open_clip starts a bias that the weights lack at 0, which would call every pair a match to begin with."""
    plain = create_student(StudentConfig(model="tiny-student"))
    torch.save(plain.model.state_dict(), tmp_path / "weights.pt")
    config = StudentConfig(model=f"tiny-student@{tmp_path / 'weights.pt'}")
    student = create_student(config, logit_bias=-10.0)
    assert student.logit_bias is not None
    assert student.logit_bias.item() == -10.0
    assert "logit_bias" in dict(student.model.named_parameters())
    assert torch.equal(student.model.token_embedding.weight, plain.model.token_embedding.weight)
    assert student.model_config is not None
    assert student.model_config["init_logit_bias"] == -10.0
    assert "init_logit_bias" not in (plain.model_config or {})
    torch.save(student.model.state_dict(), tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="open_clip cannot make 'tiny-student' with weights"):
        create_student(config)


def test_a_siglip_folder_gives_the_features_of_its_own_library(siglip_folder: Path) -> None:
    from transformers import AutoTokenizer, SiglipImageProcessor, SiglipModel

    encoder = load(str(siglip_folder))
    assert (encoder.spec.size, encoder.spec.mean, encoder.spec.std) == ((40, 40), (0.5,) * 3, (0.5,) * 3)
    assert encoder.logit_scale.shape == ()
    assert encoder.logit_scale.item() == pytest.approx(math.exp(2.3))
    assert encoder.logit_bias is not None
    assert encoder.logit_bias.item() == pytest.approx(-9)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    captions = ["a drawing of a cat", "an unknown word", "two dogs , one face , a smile , a cat and two dogs"]
    own = SiglipModel.from_pretrained(siglip_folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(siglip_folder)
    processor = SiglipImageProcessor.from_pretrained(siglip_folder)
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=10, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = own(input_ids=tokens, **processor(picture, return_tensors="pt"))
        # What training makes of a whole image, and what evaluation does.
        views = Views([encoder.spec])
        pixels = Augment(DataConfig(path="x", min_crop=1.0), views, 0)(Pair("", encode(picture, "PNG"), ("a",)), 0, 0)
        (view,) = views.of(Collate(views)([pixels]))
        for images in (view.images, encoder.preprocess(picture)[None]):
            torch.testing.assert_close(encoder.encode_image(images), expected.image_embeds, rtol=0, atol=1e-5)
        assert torch.equal(encoder.spec.tokenize(captions), tokens)
        torch.testing.assert_close(encoder.encode_text(tokens), expected.text_embeds, rtol=0, atol=1e-5)
        logits = encoder.logit_scale * expected.text_embeds @ expected.image_embeds.T + encoder.logit_bias
    torch.testing.assert_close(logits, expected.logits_per_text, rtol=1e-5, atol=1e-5)


def test_images_are_prepared_as_transformers_does(clip_folder: Path, siglip_folder: Path) -> None:
    from transformers import SiglipImageProcessor

    ramp = np.linspace(0, 255, 90 * 61 * 3).reshape(61, 90, 3).astype(np.uint8)
    expected = SiglipImageProcessor.from_pretrained(siglip_folder)(Image.fromarray(ramp), return_tensors="pt")
    found = load(str(siglip_folder)).preprocess(Image.fromarray(ramp))
    # torchvision's resizing of tensors and Pillow's differ by a rounding of 8 bits.
    torch.testing.assert_close(found, expected["pixel_values"][0], rtol=0, atol=2 * 2 / 255)
    expected = CLIPImageProcessor.from_pretrained(clip_folder)(Image.fromarray(ramp), return_tensors="pt")
    difference = (load(str(clip_folder)).preprocess(Image.fromarray(ramp)) - expected["pixel_values"][0]).abs()
    assert difference.max() < 2.5 / 255 / 0.26
    assert difference.mean() < 0.1 / 255 / 0.26


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_held_in_half_precision_keeps_its_scale_and_its_features(
    clip_folder: Path, siglip_folder: Path, dtype: torch.dtype
) -> None:
    for folder in (clip_folder, siglip_folder):
        full = load(str(folder))
        half = load(str(folder)).hold_in(dtype)
        weights = [p for name, p in half.model.named_parameters() if "logit" not in name]
        assert {weight.dtype for weight in weights} == {dtype}
        assert torch.equal(half.logit_scale, full.logit_scale)
        images = torch.randn(3, 3, *full.spec.size, generator=torch.Generator().manual_seed(0))
        texts = full.spec.tokenize(["a drawing of a cat", "two dogs", "one face"])
        with torch.no_grad():
            for ours, theirs in zip(
                half.features(View(images, texts))[:2], full.features(View(images, texts))[:2], strict=True
            ):
                assert ours.dtype == torch.float32
                torch.testing.assert_close(ours.norm(dim=-1), torch.ones(3))
                assert (ours * theirs).sum(dim=-1).min() > 0.999


PROMPTS = ["a cat", "a photo of a dog.", "x"]


def test_a_causal_text_tower_is_given_no_padding_and_one_that_looks_at_it_all(
    clip_folder: Path, siglip_folder: Path
) -> None:
    for encoder, causal in ((student(), True), (load(str(clip_folder)), True), (load(str(siglip_folder)), False)):
        seen: list[int] = []
        texts = encoder.spec.tokenize(PROMPTS)
        (embedding,) = (m for n, m in encoder.model.named_modules() if n.endswith("token_embedding"))
        with torch.inference_mode():
            whole = encoder.encode_text(texts)
            encoder.encode_prompts(texts)
            handle = embedding.register_forward_hook(
                lambda _module, given, _, seen=seen: seen.append(given[0].shape[1])
            )
            short = encoder.encode_prompts(texts)
            handle.remove()
        assert (whole - short).abs().max() < 1e-6
        (length,) = seen
        assert (length < texts.shape[1]) == causal


def test_equal_weights_of_another_architecture_are_told_apart() -> None:
    plain, quick = (create_student(StudentConfig(model="tiny-student")) for _ in range(2))
    quick.model.load_state_dict(plain.model.state_dict())
    assert plain.weights_sha256() == quick.weights_sha256()
    assert plain.architecture() == quick.architecture()
    for module in quick.model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.GELU):
                setattr(module, name, QuickGELU())
    assert plain.weights_sha256() == quick.weights_sha256()
    assert plain.architecture() != quick.architecture()


def test_a_tokenizer_is_named_by_its_tokens() -> None:
    names = [
        tokenizer_name(open_clip.SimpleTokenizer(context_length=n, clean=c)) for n, c in [(12, "lower"), (9, "lower")]
    ]
    assert names == ["CLIP BPE, 12 tokens", "CLIP BPE, 9 tokens"]
    others = [tokenizer_name(open_clip.SimpleTokenizer(context_length=12, clean="canonicalize")) for _ in range(2)]
    assert re.fullmatch(r"SimpleTokenizer [0-9a-f]{8}", others[0])
    assert others[0] == others[1]


@pytest.mark.parametrize(
    ("vision", "words"),
    [
        (
            {"timm_model_name": "vit_tiny_patch16_224", "image_size": 64},
            r"do not run: Input height \(64\) doesn't match",
        ),
        (
            {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32, "output_tokens": True},
            "leave output_tokens out",
        ),
    ],
)
def test_a_tower_that_cannot_be_used_is_one_sentence(tmp_path: Path, vision: dict[str, Any], words: str) -> None:
    text = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    (tmp_path / "x.json").write_text(json.dumps({"embed_dim": 32, "vision_cfg": vision, "text_cfg": text}))
    with pytest.raises(ValueError, match=rf"student\.model: x: its towers .*{words}"):
        create_student(StudentConfig(model=str(tmp_path / "x.json")))
