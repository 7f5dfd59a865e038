"""The output folder of an export, which replaces nothing but an earlier export."""

import json
from pathlib import Path

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
