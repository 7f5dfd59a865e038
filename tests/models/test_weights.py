"""Files of weights in every wrapping, and architectures whose tags say how images are prepared."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from clipkd.models import create
from clipkd.models.create import build_open_clip, check_weights
from clipkd.models.load import load_model
from clipkd.models.weights import read_weights

WEIGHTS = {"tower.weight": torch.arange(4.0), "bias": torch.arange(3.0)}


def renamed(form: str) -> dict[str, Tensor]:
    return {form.format(name): tensor for name, tensor in WEIGHTS.items()}


@pytest.mark.parametrize(
    ("content", "removed"),
    [
        (WEIGHTS, ""),
        ({"state_dict": WEIGHTS, "epoch": 3}, "state_dict"),
        ({"model": WEIGHTS, "args": argparse.Namespace(lr=0.1, output=Path("runs")), "best": np.float64(1)}, "model"),
        (
            {"model": {"state_dict": renamed("module.{}")}, "optimizer": {"state": {0: WEIGHTS}}},
            "model, state_dict, module.",
        ),
        (renamed("module._orig_mod.{}"), "module., _orig_mod."),
        (renamed("_orig_mod.module.{}"), "module., _orig_mod."),
        ({"tower._orig_mod.weight": WEIGHTS["tower.weight"], "bias": WEIGHTS["bias"]}, "_orig_mod."),
    ],
)
@pytest.mark.filterwarnings("always")
def test_what_wraps_weights_is_removed_and_named(
    content: dict[str, Any], removed: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.save(content, tmp_path / "weights.pt")
    found = read_weights(tmp_path / "weights.pt")
    assert list(found) == list(WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())
    said = [str(warning.message).partition(": ")[2] for warning in recwarn]
    assert said == ([f"removed {removed} from around the weights"] if removed else [])


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 3)
        self.register_buffer("steps", torch.arange(3, dtype=torch.float16))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.steps


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_a_torchscript_archive_gives_its_state_dict_without_being_loaded(tmp_path: Path) -> None:
    model = nn.Sequential(Part(), nn.BatchNorm1d(3))
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    found, expected = read_weights(tmp_path / "model.pt"), model.state_dict()
    assert list(found) == list(expected)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


class Malicious:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize(
    ("write", "words"),
    [
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs pointer"),
        (lambda path: path.write_bytes(b""), "no complete file of weights"),
        (
            lambda path: torch.save({"model": WEIGHTS, "model_ema": WEIGHTS}, path),
            r"several sets .*\(model, model_ema\)",
        ),
        (lambda path: torch.save({"epoch": 3}, path), r"no weights, only \['epoch'\]"),
        (lambda path: torch.save([WEIGHTS], path), "holds a list"),
        (
            lambda path: torch.save(nn.Linear(2, 2), path),
            r"objects \(torch\.nn\.modules\.linear\.Linear\), which could",
        ),
        (lambda path: torch.save({"a": Malicious(f"touch {path}.ran"), **WEIGHTS}, path), "system.*could run code"),
    ],
)
def test_an_unusable_file_is_refused_and_runs_nothing(write: Callable[[Path], Any], words: str, tmp_path: Path) -> None:
    write(tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=rf"weights\.pt .*{words}"):
        read_weights(tmp_path / "weights.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


def test_a_folder_of_pointers_is_refused(clip_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((clip_folder / "config.json").read_bytes())
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="git-lfs pointer"):
        load_model(str(tmp_path))


def test_a_file_is_prepared_like_the_tags_of_its_architecture_if_they_agree(tmp_path: Path) -> None:
    file = str(tmp_path / "file.pt")
    Path(file).touch()

    def prepared(name: str, weights: str) -> dict[str, Any]:
        return check_weights(name, open_clip.get_model_config(name) or {}, weights)

    assert prepared("MobileCLIP-S1", file)["mean"] == (0, 0, 0)
    assert prepared("MobileCLIP-S1", file)["interpolation"] == "bilinear"
    assert prepared("PE-Core-B-16", file)["resize_mode"] == "squash"
    assert prepared("ViT-L-14", f"laion2b_s32b_b82k@{file}")["mean"] == (0.5, 0.5, 0.5)
    assert check_weights("ViT-L-14", {"embed_dim": 8}, file) == {}  # a student's JSON of that name
    for name, words in (
        ("RN50", "trained with QuickGELU, the config says GELU; use the model 'RN50-quickgelu'"),
        (
            "ViT-L-14",
            r"differ in mean.* as TAG@.*openai \(mean \(0\.48.*, laion2b_s32b_b82k \(mean \(0\.5, 0\.5, 0\.5\)\)",
        ),
        ("ViT-B-32", r"differ in quick_gelu.* openai \(quick_gelu True\), laion2b_e16 \(quick_gelu None\)"),
        ("ViT-H-14-quickgelu", "differ in resize_mode"),
    ):
        with pytest.raises(ValueError, match=words):
            prepared(name, file)
    agreed = [name for name in open_clip.list_models() if accepted(lambda name=name: prepared(name, file))]
    assert len(agreed) > 100


def accepted(call: Callable[[], Any]) -> bool:
    try:
        call()
    except ValueError:
        return False
    return True


def test_a_model_from_a_file_gets_what_the_tags_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1},
    }
    tag = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0), "interpolation": "bilinear", "resize_mode": "squash"}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: config if name == "known" else None)
    monkeypatch.setattr(create, "list_pretrained_tags_by_model", lambda _: ["one"])
    monkeypatch.setattr(create, "get_pretrained_cfg", lambda _, tag_name: tag if tag_name == "one" else {})
    monkeypatch.setattr(create.open_clip.factory, "_MODEL_CONFIGS", {"known": config})
    start = build_open_clip("known", config)
    save_file(
        {f"module.{name}": tensor for name, tensor in start.model.state_dict().items()}, tmp_path / "a.safetensors"
    )
    for weights in (str(tmp_path / "a.safetensors"), f"one@{tmp_path / 'a.safetensors'}"):
        with pytest.warns(UserWarning, match=r"removed module\. from around the weights"):
            model = build_open_clip("known", config, pretrained=weights)
        assert model.weights_sha256() == start.weights_sha256()
        assert (model.spec.mean, model.spec.interpolation) == ((0.1, 0.2, 0.3), "bilinear")
        assert model.describe_inputs() == "32 × 32 px bilinear, squash, mean 0.1 0.2 0.3, std 1 1 1, GELU"
