"""Find the checkpoints of a run folder, check them for damage, and read them."""

import json
import warnings
from pathlib import Path
from typing import Any

from torch import nn

from clipkd.errors import short
from clipkd.files import read_tensors, sha256

FORMAT_VERSION = 4


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:06d}"


def whole_checkpoints(run: Path) -> list[Path]:
    """Checkpoints whose files all exist with their full length, oldest first."""
    return [folder for folder in step_folders(run) if find_fault(folder) is None]


def step_folders(run: Path) -> list[Path]:
    folders = [path for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdecimal()]
    return sorted(folders, key=lambda path: int(path.name[5:]))


def newest(run: Path) -> Path | None:
    """The newest undamaged checkpoint of a run (by SHA-256); warns of damaged ones after it.

    Raises: ValueError if every checkpoint is damaged.
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
        raise ValueError(f"{faults[0]}; every checkpoint of this run is damaged: move {run} away to start again")
    return None


def find_fault(folder: Path, *, content: bool = False) -> str | None:
    """Describe the first missing or shortened file, with `content` also the first changed one; None if all are fine."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if state.get("format_version") != FORMAT_VERSION:
            return None  # read_state refuses it
        for name, (size, digest) in state["files"].items():
            if (found := (folder / name).stat().st_size) != size:
                return f"{name} has {found:,} bytes instead of {size:,}"
            if content and sha256(folder / name) != digest:
                return f"{name} is not what was saved (SHA-256)"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return str(error)
    return None


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


def load_into(module: nn.Module, path: Path, prefix: str = "") -> None:
    """Load a weight file, or the part of it under a prefix, strictly."""
    tensors = {name.removeprefix(prefix): t for name, t in read_tensors(path).items() if name.startswith(prefix)}
    try:
        module.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{path} was written for another model: {short(error)}") from error
