"""Pairs from CSV and TSV files and from Hugging Face data sets, built on the spot."""

import base64
import contextlib
import functools
import gc
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas
import pyarrow
import pytest

from clipkd.data.skips import BadSample
from clipkd.data.sources import MAX_CHARACTERS
from clipkd.evaluation.layouts import open_evaluation_set
from clipkd.evaluation.sets import Images
from tests.data.samples import (
    assert_things,
    labels,
    open_set,
    picture_rows,
    plain_png,
    things,
    write_images,
    write_parquet,
)

# datasets leaves the tables beside images open, and files that it fails to read.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def table(path: Path, lines: list[list[str]], delimiter: str = ",") -> Path:
    """CSV: every field quoted, quotes doubled (RFC 4180). TSV knows no quotes."""
    quoted = delimiter == ","
    rows = [delimiter.join('"' + f.replace('"', '""') + '"' if quoted else f for f in line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="")
    return path


csv = functools.partial(open_set, format="csv", caption_key="caption")
hugging_face = functools.partial(open_set, format="huggingface", caption_key="caption")


CAPTIONS = [
    *("NA", "null", "NaN", "None", "n/a", "true", "123", "1e5", "007", "2024-01-01", "-", "'single'", "#no comment"),
    *('a "quoted" word', '"a dog', "one, two, three", "first line\nsecond line", "tab\there", "a\\b"),
    *("Käse 🧀 und Straße", "猫と犬", "مرحبا", "e\u0301", "\u00a0inner\u00a0space", "=1+1", "x" * 20_000),
]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "TSV"])
def test_every_caption_comes_back_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    delimiter = "," if suffix == "csv" else "\t"
    captions = [caption for caption in CAPTIONS if delimiter == "," or not {"\t", "\n"} & set(caption)]
    files = write_images(tmp_path, range(len(captions)))
    lines = [["image", "caption"], *([file, caption] for file, caption in zip(files, captions, strict=True))]
    source = csv(table(tmp_path / f"t.{suffix}", lines, delimiter))
    assert len(source) == len(captions) == (26 if delimiter == "," else 24)
    assert_things(source, lambda number: (captions[number].strip()[:MAX_CHARACTERS],))


def test_an_unquoted_table_by_hand(tmp_path: Path) -> None:
    write_images(tmp_path, range(3))
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,image,caption,more\r\n9,0.png, thing 0 ,x\r\n\r\n8,1.png,thing 1,\r\n7,2.png,thing 2,y"
    )
    source = csv(path)  # a byte order mark, Windows' line ends, a blank line and none at the end
    assert len(source) == 3
    assert_things(source)
    assert source.read(1).key == f"{path} row 1: 1.png"
    options = {"format": "csv", "image_column": "image", "caption_key": "caption", "label_key": None, "weight": 1.0}
    assert {n: v for n, v in source.identity()[0].items() if n != "fingerprint"} == {"pairs": 3, **options}


def test_columns_count_from_0_where_there_is_no_header(tmp_path: Path) -> None:
    lines = [[str(5 - number), f"thing {number}", file] for number, file in enumerate(write_images(tmp_path, range(5)))]
    path = table(tmp_path / "t.csv", lines)
    source = csv(path, image_column="2", caption_key="1", label_key="0")
    assert_things(source)
    assert labels(source) == [5, 4, 3, 2, 1]  # the first line is a row
    with pytest.raises(ValueError, match=r"t\.csv has no column '3', only \['0', '1', '2'\]; set data\.caption_key"):
        csv(path, image_column="2", caption_key="3")
    named = csv(table(tmp_path / "n.csv", [["image", "1"], ["0.png", "thing 0"]]), caption_key="1")
    assert (len(named), named.read(0).captions) == (1, ("thing 0",))


