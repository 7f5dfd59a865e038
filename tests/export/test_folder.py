"""The output folder of an export replaces nothing but an earlier export; the card's options hold nothing private."""

import json
from pathlib import Path

import pytest

from clipkd import files
from clipkd.export.card import publishable
from clipkd.export.command import check_output


def write(output: Path) -> None:
    with files.write_folder(output) as folder:
        (folder / "weights").touch()
        (folder / "parity.json").write_text(json.dumps({"files": ["weights"]}))


def test_only_an_unchanged_export_may_be_replaced(tmp_path: Path) -> None:
    output, source = tmp_path / "out", tmp_path / "run"
    source.mkdir()
    check_output(output, source, force=False)
    write(output)
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
