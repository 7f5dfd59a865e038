"""Find damaged files of a cache by their size and SHA-256."""

import contextlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from clipkd import distributed, files, progress
from clipkd.teachers.store.manifest import FileRecord, Manifest

VERIFIED = ".verified.json"
"""Files that were hashed before, with size and times of change. An unchanged file is not hashed at every start."""

MOST_THREADS = 8


def find_faults(folder: Path, manifest: Manifest, *, trust: bool = True) -> dict[str, str]:
    """Damaged or missing files → what is wrong with each. Call on every process; each checks its share.

    trust: skip files that were found intact before and have not been written since.
    """
    share = manifest.files()[distributed.rank() :: distributed.world_size()]
    stamps = {file.name: [*stamp(folder / file.name), file.sha256] for file in share}
    known = (files.read_rows(folder / VERIFIED) or [{}])[0] if trust else {}
    unknown = [file for file in share if known.get(file.name) != stamps[file.name]]
    with ThreadPoolExecutor(MOST_THREADS) as pool:
        checks = pool.map(lambda file: find_fault(folder / file.name, file), unknown)
        if unknown:
            checks = progress.track_on_main(checks, "check the cache", len(unknown))
        faults = {file.name: fault for file, fault in zip(unknown, checks, strict=True) if fault}
    everywhere = distributed.gather_objects((faults, stamps, len(unknown)))
    found = {name: fault for part, _, _ in everywhere for name, fault in part.items()}
    if distributed.rank() == 0 and not found and any(num_hashed for _, _, num_hashed in everywhere):
        with contextlib.suppress(OSError):  # in a folder that cannot be written, files are hashed at every start
            verified = {name: one for _, part, _ in everywhere for name, one in part.items()}
            files.write_text(folder / VERIFIED, files.to_json(verified))
    return {file.name: found[file.name] for file in manifest.files() if file.name in found}


def find_fault(path: Path, file: FileRecord) -> str | None:
    """What is wrong with a file; None if it is intact."""
    try:
        size = path.stat().st_size
        if size != file.bytes:
            return f"{path} has {size:,} bytes instead of {file.bytes:,}"
        if files.sha256(path) != file.sha256:
            return f"{path} does not hold what was written (its SHA-256 differs)"
    except FileNotFoundError:
        return f"there is no {path}"
    except OSError as error:
        return f"{path} cannot be read ({error})"
    return None


def stamp(path: Path) -> list[int]:
    """Size, both times of change (the second cannot be set) and inode number; empty if it is no file."""
    try:
        found = path.stat()
    except OSError:
        return []
    return [found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino] if stat.S_ISREG(found.st_mode) else []
