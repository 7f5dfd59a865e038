"""Damaged files are found and named; intact ones are hashed once."""

import json
import os
from pathlib import Path

import pytest

from clipkd import files
from clipkd.teachers.store.reader import find_faults
from tests.teachers.world import Made, flip


def test_damaged_files_are_named(made: Made, copy: Path) -> None:
    path = copy / "features" / "00001.text.1.npy"
    content = path.read_bytes()
    made.open(folder=copy)
    for damaged, message in (
        (None, r"there is no .*00001\.text\.1\.npy; 1 of 15 files of the cache are damaged"),
        (content[:-1], rf"npy has {len(content) - 1:,} bytes instead of {len(content):,}"),
        (content[:-1] + b"?", r"00001\.text\.1\.npy does not hold what was written \(its SHA-256 differs\)"),
    ):
        path.write_bytes(damaged) if damaged else path.unlink()
        with pytest.raises(ValueError, match=message):
            made.open(folder=copy)
        path.write_bytes(content)
        made.open(folder=copy)


def test_unchanged_files_are_hashed_once_and_a_hidden_change_is_found_without_trust(
    made: Made, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256 = files.sha256
    monkeypatch.setattr(files, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    manifest, names = made.manifest, sorted(Path(file.name).name for file in made.manifest.files())

    def faults(*, trust: bool = True) -> tuple[list[str], list[str]]:
        hashed.clear()
        found = [Path(name).name for name in find_faults(copy, manifest, trust=trust)]
        return found, sorted(hashed)

    path = copy / "features" / "00002.image.1.npy"
    assert faults() == ([], names)
    assert faults() == ([], [])
    assert faults(trust=False) == ([], names)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 1))
    assert faults() == ([], [path.name])
    kept = path.stat().st_mtime_ns
    flip(path)
    assert path.stat().st_mtime_ns == kept
    assert faults() == ([path.name], [path.name])  # by the second time of change, which nobody can set
    assert faults(trust=False) == ([path.name], names)
    flip(path)
    assert faults() == ([], [path.name])
    for content in ("", "[]", "{", json.dumps({path.name: 3})):
        (copy / ".verified.json").write_text(content)
        assert faults() == ([], names)
