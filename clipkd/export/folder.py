"""The folder that an export writes: under another name until it is whole, and never in the place of what is not clipkd's."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

ALSO_OURS = {"bench.json", ".gitattributes"}
"""What `clipkd bench` and the hub put beside an export."""

RUN_FOLDERS = ("checkpoints", "best")


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Raises: ValueError if the output exists and may not be replaced, or is where the source lies."""
    if output.is_symlink():
        raise ValueError(f"{output} is a link; name the folder that it points to, or another --output")
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise ValueError(f"{output} is, or holds, what is to be exported ({source}); choose another --output")
    if there in here.parents and ((there / "state.json").is_file() or here.relative_to(there).parts[0] in RUN_FOLDERS):
        raise ValueError(f"{output} lies among the checkpoints of a run, which come and go; choose another --output")
    if not output.exists():
        return
    if not force:
        raise ValueError(f"{output} exists already; remove it, choose another --output, or replace it with --force")
    if not output.is_dir():
        raise ValueError(f"{output} is no folder; choose another --output")
    present = {str(path.relative_to(output)) for path in output.rglob("*") if not path.is_dir()}
    try:
        files = {"parity.json", *json.loads((output / "parity.json").read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        files = set()
    if others := sorted(present - files - ALSO_OURS):
        raise ValueError(
            f"{output} holds what no export of clipkd has written ({others[0]}, {len(others)} such), so --force leaves it "
            "alone; remove it yourself or choose another --output"
        )


@contextlib.contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """A place beside the output for all that is not finished; it goes, whatever happens. What kills have left goes first."""
    output.parent.mkdir(parents=True, exist_ok=True)
    for leftover in output.parent.glob(f".{output.name}.*.tmp"):
        number = leftover.name.split(".")[-2]
        if number.isdecimal() and not is_running(int(number)):
            put_back(leftover, output)
            shutil.rmtree(leftover, ignore_errors=True)
    # Absolute, since the card's snippets are run from within it.
    place = output.parent.resolve() / f".{output.name}.{os.getpid()}.tmp"
    place.mkdir()
    try:
        yield place
    finally:
        put_back(place, output)
        shutil.rmtree(place, ignore_errors=True)


def replace(finished: Path, output: Path) -> None:
    """The finished folder, in the unfinished place, gets its name; an earlier export goes only then."""
    for path in (finished, *finished.rglob("*")):
        path.chmod(
            0o755 if path.is_dir() else 0o644
        )  # safetensors and others make files that only their owner can read
    if output.exists():
        os.replace(output, finished.parent / "before")
    os.replace(finished, output)


def put_back(place: Path, output: Path) -> None:
    """An earlier export whose successor did not come to its name."""
    if (place / "before").is_dir() and not output.exists():
        os.replace(place / "before", output)


def is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