def test_several_tables_with_absolute_and_relative_paths_are_one_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, numbers in (("a", range(3)), ("b", range(3, 4)), ("c", range(4, 7))):
        write_images(tmp_path / name / "sub", range(7))
        folder = {"a": "sub", "b": "../b/sub", "c": str(tmp_path / "c" / "sub")}[name]
        lines = [["caption", "image"], *([f"thing {number}", f"{folder}/{number}.png"] for number in numbers)]
        table(tmp_path / name / "t.tsv", [line[:: 1 if name == "a" else -1] for line in lines], "\t")
    source = csv(*(tmp_path / name / "t.tsv" for name in "abc"))
    assert len(source) == 7
    assert_things(source)
    assert source.read(5).key == f"{tmp_path}/c/t.tsv row 1: {tmp_path}/c/sub/5.png"
    monkeypatch.chdir(tmp_path / "b")
    assert_things(csv(Path("..") / "a" / "t.tsv"))
    with pytest.raises(ValueError, match=r"d\.csv holds no rows"):
        csv(tmp_path / "a" / "t.tsv", table(tmp_path / "d.csv", [["image", "caption"]]))


NO_IMAGES = {
    "gone.png": "the image file cannot be read",
    "": "has no path",
    **dict.fromkeys((".", "0.png/x", "\0.png", "x" * 100, "x" * 300), "the image file cannot"),
    "https://host/a.png": "names a URL (https://host/a.png); download the images",
    "C:\\images\\0.png": "the image file cannot be read",
}


@pytest.mark.parametrize(
    ("image", "caption", "label", "cause", "words"),
    [
        *((name, "a", "1", "no image", words) for name, words in NO_IMAGES.items()),
        *(("0.png", text, "1", "empty caption", "every caption is empty") for text in ("", " ")),
        *(
            ("0.png", "a", n, "wrong label", f"its label is '{n}'; ")
            for n in ("cat", "-2", "1.0", "1e3", "1 2", "9" * 19)
        ),
    ],
)
def test_a_bad_row_is_a_bad_sample_that_names_row_and_path(
    tmp_path: Path, image: str, caption: str, label: str, cause: str, words: str
) -> None:
    write_images(tmp_path, range(1))
    source = csv(
        table(tmp_path / "t.csv", [["image", "caption", "class"], ["0.png", "thing 0", "7"], [image, caption, label]]),
        label_key="class",
    )
    assert (source.read(0).captions, source.read(0).label) == (("thing 0",), 7)
    with pytest.raises(BadSample) as caught:
        source.read(1)
    assert caught.value.skip[:2] == (f"{tmp_path / 't.csv'} row 1: {image}", cause)
    assert caught.value.skip.message.startswith(words)
    assert ("\\" in image) == ("write its folders with /" in caught.value.skip.message)


def test_labels_of_a_table_come_from_a_column_where_empty_is_none(tmp_path: Path) -> None:
    values = ["3", "", "0", "007", "-1", " 12 "]
    rows = [[file, f"thing {n}", values[n]] for n, file in enumerate(write_images(tmp_path, range(6)))]
    path = table(tmp_path / "t.csv", [["image", "caption", "class"], *rows])
    assert labels(csv(path, label_key="class")) == [3, -1, 0, 7, -1, 12]
    assert labels(csv(path)) == [-1] * 6


GARBAGE = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
STRAY = {13: '"thing', 14: 'a 12" screen', 20: 'a 12" screen'}
NO_TABLES: dict[str, tuple[bytes | str, str]] = {
    "empty": (b"", ""),
    "blank lines": (b"\n\n\n", ""),
    "header only": (b"image,caption\n", ""),
    "garbage": (GARBAGE, ""),
    "gzip": (b"\x1f\x8b" + GARBAGE, ""),
    "a field too many": (b"image,caption\n0.png,a\n0.png,b,c\n", ""),
    "a field too few": ("image,caption\n0.png,a\n1.png\n", r" .*Row #3: Expected 2 columns, got 1: 1\.png"),
    "latin-1": ("image,caption\n0.png,Käse\n".encode("latin-1"), ""),
    "open quote": (b'image,caption\n0.png,"' + b"x" * 3_000_000 + b"\n", ""),
    "a stray quote that is closed later": (
        'image,caption\n0.png,"two\nlines"\n1.png,"a 12" screen\n2.png,"quoted, too"\n3.png,d\n',
        ": the quotes of the row at line 4 do not match",
    ),
    "a stray quote that is never closed": (
        'image,caption\n0.png,"two\nlines"\n1.png,"a 12" screen\n2.png,c\n3.png,d\n',
        ": the quotes of the row at line 4 do not match",
    ),
    "a quote that swallows the rest": (
        "".join(f"{row}\n" for row in ["image,caption", *(f"{n}.png,{STRAY.get(n, 'a')}" for n in range(24))]),
        ": the quotes of the row at line 15 do not match",
    ),
}


