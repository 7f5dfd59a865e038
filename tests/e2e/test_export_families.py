"""Every family of students in every format that it fits: other software gives the student's features to 1e-5."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torchvision.transforms import v2

from clipkd.config.train import StudentConfig
from clipkd.export.artefacts import check_formats, write_formats
from clipkd.export.parity import open_artefact
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student
from clipkd.models.load import load_model
from clipkd.models.onnx_student import onnx_file, preprocess
from tests.export.students import CAPTIONS, clip_student, odd_images, own_pixels
from tests.models.siglip_tower import vit_clipkd_test_siglip

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": None, "image_size": 64}
ATTENTION = {**TIMM, "timm_model_name": vit_clipkd_test_siglip.__name__, "image_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT},
    "mobilenetv3": {"vision_cfg": {**TIMM, "timm_model_name": "mobilenetv3_small_050"}},
    "modified_resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
    "attention_pool": {"embed_dim": 32, "vision_cfg": {**ATTENTION, "timm_pool": "map", "timm_proj": "none"}},
    "efficientvit": {"vision_cfg": {**TIMM, "timm_model_name": "efficientvit_b0"}},
    "fastvit_seen_padding": {
        "vision_cfg": {**TIMM, "timm_model_name": "fastvit_t8"},
        "text_cfg": {**TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
}
SLOW = ("attention_pool", "efficientvit", "fastvit_seen_padding")


def make_student(name: str, folder: Path) -> Encoder:
    """Random weights and batch statistics, none of them at its initial value."""
    config = {"embed_dim": 24, "text_cfg": TEXT, **FAMILIES[name]}
    (folder / f"{name}.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    encoder = create_student(StudentConfig(model=str(folder / f"{name}.json"))).eval()
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
        for _ in range(20):  # statistics of real images, so that features differ
            encoder.train().encode_image(encoder.spec.normalize(torch.randint(0, 256, (8, 3, *encoder.spec.size))))
    return encoder.eval()


@torch.no_grad()
def expected_features(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """By torchvision and open_clip's modules, not by the encoder's own methods."""
    size = encoder.spec.size[0]
    steps = [v2.RGB(), v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC), v2.CenterCrop(size)]
    steps += [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(encoder.spec.mean, encoder.spec.std),
    ]
    pixels = torch.stack([v2.Compose(steps)(image.convert("RGB")) for image in odd_images()])
    tokens = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])(CAPTIONS)
    clip: Any = encoder.model
    return F.normalize(clip.encode_image(pixels), dim=-1), F.normalize(clip.encode_text(tokens), dim=-1)


def by_onnxruntime(folder: Path, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Sessions and tokenizers alone; batch size and length are free."""
    vision, text = (onnxruntime.InferenceSession(onnx_file(folder, tower, "onnx")) for tower in ("vision", "text"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(CAPTIONS)])
    texts = text.run(None, {"input_ids": ids})[0]
    alone = text.run(None, {"input_ids": np.array([tokenizer.encode(CAPTIONS[0]).ids])})[0]
    np.testing.assert_allclose(alone, texts[:1], atol=1e-6)
    return torch.from_numpy(vision.run(None, {"pixel_values": pixels})[0]), torch.from_numpy(texts)


@torch.inference_mode()
def by_evaluation(folder: Path, format: str) -> tuple[Tensor, Tensor]:
    encoder = load_model(f"{format}:{folder}")
    texts = torch.cat([encoder.encode_prompts(encoder.spec.tokenize([caption])) for caption in CAPTIONS])
    return encoder.encode_image(own_pixels(encoder)), texts


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().amax(dim=1).tolist() == pytest.approx([0] * len(theirs), abs=1e-5)
        assert theirs.std(dim=0).max() > 1e-3, "inputs must not all have the same features"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in FAMILIES])
def test_other_software_gives_the_students_features(name: str, tmp_path: Path) -> None:
    encoder = make_student(name, tmp_path)
    exact = ["open_clip", "onnx", *(["hf"] if name == "vit" else [])]
    formats = [*exact, *(["onnx-fp16", "onnx-int8"] if name == "vit" else [])]
    check_formats(encoder, formats)
    assert write_formats(encoder, tmp_path, formats) == {}
    expected = expected_features(encoder)
    assert [len(features) for features in expected] == [18, len(CAPTIONS)]
    assert_close(by_onnxruntime(tmp_path, own_pixels(encoder).numpy()), expected)
    for format in exact:
        images, texts = open_artefact(tmp_path, format)
        with torch.inference_mode():
            assert_close((images([image.convert("RGB") for image in odd_images()]), texts(CAPTIONS)), expected)
        if format != "open_clip":
            assert_close(by_evaluation(tmp_path, format), expected)
    if name == "vit":
        assert_smaller_and_near(tmp_path, expected)
    else:
        with pytest.raises(ValueError, match=r"(CLIP|Siglip)Model.*--to"):
            check_formats(encoder, ["hf"])


def assert_smaller_and_near(folder: Path, expected: tuple[Tensor, Tensor]) -> None:
    sizes = {}
    for format, cosine in (("onnx", 0.999999), ("onnx-fp16", 0.9999), ("onnx-int8", 0.99)):
        found = by_evaluation(folder, format)
        assert all(F.cosine_similarity(a, b).min() > cosine for a, b in zip(found, expected, strict=True))
        sizes[format] = sum(onnx_file(folder, tower, format).stat().st_size for tower in ("vision", "text"))
    assert sizes["onnx-fp16"] < 0.6 * sizes["onnx"]
    assert sizes["onnx-int8"] < 0.4 * sizes["onnx"]


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_without_torch_is_torchvisions(mode: str) -> None:
    encoder = clip_student(preprocess={"resize_mode": mode})
    about = {"image_size": encoder.spec.size, "image_mean": encoder.spec.mean, "image_std": encoder.spec.std}
    about |= {"interpolation": "bicubic", "resize_mode": mode}
    ours = np.stack([preprocess(image, about) for image in odd_images()])
    np.testing.assert_allclose(ours, own_pixels(encoder).numpy(), atol=1e-6)


def test_preprocessing_that_the_metadata_cannot_describe_is_refused() -> None:
    with pytest.raises(ValueError, match="longest"):
        check_formats(clip_student(preprocess={"resize_mode": "longest"}), ["onnx"])
    with pytest.raises(ValueError, match="32 × 48"):
        check_formats(clip_student(vision_cfg={"image_size": [32, 48]}), ["onnx"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "fastvit_seen_padding"])
def test_executorch_gives_the_students_features(name: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs the extra executorch")
    encoder = make_student(name, tmp_path)
    assert write_formats(encoder, tmp_path, ["executorch"]) == {}
    images, texts = open_artefact(tmp_path, "executorch")
    assert_close(
        (images([image.convert("RGB") for image in odd_images()]), texts(CAPTIONS)), expected_features(encoder)
    )
