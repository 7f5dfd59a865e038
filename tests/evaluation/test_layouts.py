"""Every kind of task in every layout, and for each wrong file an error that names it."""

import io
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import EvaluationSet, Images
from clipkd.evaluation.subjects import open_subject
from clipkd.evaluation.tasks import Kind, Task
from tests.data.samples import picture_rows, plain_png, write_benchmark, write_tar

# datasets leaves the tables beside images open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))


def npy(values: Any, dtype: Any = float) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def sampled(extension: str, *contents: bytes) -> list[tuple[str, bytes]]:
    return [
        (f"s{place}.{end}", part)
        for place, content in enumerate(contents)
        for end, part in (("png", plain_png(10 * place)), (extension, content))
    ]


def class_folders(root: Path, *files: str) -> Path:
    for number, name in enumerate(files):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(plain_png(number))
    return root


def keys(data: EvaluationSet) -> list[str]:
    return [picture.key for picture in data.pictures]


def reds(data: EvaluationSet) -> list[int]:
    """The red value that plain_png gave each image."""
    images = Images(data.pictures, lambda image: image.getpixel((0, 0))[0])
    assert [images[place][1] for place in range(len(data))] == list(range(len(data)))
    return [images[place][0] for place in range(len(data))]


def refused(root: Path, words: str, *, kind: Kind | None = None, split: str | None = None) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_evaluation_set(root, kind=kind, split=split)


def test_the_webdataset_layout_gives_every_image_its_label_in_file_order(tmp_path: Path) -> None:
    members = sampled("cls", b"2", b"0\n", b"1", b"2")
    data = open_evaluation_set(write_benchmark(tmp_path, members[:4], members[4:], classnames="cat\nsea lion\neel\n"))
    assert (data.kind, data.labels, reds(data)) == ("classification", [2, 0, 1, 2], [0, 10, 20, 30])
    assert keys(data) == ["0/s0", "0/s1", "1/s2", "1/s3"]
    assert (data.classnames, data.templates) == (["cat", "sea lion", "eel"], ["a photo of a {c}.", "{c}"])


def test_multilabel_vectors_become_rows_of_truth(tmp_path: Path) -> None:
    members = sampled("npy", npy([1, 0, 1]), npy([0, 0, 0], np.int64), npy([True, True, False], bool))
    data = open_evaluation_set(write_benchmark(tmp_path, members, classnames="a\nb\nc\n", kind=" Multilabel\n"))
    assert data.kind == "multilabel"
    assert data.targets is not None
    assert data.targets.dtype == bool
    assert data.targets.tolist() == [[True, False, True], [False, False, False], [True, True, False]]


def test_a_pickle_in_place_of_a_vector_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for place, content in enumerate((npy([Evil(), Evil()], object), pickle.dumps(Evil()))):
        root = write_benchmark(tmp_path / str(place), sampled("npy", npy([1, 0]), content), kind="multilabel")
        refused(root, r"0\.tar: sample 0/s1: its \.npy cannot be read")
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # what it would have done
    assert (tmp_path / "ran").exists()


WRONG = [npy([1]), npy([1, 0, 0]), npy([[1, 0]]), npy([0, 2]), npy([0.5, 0]), npy([0, np.nan])]
UNREADABLE = [b"", b"1 0", npy([1, 0])[:-3], b"PK\x03\x04 no archive"]


@pytest.mark.parametrize(
    ("kind", "extension", "good", "content", "words"),
    [
        *(("multilabel", "npy", npy([1, 0]), vector, "its labels must be 2 zeros and ones") for vector in WRONG),
        *(("multilabel", "npy", npy([1, 0]), content, r"its \.npy cannot be read") for content in UNREADABLE),
        *(("pairs", "txt", b"a\nb", text, "has [13] captions; a pair") for text in (b"one", b"one\ntwo\n\n")),
        ("retrieval", "txt", b"a", b"", "has no captions"),
        ("retrieval", "txt", b"a", b"caf\xe9", "captions are not UTF-8"),
        *((None, "cls", b" 0\n", label, "has the label b'.*', not a number") for label in (b"1_0", b"+1", b"1.0", b"")),
    ],
)
def test_a_sample_with_a_wrong_label_is_named(
    tmp_path: Path, kind: Kind, extension: str, good: bytes, content: bytes, words: str
) -> None:
    refused(
        write_benchmark(tmp_path, sampled(extension, good, content)), rf"0\.tar: sample 0/s1:? .*{words}", kind=kind
    )


