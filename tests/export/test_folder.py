"""The output folder of an export: complete or absent, and nothing but an earlier export is replaced."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clipkd.export.card import publishable
from clipkd.export.folder import check_output, replace, unfinished


def finish(place: Path, content: str) -> Path:
    folder = place / "student"
    folder.mkdir()
    (folder / "weights").write_text(content)
    (folder / "weights").chmod(0o600)
    (folder / "parity.json").write_text(json.dumps({"files": ["weights"]}))
    return folder


def test_the_folder_gets_its_name_when_it_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = Path("deep/out")
    for content in ("one", "two"):
        with unfinished(output) as place:
            assert place.is_absolute()
            replace(finish(place, content), output)
        assert (output / "weights").read_text() == content
        assert (output.stat().st_mode & 0o777, (output / "weights").stat().st_mode & 0o777) == (0o755, 0o644)
        assert [path.name for path in Path("deep").iterdir()] == ["out"]


def test_an_error_leaves_the_earlier_export_and_nothing_else(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with unfinished(output) as place:
        replace(finish(place, "one"), output)

    def interrupted() -> None:
        with unfinished(output) as place:
            finish(place, "two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (output / "weights").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_of_a_kill_are_removed_and_only_one_process_exports(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp" / "student").mkdir(parents=True)
    (tmp_path / ".out.v2.12.tmp").mkdir()
    code = "import sys\nfrom pathlib import Path\nfrom clipkd.export.folder import unfinished\n"
    code += "with unfinished(Path(sys.argv[1])): pass"
    with unfinished(tmp_path / "out") as place:
        assert [path.name for path in place.iterdir()] == [".lock"]
        other = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], capture_output=True, text=True)
        assert f"is being written by process {os.getpid()} on " in other.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / ".out.v2.12.tmp"]


def test_only_an_unchanged_export_may_be_replaced(tmp_path: Path) -> None:
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


def test_an_output_that_overlaps_with_the_source_is_refused(tmp_path: Path) -> None:
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
        ("ViT-B-16@laion2b_s34b_b88k", "ViT-B-16@laion2b_s34b_b88k"),
        ("ViT-B-16@/home/me/secret/w.pt", "ViT-B-16@w.pt"),
        ("/home/me/arch.json@/home/me/start.pt", "arch.json@start.pt"),
        ("hf-hub:laion/model", "hf-hub:laion/model"),
        ("pipe:aws s3 cp s3://bucket/{0..9}.tar --key 123 -", "pipe:…"),
        ("https://me:word@host/data/{00..99}.tar?token=1", "https://host/data/{00..99}.tar"),
        ({"a": ["/x/y", 3, None, True]}, {"a": ["y", 3, None, True]}),
    ],
)
def test_published_options_hold_nothing_private(value: object, published: object) -> None:
    assert publishable(value) == published
