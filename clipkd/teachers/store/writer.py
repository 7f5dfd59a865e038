"""Writing a cache: each file whole or absent, each shard known as done only after its last file."""

import dataclasses
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipkd import files
from clipkd.teachers.store.manifest import MANIFEST, PLAN, FileRecord, Manifest, Shard, parse_shard, to_json

RECORDS, FEATURES = "records", "features"


def write_array(folder: Path, planned: FileRecord, array: np.ndarray) -> FileRecord:
    """As .npy. Raises: OSError that names the file."""
    assert (array.shape, array.dtype.str) == (planned.shape, planned.dtype), (array.shape, array.dtype.str, planned)
    path = folder / planned.name

    def write(file: BinaryIO) -> None:
        # Not numpy.save, whose errors of a full disk have no number.
        header: Any = np.lib.format.header_data_from_array_1_0(array)
        np.lib.format.write_array_header_1_0(file, header)
        file.write(np.ascontiguousarray(array).data)

    files.write_whole(path, write, durable=True)
    return dataclasses.replace(planned, bytes=path.stat().st_size, sha256=files.sha256(path))


def record_path(folder: Path, number: int) -> Path:
    return folder / RECORDS / f"{number:05d}.json"


def write_record(folder: Path, number: int, shard: Shard) -> None:
    """This makes a shard count as done."""
    files.write_json(record_path(folder, number), to_json(shard), durable=True)


def read_record(folder: Path, number: int) -> Shard | None:
    """None unless all files of a shard are there in their size."""
    try:
        shard = parse_shard(json.loads(record_path(folder, number).read_text(encoding="utf-8")))
        whole = all((folder / file.name).stat().st_size == file.bytes for file in shard.files.values())
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shard if whole else None


def read_plan(folder: Path) -> dict[str, Any] | None:
    """Of a cache that is not finished. Raises: ValueError if it cannot be read."""
    path = folder / PLAN
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); remove {folder} and make the cache again") from error
    assert isinstance(found, dict)
    return found


def remove_leftovers(folder: Path) -> None:
    """What kills have left half written."""
    for place in (folder, folder / FEATURES, folder / RECORDS):
        for path in place.glob("*.tmp"):
            path.unlink()


def finish(folder: Path, manifest: Manifest) -> None:
    """From here on it may be trained from."""
    files.sync(folder / FEATURES)
    files.write_json(folder / MANIFEST, to_json(manifest), durable=True)
    remove_traces(folder)
    files.sync(folder)


def remove_traces(folder: Path) -> None:
    """What only an unfinished cache has."""
    for path in (folder / RECORDS).glob("*.json"):
        path.unlink()
    if (folder / RECORDS).is_dir():
        (folder / RECORDS).rmdir()
    (folder / PLAN).unlink(missing_ok=True)


def reopen(folder: Path, plan: dict[str, Any], whole: dict[int, Shard] | None) -> None:
    """A finished cache as one that was interrupted after the shards that are whole; None leaves it finished."""
    remove_traces(folder)  # a kill may have left them
    if whole is not None:
        for number, shard in whole.items():
            write_record(folder, number, shard)
        files.write_json(folder / PLAN, plan, durable=True)
        (folder / MANIFEST).unlink()
        files.sync(folder)