@pytest.mark.parametrize(("content", "words"), NO_TABLES.values(), ids=NO_TABLES)
def test_a_file_that_is_no_table_is_refused_by_name(tmp_path: Path, content: bytes | str, words: str) -> None:
    write_images(tmp_path, range(24))
    content = content if isinstance(content, bytes) else content.encode()
    for path, written in (("wrong.csv", content), ("wrong.csv.gz", compressed(content, "gzip"))):
        (tmp_path / path).write_bytes(written)
        with pytest.raises(ValueError, match=re.escape(path) + words):
            csv(tmp_path / path)


def compressed(content: bytes, suffix: str) -> bytes:
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, suffix) as stream:
        stream.write(content)
    return buffer.getvalue().to_pybytes()


@pytest.mark.parametrize("suffix", ["", ".gz", ".bz2", ".zst", ".lz4"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_every_form_of_a_table_is_read_and_checked_after_unpacking(
    tmp_path: Path, delimiter: str, encoding: str, suffix: str
) -> None:
    files, captions = write_images(tmp_path, range(3)), ["Käse; a, b\tc", 'a "quoted"\nword', "thing"]
    lines = [["image", "caption"], *zip(files, captions, strict=True)]
    text = "".join(delimiter.join('"' + field.replace('"', '""') + '"' for field in line) + "\n" for line in lines)
    path = tmp_path / f"t.csv{suffix}"

    def write(text: str) -> Path:
        content = text.encode(encoding)
        path.write_bytes(
            compressed(content, {"gz": "gzip", "zst": "zstd"}.get(suffix[1:], suffix[1:])) if suffix else content
        )
        return path

    assert_things(csv(write(text)), lambda number: (captions[number],))
    headless = csv(write(text.split("\n", 1)[1]), image_column="0", caption_key="1")
    assert_things(headless, lambda number: (captions[number],))
    swallowed = text.replace('"Käse', '"Kä"se').replace('""quoted""', '"quoted')
    with pytest.raises(ValueError, match=r"t\.csv.*(quotes of the row at line|no readable table)"):
        csv(write(swallowed))
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ValueError, match=r"t\.csv"):
        csv(path)


def test_a_message_about_columns_is_no_longer_than_a_screen(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [["x" * 5000, *map(str, range(3000))]])
    with pytest.raises(ValueError, match="has no column 'image'") as caught:
        csv(path)
    assert len(str(caught.value)) < 600


def test_a_table_reads_as_open_clip_reads_it_but_for_words_that_pandas_takes_for_nothing(tmp_path: Path) -> None:
    # open_clip: pandas.read_csv(path, sep="\t"), then every image by its path and str(caption).
    odd = ["NA", "null", "", "nan", "None"]
    lines = [["filepath", "title"], *([f"{n}.png", caption] for n, caption in enumerate([*CAPTIONS[10:], *odd]))]
    text = "\n\n".join("\t".join('"' + field.replace('"', '""') + '"' for field in line) for line in lines)
    path = tmp_path / "t.csv"
    path.write_text(text.replace("\n\n\n", "\n"), encoding="utf-8", newline="")
    write_images(tmp_path, range(len(lines)))
    theirs = pandas.read_csv(path, sep="\t")
    source = csv(path, image_column="filepath", caption_key="title")
    assert len(source) == len(theirs) == len(lines) - 1
    for number, caption in enumerate(map(str, theirs["title"])):
        try:
            ours = source.read(number).captions
        except BadSample as bad:
            assert (bad.skip.cause, caption) == ("empty caption", "nan")  # noqa: PT017
            continue
        expected = lines[number + 1][1]
        assert ours == (expected.strip()[:MAX_CHARACTERS].strip(),)
        assert caption == (expected if expected not in odd else "nan")


def test_random_damage_of_a_table_is_bad_samples_or_one_value_error_that_names_it(tmp_path: Path) -> None:
    lines = [["image", "caption", "n"], *([file, f"a, {file}", "3"] for file in write_images(tmp_path, range(6)))]
    content, rng = np.frombuffer(table(tmp_path / "t.csv", lines).read_bytes(), np.uint8), np.random.default_rng(0)
    num_refused = num_bad = num_read = 0
    for trial in range(200):
        damaged = content.copy()
        places = rng.integers(0, len(damaged), rng.integers(1, 6))
        damaged[places] = rng.choice(np.frombuffer(b'",\n\r\0\xff\t x7', np.uint8), len(places))
        (tmp_path / "t.csv").write_bytes(damaged[: rng.integers(len(damaged)) if trial % 4 == 0 else None].tobytes())
        try:
            source = csv(tmp_path / "t.csv", label_key="n")
        except ValueError as error:
            num_refused += 1
            assert "t.csv" in str(error)  # noqa: PT017
            continue
        for number in range(len(source)):
            try:
                assert source.read(number).image in [plain_png(value) for value in range(6)]
                num_read += 1
            except BadSample as bad:
                num_bad += 1
                assert f"t.csv row {number}: " in bad.skip.key  # noqa: PT017
    assert num_refused > 50
    assert num_bad > 20
    assert num_read > 100


def test_the_identity_of_a_table_changes_with_its_content_and_its_order_and_not_with_its_place(tmp_path: Path) -> None:
    lines = [["image", "caption"], *([file, f"thing {file}"] for file in write_images(tmp_path / "a", range(3)))]
    before = csv(table(tmp_path / "a" / "t.csv", lines)).identity()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    assert csv(tmp_path / "b" / "t.csv").identity() == before
    changes = [lines[:-1], [*lines, lines[1]], [lines[0], *lines[:0:-1]], [*lines[:3], ["2.png", "x"]]]
    tables = [csv(table(tmp_path / "a" / "t.csv", changed)).identity() for changed in changes]
    other = table(tmp_path / "b" / "u.csv", lines[:2])
    tables += [
        csv(*paths).identity() for paths in ((tmp_path / "b" / "t.csv", other), (other, tmp_path / "b" / "t.csv"))
    ]
    assert len({source[0]["fingerprint"] for source in (before, *tables)}) == 7


# Hugging Face data sets.


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """A collection of garbage that passes over what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def rows(quick_collection: None) -> Iterator[datasets.Dataset]:
    """Five images with one and with two captions, and a label."""
    columns = {
        "caption": [f"thing {number}" for number in range(5)],
        "many": [[f"thing {number}", "any"] for number in range(5)],
        "class": [3, None, 0, 12, -1],
    }
    yield picture_rows(range(5), **columns)
    gc.collect()  # so that open files are reported here, where they are expected


def as_parquet(rows: datasets.Dataset, folder: Path) -> None:
    folder.mkdir()
    for number, part in enumerate((range(len(rows) // 2), range(len(rows) // 2, len(rows)))):
        rows.select(part).to_parquet(folder / f"train-{number:05}-of-00002.parquet")


def as_arrow(rows: datasets.Dataset, folder: Path) -> None:
    rows.save_to_disk(folder / "saved")
    for file in (folder / "saved").glob("*.json"):
        file.unlink()


def as_images(rows: datasets.Dataset, folder: Path) -> None:
    """The layout that datasets calls imagefolder."""
    folder.mkdir()
    lines = [["file_name", "caption", "class"]]
    for number, row in enumerate(rows.cast_column("image", datasets.Image(decode=False))):
        (folder / f"{number}.png").write_bytes(row["image"]["bytes"])  # type: ignore[index, call-overload]
        lines.append([f"{number}.png", row["caption"], str(-1 if row["class"] is None else row["class"])])  # type: ignore[index, call-overload]
    table(folder / "metadata.csv", lines)


Write = Callable[[datasets.Dataset, Path], None]
FORMS = pytest.mark.parametrize("write", [datasets.Dataset.save_to_disk, as_parquet, as_arrow, as_images])


@FORMS
def test_every_form_of_a_folder_gives_the_same_pairs_and_its_identity_follows_its_rows(
    rows: datasets.Dataset, tmp_path: Path, write: Write
) -> None:
    write(rows, tmp_path / "data")
    source = hugging_face(tmp_path / "data", label_key="class")
    assert len(source) == 5
    assert_things(source)
    assert labels(source) == [3, -1, 0, 12, -1]
    assert labels(hugging_face(tmp_path / "data")) == [-1] * 5
    assert source.read(2).key == f"{tmp_path}/data row 2"
    shutil.copytree(tmp_path / "data", tmp_path / "copy", copy_function=shutil.copy)  # without the files' times
    assert hugging_face(tmp_path / "copy", label_key="class").identity() == source.identity()
    for number, order in enumerate([range(4), range(4, -1, -1), [0, 1, 2, 3, 3]]):
        write(rows.select(order), tmp_path / f"other{number}")
        assert hugging_face(tmp_path / f"other{number}", label_key="class").identity() != source.identity()


def test_a_list_of_captions_and_images_stored_by_path_are_read(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    assert_things(hugging_face(tmp_path / "saved", caption_key="many"), lambda number: (f"thing {number}", "any"))
    files = [str(tmp_path / "images" / name) for name in write_images(tmp_path / "images", range(2))]
    by_path = datasets.Dataset.from_dict({"picture": files, "caption": ["thing 0", "thing 1"]})
    by_path.cast_column("picture", datasets.Image()).save_to_disk(tmp_path / "by_path")
    assert_things(hugging_face(tmp_path / "by_path", image_column="picture"))
    as_images(rows, tmp_path / "data")
    source = hugging_face(tmp_path / "data")
    (tmp_path / "data" / "3.png").unlink()
    with pytest.raises(BadSample, match="data row 3: the image file cannot be read") as caught:
        source.read(3)
    assert caught.value.skip.cause == "no image"


def test_splits_and_columns_are_named_if_they_are_missing(rows: datasets.Dataset, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": rows, "val": rows.select([0])}).save_to_disk(tmp_path / "s")
    assert [len(hugging_face(tmp_path / "s", split=split)) for split in ("train", "val")] == [5, 1]
    as_parquet(rows, tmp_path / "parquet")
    for folder in ("s", "parquet"):
        with pytest.raises(ValueError, match=rf"{folder}.*split 'test'"):
            hugging_face(tmp_path / folder, split="test")
    rows.select([]).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match=r"none.*split 'train'"):
        hugging_face(tmp_path / "none")
    for option in ("image_column", "caption_key", "label_key"):
        words = rf"no column 'x', only \['image', 'caption', '.*', '.*'\]; set data\.{option}"
        with pytest.raises(ValueError, match=words):
            hugging_face(tmp_path / "s", **{option: "x"})


@pytest.mark.parametrize(
    ("column", "value"), [("caption", None), ("caption", ""), ("image", None), ("class", -2)], ids=str
)
def test_a_wrong_value_names_its_row(rows: datasets.Dataset, tmp_path: Path, column: str, value: Any) -> None:
    first, second = rows.to_list()[:2]
    other = datasets.Dataset.from_list([first, {**second, column: value}], features=rows.features)
    other.save_to_disk(tmp_path / "saved")
    source = hugging_face(tmp_path / "saved", label_key="class")
    assert source.read(0).captions == ("thing 0",)
    with pytest.raises(BadSample, match="saved row 1: "):
        source.read(1)
    other.select([1]).save_to_disk(tmp_path / "all")
    with pytest.raises(ValueError, match="all row 0: "):  # at once, if none of the first rows can be read
        hugging_face(tmp_path / "all", label_key="class")


@FORMS
def test_a_damaged_data_set_is_one_value_error_that_names_it(
    rows: datasets.Dataset, tmp_path: Path, write: Write
) -> None:
    rng = np.random.default_rng(0)
    num_refused = 0
    for trial in range(8):
        folder = tmp_path / f"data{trial}"
        write(rows, folder)
        chosen = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".arrow", ".parquet", ".csv"))
        path = chosen[trial % len(chosen)]
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        if trial < 4 or path.suffix == ".arrow":  # within complete messages Arrow trusts every byte, and may crash
            data = data[: len(data) * (trial % 4) // 4]
        else:
            data[rng.integers(0, len(data), 30)] = rng.integers(0, 256, 30)
        path.write_bytes(data.tobytes())
        try:
            source = hugging_face(folder)
            for number in range(len(source)):
                try:
                    source.read(number)
                except BadSample as bad:
                    assert f"data{trial} row" in str(bad)  # noqa: PT017
        except ValueError as error:
            num_refused += 1
            assert f"data{trial}" in str(error)  # noqa: PT017
    assert num_refused >= 2


@pytest.mark.parametrize(
    ("files", "split", "expected", "left_out"),
    [
        ({"coyo-0": [0], "coyo-1": [1], "cc3m-train": [2], "test_of_time": [3]}, "train", [2, 0, 1, 3], None),
        ({"train-00000-of-00002": [0], "train-00001-of-00002": [1], "test-00000-of-00001": [2]}, "train", [0, 1], None),
        ({"train-00000-of-00002": [0], "train-00001-of-00002": [1], "test-00000-of-00001": [2]}, "test", [2], None),
        ({"data/train-0": [0], "data/validation-0": [1]}, "val", [1], None),
        (
            {"train/a": [0], "train/b": [1], "val/a": [2], "c": [3]},
            "train",
            [0, 1],
            "1 of 4 files .* such as c.parquet",
        ),
        ({"mine/a": [0], "other/a": [1]}, "mine", [0], "1 of 2 files"),
        ({"train/a": [0], "val/a": [1]}, "train+val", [0, 1], None),
        ({"a": [0, 1, 2, 3]}, "train[:50%]", [0, 1], None),
        ({".cache/a": [0], "._b": [1], "c": [2]}, "train", [2], None),
    ],
)
def test_a_split_is_what_the_option_and_folders_say(
    tmp_path: Path,
    quick_collection: None,
    files: dict[str, list[int]],
    split: str,
    expected: list[int],
    left_out: str | None,
) -> None:
    for name, numbers in files.items():
        write_parquet(tmp_path / f"{name}.parquet", numbers)
    with pytest.warns(UserWarning, match=left_out) if left_out else contextlib.nullcontext():
        assert things(hugging_face(tmp_path, split=split)) == expected
    gc.collect()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("none.parquet", "no file or folder none.parquet$"),
        *(("{}/empty", "neither images nor tables"), ("{}/notes.txt", r"it is no table \(\.parquet")),
        ("{}/a::b", "takes the '::' of .*/a::b/0.parquet for a chain"),
        ("{}/splits", r"no split 'train', only \['test'\]"),
    ],
)
def test_a_place_without_rows_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_collection: None, path: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").touch()
    for name in ("splits/test", "a::b"):
        write_parquet(tmp_path / name / "0.parquet", [0])
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        hugging_face(path.format(tmp_path))


CONFIGURED = """---
license: mit
configs:
- config_name: en
  data_files:
  - {split: train, path: en-*.parquet}
  - {split: test, path: [test/en.parquet]}
- config_name: de
  data_dir: de
---
Text.
"""


def test_one_of_several_configurations_is_named(tmp_path: Path, quick_collection: None) -> None:
    for number, name in enumerate(["en-0", "en-1", "de/train-0", "test/en", "de/test-0", "other/a"]):
        write_parquet(tmp_path / f"{name}.parquet", [number])
    (tmp_path / "README.md").write_text(CONFIGURED)
    found = {
        (name, split): things(hugging_face(tmp_path, configuration=name, split=split))
        for name in ("en", "de")
        for split in ("train", "test")
    }
    assert found == {("en", "train"): [0, 1], ("en", "test"): [3], ("de", "train"): [2], ("de", "test"): [4]}
    for options in ({}, {"configuration": "fr"}):
        with pytest.raises(ValueError, match=r"configurations \['de', 'en'\]; set data\.configuration to one of them"):
            hugging_face(tmp_path, **options)
    assert things(hugging_face(tmp_path, configuration="other")) == [5]  # a folder
    gc.collect()


Fields = Callable[[Path, int], Any]
FIELDS: dict[str, Fields] = {
    "relative": lambda folder, n: f"images/{n}.png",
    "parent": lambda folder, n: f"../{folder.name}/images/{n}.png",
    "absolute": lambda folder, n: str(folder / "images" / f"{n}.png"),
    "file://": lambda folder, n: (folder / "images" / f"{n}.png").as_uri(),
    "base64": lambda folder, n: base64.b64encode(plain_png(n)).decode(),
    "data:": lambda folder, n: "data:image/png;base64," + base64.b64encode(plain_png(n)).decode(),
}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("form", ["csv", "parquet strings", "parquet structs", "saved", "evaluation"])
def test_an_image_is_named_relative_to_its_table_or_is_written_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quick_collection: None, form: str, field: str
) -> None:
    folder = tmp_path / "some folder"
    write_images(folder / "images", range(2))
    values = [FIELDS[field](folder, number) for number in range(2)]
    monkeypatch.chdir(tmp_path)
    if form == "csv":
        table(folder / "t.csv", [["image", "caption"], *([value, f"thing {n}"] for n, value in enumerate(values))])
        return assert_things(csv(Path("some folder") / "t.csv"))
    column: list[Any] = (
        values if form in ("parquet strings", "saved") else [{"bytes": None, "path": value} for value in values]
    )
    rows = datasets.Dataset.from_dict({"image": column, "caption": ["thing 0", "thing 1"], "label": [0, 1]})
    if form == "saved":
        rows.save_to_disk(folder)
    else:
        rows.to_parquet(folder / "0.parquet")
    if form == "evaluation":
        pictures = open_evaluation_set(folder, layout="huggingface").pictures
        assert [Images(pictures, lambda image: image.getpixel((0, 0)))[n][0] for n in range(2)] == [
            (0, 0, 0),
            (1, 0, 0),
        ]
    else:
        assert_things(hugging_face("some folder"))
    return None


def test_paths_of_tables_in_several_folders_are_each_relative_to_their_own(
    tmp_path: Path, quick_collection: None
) -> None:
    for number, name in enumerate(["a", "b"]):
        write_images(tmp_path / name, [number])
        columns = {"image": [f"{number}.png"], "caption": [f"thing {number}"]}
        datasets.Dataset.from_dict(columns).to_parquet(tmp_path / name / "0.parquet")
    assert_things(hugging_face(tmp_path))


@pytest.mark.parametrize(
    ("column", "words"),
    [([[{"bytes": plain_png(0), "path": None}]], "lists; a pair has one image"), ([3], r"Value.*int64.*, not images")],
)
def test_a_column_that_holds_no_images_is_refused(tmp_path: Path, column: list[Any], words: str) -> None:
    datasets.Dataset.from_dict({"image": column, "caption": ["a"]}).to_parquet(tmp_path / "0.parquet")
    with pytest.raises(ValueError, match=rf"the column 'image' holds {words}"):
        hugging_face(tmp_path)
