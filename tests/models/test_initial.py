"""Initial weights per tower, from files made on the spot with known values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from clipkd.config.train import StudentConfig, TrainConfig
from clipkd.models.create import build_open_clip
from clipkd.models.encoder import Encoder
from clipkd.models.initial import create_student, initial_student
from clipkd.models.students import MODEL_CONFIGS, is_projection, tower_of
from clipkd.models.towers import copy_tower

PLAIN: dict[str, Any] = json.loads((MODEL_CONFIGS / "tiny-student.json").read_text())
TRUNK = "test_efficientnet"
TIMM = {"timm_model_name": TRUNK, "timm_pool": "avg", "timm_proj": "linear", "image_size": 32}


def write(folder: Path, name: str = "student", **options: Any) -> str:
    config = {**PLAIN, **options}
    (folder / f"{name}.json").write_text(json.dumps(config))
    return str(folder / f"{name}.json")


def start(model: str, **options: Any) -> Encoder:
    return initial_student(TrainConfig(seed=3, student=StudentConfig(model=model, **options)))


def tower(encoder: Encoder, side: str) -> dict[str, Tensor]:
    return {n: t for n, t in encoder.model.state_dict().items() if tower_of(n) == side and "num_batches" not in n}


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in ours.items() if name in theirs and torch.equal(tensor, theirs[name])]


def trunk_weights(**options: Any) -> dict[str, Tensor]:
    torch.manual_seed(11)
    return timm.create_model(TRUNK, **options).state_dict()


def in_order(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of another library, in which the order alone is that of timm."""
    kinds = ("_fc." if name.startswith("classifier") else f"_layer{number}." for number, name in enumerate(weights))
    return {kind + name.rpartition(".")[2]: tensor for kind, (name, tensor) in zip(kinds, weights.items(), strict=True)}


@pytest.mark.parametrize(
    ("change", "how"),
    [
        (lambda weights: weights, "name"),
        (lambda weights: {f"trunk.{name}": tensor for name, tensor in weights.items()}, "name"),
        (lambda weights: {f"visual.trunk.{name}": tensor for name, tensor in weights.items()}, "name"),
        (in_order, "order"),
    ],
    ids=["timm", "open_clip's tower", "open_clip", "another library"],
)
def test_an_image_tower_starts_from_a_file_of_it_and_every_weight_is_accounted_for(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], how: str, tmp_path: Path
) -> None:
    weights = trunk_weights()
    torch.save(change(weights), tmp_path / "trunk.pt")
    student = start(write(tmp_path, vision_cfg=TIMM), image_weights=str(tmp_path / "trunk.pt"))
    expected = {f"visual.trunk.{name}": tensor for name, tensor in weights.items()}
    image = tower(student, "image")
    assert set(same(image, expected)) == image.keys() - {"visual.head.proj.weight"}
    assert student.loaded >= image.keys() - {"visual.head.proj.weight"}
    assert {tower_of(name) for name in student.loaded} == {"image"}
    (note,) = student.notes
    assert f"matched by {how}; left at random: visual.head.proj.weight; not used: " in note
    assert note.count("classifier" if how == "name" else "_fc") == 2
    assert student.spec.mean == timm.get_pretrained_cfg(TRUNK).mean  # how timm's weights of that name see images


def test_towers_start_from_other_models_alone_and_positions_are_resampled(tmp_path: Path) -> None:
    torch.manual_seed(5)
    other = build_open_clip("other", {**PLAIN, "vision_cfg": {**PLAIN["vision_cfg"], "image_size": 64}})
    save_file(other.model.state_dict(), tmp_path / "other.safetensors")
    student = start("tiny-student", image_weights=str(tmp_path / "other.safetensors"))
    plain = start("tiny-student")
    assert same(tower(student, "text"), tower(plain, "text")) == [*tower(student, "text")]
    image, theirs = tower(student, "image"), tower(other, "image")
    assert {*image} - {*same(image, theirs)} == {"visual.positional_embedding"}
    assert "resampled: visual.positional_embedding [" in student.notes[0]
    # A field that changes linearly stays one: its middle is where it was.
    positions = other.model.visual.positional_embedding  # type: ignore[union-attr]
    side = int((len(positions) - 1) ** 0.5)
    with torch.no_grad():
        positions[1:] = torch.arange(side).float().repeat(side)[:, None]
    copy_tower(other, student, "image", option="student.image_weights is teacher")
    found = student.model.visual.positional_embedding  # type: ignore[union-attr]
    assert torch.equal(found[0], positions[0])
    assert found.detach()[1:].mean() == pytest.approx((side - 1) / 2, abs=1e-4)
    assert len(found) < len(positions)