def test_captions_stand_one_per_line_unchanged(tmp_path: Path) -> None:
    members = sampled("txt", "A cat. \n\n  Käse 🧀\\n\r\nlast".encode(), b"one\n")
    data = open_evaluation_set(write_benchmark(tmp_path, members, kind="retrieval", classnames=""))
    assert data.captions == [("A cat. ", "", "  Käse 🧀\\n", "last"), ("one",)]
    assert (data.kind, data.classnames, data.templates, data.num_classes) == ("retrieval", None, None, 0)


def test_a_blank_class_name_keeps_its_number_and_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    # vtab/clevr_closest_object_distance; WILDS folders also hold .npy metadata beside the labels.
    members = [*sampled("cls", b"3", b"2"), ("s1.npy", npy([1, 0]))]
    data = open_evaluation_set(
        write_benchmark(tmp_path, members, classnames="\ufeff very nearby\nnear \n\ndistant\r\n")
    )
    assert data.classnames == ["very nearby", "near", "", "distant"]
    assert (data.kind, data.labels, data.targets) == ("classification", [3, 2], None)


LISTS = ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *((name, content, "") for name in LISTS for content in (b"", b"\n \n", b"caf\xe9 {c}\n")),
        *((name, None, "") for name in LISTS[:2]),
        *((LISTS[2], text, " must hold one number") for text in (b"two\n", b"1\n2\n", b"-1\n")),
        (LISTS[1], b"{c}\na photo of a {}.\n", r": line 2 has no \{c\}"),
        ("dataset_type.txt", b"regression", " says 'regression'; known"),
        ("test/0.tar", None, ""),
    ],
)
def test_a_missing_or_wrong_file_is_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    root = write_benchmark(tmp_path, sampled("cls", b"0"))
    (root / name).unlink() if content is None else (root / name).write_bytes(content)
    refused(root, name + words, split="test")


def test_a_shard_that_is_cut_or_damaged_or_lacks_a_member_is_refused(tmp_path: Path) -> None:
    root = write_benchmark(tmp_path, sampled("cls", *[b"0"] * 9))
    shard = root / "test" / "0.tar"
    shard.write_bytes(shard.read_bytes()[:700])  # test_tar_index.py has the other damage
    refused(root, r"0\.tar is not a complete uncompressed tar")
    write_tar(shard, sampled("cls", b"0") * 2)
    refused(root, r"0\.tar holds 's0' more than once")
    for member in (("s7.png", plain_png(0)), ("s7.cls", b"0")):
        write_tar(shard, [*sampled("cls", b"1"), member])
        refused(root, r"0\.tar: sample s7 has no image or no \.cls \(1 such")
    write_tar(shard, [("bad.png", b"broken"), ("bad.cls", b"1")])
    with pytest.raises(ValueError, match=r"0\.tar: sample 0/bad: cannot be decoded"):
        reds(open_evaluation_set(root))


