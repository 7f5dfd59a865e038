"""Checkpoints are complete or absent, and loading one never runs code from it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from clipkd import files
from clipkd.models import run_folder
from clipkd.training import checkpoint

Model = tuple[nn.Module, torch.optim.Optimizer]


def make(seed: int = 0, width: int = 4) -> Model:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, generator=generator)).square().mean().backward()
        optimizer.step()
    return model, optimizer


def save(run: Path, step: int, model: Model | None = None, ema: nn.Module | None = None) -> Path:
    network, optimizer = model or make()
    return checkpoint.save(
        run, step, model=network, ema=ema, optimizer=optimizer, memory={}, state={"seconds": 1.5, "n": [1]}
    )


def differing(one: nn.Module, other: nn.Module) -> list[str]:
    found = other.state_dict()
    return [name for name, tensor in one.state_dict().items() if not torch.equal(tensor, found[name])]


def test_moments_come_back_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    """A fused kernel reads weights and moments in the order of their memory."""
    models = [nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last) for _ in range(2)]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.1, fused=True) for model in models]

    def step(number: int) -> None:
        torch.manual_seed(7)
        models[number](torch.randn(2, 3, 5, 5)).square().mean().backward()
        optimizers[number].step()
        optimizers[number].zero_grad()

    step(0)
    checkpoint.restore(
        save(tmp_path, 1, (models[0], optimizers[0])), model=models[1], ema=None, optimizer=optimizers[1]
    )
    step(0)
    step(1)
    assert differing(*models) == []
    assert optimizers[1].state[models[1].weight]["exp_avg"].stride() == models[1].weight.stride()


def test_a_checkpoint_is_safetensors_and_json_that_others_may_read(tmp_path: Path) -> None:
    folder = save(tmp_path, 12, train(*make(), 1, seed=0), make()[0])
    assert folder == tmp_path / "checkpoints" / "step_000012"
    names = ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert {oct(path.stat().st_mode & 0o644) for path in folder.iterdir()} == {oct(0o644)}
    assert run_folder.read_state(folder)["format_version"] == run_folder.FORMAT_VERSION
    moments = set(files.read_tensors(folder / "optimizer.safetensors"))
    assert {"0.weight/exp_avg", "2.bias/exp_avg_sq", "1.weight/step"} <= moments
    assert not (save(tmp_path, 13) / "ema.safetensors").exists()


@pytest.mark.parametrize("dies_at", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_save_that_dies_half_way_leaves_the_earlier_one_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dies_at: str
) -> None:
    def dying(function: Callable[..., None]) -> Callable[..., None]:
        def run(path: Path, *rest: object) -> None:
            if path.name == dies_at:
                raise KeyboardInterrupt
            function(path, *rest)

        return run

    first = save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write_tensors", dying(files.write_tensors))
        patch.setattr(files, "sync", dying(files.sync))
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert list(first.parent.iterdir()) == [first]
    leftover = first.parent / ".step_000003.tmp"
    (leftover / "new").mkdir(parents=True)  # of a kill
    assert run_folder.whole_checkpoints(tmp_path) == [first]
    assert run_folder.resolve(tmp_path) == first
    assert save(tmp_path, 2) == run_folder.resolve(tmp_path)
    assert not leftover.exists()
    other, found = make(seed=9), make()[0]
    run_folder.load_into(found, save(tmp_path, 2, other) / "model.safetensors")  # replaces the earlier one
    assert differing(found, other[0]) == []


def test_what_is_no_complete_checkpoint_is_not_taken_for_one(tmp_path: Path) -> None:
    assert not run_folder.is_run(tmp_path)
    assert run_folder.newest(tmp_path) is None
    with pytest.raises(ValueError, match=r"none holds no checkpoint"):
        run_folder.resolve(tmp_path / "none")
    whole = save(tmp_path, 2)
    os.rename(save(tmp_path, 3), tmp_path / "checkpoints" / "step_000003_backup")
    (tmp_path / "checkpoints" / "step_000009.tmp").mkdir()
    (tmp_path / "checkpoints" / "step_000009.tmp" / "state.json").write_text('{"format_version": 3}')
    (tmp_path / "checkpoints" / "step_000008").mkdir()
    assert run_folder.whole_checkpoints(tmp_path) == [whole]
    with pytest.warns(UserWarning, match=r"step_000008 is damaged: .*state\.json.*; going back to .*step_000002"):
        assert run_folder.resolve(tmp_path) == whole
    assert run_folder.resolve(whole) == whole
    assert run_folder.is_run(tmp_path)
    assert run_folder.is_run(whole)


def test_the_newest_checkpoints_and_the_best_one_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By number: as text, step_1000000 would come before step_999999.
    folders = [save(tmp_path, step) for step in (999_999, 2, 1_000_000, 30)]
    assert run_folder.whole_checkpoints(tmp_path) == [folders[1], folders[3], folders[0], folders[2]]
    assert run_folder.resolve(tmp_path) == folders[2]
    assert checkpoint.best_step(tmp_path) is None
    best = checkpoint.keep_best(tmp_path, 2)
    checkpoint.prune(tmp_path, 2)
    assert run_folder.whole_checkpoints(tmp_path) == [folders[0], folders[2]]
    assert checkpoint.best_step(tmp_path) == 2
    assert (best / "model.safetensors").stat().st_nlink == 1  # the other name is pruned
    with monkeypatch.context() as patched:  # a file system without hard links
        patched.setattr(os, "link", refuse)
        checkpoint.keep_best(tmp_path, 999_999)
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.best_step(tmp_path) == 999_999
    assert run_folder.find_fault(best, content=True) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "checkpoints"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1000000"]


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(1, "Operation not permitted")


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


def restore(folder: Path, *, width: int = 4) -> None:
    model, optimizer = make(width=width)
    run_folder.read_state(folder)
    checkpoint.restore(folder, model=model, ema=make(width=width)[0], optimizer=optimizer)


class Trap:
    """Unpickling this fails the test."""

    def __reduce__(self) -> tuple:
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_file_is_named_and_a_pickle_in_its_place_is_never_run(tmp_path: Path, name: str) -> None:
    folder, trap = save(tmp_path, 1, train(*make(), 1, seed=0), make()[0]), tmp_path / "trap"
    restore(folder)
    torch.save({"0.weight": Trap()}, trap)
    gone = [] if name == "state.json" else [None]  # without it, a folder is no checkpoint
    for damaged in ((folder / name).read_bytes()[:-8], b"x" * 500, b"", trap.read_bytes(), *gone):
        (folder / name).write_bytes(damaged) if damaged is not None else (folder / name).unlink()
        with pytest.raises(ValueError, match=rf"{name} is (missing or )?damaged"):
            restore(folder)
    with pytest.raises(pytest.fail.Exception, match="unpickled"):
        torch.load(trap, weights_only=False)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, r"step_000001/state\.json is damaged") for text in ("", "{", "[]", '{"step": 1}')),
        *((f'{{"format_version": {n}}}', f"format {n}, this clipkd reads 4") for n in (0, 2)),
    ],
)
def test_a_damaged_state_and_another_format_are_refused(tmp_path: Path, text: str, words: str) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").write_text(text)
    with pytest.raises(ValueError, match=words):
        restore(folder)


def test_weights_and_moments_of_another_model_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1, ema=make()[0])
    with pytest.raises(ValueError, match=r"model\.safetensors was written for another model.*size mismatch"):
        restore(folder, width=5)
    with pytest.raises(ValueError, match=r"another model.*Missing key"):
        run_folder.load_into(nn.Linear(3, 3), folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"'9\.weight' that this model lacks"):
        checkpoint.load_optimizer(*make(), {"9.weight/exp_avg": torch.zeros(2)})