def text_folder(folder: Path, seed: int = 7) -> str:
    from transformers import BertConfig, BertModel, BertTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "cat"]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
    return str(folder)


def test_a_text_tower_starts_from_a_transformers_folder_and_its_head_alone_trains(tmp_path: Path) -> None:
    folder = text_folder(tmp_path / "bert")
    text = {"hf_model_name": folder, "hf_tokenizer_name": folder, "hf_proj_type": "linear", "context_length": 6}
    model = write(tmp_path, text_cfg={**text, "hf_pooler_type": "mean_pooler"}, custom_text=True)
    student = start(model, text_weights=folder, text="head")
    (note,) = student.notes
    assert "left at random: text.proj.weight; not used: pooler.dense.weight, pooler.dense.bias" in note
    trained = [n for n, p in student.model.named_parameters() if tower_of(n) == "text" and p.requires_grad]
    assert trained == ["text.proj.weight"]
    assert not student.model.text.training  # type: ignore[union-attr]
    # The flag of the JSON asks for the same weights.
    flagged = write(
        tmp_path, "flagged", text_cfg={**json.loads(Path(model).read_text())["text_cfg"], "hf_model_pretrained": True}
    )
    assert same(tower(start(flagged), "text"), tower(student, "text")) == [*tower(student, "text")]


def test_a_student_continues_from_an_open_clip_folder(tmp_path: Path) -> None:
    from clipkd.export.artefacts import write_open_clip

    torch.manual_seed(9)
    before = create_student(StudentConfig(model="tiny-student"))
    (tmp_path / "model").mkdir()
    write_open_clip(before, tmp_path / "model")
    student = start(str(tmp_path / "model"), text="frozen")
    assert student.weights_sha256() == before.weights_sha256()
    assert (student.name, student.model_config) == ("model", before.model_config)
    assert student.loaded == {name for name, _ in student.model.named_parameters()}


@pytest.mark.parametrize("side", ["image", "text"])
@pytest.mark.parametrize("layout", [False, True], ids=["CLIP", "CustomTextCLIP"])
@pytest.mark.parametrize("mode", ["frozen", "head"])
def test_frozen_parts_take_no_gradient_and_never_train(side: Any, layout: bool, mode: str) -> None:
    student = build_open_clip("student", {**PLAIN, "custom_text": layout}).train()
    assert student.frozen == {}
    student.freeze(side, head=mode == "head")
    asks = {name: parameter.requires_grad for name, parameter in student.model.named_parameters()}
    frozen = {name for name, ask in asks.items() if not ask}
    own = {name for name in asks if tower_of(name) == side}
    assert frozen == {name for name in own if mode == "frozen" or not is_projection(name)}
    assert len(own - frozen) == (mode == "head")
    for training in (True, False, True):
        student.train(training)
        modes = {(tower_of(n), m.training) for n, m in student.model.named_modules() if n}
        assert modes == {(tower, training and tower != side) for tower in ("image", "text")}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda weights: dict(list(weights.items())[::2]),
            r"has \d+ of the \d+ weights of student's image tower and lacks",
        ),
        (
            lambda weights: {**weights, "blocks.9.weight": torch.ones(1)},
            r"1 weights that student's image tower lacks, such as b",
        ),
        (
            lambda weights: {n: t if n != "conv_stem.weight" else t[:2] for n, t in weights.items()},
            "has shape .* differ",
        ),
        (lambda _: {"a": torch.ones(1), "b": torch.ones(2)}, "has 0 of the"),
    ],
    ids=["half", "more", "width", "nothing"],
)
def test_weights_of_another_tower_are_refused(spoil: Any, words: str, tmp_path: Path) -> None:
    torch.save(spoil(trunk_weights()), tmp_path / "trunk.pt")
    with pytest.raises(ValueError, match=rf"student\.image_weights: .*trunk\.pt.*{words}"):
        start(write(tmp_path, vision_cfg=TIMM), image_weights=str(tmp_path / "trunk.pt"))


def test_a_source_that_does_not_exist_and_a_head_that_is_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"student\.image_weights: no model 'nothing'"):
        start("tiny-student", image_weights="nothing")
    tower = {**TIMM, "timm_proj": "none"}
    weights = tmp_path / "trunk.pt"
    torch.save(trunk_weights(), weights)
    model = write(tmp_path, vision_cfg=tower, embed_dim=timm.create_model(TRUNK).num_features)
    with pytest.raises(ValueError, match=r"student\.image is head, but student has no projection"):
        start(model, image="head", image_weights=str(weights))
