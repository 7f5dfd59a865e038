"""Check the paths of a training configuration by looking at the disk alone, before torch is loaded."""

import os
from pathlib import Path

from clipkd.config.train import TrainConfig
from clipkd.errors import require


def require_paths(config: TrainConfig) -> None:
    """Raises: FileNotFoundError or ValueError naming the option whose path is missing or cannot be written."""
    require_writable("output", Path(config.output))
    sources = {"data": config.data} | {f"data.mix[{number}]": each for number, each in enumerate(config.data.mix)}
    found = [
        (f"{name}.path", path) for name, each in sources.items() for path in each.paths if each.format != "huggingface"
    ]
    teachers = () if config.teacher.cache else config.teacher.names  # a cache stands for them
    local = [("teacher.models", model.removeprefix("local-dir:")) for model in teachers]
    evaluated = config.evaluation.data
    local += [("evaluation.data", path) for path in ((evaluated,) if isinstance(evaluated, str) else evaluated)]
    found += [
        (name, path) for name, path in local if path.startswith(("/", "./", "../"))
    ]  # others may be names of a hub
    found += [("teacher.cache", config.teacher.cache)] if config.teacher.cache else []
    for name, path in found:
        pattern = "://" in path or path.startswith("pipe:") or "{" in path or "@" in path
        if not (pattern or Path(path).expanduser().exists()):
            raise FileNotFoundError(f"{name} is {path}, and there is no such file or folder")


def require_writable(name: str, folder: Path) -> None:
    """Raises: ValueError if a folder cannot be made there, or nothing be written into it."""
    require(not folder.exists() or folder.is_dir(), f"{name} {folder} is a file; name a folder")
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(
        place.is_dir() and os.access(place, os.W_OK | os.X_OK),
        f"{name} {folder} cannot be written: {place} is no folder that this user may write to; name another --output",
    )