def test_class_folders_hold_every_kind_of_image_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    names = ["x/a.bmp", "x/b.TIF", "x/c.jfif", "x/d.gif", "x/e.avif", "x/f.ppm", "x/g", "y/deep/e.PNG"]
    class_folders(tmp_path, *names, "x/._a.png", ".cache/f.png", "@eaDir/f.png")
    (tmp_path / "y" / "notes.txt").write_text("no image")
    Image.new("P", (1, 1)).save(tmp_path / "x" / "d.gif")
    with pytest.warns(UserWarning, match=r"left out 1 × hidden \(.*x/\._a\.png\), 1 × no image \(.*y/notes\.txt\)"):
        data = open_evaluation_set(tmp_path)
    assert (keys(data), data.labels, data.classnames, data.templates) == (names, [0] * 7 + [1], None, None)
    assert Images(data.pictures, lambda image: image.mode)[3] == ("RGB", 3)  # which a palette is not
    for name in ("x/._a.png", "y/notes.txt"):
        (tmp_path / name).unlink()
    (tmp_path / "x" / "z.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(ValueError, match=r"x/z\.heic: cannot be decoded \(.*HEIC needs pillow-heif"):
        reds(open_evaluation_set(tmp_path))
    (tmp_path / "x" / "z.heic").unlink()
    (tmp_path / "z").mkdir()
    with pytest.warns(UserWarning, match="1 class folders hold no image, such as z"):
        assert open_evaluation_set(tmp_path).folders == ["x", "y", "z"]
    refused(class_folders(tmp_path / "rows", "0.parquet"), "parquet files; set layout: huggingface in a task")
    refused(class_folders(tmp_path / "flat", "ILSVRC2012_val_1.JPEG"), "no class folders; sort the images")
    (tmp_path / "none" / "n01").mkdir(parents=True)
    refused(tmp_path / "none", r"no image in its 1 class folders")


@pytest.mark.parametrize("names", [[*map(str, range(12))], [*map(str, range(1, 13))], [*"cab"], ["00", "1", "02"]])
def test_class_folders_called_by_numbers_are_in_numeric_order_as_imagefolder_where_the_two_agree(
    tmp_path: Path, names: list[str]
) -> None:
    root = class_folders(tmp_path / "data", *(f"{name}/{name}.png" for name in names))
    numeric = all(name.isdecimal() for name in names)
    assert open_evaluation_set(root).folders == sorted(names, key=int if numeric else str)  # type: ignore[arg-type]
    theirs = ImageFolder(str(root))
    assert theirs.classes == sorted(names)
    if theirs.classes == sorted(names, key=int if numeric else str):  # type: ignore[arg-type]
        ours = open_evaluation_set(root)
        assert [
            (str(root / picture.key), label) for picture, label in zip(ours.pictures, ours.labels, strict=True)
        ] == theirs.imgs


def test_numbers_with_gaps_that_sort_otherwise_than_text_are_refused(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", *(f"{number}/a.png" for number in (2, 10, 33)))
    task = Task(classnames=("a", "b", "c"), templates=("{c}",))
    with pytest.raises(
        ValueError, match="2 … 33 sort differently as numbers and as text, and have gaps; write all names"
    ):
        open_subject(task, root)
    assert open_subject(replace(task, classnames=(), templates=(), prompts="imagenet"), root).data.labels == [0, 1, 2]
    (root / "2").rename(root / "02")
    assert open_subject(task, root).data.folders == ["02", "10", "33"]


@pytest.mark.parametrize("place", ["val", ""])
def test_shards_are_found_in_val_or_the_folder_itself_and_need_no_count(tmp_path: Path, place: str) -> None:
    root = write_benchmark(tmp_path, *([(f"s{n}.png", plain_png(n)), (f"s{n}.cls", b"0")] for n in range(11)))
    (root / "test" / "nshards.txt").unlink()
    (root / "test" / "._1.tar").write_bytes(b"no shard")
    if place:
        (root / "test").rename(root / place)
    else:
        for shard in (root / "test").iterdir():
            shard.rename(root / shard.name)
        (root / "test").rmdir()
    assert reds(open_evaluation_set(root)) == [*range(11)]  # 10.tar after 9.tar
    (root / place / "3.tar").unlink()
    refused(root, r"no .*3\.tar, though there is a 10\.tar")


def test_split_and_layout_follow_from_the_folder_of_the_split(tmp_path: Path) -> None:
    root = class_folders(
        write_benchmark(tmp_path, sampled("cls", b"0"), classnames="x\n"), "val/x/a.png", "train/x/b.png"
    )
    assert [keys(open_evaluation_set(root, split=split)) for split in (None, "val")] == [["0/s0"], ["x/a.png"]]
    refused(root, r"no split .*/dev", split="dev")
    refused(tmp_path / "nowhere", "no data folder .*nowhere")
    shutil.rmtree(root / "test")
    assert keys(open_evaluation_set(root)) == keys(open_evaluation_set(root / "val")) == ["x/a.png"]


def test_class_folders_and_class_names_must_be_equally_many(tmp_path: Path) -> None:
    root = class_folders(write_benchmark(tmp_path, [], classnames="a\n"), "val/n01/x.png", "val/n02/x.png")
    refused(root, r"classnames\.txt has 1 lines, .*val 2 class folders", split="val")
    (root / "classnames.txt").write_text("a cat\na dog\n")
    data = open_evaluation_set(root, split="val")
    assert (data.classnames, data.folders, data.labels) == (["a cat", "a dog"], ["n01", "n02"], [0, 1])
    refused(root, "class folders hold a classification task, not retrieval", split="val", kind="retrieval")


def stored(
    path: Path, columns: dict[str, list[Any]], features: dict[str, Any], *, image: str = "image", reds: Any = None
) -> Path:
    """Rows with images as datasets saves them; in the folder of a parquet file where the path is called so."""
    reds = reds or range(0, 10 * len(next(iter(columns.values()))), 10)
    rows = picture_rows(reds, image, features=features, **columns)
    if path.name == "parquet":
        path.mkdir(parents=True)
        rows.to_parquet(str(path / "test-00000.parquet"))
    else:
        rows.save_to_disk(str(path))
    return path


CLASSES = datasets.ClassLabel(names=["cat", "dog", "eel"])
TEXTS = datasets.List(datasets.Value("string"))


def open_stored(path: Path, *columns: str, kind: Kind | None = None) -> EvaluationSet:
    wanted = (*columns, *("image", "label", "caption")[len(columns) :])
    return open_evaluation_set(str(path), layout="huggingface", kind=kind, columns=wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_hugging_face_rows_give_every_image_its_label_or_captions(tmp_path: Path, form: str) -> None:
    data = open_stored(stored(tmp_path / form, {"label": [2, 0, 1]}, {"label": CLASSES}))
    assert (data.kind, data.labels, data.templates) == ("classification", [2, 0, 1], None)
    assert (data.classnames, keys(data), reds(data)) == (
        ["cat", "dog", "eel"],
        ["row 0", "row 1", "row 2"],
        [0, 10, 20],
    )
    several = stored(tmp_path / "several" / form, {"texts": [["a", "b"], ["c"]]}, {"texts": TEXTS}, image="img")
    assert open_stored(several, "img", "", "texts", kind="retrieval").captions == [("a", "b"), ("c",)]
    single = {"caption": ["one cat", "two cats"]}, {"caption": datasets.Value("string")}
    data = open_stored(stored(tmp_path / "single" / form, *single), kind="retrieval")
    assert data.captions == [("one cat",), ("two cats",)]


@pytest.mark.parametrize("wrong", [None, [], ["one"], ["one", "two", "three"]])
def test_hugging_face_captions_that_are_no_pair_are_named_by_row(tmp_path: Path, wrong: list[str] | None) -> None:
    path = stored(tmp_path / "pairs", {"caption": [["true", "false"], wrong]}, {"caption": TEXTS})
    with pytest.raises(ValueError, match=r"pairs: sample row 1 has (no|1|3) captions"):
        open_stored(path, kind="pairs")


def test_rows_without_an_image_are_named_and_others_change_their_stamp_with_it(tmp_path: Path) -> None:
    def rows(place: int, *images: int | None) -> EvaluationSet:
        columns = {"label": [0] * len(images)}
        return open_stored(stored(tmp_path / str(place) / "cats", columns, {"label": CLASSES}, reds=images))

    with pytest.raises(ValueError, match=r"cats: sample row 1: .*has no image"):
        reds(rows(0, 10, None))
    first, other = rows(1, 10), rows(2, 20)  # of the same length
    assert first.sha256 == other.sha256
    assert first.stamps != other.stamps
    paths = class_folders(tmp_path / "paths", "test/x/a.png", "test/y/b.png")
    first = open_stored(paths)
    assert first.stamps == open_stored(paths).stamps
    os.utime(paths / "test/y/b.png", ns=(0, 1))  # rewritten
    assert first.stamps != open_stored(paths).stamps


def test_classes_that_hugging_face_names_by_numbers_are_in_numeric_order(tmp_path: Path) -> None:
    named = datasets.ClassLabel(names=sorted(map(str, range(12))))
    data = open_stored(
        stored(tmp_path / "x", {"label": [named.str2int(name) for name in ("2", "10", "11")]}, {"label": named})
    )
    assert (data.labels, data.classnames) == ([2, 10, 11], [*map(str, range(12))])
