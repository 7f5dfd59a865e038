"""Read a file of weights as a plain state dict, whatever wraps it. Nothing in a file is executed."""

import argparse
import io
import pathlib
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from clipkd.errors import short

LFS_POINTER = b"version https://git-lfs"
HARMLESS = [argparse.Namespace, pathlib.PosixPath, np.dtype, np.dtypes.Float64DType, np.float64(0).__reduce__()[0]]
"""Classes that training programs save beside weights; making one runs no code."""


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a torch checkpoint or a TorchScript archive, under the model's own names.

    What wraps them without a doubt (`state_dict`, `model`, `module.`, `_orig_mod.`) is removed, with a warning that says so.
    Raises: ValueError if it holds no weights or several sets, is damaged, or could run code.
    """
    require_content(path)
    try:
        content = read_content(path)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {short(error)[:200]}"
        raise ValueError(f"{path} is no complete file of weights ({reason}); copy or download it again") from error
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds Python objects ({short(error)[:100]}), which could run code; save its state dict alone: "
            "torch.save(model.state_dict(), PATH)"
        ) from error
    tensors, removed = unwrap(content, path)
    tensors, prefixes = strip(tensors, path)
    if removed := removed + prefixes:
        warnings.warn(f"{path}: removed {', '.join(removed)} from around the weights", stacklevel=2)
    return tensors


def require_content(path: Path) -> None:
    """Raises: ValueError if the file only points to the weights."""
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a git-lfs pointer, not the weights; run git lfs pull in its repository")


def read_content(path: Path) -> Any:
    if path.suffix == ".safetensors":
        return load_file(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                return read_torchscript(archive)
    with torch.serialization.safe_globals(HARMLESS):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            unsafe = zipfile.is_zipfile(path) and torch.serialization.get_unsafe_globals_in_checkpoint(path)
            raise pickle.UnpicklingError(", ".join(sorted(unsafe)) if unsafe else str(error)) from error


def unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The only state dict in nested dictionaries, and the keys that lead to it."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}
    inner: dict[str, tuple[dict[str, Tensor], list[str]]] = {}
    for name, value in content.items():
        if isinstance(value, Mapping) and isinstance(name, str):
            try:
                inner[name] = unwrap(value, path)
            except ValueError:
                continue
    if not inner and tensors:
        return tensors, []
    if len(inner) != 1:
        found = (
            f"several sets of weights ({', '.join(inner)})"
            if inner
            else f"no weights, only {sorted(map(str, content))[:8]}"
        )
        raise ValueError(f"{path} holds {found}; save one state dict alone: torch.save(model.state_dict(), PATH)")
    ((name, (tensors, below)),) = inner.items()
    return tensors, [name, *below]


def strip(tensors: dict[str, Tensor], path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Without `module.` (DDP) before every name and `_orig_mod.` (torch.compile) within names."""
    removed = []
    while all(name.startswith(("module.", "_orig_mod.module.")) for name in tensors):
        tensors = {name.replace("module.", "", 1): value for name, value in tensors.items()}
        removed.append("module.")
    if any("_orig_mod." in name for name in tensors):
        renamed = {name.replace("_orig_mod.", ""): value for name, value in tensors.items()}
        if len(renamed) < len(tensors):
            raise ValueError(f"{path} holds weights with and without _orig_mod. in their names; save one set alone")
        tensors, further = strip(renamed, path)
        removed += ["_orig_mod.", *further]
    return tensors, removed


OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")
"""Buffers of OpenAI's archives that are no weights."""


class Scripted:
    """A module of a TorchScript archive, of which only the attributes are read."""

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                found[prefix + name] = value
            elif isinstance(value, Scripted):
                found |= value.tensors(f"{prefix}{name}.")
        return found


def read_torchscript(archive: zipfile.ZipFile) -> dict[str, Tensor]:
    """The tensors of the modules in a TorchScript archive, without loading its program.

    Raises: pickle.UnpicklingError for anything but modules and tensors.
    """
    root = archive.namelist()[0].split("/")[0]

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            if module.split(".")[0] == "__torch__":
                return Scripted
            known = {
                "torch._utils._rebuild_tensor_v2": lambda flat, offset, size, stride, *_: flat.as_strided(
                    size, stride, offset
                ),
                "collections.OrderedDict": OrderedDict,  # the empty hooks of a tensor
            }
            if f"{module}.{name}" in known:
                return known[f"{module}.{name}"]
            dtype = getattr(torch, name.removesuffix("Storage").lower(), None)
            if module == "torch" and name.endswith("Storage") and isinstance(dtype, torch.dtype):
                return dtype
            if module == "torch.jit._pickle":  # lists of numbers
                return lambda values: values
            raise pickle.UnpicklingError(f"{module}.{name}")

        def persistent_load(self, pid: Any) -> Any:
            _, dtype, key, _, size = pid
            content = bytearray(archive.read(f"{root}/data/{key}"))
            return torch.frombuffer(content, dtype=dtype) if size else torch.empty(0, dtype=dtype)

    model = Unpickler(io.BytesIO(archive.read(f"{root}/data.pkl"))).load()
    tensors = model.tensors() if isinstance(model, Scripted) else {}
    return {name: value for name, value in tensors.items() if name not in OPENAI_FACTS}
