"""Write a cache: plan.json first, then the files of each shard and its record, manifest.json last."""

import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipkd import files
from clipkd.teachers.store.manifest import PLAN, FileRecord, Shard, parse_shard, to_json


def write_array(folder: Path, planned: FileRecord, array: np.ndarray) -> FileRecord:
    """Write a planned .npy file; return its record with size and SHA-256. Raises: OSError that names the file."""
    assert (array.shape, array.dtype.str) == (planned.shape, planned.dtype), (array.shape, array.dtype.str, planned)
    path = folder / planned.name

    def write(file: BinaryIO) -> None:
        # numpy.save raises errors without a number when the disk is full.
        header: Any = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)

    files.write_whole(path, write, durable=True)
    return dataclasses.replace(planned, bytes=path.stat().st_size, sha256=files.sha256(path))


def record_path(folder: Path, number: int) -> Path:
    return folder / "records" / f"{number:05d}.json"


def write_record(folder: Path, number: int, shard: Shard) -> None:
    """Mark a shard as complete."""
    files.write_json(record_path(folder, number), to_json(shard), durable=True)


def read_record(folder: Path, number: int) -> Shard | None:
    """The record of a complete shard; None unless all its files exist with their size."""
    try:
        shard = parse_shard(json.loads(record_path(folder, number).read_text(encoding="utf-8")))
        complete = all((folder / file.name).stat().st_size == file.bytes for file in shard.files.values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if complete else None


def read_plan(folder: Path) -> dict[str, Any] | None:
    """plan.json; None if there is none. Raises: ValueError if it is damaged."""
    try:
        return json.loads((folder / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{folder / PLAN} is damaged ({error}); remove {folder} and make the cache again") from error
