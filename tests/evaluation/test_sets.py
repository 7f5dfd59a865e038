"""Labelled images in both layouts, and the file that an error names."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import EvaluationSet, Images, Layout
from tests.data.samples import plain_png, write_tar


def red(image: Image.Image) -> Any:
    return image.convert("RGB").getpixel((0, 0))[0]  # type: ignore[index]


def benchmark(root: Path, labels: list[bytes] | None = None) -> Path:
    """CLIP_benchmark's layout: three classes, four images in two shards."""
    labels = labels or [b"2", b"0\n", b"1", b"2"]
    (root / "test").mkdir(parents=True)
    (root / "classnames.txt").write_text("cat\nsea lion\ngrand piano\n")
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n{c}\n")
    (root / "test" / "nshards.txt").write_text("2\n")
    members = [[(f"s{i}.png", plain_png(10 * i)), (f"s{i}.cls", label)] for i, label in enumerate(labels)]
    write_tar(root / "test" / "0.tar", members[0] + members[1])
    write_tar(root / "test" / "1.tar", [member for pair in members[2:] for member in pair])
    return root


def open_set(layout: Layout, root: Path, split: str) -> EvaluationSet:
    return open_evaluation_set(root, layout=layout, split=split)


def items(data: EvaluationSet) -> list[tuple[Any, int, int]]:
    images = [Images(data.pictures, red)[place] for place in range(len(data))]
    return [(pixels, label, place) for (pixels, place), label in zip(images, data.labels, strict=True)]


def test_the_webdataset_layout_gives_every_image_its_label_in_file_order(tmp_path: Path) -> None:
    images = open_set("webdataset", benchmark(tmp_path), "test")
    assert items(images) == [(0, 2, 0), (10, 0, 1), (20, 1, 2), (30, 2, 3)]
    assert images.labels == [2, 0, 1, 2]
    assert images.classnames == ["cat", "sea lion", "grand piano"]
    assert images.templates == ["a photo of a {c}.", "{c}"]


def test_the_imagefolder_layout_numbers_the_sorted_folders(tmp_path: Path) -> None:
    for name, file, value in [
        ("n02", "b.png", 4),
        ("n02", "a.PNG", 3),
        ("n01", "x.JPEG", 1),
        ("n03", "deep/y.png", 5),
        ("n01", "notes.txt", 0),
    ]:
        path = tmp_path / "val" / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(plain_png(value))
    expected = [(1, 0, 0), (3, 1, 1), (4, 1, 2), (5, 2, 3)]
    assert items(open_set("imagefolder", tmp_path, "val")) == expected
    images = open_set("imagefolder", tmp_path / "val", "val")  # the root may hold the classes itself
    assert items(images) == expected
    assert images.classnames is None
    assert images.templates is None


@pytest.mark.parametrize(
    "missing", ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt", "test/1.tar"]
)
def test_a_missing_file_of_the_webdataset_layout_is_named(tmp_path: Path, missing: str) -> None:
    (benchmark(tmp_path) / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        open_set("webdataset", tmp_path, "test")


def test_a_missing_root_or_split_is_named(tmp_path: Path) -> None:
    benchmark(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"val/nshards\.txt"):
        open_set("webdataset", tmp_path, "val")
    for layout in ("webdataset", "imagefolder"):
        with pytest.raises(FileNotFoundError, match="nowhere"):
            open_set(layout, tmp_path / "nowhere", "test")


@pytest.mark.parametrize("text", ["two\n", "1 2\n", "1\n2\n", "\n", "-1\n"])
def test_a_wrong_count_of_shards_is_refused(tmp_path: Path, text: str) -> None:
    (benchmark(tmp_path) / "test" / "nshards.txt").write_text(text)
    with pytest.raises(ValueError, match=r"nshards\.txt must hold one number"):
        open_set("webdataset", tmp_path, "test")


@pytest.mark.parametrize(
    ("label", "words"),
    [
        (b"3", "label 3, outside the 3"),
        (b"-1", "label -1, outside"),
        (b"cat", "b'cat', not a number"),
        (b"", "not a number"),
    ],
)
def test_a_wrong_label_names_shard_and_sample(tmp_path: Path, label: bytes, words: str) -> None:
    benchmark(tmp_path, [b"0", b"1", b"2", label])
    with pytest.raises(ValueError, match=rf"1\.tar: sample s3 has .*{words}"):
        open_set("webdataset", tmp_path, "test")


@pytest.mark.parametrize("kept", ["s7.png", "s7.cls"])
def test_a_sample_without_image_or_label_is_refused(tmp_path: Path, kept: str) -> None:
    benchmark(tmp_path)
    write_tar(tmp_path / "test" / "1.tar", [("s2.png", plain_png(1)), ("s2.cls", b"1"), (kept, b"0")])
    with pytest.raises(ValueError, match=r"1\.tar: sample s7 has no image or no \.cls \(1 such"):
        open_set("webdataset", tmp_path, "test")


def test_a_folder_of_images_without_classes_is_refused_with_the_remedy(tmp_path: Path) -> None:
    # ImageNet's validation archive unpacks flat.
    for number in range(3):
        (tmp_path / f"ILSVRC2012_val_{number:08}.JPEG").write_bytes(plain_png(number))
    with pytest.raises(ValueError, match="no class folders; sort the images"):
        open_set("imagefolder", tmp_path, "val")


def test_class_folders_without_an_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "n01").mkdir()
    (tmp_path / "n01" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"no image .* in its 1 class folders"):
        open_set("imagefolder", tmp_path, "val")


def test_a_corrupt_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    benchmark(tmp_path)
    write_tar(tmp_path / "test" / "1.tar", [("bad.png", b"broken"), ("bad.cls", b"1")])
    images = open_set("webdataset", tmp_path, "test")
    with pytest.raises(ValueError, match=r"1\.tar, sample 1/bad: cannot be decoded"):
        Images(images.pictures, red)[2]
    (tmp_path / "folders" / "n01").mkdir(parents=True)
    (tmp_path / "folders" / "n01" / "bad.png").write_bytes(b"broken")
    images = open_set("imagefolder", tmp_path / "folders", "val")
    with pytest.raises(ValueError, match=r"n01/bad\.png.*cannot be decoded"):
        Images(images.pictures, red)[0]
