"""Every family of students in every format that it fits: the features of the student itself, to 1e-5, by other software."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor
from torchvision.transforms import v2

from clipkd.config.train import StudentConfig
from clipkd.export.artefacts import check_formats, write_formats
from clipkd.models.create import build_open_clip, create_student
from clipkd.models.encoder import Encoder
from clipkd.models.load import load_model
from clipkd.models.onnx import load_onnx
from clipkd.models.onnx_student import preprocess
from tests.models.siglip_tower import vit_clipkd_test_siglip

TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TIMM = {"timm_model_pretrained": False, "timm_pool": "avg", "timm_proj": None, "image_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}},
    "vit_quickgelu_thin_text": {
        "vision_cfg": {"image_size": 48, "layers": 2, "width": 96, "head_width": 32, "patch_size": 16},
        "text_cfg": {**TEXT, "width": 16},
        "quick_gelu": True,
    },
    "mobilenetv3": {"vision_cfg": {**TIMM, "timm_model_name": "mobilenetv3_small_050"}},
    "efficientvit": {"vision_cfg": {**TIMM, "timm_model_name": "efficientvit_b0"}},
    "fastvit_seen_padding": {
        "vision_cfg": {**TIMM, "timm_model_name": "fastvit_t8"},
        "text_cfg": {**TEXT, "no_causal_mask": True},
        "custom_text": True,
    },
    "attention_pool": {
        "embed_dim": 32,
        "vision_cfg": {
            "timm_model_name": vit_clipkd_test_siglip.__name__,
            "timm_model_pretrained": False,
            "image_size": 40,
            "timm_pool": "map",
            "timm_proj": "none",
        },
    },
    "modified_resnet": {"vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None}},
}
FITS_TRANSFORMERS = ("vit", "vit_quickgelu_thin_text")
CAPTIONS = (
    *(
        "a photo of a cat",
        "",
        "TWO dogs & 3½ birds!",
        "naïve “café” isn't   open",
        "日本語 🐈",
        "w" * 70,
        "one more " * 40,
    ),
    *("tabs\tand\nlines", "AT&amp;T", "end<|endoftext|> of it"),
)


def make_student(name: str, folder: Path) -> Encoder:
    """Random weights and statistics, none of them at the value that it is initialised with."""
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


def odd_images() -> list[Image.Image]:
    """Every way that a side can exceed the crop, and every mode that people have files in."""
    rng = np.random.default_rng(0)
    images = [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in (
            (48, 48),
            (49, 51),
            (61, 90),
            (131, 64),
            (64, 67),
            (31, 200),
            (500, 333),
            (7, 9),
            (64, 130),
        )
    ]
    modes = ("L", "P", "RGBA", "CMYK", "1", "I;16")
    grey = Image.fromarray(rng.integers(0, 65535, (55, 71), dtype=np.uint16))
    return [*images, *(grey if mode == "I;16" else images[2].convert(mode) for mode in modes)]


def expected_features(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """By torchvision and open_clip's modules, not by the encoder's own calls."""
    size = encoder.spec.size[0]
    transform = v2.Compose(
        [
            v2.RGB(),
            v2.Resize(size, interpolation=v2.InterpolationMode.BICUBIC),
            v2.CenterCrop(size),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(encoder.spec.mean, encoder.spec.std),
        ]
    )
    tokens = open_clip.SimpleTokenizer(context_length=TEXT["context_length"])(list(CAPTIONS))
    with torch.no_grad():
        pixels = torch.stack([transform(image.convert("RGB")) for image in odd_images()])
        return F.normalize(encoder.model.encode_image(pixels), dim=-1), F.normalize(  # type: ignore[operator]
            encoder.model.encode_text(tokens),  # type: ignore[operator]
            dim=-1,
        )


def by_open_clip(folder: Path) -> tuple[Tensor, Tensor]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{folder}")
    with torch.no_grad():
        pixels = torch.stack([preprocess(image.convert("RGB")) for image in odd_images()])  # type: ignore[operator]
        clip: Any = model.eval()
        return clip.encode_image(pixels, normalize=True), clip.encode_text(tokenize(list(CAPTIONS)), normalize=True)


def by_transformers(folder: Path) -> tuple[Tensor, Tensor]:
    from transformers import AutoModel, AutoProcessor

    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder / "exact", trust_remote_code=True)
    with torch.no_grad():
        images = model.get_image_features(**processor(images=odd_images(), return_tensors="pt")).pooler_output
        tokens = processor(text=list(CAPTIONS), padding=True, truncation=True, return_tensors="pt")
        texts = model.get_text_features(**tokens).pooler_output
    return F.normalize(images, dim=-1), F.normalize(texts, dim=-1)


def by_onnxruntime(folder: Path, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """Sessions and tokenizers alone; pixels from torchvision."""
    vision, text = (onnxruntime.InferenceSession(folder / "onnx" / f"{t}_model.onnx") for t in ("vision", "text"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = np.array([encoding.ids for encoding in tokenizer.encode_batch(list(CAPTIONS))])
    alone = np.array([tokenizer.encode(CAPTIONS[0]).ids])
    texts = text.run(None, {"input_ids": ids})[0]
    np.testing.assert_allclose(
        text.run(None, {"input_ids": alone})[0], texts[:1], atol=1e-6
    )  # batch and length are free
    return torch.from_numpy(vision.run(None, {"pixel_values": pixels})[0]), torch.from_numpy(texts)


@pytest.fixture(scope="module", params=FAMILIES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Encoder, Path]:
    folder = tmp_path_factory.mktemp("family")
    encoder = make_student(request.param, folder)
    formats = ["open_clip", *(["hf"] if request.param in FITS_TRANSFORMERS else []), "onnx"]
    (folder / "out").mkdir()
    check_formats(encoder, formats)
    write_formats(encoder, folder / "out", formats, lambda _: None)
    return request.param, encoder, folder / "out"


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], within: float = 1e-5) -> None:
    assert len(expected[0]) == 15
    assert len(expected[1]) == len(CAPTIONS)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().amax(dim=1).tolist() == pytest.approx([0] * len(theirs), abs=within)
        assert theirs.std(dim=0).max() > 1e-3, "inputs must not all have the same features"


def test_other_software_gives_the_students_features(exported: tuple[str, Encoder, Path]) -> None:
    name, encoder, folder = exported
    expected = expected_features(encoder)
    assert_close(by_open_clip(folder), expected)
    if name in FITS_TRANSFORMERS:
        assert_close(by_transformers(folder), expected)
        assert_close(features_of(load_model(f"hf:{folder}")), expected)
    pixels = torch.stack([encoder.preprocess(image.convert("RGB")) for image in odd_images()]).numpy()
    assert_close(by_onnxruntime(folder, pixels), expected)
    assert_close(features_of(load_model(f"onnx:{folder}")), expected)


def features_of(encoder: Encoder) -> tuple[Tensor, Tensor]:
    """As an evaluation computes them."""
    with torch.inference_mode():
        pixels = torch.stack([encoder.preprocess(image.convert("RGB")) for image in odd_images()])
        texts = torch.cat([encoder.encode_prompts(encoder.spec.tokenize([caption])) for caption in CAPTIONS])
        return encoder.encode_image(pixels), texts


@pytest.mark.parametrize("mode", ["shortest", "squash"])
def test_preprocessing_without_torch_is_torchvisions(mode: str, tmp_path: Path) -> None:
    plain = make_student("vit", tmp_path)
    config = {**plain.preprocess_config, "resize_mode": mode}
    encoder = build_open_clip("vit", plain.model_config or {}, preprocess_config=config)
    about = {"image_size": (48, 48), "image_mean": encoder.spec.mean, "image_std": encoder.spec.std}
    about |= {"interpolation": "bicubic", "resize_mode": mode}
    for image in odd_images():
        ours, theirs = preprocess(image, about), encoder.preprocess(image.convert("RGB")).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_towers_that_transformers_lacks_are_refused(exported: tuple[str, Encoder, Path]) -> None:
    name, encoder, _ = exported
    if name in FITS_TRANSFORMERS:
        check_formats(encoder, ["hf"])
        return
    with pytest.raises(ValueError, match=r"(CLIP|Siglip)Model.*--to"):
        check_formats(encoder, ["hf"])


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"resize_mode": "longest"}, "longest"),
        ({"size": (48, 64)}, "48 × 64"),
    ],
)
def test_preprocessing_that_the_metadata_cannot_tell_is_refused(
    change: dict[str, Any], refused: str, tmp_path: Path
) -> None:
    encoder = make_student("vit", tmp_path)
    config = {**encoder.preprocess_config, **change}
    other = build_open_clip("vit", encoder.model_config or {}, preprocess_config=encoder.preprocess_config)
    other.preprocess_config = config
    other.spec = type(other.spec)(**{**vars(other.spec), "size": change.get("size", other.spec.size)})
    with pytest.raises(ValueError, match=refused):
        check_formats(other, ["onnx"])


def test_int8_and_fp16_are_smaller_and_near(tmp_path: Path) -> None:
    encoder = make_student("vit", tmp_path)
    write_formats(encoder, tmp_path, ["onnx", "onnx-fp16", "onnx-int8"], lambda _: None)
    expected = expected_features(encoder)
    sizes: dict[str, int] = {}
    smallest: Callable[[Tensor, Tensor], float] = lambda a, b: F.cosine_similarity(a, b).min().item()  # noqa: E731
    for format, suffix, cosine in (
        ("onnx", "", 0.999999),
        ("onnx-fp16", "_fp16", 0.9999),
        ("onnx-int8", "_quantized", 0.99),
    ):
        found = features_of(load_onnx(tmp_path, format))
        assert all(smallest(ours, theirs) > cosine for ours, theirs in zip(found, expected, strict=True))
        sizes[format] = sum(
            (tmp_path / "onnx" / f"{tower}_model{suffix}.onnx").stat().st_size for tower in ("vision", "text")
        )
    assert sizes["onnx-fp16"] < 0.6 * sizes["onnx"]
    assert sizes["onnx-int8"] < 0.4 * sizes["onnx"]


@pytest.mark.parametrize("name", ["vit", "fastvit_seen_padding"])
def test_executorch_gives_the_students_features(name: str, tmp_path: Path) -> None:
    pytest.importorskip("executorch", reason="needs the extra executorch")
    from executorch.runtime import Runtime  # type: ignore[import-not-found]

    encoder = make_student(name, tmp_path)
    assert write_formats(encoder, tmp_path, ["executorch"], lambda _: None) == {}
    about = json.loads((tmp_path / "executorch" / "about.json").read_text())
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.enable_padding(length=about["context_length"], pad_id=about["pad_id"])
    runtime = Runtime.get()
    programs = [runtime.load_program(tmp_path / "executorch" / f"{tower}_model.pte") for tower in ("vision", "text")]
    vision, text = (program.load_method("forward") for program in programs)
    pixels = [encoder.preprocess(image.convert("RGB"))[None] for image in odd_images()]
    images = torch.cat([vision.execute([each])[0].clone() for each in pixels])  # type: ignore[union-attr]
    ids = [torch.tensor([tokenizer.encode(caption).ids]) for caption in CAPTIONS]
    texts = torch.cat([text.execute([each])[0].clone() for each in ids])  # type: ignore[union-attr]
    assert_close((images, texts), expected_features(encoder))
