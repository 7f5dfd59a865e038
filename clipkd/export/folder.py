"""The output folder of an export: written under a temporary name, and replacing nothing but an earlier export."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from clipkd import files
from clipkd.config.paths import require_writable

ALSO_OURS = {"bench.json", ".gitattributes"}
"""Files that `clipkd bench` and the hub add to an export."""

RUN_FOLDERS = ("checkpoints", "best")


def check_output(output: Path, source: Path, *, force: bool) -> None:
    """Raises: ValueError if the output exists and may not be replaced, or overlaps with the source."""
    if output.is_symlink():
        raise ValueError(f"{output} is a link; name the folder that it points to, or another --output")
    here, there = output.resolve(), source.resolve()
    if here == there or here in there.parents:
        raise ValueError(f"{output} contains the student to export ({source}); choose another --output")
    if there in here.parents and ((there / "state.json").is_file() or here.relative_to(there).parts[0] in RUN_FOLDERS):
        raise ValueError(f"{output} is among a run's checkpoints, which training deletes; choose another --output")
    if not output.exists():
        return require_writable("output", output)
    if not force:
        raise ValueError(f"{output} exists already; remove it, choose another --output, or replace it with --force")
    if not output.is_dir():
        raise ValueError(f"{output} is no folder; choose another --output")
    present = {str(path.relative_to(output)) for path in output.rglob("*") if not path.is_dir()}
    try:
        written = {"parity.json", *json.loads((output / "parity.json").read_text(encoding="utf-8"))["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        written = set()
    if others := sorted(present - written - ALSO_OURS):
        raise ValueError(
            f"{output} holds files that no export of clipkd has written ({others[0]}, {len(others)} such), so --force "
            "does not replace it; remove it yourself or choose another --output"
        )


@contextlib.contextmanager
def unfinished(output: Path) -> Iterator[Path]:
    """A temporary folder beside the output, removed at the end; what a killed export left in it is removed first.

    Raises: ValueError if another process is exporting to this output.
    """
    # Absolute, since the snippets of the card run inside it.
    place = output.parent.resolve() / f".{output.name}.tmp"
    place.mkdir(parents=True, exist_ok=True)
    with files.claim(place):
        for leftover in place.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)


def replace(finished: Path, output: Path) -> None:
    """Rename the finished folder, which lies in the temporary one, to the output; an earlier export is removed after."""
    for path in (finished, *finished.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)  # some writers make files that only their owner can read
    if output.exists():
        os.replace(output, finished.parent / "before")
    os.replace(finished, output)
