"""Where an export is written: whole or not at all, and nobody's files in its way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipkd.export.folder import check_output, replace, unfinished
from clipkd.export.source import publishable


def finish(place: Path, content: str) -> Path:
    folder = place / "student"
    folder.mkdir()
    (folder / "weights").write_text(content)
    (folder / "weights").chmod(0o600)
    (folder / "parity.json").write_text(json.dumps({"files": ["weights"]}))
    return folder


def test_the_folder_gets_its_name_when_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = Path("deep/out")
    with unfinished(output) as place:
        assert place.is_absolute()
        replace(finish(place, "one"), output)
    assert [path.name for path in Path("deep").iterdir()] == ["out"]
    assert (output.stat().st_mode & 0o777, (output / "weights").stat().st_mode & 0o777) == (0o755, 0o644)
    with unfinished(output) as place:
        replace(finish(place, "two"), output)
    assert (output / "weights").read_text() == "two"
    assert [path.name for path in Path("deep").iterdir()] == ["out"]


def test_an_error_leaves_the_earlier_export_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out"
    with unfinished(output) as place:
        replace(finish(place, "one"), output)

    def stop_half_way() -> None:
        with unfinished(output) as place:
            finish(place, "two")
            raise RuntimeError("half")

    with pytest.raises(RuntimeError, match="half"):
        stop_half_way()
    rename, calls = os.replace, []

    def fail_at_the_second(source: Path, target: Path) -> None:
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        rename(source, target)

    with unfinished(output) as place:
        folder = finish(place, "three")
        monkeypatch.setattr(os, "replace", fail_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            replace(folder, output)
        assert not output.exists()
    assert (output / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_kill_left_is_swept_and_its_earlier_export_put_back(tmp_path: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    killed, running = tmp_path / f".out.{dead.stdout.strip()}.tmp", tmp_path / f".out.{os.getppid()}.tmp"
    (killed / "before").mkdir(parents=True)
    (killed / "before" / "weights").write_text("one")
    running.mkdir()
    mine = [tmp_path / "out.tmp", tmp_path / ".out.notes.tmp", tmp_path / ".other.1.tmp"]
    for path in mine:
        path.mkdir()
    with unfinished(tmp_path / "out"):
        assert (tmp_path / "out" / "weights").read_text() == "one"
    assert set(tmp_path.iterdir()) == {tmp_path / "out", running, *mine}


def test_only_an_export_as_it_was_written_may_be_replaced(tmp_path: Path) -> None:
    output, source = tmp_path / "out", tmp_path / "run"
    source.mkdir()
    check_output(output, source, force=False)
    with unfinished(output) as place:
        replace(finish(place, "one"), output)
    with pytest.raises(ValueError, match="exists already"):
        check_output(output, source, force=False)
    check_output(output, source, force=True)
    (output / "bench.json").touch()
    check_output(output, source, force=True)
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"no export of clipkd has written \(notes.txt, 1 such\)"):
        check_output(output, source, force=True)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "open_clip_config.json").touch()
    with pytest.raises(ValueError, match=r"open_clip_config\.json"):
        check_output(tmp_path / "model", source, force=True)


def test_an_output_where_the_source_lies_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = run / "checkpoints" / "step_000001"
    step.mkdir(parents=True)
    (step / "state.json").touch()
    for output, source in ((run, run), (tmp_path, run), (run, step), (step / "out", run), (step / "out", step)):
        with pytest.raises(ValueError, match="choose another --output"):
            check_output(output, source, force=True)
    check_output(run / "student", run, force=False)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a link"):
        check_output(tmp_path / "link", run, force=True)


@pytest.mark.parametrize(
    ("value", "published"),
    [
        ("/home/me/secret/teacher", "teacher"),
        ("local-dir:/home/me/teacher/", "local-dir:teacher/"),
        ("local-dir:../runs/teacher", "local-dir:teacher"),
        ("runs/vit", "runs/vit"),
        ("ViT-B-16", "ViT-B-16"),
        ("hf-hub:laion/model", "hf-hub:laion/model"),
        ("pipe:aws s3 cp s3://bucket/{0..9}.tar --key 123 -", "pipe:…"),
        ("https://me:word@host/data/{00..99}.tar?token=1", "https://host/data/{00..99}.tar"),
        ("a photo of a {c}.", "a photo of a {c}."),
        ({"a": ["/x/y", 3, None, True]}, {"a": ["y", 3, None, True]}),
    ],
)
def test_what_is_published_tells_nothing_of_the_machine(value: object, published: object) -> None:
    assert publishable(value) == published
