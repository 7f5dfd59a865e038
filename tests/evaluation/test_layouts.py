"""Every kind of task in every layout, and for each wrong file an error that names it."""

import io
import pickle
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import EvaluationSet, Images, Kind
from tests.data.samples import plain_png, write_tar

# datasets leaves the tables beside images open.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")


def npy(values: Any, dtype: Any = float) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array(values, dtype))
    return buffer.getvalue()


def folder(root: Path, members: list[tuple[str, bytes]], *, classnames: str = "cat\ndog\n", type: str = "") -> Path:
    """CLIP_benchmark's layout with one shard."""
    (root / "test").mkdir(parents=True)
    (root / "test" / "nshards.txt").write_text("1")
    (root / "classnames.txt").write_text(classnames)
    (root / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\n")
    if type:
        (root / "dataset_type.txt").write_text(type)
    write_tar(root / "test" / "0.tar", members)
    return root


def sampled(extension: str, *contents: bytes) -> list[tuple[str, bytes]]:
    return [
        (f"s{place}.{end}", part)
        for place, content in enumerate(contents)
        for end, part in (("png", plain_png(place)), (extension, content))
    ]


def class_folders(root: Path, *files: str) -> Path:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(plain_png(0))
    return root


def keys(data: EvaluationSet) -> list[str]:
    return [picture.key for picture in data.pictures]


def refused(root: Path, words: str, *, kind: Kind | None = None) -> None:
    with pytest.raises(ValueError, match=words):
        open_evaluation_set(root, kind=kind)


def test_multilabel_vectors_become_rows_of_truth(tmp_path: Path) -> None:
    members = sampled("npy", npy([1, 0, 1]), npy([0, 0, 0], np.int64), npy([True, True, False], bool))
    data = open_evaluation_set(folder(tmp_path, members, classnames="a\nb\nc\n", type=" Multilabel\n"))
    assert data.kind == "multilabel"
    assert data.targets is not None
    assert data.targets.dtype == bool
    assert data.targets.tolist() == [[True, False, True], [False, False, False], [True, True, False]]
    assert (data.num_classes, len(data), data.pictures[2].key) == (3, 3, "0/s2")


def test_a_pickle_in_place_of_a_vector_is_refused_and_does_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for place, content in enumerate((npy([Evil(), Evil()], object), pickle.dumps(Evil()))):
        root = folder(tmp_path / str(place), sampled("npy", npy([1, 0]), content), type="multilabel")
        refused(root, r"0\.tar: sample s1: its \.npy cannot be read")
    assert not (tmp_path / "ran").exists()
    pickle.loads(content)  # what it would have done
    assert (tmp_path / "ran").exists()


WRONG = [npy([1]), npy([1, 0, 0]), npy([[1, 0]]), npy(1), npy([0, 2]), npy([0, -1]), npy([0.5, 0]), npy([0, np.nan])]
UNREADABLE = [b"", b"1 0", npy([1, 0])[:-3], npy([1, 0])[:20], b"PK\x03\x04 no archive"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(content, "labels must be 2 zeros and ones") for content in WRONG]
    + [(content, r"\.npy cannot be read") for content in UNREADABLE],
)
def test_what_is_no_vector_of_a_zero_or_one_per_class_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    root = folder(tmp_path, sampled("npy", npy([1, 0]), content), type="multilabel")
    refused(root, rf"0\.tar: sample s1: its {words}")


def test_captions_stand_one_per_line_as_they_are(tmp_path: Path) -> None:
    members = sampled("txt", "A cat. \n\n  Käse 🧀\\n\r\nlast".encode(), b"one\n")
    root = folder(tmp_path, members, type="retrieval")
    (root / "classnames.txt").unlink()
    (root / "zeroshot_classification_templates.txt").unlink()
    data = open_evaluation_set(root)
    assert data.kind == "retrieval"
    assert data.captions == [("A cat. ", "", "  Käse 🧀\\n", "last"), ("one",)]
    assert (data.classnames, data.templates, data.num_classes) == (None, None, 0)


def test_a_pair_is_two_captions_the_true_one_first(tmp_path: Path) -> None:
    members = sampled("txt", b"a black cat\na white cat\n", b"two dogs\nthree dogs")
    data = open_evaluation_set(folder(tmp_path, members, type="retrieval"), kind="pairs")
    assert data.captions == [("a black cat", "a white cat"), ("two dogs", "three dogs")]
    assert data.kind == "pairs"


@pytest.mark.parametrize(
    ("kind", "content", "words"),
    [
        *(("pairs", text, "has [13] captions; a pair") for text in (b"one", b"one\ntwo\nthree", b"one\ntwo\n\n")),
        ("retrieval", b"", "has no captions"),
        ("retrieval", b"caf\xe9", "captions are not UTF-8"),
    ],
)
def test_captions_that_are_none_or_no_pair_are_refused(tmp_path: Path, kind: Kind, content: bytes, words: str) -> None:
    refused(folder(tmp_path, sampled("txt", b"a\nb", content)), rf"0\.tar: sample s1.*{words}", kind=kind)


