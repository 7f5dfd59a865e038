"""metrics.jsonl and results.jsonl: one JSON object per line, whole lines only."""

import contextlib
import json
import math
from pathlib import Path
from typing import Any


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line; NaN and infinities become null, which JSON can hold. Raises: OSError that names the file."""
    line = to_json(row) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("ab+") as file:
            if file.tell():
                file.seek(-1, 2)
                if file.read(1) != b"\n":  # a kill cut the last line short
                    line = "\n" + line
            file.write(line.encode())
    except OSError as error:  # a full disk shows at the write, which knows no name
        raise OSError(error.errno, error.strerror, str(path)) from error


def write(path: Path, record: dict[str, Any]) -> None:
    """One record as a file of its own."""
    path.write_text(to_json(record, indent=1) + "\n", encoding="utf-8")


def to_json(record: dict[str, Any], *, indent: int | None = None) -> str:
    return json.dumps(replace_non_finite(record), allow_nan=False, indent=indent)


def replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; one that a kill cut short is left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def drop_after(path: Path, step: int) -> None:
    """Forget the lines of steps that a resumed run will do again."""
    kept = [row for row in read(path) if row.get("step", 0) <= step]
    if path.is_file():
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        temporary.replace(path)
