"""Compare what a cache was made from with what a command is given now."""

from pathlib import Path
from typing import Any

OPTIONS = {
    "num_views": "--views",
    "dtype": "--dtype",
    "augmentation.version": "augmentation version",
    "augmentation.seed": "seed",
    "augmentation.min_crop": "data.min_crop",
    "augmentation.background": "data.background",
}
"""Keys of a plan → what a user calls them."""

PLACES = ("parts", "model", "name", "files")


def require_same(folder: Path, made_with: dict[str, Any], now: dict[str, Any]) -> None:
    """Compare two plans, or equal parts of them. Data and weights are compared by content, wherever they lie.

    Raises: ValueError naming the first option or file that differs.
    """
    for name, what in (("data", "data sources (data, data.mix)"), ("teachers", "teachers (teacher.models)")):
        before, after = made_with.get(name, []), now.get(name, [])
        if len(before) != len(after):
            raise ValueError(
                f"{folder} was made with {len(before)} {what}, now there are {len(after)}; make another cache"
            )
    for number, (before, after) in enumerate(zip(made_with.get("data", []), now.get("data", []), strict=True)):
        require_same_parts(folder, number, before["parts"], after["parts"])
    for before, after in zip(made_with.get("teachers", []), now.get("teachers", []), strict=True):
        if before["identity"]["sha256"] != after["identity"]["sha256"]:
            where = ", ".join(after["files"]) or after["model"]
            raise ValueError(
                f"{folder} was made with other weights than {where} holds; put the weights back, or make another cache"
            )
    before, after = facts(made_with), facts(now)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            raise ValueError(
                f"{folder} was made with {OPTIONS.get(key, key)} = {before.get(key)}, now it is {after.get(key)}; change it "
                "back, or make another cache"
            )


def facts(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted key → value, for everything in a plan but names and paths."""
    if not isinstance(value, dict | list):
        return {path: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    parts = [facts(item, f"{path}.{key}".strip(".")) for key, item in items if key not in PLACES]
    return {key: item for part in parts for key, item in part.items()}


def require_same_parts(folder: Path, number: int, before: dict[str, str], after: dict[str, str]) -> None:
    """Compare the files of one data source: path → digest of its samples.

    Raises: ValueError naming a file that holds other samples, is missing or is new.
    """
    option = f"data.mix[{number - 1}].path" if number else "data.path"
    if len(before) != len(after):
        named = [f"; {path} is missing" for path, digest in before.items() if digest not in after.values()][:1]
        named += [f"; {path} is new" for path, digest in after.items() if digest not in before.values()][:1]
        raise ValueError(
            f"{option} holds {len(after)} files, {folder} was made from {len(before)}{''.join(named)}; put them back, or "
            "make another cache"
        )
    for (was, old_digest), (now, new_digest) in zip(before.items(), after.items(), strict=True):
        if old_digest != new_digest:
            raise ValueError(
                f"{now} does not hold the samples that {was} held when {folder} was made, in that order; put the file back, "
                "or make another cache"
            )