def test_a_blank_class_name_keeps_its_number_and_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    # vtab/clevr_closest_object_distance
    names = "\ufeff very nearby\nnear \n\ndistant\r\n"
    data = open_evaluation_set(folder(tmp_path, sampled("cls", b"3", b"2"), classnames=names))
    assert data.classnames == ["very nearby", "near", "", "distant"]
    assert (data.labels, data.num_classes) == ([3, 2], 4)


def test_metadata_beside_a_label_is_no_vector_of_labels(tmp_path: Path) -> None:
    # WILDS and GeoDE folders hold .npy metadata.
    members = [("s0.png", plain_png(0)), ("s0.cls", b"1"), ("s0.npy", npy([1, 0, 1, 3]))]
    data = open_evaluation_set(folder(tmp_path / "wilds", members))
    assert (data.kind, data.labels, data.targets) == ("classification", [1], None)


LISTS = ["classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        *((name, content, "") for name in LISTS for content in (b"", b"\n \n", b"caf\xe9 {c}\n")),
        (LISTS[1], b"{c}\na photo of a {}.\n", r": line 2 has no \{c\}"),
        ("dataset_type.txt", b"regression", " says 'regression'; known"),
        ("dataset_type.txt", b"\xff\xfer\x00e\x00", " says .*; known"),
    ],
)
def test_an_empty_undecodable_or_senseless_file_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    root = folder(tmp_path, sampled("cls", b"0"))
    (root / name).write_bytes(content)
    refused(root, name + words)


@pytest.mark.parametrize("label", [b"1_0", b"+1", b"1.0", b"0 1", b"0x1", b"", "١".encode(), b"1" * 10])
def test_a_class_is_a_number_in_plain_digits(tmp_path: Path, label: bytes) -> None:
    refused(folder(tmp_path, sampled("cls", b" 0\n", label)), r"0\.tar: sample s1 has the label b'.*', not a number")


def test_class_folders_hold_every_kind_of_image_but_nothing_hidden(tmp_path: Path) -> None:
    names = ["x/a.bmp", "x/b.TIF", "x/c.tiff", "x/d.gif", "y/e.png"]
    class_folders(tmp_path, *names, "x/._a.png", ".cache/f.png")
    Image.new("P", (1, 1)).save(tmp_path / "x" / "d.gif")
    data = open_evaluation_set(tmp_path)
    assert (keys(data), data.labels) == (names, [0, 0, 0, 0, 1])
    assert Images(data.pictures, lambda image: image.mode)[3] == ("RGB", 3)  # which a palette is not
    (tmp_path / "z").mkdir()
    with pytest.warns(UserWarning, match="1 class folders hold no image, such as z"):
        assert open_evaluation_set(tmp_path).folders == ["x", "y", "z"]
    refused(class_folders(tmp_path, "y/g.PPM"), r"y/g\.PPM is of a format that clipkd does not open; convert it")
    refused(class_folders(tmp_path / "rows", "0.parquet"), "parquet files; set layout: huggingface in a task")


def test_split_and_layout_are_what_lies_in_the_folder_of_the_split(tmp_path: Path) -> None:
    root = class_folders(folder(tmp_path, sampled("cls", b"0"), classnames="x\n"), "val/x/a.png", "train/x/b.png")
    assert [keys(open_evaluation_set(root, split=split)) for split in (None, "val")] == [["0/s0"], ["x/a.png"]]
    with pytest.raises(FileNotFoundError, match=r"no split .*/dev"):
        open_evaluation_set(root, split="dev")
    shutil.rmtree(root / "test")
    assert keys(open_evaluation_set(root)) == ["x/a.png"]


def test_class_folders_and_class_names_must_be_equally_many(tmp_path: Path) -> None:
    root = class_folders(folder(tmp_path, [], classnames="a\n"), "val/n01/x.png", "val/n02/x.png")
    with pytest.raises(ValueError, match=r"classnames\.txt has 1 lines, .*val 2 class folders"):
        open_evaluation_set(root, layout="imagefolder", split="val")
    (root / "classnames.txt").write_text("a cat\na dog\n")
    data = open_evaluation_set(root, layout="imagefolder", split="val")
    assert (data.classnames, data.folders, data.labels) == (["a cat", "a dog"], ["n01", "n02"], [0, 1])
    with pytest.raises(ValueError, match="class folders hold a classification task, not retrieval"):
        open_evaluation_set(root, layout="imagefolder", split="val", kind="retrieval")


