"""Checkpoints: complete or absent, versioned, safetensors and JSON only, so that loading one never runs code from it."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipkd import files
from clipkd.files import read_tensors
from clipkd.models.run_folder import FORMAT_VERSION, checkpoint_folder, load_into, read_state, whole_checkpoints


def save(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    memory: Mapping[str, Tensor],
    state: dict[str, Any],
) -> Path:
    """Write RUN/checkpoints/step_N under a temporary name, then rename it. Call on one process only.

    memory: the queue and the class prior. state: other entries of state.json, which holds the other files' hashes too.

    Raises: OSError that names the file; nothing of the checkpoint stays.
    """
    folder = checkpoint_folder(run, step)
    remove_leftovers(run)
    moments = {
        f"{name}/{key}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    tensors = {"model": model.state_dict(), "ema": {} if ema is None else ema.state_dict(), "memory": memory}
    tensors["optimizer"] = moments
    with files.write_folder(folder) as temporary:
        for name, content in tensors.items():
            if content or name == "optimizer":
                files.write_tensors(temporary / f"{name}.safetensors", content)
        written = {path.name: [path.stat().st_size, files.sha256(path)] for path in sorted(temporary.iterdir())}
        about = {"format_version": FORMAT_VERSION, "step": step, "files": written, **state}
        files.write_json(temporary / "state.json", about)
    return folder


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest checkpoints. Call after the newest is complete."""
    for folder in whole_checkpoints(run)[:-keep]:
        folder.rename(folder.with_name(f".{folder.name}.tmp"))  # half deleted, it must not look complete
    remove_leftovers(run)


def remove_leftovers(run: Path) -> None:
    """Delete checkpoints that a kill or a full disk left incomplete."""
    for leftover in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_best(run: Path, step: int) -> Path:
    """Make RUN/best that step's checkpoint: the same files under a second name, or copies where links are not possible."""
    with files.write_folder(run / "best") as folder:
        shutil.copytree(checkpoint_folder(run, step), folder, copy_function=link_or_copy, dirs_exist_ok=True)
    return run / "best"


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def best_step(run: Path) -> int | None:
    """Step of RUN/best; None if there is none."""
    try:
        return int(read_state(run / "best")["step"])
    except (OSError, ValueError):
        return None


def restore(
    folder: Path, *, model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """Load a checkpoint into newly built objects; returns the tensors of the queue and the class prior.

    Raises: ValueError if a file is damaged or was written for another model.
    """
    load_into(model, folder / "model.safetensors")
    if ema is not None:
        load_into(ema, folder / "ema.safetensors")
    load_optimizer(model, optimizer, read_tensors(folder / "optimizer.safetensors"))
    memory = folder / "memory.safetensors"
    return read_tensors(memory) if memory.exists() else {}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"the checkpoint's optimizer knows a parameter {name!r} that this model lacks")
        # Moments in the memory layout of their parameter, which fused kernels take for granted.
        like = parameters[name] if value.shape == parameters[name].shape else value
        optimizer.state[parameters[name]][key] = torch.empty_like(
            like, dtype=value.dtype, device=parameters[name].device, requires_grad=False
        ).copy_(value)
