"""Checkpoints: whole or absent, versioned, safetensors and JSON only, so that loading one never runs code from it."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from clipkd.files import read_tensors, sha256, sync, write_tensors
from clipkd.models.run_folder import FORMAT_VERSION, checkpoint_folder, load_into, read_state, whole_checkpoints


def save(
    run: Path,
    step: int,
    *,
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: torch.optim.Optimizer,
    state: dict,
    memory: Mapping[str, Tensor] = MappingProxyType({}),
) -> Path:
    """Write RUN/checkpoints/step_N under a temporary name, then rename it. Call on one process only.

    model.safetensors holds everything trainable, ema.safetensors the averaged student, optimizer.safetensors AdamW's
    moments by parameter name, memory.safetensors the queue and the class prior where there are any, state.json the rest,
    with length and SHA-256 of the others.

    Raises: OSError that names what could not be written; then nothing of it stays.
    """
    folder = checkpoint_folder(run, step)
    temporary = folder.with_name(folder.name + ".tmp")
    for leftover in folder.parent.glob("step_*.tmp"):  # of kills, and of a disk that was full
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        write_tensors(temporary / "model.safetensors", model.state_dict())
        if ema is not None:
            write_tensors(temporary / "ema.safetensors", ema.state_dict())
        write_tensors(temporary / "optimizer.safetensors", optimizer_tensors(model, optimizer))
        if memory:
            write_tensors(temporary / "memory.safetensors", memory)
        files = {path.name: [path.stat().st_size, sha256(path)] for path in sorted(temporary.iterdir())}
        text = json.dumps({"format_version": FORMAT_VERSION, "step": step, "files": files, **state}, indent=1)
        (temporary / "state.json").write_text(text + "\n", encoding="utf-8")
        for path in (*temporary.iterdir(), temporary):
            sync(path)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)  # a full disk must not stay full of halves
        if error.filename is None:
            raise OSError(error.errno, error.strerror or str(error), str(folder)) from error
        raise
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)
    sync(folder.parent)
    return folder


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest checkpoints and what a kill left half written or half deleted.

    Call after the new one is complete.
    """
    for folder in whole_checkpoints(run)[:-keep]:
        folder.rename(folder.with_name(folder.name + ".tmp"))  # half deleted, it must not look whole
    for leftover in (run / "checkpoints").glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_best(run: Path, step: int) -> Path:
    """RUN/best becomes that step's checkpoint: the same files under a second name, which pruning leaves alone."""
    folder, temporary = run / "best", run / "best.tmp"
    for leftover in (temporary, run / "best_before.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        shutil.copytree(checkpoint_folder(run, step), temporary, copy_function=os.link)
    except OSError:  # a file system without hard links, which copytree tells of as one error of many
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(checkpoint_folder(run, step), temporary)
    if folder.is_dir():  # there is a moment without either; the run evaluates that step again after a kill
        os.replace(folder, old := run / "best_before.tmp")
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(temporary, folder)
    return folder


def best_step(run: Path) -> int | None:
    """Step of RUN/best; None where there is none."""
    try:
        return int(read_state(run / "best")["step"])
    except (OSError, ValueError):
        return None


def restore(
    folder: Path, *, model: nn.Module, ema: nn.Module | None, optimizer: torch.optim.Optimizer
) -> dict[str, Any]:
    """Load a checkpoint into freshly built objects; returns its state.json.

    Raises: ValueError if a file is damaged or was written for another model.
    """
    state = read_state(folder)
    load_into(model, folder / "model.safetensors")
    if ema is not None:
        load_into(ema, folder / "ema.safetensors")
    load_optimizer(model, optimizer, read_tensors(folder / "optimizer.safetensors"))
    return state


def read_memory(folder: Path) -> dict[str, Tensor]:
    """State beyond weights, empty if the run keeps none. Raises: ValueError if the file is damaged."""
    path = folder / "memory.safetensors"
    return read_tensors(path) if path.exists() else {}


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value if isinstance(value, Tensor) else torch.tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    for path, value in tensors.items():
        name, key = path.rsplit("/", 1)
        if name not in parameters:
            raise ValueError(f"the checkpoint's optimizer knows a parameter {name!r} that this model lacks")
        optimizer.state[parameters[name]][key] = value.to(parameters[name].device)
