"""Checkpoints: whole or absent, versioned, safetensors and JSON only, so that loading one never runs code from it."""

import errno
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FORMAT_VERSION = 3


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


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


def whole_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run whose files are all there in their length, oldest first."""
    return [folder for folder in step_folders(run) if find_fault(folder) is None]


def step_folders(run: Path) -> list[Path]:
    folders = [path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def newest(run: Path) -> Path | None:
    """The newest checkpoint of a run that is byte for byte as it was saved; warns of damaged ones after it.

    Raises: ValueError if there are checkpoints, but none that can be read.
    """
    faults: list[str] = []
    for folder in reversed(step_folders(run)):
        fault = find_fault(folder, content=True)
        if fault is None:
            if faults:
                warnings.warn(f"{'; '.join(faults)}; going back to {folder}", stacklevel=2)
            return folder
        faults.append(f"{folder} is damaged: {fault}")
    if faults:
        raise ValueError(f"{faults[0]}; no checkpoint of this run is whole: move {run} away to begin anew")
    return None


def find_fault(folder: Path, *, content: bool = False) -> str | None:
    """The first file that a disk or a copy has cut short or lost, or, if asked for, changed."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("format_version") != FORMAT_VERSION:
            return None  # who reads it is told
        for name, (size, digest) in state["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if content and sha256(folder / name) != digest:
                return f"{name} is not what was saved (SHA-256)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return str(error)
    return None


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_run(path: Path) -> bool:
    """Whether a path is a run folder or a checkpoint in one."""
    return (path / "state.json").is_file() or bool(step_folders(path))


def resolve(path: Path) -> Path:
    """A run folder → its newest checkpoint that can be read; a checkpoint folder → itself.

    Raises: ValueError if it is neither, or damaged.
    """
    if (path / "state.json").is_file():
        if fault := find_fault(path, content=True):
            raise ValueError(f"{path} is damaged: {fault}; use an earlier checkpoint")
        return path
    if folder := newest(path):
        return folder
    raise ValueError(f"{path} holds no checkpoint (checkpoints/step_N); name a run folder or a checkpoint")


def read_state(folder: Path) -> dict[str, Any]:
    """Raises: ValueError if state.json is damaged or of another format version."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        version = state["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / 'state.json'} is damaged ({error}); use an earlier checkpoint") from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has checkpoint format {version}, this clipkd reads {FORMAT_VERSION}; use the clipkd that wrote it"
        )
    return state


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


def load_into(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a weight file, or the part of it under a prefix, strictly."""
    tensors = {name.removeprefix(prefix): t for name, t in read_tensors(path).items() if name.startswith(prefix)}
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} was written for another model: {' '.join(str(error).split())[:300]}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], *, metadata: dict[str, str] | None = None) -> None:
    # Cloned, since safetensors refuses tensors that share memory (tied weights).
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); use an earlier checkpoint") from error


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


def sync(path: Path) -> None:
    """Force a file or folder to disk: a rename must not overtake the content it names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