def test_a_shard_that_is_cut_or_damaged_or_holds_a_key_twice_is_refused(tmp_path: Path) -> None:
    root = folder(tmp_path, sampled("cls", *[b"0"] * 9))
    shard = root / "test" / "0.tar"
    whole = shard.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:700], whole[:4096] + b"x" * 512 + whole[4608:]):
        shard.write_bytes(broken)
        refused(root, r"0\.tar is not a whole uncompressed tar")
    shard.write_bytes(whole)
    assert len(open_evaluation_set(root)) == 9
    twice = sampled("cls", b"0", b"1") + sampled("cls", b"1")
    for members in (twice, twice[:2] * 2):  # apart, and side by side
        write_tar(shard, members)
        refused(root, r"0\.tar holds 's0' more than once")


def images(number: int) -> list[dict[str, Any]]:
    return [{"bytes": plain_png(10 * place), "path": None} for place in range(number)]


def stored(path: Path, columns: dict[str, list[Any]], features: dict[str, Any], *, image: str = "image") -> Path:
    """Rows with images as datasets saves them; in the folder of a parquet file where the path is called so."""
    columns = {image: images(len(next(iter(columns.values()))))} | columns
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features({image: datasets.Image(), **features}))
    if path.name == "parquet":
        path.mkdir(parents=True)
        rows.to_parquet(str(path / "test-00000.parquet"))
    else:
        rows.save_to_disk(str(path))
    return path


CLASSES = datasets.ClassLabel(names=["cat", "dog", "eel"])


def open_stored(path: Path, *columns: str, kind: Kind | None = None) -> EvaluationSet:
    wanted = (*columns, *("image", "label", "caption")[len(columns) :])
    return open_evaluation_set(str(path), layout="huggingface", kind=kind, columns=wanted)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_hugging_face_rows_give_every_image_its_label(tmp_path: Path, form: str) -> None:
    data = open_stored(stored(tmp_path / form, {"label": [2, 0, 1]}, {"label": CLASSES}))
    assert (data.kind, data.labels, data.templates) == ("classification", [2, 0, 1], None)
    assert data.classnames == ["cat", "dog", "eel"]
    read = Images(data.pictures, lambda image: image.getpixel((0, 0)))
    assert [read[place] for place in range(3)] == [((10 * place, 0, 0), place) for place in range(3)]
    assert keys(data) == ["row 0", "row 1", "row 2"]


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_hugging_face_captions_are_a_text_or_several(tmp_path: Path, form: str) -> None:
    several = {"texts": [["a", "b"], ["c"]]}, {"texts": datasets.List(datasets.Value("string"))}
    data = open_stored(stored(tmp_path / "several" / form, *several, image="img"), "img", "", "texts", kind="retrieval")
    assert data.captions == [("a", "b"), ("c",)]
    single = {"caption": ["one cat", "two cats"]}, {"caption": datasets.Value("string")}
    data = open_stored(stored(tmp_path / "single" / form, *single), kind="retrieval")
    assert data.captions == [("one cat",), ("two cats",)]


@pytest.mark.parametrize("wrong", [None, [], ["one"], ["one", "two", "three"]])
def test_hugging_face_captions_that_are_no_pair_are_named_by_row(tmp_path: Path, wrong: list[str] | None) -> None:
    texts = {"caption": [["true", "false"], wrong]}
    path = stored(tmp_path / "pairs", texts, {"caption": datasets.List(datasets.Value("string"))})
    with pytest.raises(ValueError, match=r"pairs, row 1 has (no|1|3) captions"):
        open_stored(path, kind="pairs")


def test_a_row_without_an_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    columns = {"image": [*images(1), None], "label": [0, 1]}
    data = open_stored(stored(tmp_path / "cats", columns, {"label": CLASSES}))
    with pytest.raises(ValueError, match=r"cats, sample row 1: .*it has no image"):
        Images(data.pictures, lambda image: image)[1]


def test_rows_that_hold_paths_count_the_bytes_of_their_files(tmp_path: Path) -> None:
    file = class_folders(tmp_path, "test/x/a.png", "test/y/b.png") / "test/y/b.png"
    data = open_stored(tmp_path)
    assert data.stamps[1] == ("row 1", file.stat().st_size, file.stat().st_mtime_ns)
    file.write_bytes(plain_png(0) + b"longer")
    assert open_stored(tmp_path).sha256 != data.sha256


def test_stamps_of_stored_rows_change_with_an_image_of_the_same_length(tmp_path: Path) -> None:
    found = []
    for red in (10, 20, 20):
        shutil.rmtree(tmp_path / "rows", ignore_errors=True)
        columns = {"image": [{"bytes": plain_png(red), "path": None}], "label": [0]}
        found.append(open_stored(stored(tmp_path / "rows", columns, {"label": CLASSES})))
        assert len(found[-1].stamps_sha256) == 64  # before the rows are gone
    assert found[0].sha256 == found[1].sha256
    assert found[0].stamps_sha256 != found[1].stamps_sha256 == found[2].stamps_sha256
