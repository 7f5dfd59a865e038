"""Files that are complete or absent, JSON and JSON lines, hashes, tensor files, and the lock of a folder; loads no torch."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, BinaryIO

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None

if TYPE_CHECKING:
    from torch import Tensor


def write_whole(path: Path, write: Callable[[BinaryIO], Any], *, durable: bool = False) -> None:
    """Write a file under a temporary name beside it, then rename it; make its folder first.

    durable: force the content to disk before the rename. Raises: OSError that names the file; nothing of it stays.
    """
    # No process id: in a folder that containers or hosts share, several have the same one.
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        raise


@contextlib.contextmanager
def write_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the name and the place of `folder` when the block ends without an error.

    It lies in a hidden folder beside it, for other temporary files too, which is removed at the end; what a kill left of
    that is removed first. Raises: ValueError if another process writes this folder; OSError that names the file.
    """
    place = folder.absolute().parent / f".{folder.name}.tmp"
    place.mkdir(parents=True, exist_ok=True)
    written, before = place / "new", place / "before"

    def keep_before() -> None:
        if before.exists() and not folder.exists():
            os.replace(before, folder)

    with claim(place):
        keep_before()  # a kill fell between the two renames below
        for leftover in place.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
        try:
            written.mkdir()
            yield written
            for path in (written, *written.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files that only their owner can read
                sync(path)
            if folder.exists():
                os.replace(folder, before)
            os.replace(written, folder)
            sync(folder.parent)
        except OSError as error:
            if error.errno is None and not isinstance(error, shutil.Error):
                raise
            raise OSError(error.errno, error.strerror or str(error), str(error.filename or folder)) from error
        finally:
            keep_before()
            shutil.rmtree(place, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what a kill left of `write_whole` in and below a folder that nobody else is writing to."""
    for path in folder.rglob("*.tmp"):
        if re.fullmatch(r".+\.[0-9a-f]{16}\.tmp", path.name):
            path.unlink()


def write_text(path: Path, text: str, *, durable: bool = False) -> None:
    """Write a UTF-8 file as `write_whole` does."""
    write_whole(path, lambda file: file.write(text.encode()), durable=durable)


def write_json(path: Path, record: Any, *, durable: bool = False) -> None:
    """Write one JSON value as `write_whole` does; NaN and infinities become null."""
    write_text(path, to_json(record, indent=1) + "\n", durable=durable)


def to_json(record: Any, *, indent: int | None = None) -> str:
    """JSON text; NaN and infinities become null, which JSON can hold."""
    return json.dumps(replace_non_finite(record), allow_nan=False, indent=indent)


def replace_non_finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_row(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a file of JSON lines. Raises: OSError that names the file."""
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


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All complete rows of a file of JSON lines; a line that a kill cut short is left out. Empty if there is no file."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def drop_rows_after(path: Path, step: int) -> None:
    """Remove the rows of steps that a resumed run repeats."""
    if path.is_file():
        kept = [row for row in read_rows(path) if row.get("step", 0) <= step]
        write_rows(path, kept)


def expand_home(path: str) -> str:
    """A path whose leading `~` stands for the home folder, unless something exists under the name as it is."""
    return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


LITTER = {"__MACOSX", "@eaDir", "Thumbs.db", "desktop.ini"}
"""Names under which systems keep their own files beside the user's."""


def is_hidden(path: str) -> bool:
    """Whether a path has a hidden part: one that begins with a dot, as in `._1.jpg`, or is in LITTER."""
    return any((part.startswith(".") and part not in (".", "..")) or part in LITTER for part in path.split("/"))


def find_files(top: str, wanted: Callable[[str], bool]) -> tuple[list[str], list[tuple[str, str]]]:
    """The files in and below a folder that are `wanted`, outer ones first, and what was left out, with causes.

    Links are followed, but not back into their parents.
    """
    found: list[str] = []
    left_out: list[tuple[str, str]] = []

    def unreadable(error: OSError) -> None:
        left_out.append((str(error.filename), error.strerror or str(error)))

    for folder, folders, names in os.walk(top, onerror=unreadable, followlinks=True):
        here = os.path.realpath(folder)
        left_out += [(os.path.join(folder, name), "hidden") for name in (*folders, *names) if is_hidden(name)]
        folders[:] = sorted(
            name
            for name in folders
            if not is_hidden(name)
            and os.path.commonpath([real := os.path.realpath(os.path.join(folder, name)), here]) != real
        )
        for path in (os.path.join(folder, name) for name in sorted(names) if not is_hidden(name)):
            if os.path.exists(path) and not os.path.isfile(path):  # a pipe, which would block a reader
                left_out.append((path, "no file"))
            elif not os.path.exists(path) or wanted(path):
                found.append(path)  # of a broken link the reader gives the reason
            else:
                left_out.append((path, "no image"))
    return found, left_out


def describe_left_out(left_out: Sequence[tuple[str, str]]) -> str:
    """Counts by cause, each with an example: `2 × no image (a/notes.txt)`."""
    examples = dict(reversed([(cause, path) for path, cause in left_out]))
    counts = Counter(cause for _, cause in left_out)
    return ", ".join(f"{count} × {cause} ({examples[cause]})" for cause, count in counts.most_common())


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of(value: Any) -> str:
    """SHA-256 of a value's JSON, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()


def sync(path: Path) -> None:
    """Force a file or folder to disk: a rename must not overtake the content it names. Windows opens no folders."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"], *, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that everyone may read. Raises: OSError that names the file."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    # Cloned, since safetensors refuses tensors that share memory (tied weights).
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        save_file(copies, path, metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Tensors of a safetensors file, on the CPU. Raises: ValueError if it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(f"{path} is missing or damaged ({error}); use an earlier checkpoint") from error


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Wait until no other process changes this file: for reading it, adding to it and writing it again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("a") as lock:
        with contextlib.suppress(OSError):  # a file system without locks
            if fcntl is not None:
                fcntl.lockf(lock, fcntl.LOCK_EX)
        yield


def claim(folder: Path) -> IO[str]:
    """Lock a folder for this process until it closes the returned file or dies.

    Raises: ValueError if another process holds the lock.
    """
    lock = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        # lockf, not flock: its locks are not inherited by loader processes, which may outlive this one, and hold across
        # the hosts and containers that share the folder.
        if fcntl is not None:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        lock.seek(0)
        owner = lock.read().strip()
        lock.close()
        raise ValueError(
            f"{folder} is being written by {owner}; wait for it, end it, or set another --output"
        ) from None
    except OSError:
        return lock  # a file system without locks
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    lock.flush()
    return lock
