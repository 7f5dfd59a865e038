"""Checkpoints: whole or absent, and nothing in them is ever run."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clipkd import files
from clipkd.models import run_folder
from clipkd.training import checkpoint

Model = tuple[nn.Module, torch.optim.Optimizer]


def make(seed: int = 0, width: int = 4) -> Model:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()


def save(run: Path, step: int, model: Model | None = None, ema: nn.Module | None = None) -> Path:
    network, optimizer = model or make()
    return checkpoint.save(run, step, model=network, ema=ema, optimizer=optimizer, state={"seconds": 1.5, "n": [1]})


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name in a if not torch.equal(a[name], b[name])]


def test_a_restored_run_goes_on_bit_by_bit(tmp_path: Path) -> None:
    model, optimizer = make()
    ema, _ = make(seed=1)
    train(model, optimizer, 3, seed=5)
    folder = save(tmp_path, 3, (model, optimizer), ema)
    restored, restored_optimizer = make(seed=2)
    restored_ema, _ = make(seed=3)
    state = checkpoint.restore(folder, model=restored, ema=restored_ema, optimizer=restored_optimizer)
    assert (state["step"], state["seconds"], state["n"]) == (3, 1.5, [1])
    assert differing(tensors(restored), tensors(model)) == []
    assert differing(tensors(restored_ema), tensors(ema)) == []
    train(model, optimizer, 2, seed=6)
    train(restored, restored_optimizer, 2, seed=6)
    assert differing(tensors(restored), tensors(model)) == []
    # Without the optimizer's moments the next step is another one.
    fresh, fresh_optimizer = make(seed=4)
    run_folder.load_into(fresh, folder / "model.safetensors")
    train(fresh, fresh_optimizer, 2, seed=6)
    assert "0.weight" in differing(tensors(fresh), tensors(model))


def test_a_checkpoint_is_safetensors_and_json_that_others_may_read(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 1, seed=0)
    folder = save(tmp_path, 12, (model, optimizer), make()[0])
    assert folder == tmp_path / "checkpoints" / "step_000012"
    assert sorted(path.name for path in folder.iterdir()) == [
        "ema.safetensors",
        "model.safetensors",
        "optimizer.safetensors",
        "state.json",
    ]
    assert {oct(path.stat().st_mode & 0o644) for path in folder.iterdir()} == {oct(0o644)}
    assert json.loads((folder / "state.json").read_text())["format_version"] == run_folder.FORMAT_VERSION
    names = set(files.read_tensors(folder / "optimizer.safetensors"))
    assert {"0.weight/exp_avg", "2.bias/exp_avg_sq", "1.weight/step"} <= names
    assert not (save(tmp_path, 13) / "ema.safetensors").exists()


def test_a_save_that_dies_half_way_leaves_the_earlier_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = save(tmp_path, 1)
    for dies_at in ("model.safetensors", "optimizer.safetensors", "state.json"):
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_tensors", dying(files.write_tensors, dies_at))
            patch.setattr(checkpoint, "sync", dying(files.sync, dies_at))
            with pytest.raises(KeyboardInterrupt):
                save(tmp_path, 2)
        assert (tmp_path / "checkpoints" / "step_000002.tmp").is_dir()
        assert run_folder.whole_checkpoints(tmp_path) == [first]
        assert run_folder.resolve(tmp_path) == first
    second = save(tmp_path, 2)  # over the leftover
    assert run_folder.whole_checkpoints(tmp_path) == [first, second]
    assert not (tmp_path / "checkpoints" / "step_000002.tmp").exists()


def dying(function: Callable[..., None], name: str) -> Callable[..., None]:
    def run(path: Path, *rest: object) -> None:
        if path.name == name:
            raise KeyboardInterrupt
        function(path, *rest)

    return run


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    other = make(seed=9)
    folder = save(tmp_path, 5, other)
    assert differing(files.read_tensors(folder / "model.safetensors"), tensors(other[0])) == []


def test_leftovers_and_half_folders_are_no_checkpoints(tmp_path: Path) -> None:
    whole = save(tmp_path, 2)
    (tmp_path / "checkpoints" / "step_000009.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_000009.tmp" / "state.json").write_text('{"format_version": 3}')
    (tmp_path / "checkpoints" / "step_000008").mkdir()
    assert run_folder.whole_checkpoints(tmp_path) == [whole]
    with pytest.warns(UserWarning, match=r"step_000008 is damaged: .*state\.json.*; going back to .*step_000002"):
        assert run_folder.resolve(tmp_path) == whole
    assert run_folder.resolve(whole) == whole
    assert run_folder.is_run(tmp_path)
    assert run_folder.is_run(whole)


def test_a_copy_that_someone_made_by_hand_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    whole = save(tmp_path, 2)
    os.rename(save(tmp_path, 3), tmp_path / "checkpoints" / "step_000003_backup")
    assert run_folder.whole_checkpoints(tmp_path) == [whole]


def test_the_newest_is_the_one_of_the_largest_step(tmp_path: Path) -> None:
    # By number: as text, step_1000000 would come before step_999999.
    folders = [save(tmp_path, step) for step in (999_999, 2, 1_000_000, 30)]
    assert run_folder.resolve(tmp_path) == folders[2]
    assert run_folder.whole_checkpoints(tmp_path) == [folders[1], folders[3], folders[0], folders[2]]
    checkpoint.prune(tmp_path, 2)
    assert run_folder.whole_checkpoints(tmp_path) == [folders[0], folders[2]]
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_1000000", "step_999999"]
    checkpoint.prune(tmp_path, 5)
    assert len(run_folder.whole_checkpoints(tmp_path)) == 2


def test_a_changed_byte_is_found_by_its_digest_and_the_one_before_is_taken(tmp_path: Path) -> None:
    first, second = save(tmp_path, 1), save(tmp_path, 2)
    path = second / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert run_folder.whole_checkpoints(tmp_path) == [first, second]  # by length
    with pytest.warns(UserWarning, match=r"step_000002 is damaged: model\.safetensors is not what was saved"):
        assert run_folder.newest(tmp_path) == first
    with pytest.raises(ValueError, match=r"step_000002 is damaged: model\.safetensors .*; use an earlier"):
        run_folder.resolve(second)
    (first / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint of this run is damaged"):
        run_folder.newest(tmp_path)


def test_a_run_without_checkpoints_has_no_newest(tmp_path: Path) -> None:
    assert run_folder.newest(tmp_path) is None


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    assert not run_folder.is_run(tmp_path)
    assert run_folder.whole_checkpoints(tmp_path / "none") == []
    with pytest.raises(ValueError, match=r"none holds no checkpoint"):
        run_folder.resolve(tmp_path / "none")


def restore(folder: Path, *, ema: bool = False, width: int = 4) -> None:
    model, optimizer = make(width=width)
    checkpoint.restore(folder, model=model, ema=make(width=width)[0] if ema else None, optimizer=optimizer)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors"])
@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "missing"])
def test_a_damaged_weight_file_is_named(tmp_path: Path, name: str, damage: str) -> None:
    model, optimizer = make()
    train(model, optimizer, 1, seed=0)
    folder = save(tmp_path, 1, (model, optimizer), make()[0])
    restore(folder, ema=True)
    whole = (folder / name).read_bytes()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes({"cut": whole[: len(whole) - 8], "garbage": b"x" * 500, "empty": b""}[damage])
    with pytest.raises(ValueError, match=rf"{name} is missing or damaged"):
        restore(folder, ema=True)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"step": 1}'])
def test_a_damaged_state_is_named(tmp_path: Path, text: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match=r"step_000001/state\.json is damaged"):
        restore(folder)


@pytest.mark.parametrize("version", [0, 2, "3", None])
def test_another_format_version_is_refused_with_both_versions(tmp_path: Path, version: object) -> None:
    folder = save(tmp_path, 1)
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "format_version": version}))
    with pytest.raises(ValueError, match=rf"format {version}, this clipkd reads 3"):
        restore(folder)


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    with pytest.raises(ValueError, match=r"model\.safetensors was written for another model.*size mismatch"):
        restore(folder, width=5)
    with pytest.raises(ValueError, match=r"another model.*Missing key"):
        run_folder.load_into(nn.Linear(3, 3), folder / "model.safetensors")


def test_moments_of_an_unknown_parameter_are_refused() -> None:
    model, optimizer = make()
    with pytest.raises(ValueError, match=r"'9\.weight' that this model lacks"):
        checkpoint.load_optimizer(model, optimizer, {"9.weight/exp_avg": torch.zeros(2)})


def test_a_part_of_a_weight_file_is_loaded_by_its_prefix(tmp_path: Path) -> None:
    wrapped = nn.ModuleDict({"student": make(seed=7)[0], "projection": nn.Linear(2, 2)})
    files.write_tensors(tmp_path / "model.safetensors", wrapped.state_dict())
    model, _ = make()
    run_folder.load_into(model, tmp_path / "model.safetensors", "student.")
    assert differing(tensors(model), tensors(wrapped["student"])) == []


class Trap:
    """Unpickling this makes a folder."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sprung),)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_pickle_in_a_checkpoint_is_refused_and_never_run(tmp_path: Path, name: str) -> None:
    folder = save(tmp_path / "run", 1)
    sprung = tmp_path / "sprung"
    payload = pickle.dumps(Trap(sprung), protocol=0)
    (folder / name).write_bytes(payload)
    with pytest.raises(ValueError, match=rf"{name}"):
        restore(folder)
    torch.save({"0.weight": Trap(sprung)}, folder / name)
    with pytest.raises(ValueError, match=rf"{name}"):
        restore(folder)
    assert not sprung.exists()
    pickle.loads(payload)  # the trap does work
    assert sprung.is_dir()
