"""JSON lines that survive a kill, folders that are complete or absent."""

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipkd import files


def test_rows_come_back_in_order(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "metrics.jsonl"
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25, "name": "ü\n"}, {"step": 3, "nested": {"a": [1, 2.5]}}]
    for row in rows:
        files.append_row(path, row)
    assert files.read_rows(path) == rows
    assert path.read_bytes().count(b"\n") == 3


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    assert files.read_rows(tmp_path / "none.jsonl") == []
    files.drop_rows_after(tmp_path / "none.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"loss": math.nan, "norm": math.inf, "list": [1.0, -math.inf, (math.nan, 2)], "deep": {"x": math.nan}, "n": 3}
    files.append_row(path, row)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read == {"loss": None, "norm": None, "list": [1.0, None, [None, 2]], "deep": {"x": None}, "n": 3}
    assert math.isnan(row["loss"])


def test_a_last_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in range(3):
        files.append_row(path, {"step": step, "loss": 0.125})
    whole = path.read_bytes()
    last = whole.rindex(b'{"step": 2')
    for cut in range(last, len(whole) - 1):
        path.write_bytes(whole[:cut])
        rows = files.read_rows(path)
        assert rows == [{"step": 0, "loss": 0.125}, {"step": 1, "loss": 0.125}], whole[last:cut]


def test_rows_added_after_a_cut_line_are_read(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text('{"n": 1}\n{"n": 2, "acc')
    files.append_row(path, {"n": 3})
    files.append_row(path, {"n": 4})
    assert files.read_rows(path) == [{"n": 1}, {"n": 3}, {"n": 4}]


def test_drop_after_keeps_the_steps_up_to_the_given_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for step in (1, 10, 20, 30):
        files.append_row(path, {"step": step})
    with path.open("a") as file:
        file.write('{"step": 3')
    files.drop_rows_after(path, 20)
    assert files.read_rows(path) == [{"step": 1}, {"step": 10}, {"step": 20}]
    files.append_row(path, {"step": 21})
    assert [row["step"] for row in files.read_rows(path)] == [1, 10, 20, 21]
    files.drop_rows_after(path, 0)
    assert path.read_bytes() == b""
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_is_an_error_that_names_the_file() -> None:
    with pytest.raises(OSError, match="/dev/full") as caught:
        files.append_row(Path("/dev/full"), {"step": 1})
    assert caught.value.errno == errno.ENOSPC


def write(output: Path, content: str) -> None:
    with files.write_folder(output) as folder:
        assert folder.is_absolute()
        (folder / "weights").write_text(content)
        (folder / "weights").chmod(0o600)


def test_a_folder_gets_its_name_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = Path("deep/out")
    for content in ("one", "two"):
        write(output, content)
        assert (output / "weights").read_text() == content
        assert (output.stat().st_mode & 0o777, (output / "weights").stat().st_mode & 0o777) == (0o755, 0o644)
        assert [path.name for path in Path("deep").iterdir()] == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "full", "weights")])
def test_an_error_leaves_the_earlier_folder_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    output = tmp_path / "out"
    write(output, "one")

    def fail() -> None:
        with files.write_folder(output) as folder:
            (folder / "weights").write_text("two")
            raise error

    with pytest.raises(type(error)) as caught:
        fail()
    assert str(caught.value) == str(error)
    assert (output / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_kill_are_removed_and_only_one_process_writes_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp" / "new").mkdir(parents=True)
    (tmp_path / ".out.v2.12.tmp").mkdir()
    code = "import sys\nfrom pathlib import Path\nfrom clipkd.files import write_folder\n"
    code += "with write_folder(Path(sys.argv[1])): pass"
    with files.write_folder(tmp_path / "out") as folder:
        assert sorted(path.name for path in folder.parent.iterdir()) == [".lock", "new"]
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
        assert f"is being written by process {os.getpid()} on " in other.stderr
    assert sorted(tmp_path.iterdir()) == [tmp_path / ".out.v2.12.tmp", tmp_path / "out"]


@pytest.mark.parametrize("killed", [False, True])
def test_the_earlier_folder_stays_if_its_place_cannot_be_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed: bool
) -> None:
    """Between the two renames: an error, or a kill, after which the next writer finds the folder."""
    folder, place, replace = tmp_path / "out", tmp_path / ".out.tmp", os.replace
    folder.mkdir()
    (folder / "a").write_text("before")

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name == "new":
            raise PermissionError(13, "Permission denied", str(target))
        replace(source, target)

    if killed:
        place.mkdir()
        folder.rename(place / "before")
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(PermissionError), files.write_folder(folder) as written:
        (written / "a").write_text("after")
    assert (folder / "a").read_text() == "before"
    assert not place.exists()
