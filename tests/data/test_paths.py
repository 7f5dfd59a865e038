"""What a path of data means: the same for every command and kind of data, whatever the path looks like."""

import gc
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkd.evaluation.sets import Images
from clipkd.evaluation.subjects import open_subjects
from clipkd.images import open_image, to_rgb
from clipkd.inference.images import find_images
from tests.data.samples import (
    open_set,
    pair_members,
    plain_png,
    things,
    write_benchmark,
    write_images,
    write_parquet,
    write_table,
    write_tar,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*left out 1 × hidden:UserWarning"),
]


def write_shard(folder: Path, numbers: Iterable[int]) -> Path:
    return write_tar(folder / "0.tar", pair_members(numbers))


def write_csv(folder: Path, numbers: Iterable[int]) -> Path:
    return write_table(folder / "t.csv", numbers, "txt")


def write_rows(folder: Path, numbers: Iterable[int]) -> Path:
    return write_parquet(folder / "rows.parquet", numbers, "txt")


def write_album(folder: Path, numbers: Iterable[int]) -> Path:
    return folder / write_images(folder, numbers)[0]


def write_classes(folder: Path, numbers: Iterable[int]) -> Path:
    write_benchmark(folder, classnames="thing\n")
    shutil.rmtree(folder / "test")
    return write_album(folder / "val" / "thing", numbers)


def write_webdataset(folder: Path, numbers: Iterable[int]) -> Path:
    members = [(f"{n}.{end}", data) for n in numbers for end, data in (("png", plain_png(n)), ("cls", b"0"))]
    return write_benchmark(folder, members, classnames="thing\n")


def pairs(format: str) -> Callable[[str], list[int]]:
    return lambda path: things(open_set(path, format=format))


def evaluated(task: str | None = None) -> Callable[[str], list[int]]:
    def read(path: str) -> list[int]:
        (subject,) = open_subjects((task,) if task else (), (path,))
        images = Images(subject.data.pictures, lambda image: image.getpixel((0, 0))[0])
        return [images[place][0] for place in range(len(images))]

    return read


def predicted(path: str) -> list[int]:
    return [int(np.asarray(to_rgb(open_image(name)))[0, 0, 0]) for name in find_images([path])]


TASK = "layout: huggingface\nlabel_column: label\nclassnames: [thing]\ntemplates: ['{c}']\n"

KINDS: dict[str, tuple[Callable[[Path, Iterable[int]], Path], Callable[[str], list[int]], bool]] = {
    "train webdataset": (write_shard, pairs("webdataset"), True),
    "train csv": (write_csv, pairs("csv"), True),
    "train parquet": (write_rows, pairs("huggingface"), True),
    "eval webdataset": (write_webdataset, evaluated(), False),
    "eval classes": (write_classes, evaluated(), False),
    "eval parquet": (write_rows, evaluated("task.yaml"), True),
    "predict": (write_album, predicted, True),
}
"""What writes numbers into a folder and returns its file, what reads them back, and whether the file alone is data."""

NAMES = ["nested/with space", "data[1]", "a*b", "ü@x:y", "{a,b}", "n.v2"]
DECOYS = ["data1", "a_old_b", "a", "b", "n"]
"""Folders that a pattern or a name cut short would find."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_name_means_itself_in_every_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    write, read, alone = KINDS[kind]
    for decoy in DECOYS:
        write(tmp_path / "data" / decoy, range(5, 8))
    folder = tmp_path / "data" / name
    file = write(folder, range(2))
    (tmp_path / "link to folder").symlink_to(folder)
    (folder / "loop").symlink_to(folder if kind != "eval classes" else folder.parent)
    forms: dict[str, Any] = {"absolute": folder, "relative": f"data/{name}", "home": f"~/{name}"}
    forms |= {"link to folder": tmp_path / "link to folder", "dotted": f"./data/../data/{name}"}
    if kind == "train csv":
        forms = {form: f"{path}/t.csv" for form, path in forms.items()}
    elif alone:
        forms |= {"file": file, "relative file": f"data/{name}/{file.name}"}
        (tmp_path / f"alone{file.suffix}").symlink_to(file)
        forms |= {"link to file": tmp_path / f"alone{file.suffix}"}
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(TASK)
    monkeypatch.setenv("HOME", str(tmp_path / "data"))
    single = [0] if kind == "predict" else [0, 1]
    found = {form: read(str(path)) for form, path in forms.items()}
    assert found == {form: single if "file" in form else [0, 1] for form in forms}
    if kind != "train csv":
        monkeypatch.chdir(folder)
        Path("task.yaml").write_text(TASK)
        assert read(".") == [0, 1]
    gc.collect()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("path", ["{}/none", "./none", "~/none", "here/none", "{}/broken"])
def test_a_missing_path_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("task.yaml").write_text(TASK)
    Path("here").mkdir()
    Path("broken").symlink_to("nowhere")
    with pytest.raises((ValueError, FileNotFoundError), match=r"no .*(none|broken)"):
        KINDS[kind][1](path.format(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("kind", KINDS)
def test_an_unreadable_folder_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write, read, _ = KINDS[kind]
    write(tmp_path / "closed", range(2))
    monkeypatch.chdir(tmp_path)
    Path("task.yaml").write_text(TASK)
    (tmp_path / "closed").chmod(0)
    try:
        with pytest.raises((ValueError, OSError), match="closed"):
            read(str(tmp_path / "closed"))
    finally:
        (tmp_path / "closed").chmod(0o755)
