"""Pairs from CSV and TSV files and from Hugging Face data sets, built on the spot."""

import gc
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from clipkd.config.data import DataConfig
from clipkd.data.open import open_pairs
from clipkd.data.skips import BadSample
from clipkd.data.sources import MOST_CHARACTERS, UNLABELLED, PairSet
from tests.data.samples import plain_png

# datasets leaves the tables beside images open, and files that it fails to read.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


@pytest.fixture(autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path_factory.mktemp("caches")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "datasets")


CAPTIONS = [
    *("NA", "null", "NULL", "NaN", "None", "n/a", "true", "123", "1e5", "007", "2024-01-01", "-"),
    *('a "quoted" word', "one, two, three", "first line\nsecond line", "tab\there", "'single'", "#no comment", "a\\b"),
    *("Käse 🧀 und Straße", "猫と犬", "مرحبا", "e\u0301", "\u00a0inner\u00a0space", "=1+1", "x" * 20_000),
]


def table(path: Path, lines: list[list[str]], delimiter: str = ",") -> Path:
    """CSV: every field quoted, quotes doubled (RFC 4180). TSV knows no quotes."""
    quoted = delimiter == ","
    rows = [delimiter.join('"' + f.replace('"', '""') + '"' if quoted else f for f in line) for line in lines]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row + "\n" for row in rows), encoding="utf-8", newline="")
    return path


def images(folder: Path, num_images: int) -> list[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_images):
        (folder / f"{number}.png").write_bytes(plain_png(number))
    return [f"{number}.png" for number in range(num_images)]


def open_set(config: DataConfig) -> PairSet:
    pairs = open_pairs(config)
    assert isinstance(pairs, PairSet)
    return pairs


def csv(*paths: Path, **options: str) -> PairSet:
    return open_set(DataConfig(format="csv", path=tuple(map(str, paths)), **({"caption_key": "caption"} | options)))  # type: ignore[arg-type]


def labels(source: PairSet) -> list[int]:
    return [source.read(number).label for number in range(len(source))]


def assert_things(source: PairSet, captions: Any = lambda number: (f"thing {number}",)) -> None:
    for number in range(len(source)):
        pair = source.read(number)
        assert (pair.image, pair.captions) == (plain_png(number), captions(number)), pair.key


@pytest.mark.parametrize("suffix", ["csv", "tsv", "TSV"])
def test_every_caption_comes_back_as_it_was_written(tmp_path: Path, suffix: str) -> None:
    delimiter = "," if suffix == "csv" else "\t"
    captions = [caption for caption in CAPTIONS if delimiter == "," or not {"\t", "\n"} & set(caption)]
    files = images(tmp_path, len(captions))
    lines = [["image", "caption"], *([file, caption] for file, caption in zip(files, captions, strict=True))]
    source = csv(table(tmp_path / f"t.{suffix}", lines, delimiter))
    assert len(source) == len(captions) == (26 if delimiter == "," else 24)
    assert_things(source, lambda number: (captions[number].strip()[:MOST_CHARACTERS],))


def test_a_caption_that_begins_with_a_quote_does_not_swallow_the_rows_after_it(tmp_path: Path) -> None:
    files = images(tmp_path, 5)
    captions = ["a cat", '"a dog', "a bird", 'the "best" fish', "a cow"]
    rows = "".join(f"{caption}\t{file}\n" for caption, file in zip(captions, files, strict=True))
    (tmp_path / "t.tsv").write_text("caption\timage\n" + rows)
    assert_things(csv(tmp_path / "t.tsv"), lambda number: (captions[number],))


def test_an_unquoted_table_by_hand(tmp_path: Path) -> None:
    images(tmp_path, 3)
    path = tmp_path / "t.csv"
    path.write_bytes(
        b"\xef\xbb\xbfid,image,caption,more\r\n9,0.png, thing 0 ,x\r\n\r\n8,1.png,thing 1,\r\n7,2.png,thing 2,y"
    )
    source = csv(path)  # a byte order mark, Windows' line ends, a blank line and none at the end
    assert len(source) == 3
    assert_things(source)
    assert source.read(1).key == f"{path} row 1: 1.png"
    assert {name: value for name, value in source.identity()[0].items() if name != "fingerprint"} == {
        "pairs": 3,
        "format": "csv",
        "image_column": "image",
        "caption_key": "caption",
        "label_key": None,
        "weight": 1.0,
    }


def test_an_empty_caption_is_a_bad_sample_that_names_row_and_path(tmp_path: Path) -> None:
    lines = [["image", "caption"], *([file, caption] for file, caption in zip(images(tmp_path, 3), ["a", "", " "]))]  # noqa: B905
    source = csv(table(tmp_path / "t.csv", lines))
    assert source.read(0).captions == ("a",)
    for number in (1, 2):
        with pytest.raises(BadSample) as caught:
            source.read(number)
        assert caught.value.skip == (
            f"{tmp_path / 't.csv'} row {number}: {number}.png",
            "empty caption",
            "every caption is empty",
        )


def test_columns_count_from_0_where_there_is_no_header(tmp_path: Path) -> None:
    lines = [[str(5 - number), f"thing {number}", file] for number, file in enumerate(images(tmp_path, 5))]
    path = table(tmp_path / "t.csv", lines)
    source = csv(path, image_column="2", caption_key="1")
    assert len(source) == 5  # the first line is a row
    assert_things(source)
    assert labels(csv(path, image_column="2", caption_key="1", label_key="0")) == [5, 4, 3, 2, 1]
    with pytest.raises(ValueError, match=r"t\.csv has no column '3', only \['0', '1', '2'\]; set data\.caption_key"):
        csv(path, image_column="2", caption_key="3")


def test_a_number_beside_a_name_is_a_column_of_the_header(tmp_path: Path) -> None:
    source = csv(table(tmp_path / "t.csv", [["image", "1"], [images(tmp_path, 1)[0], "thing 0"]]), caption_key="1")
    assert len(source) == 1
    assert_things(source)


def test_paths_are_absolute_or_relative_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images(tmp_path / "elsewhere", 2)
    images(tmp_path / "data" / "sub", 3)
    lines = [["image", "caption"]]
    for number, file in enumerate(["../elsewhere/0.png", str(tmp_path / "elsewhere" / "1.png"), "sub/2.png"]):
        lines.append([file, f"thing {number}"])
    table(tmp_path / "data" / "t.csv", lines)
    assert_things(csv(tmp_path / "data" / "t.csv"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert_things(csv(Path("..") / "data" / "t.csv"))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("gone.png", "the image file cannot be read"),
        ("", "has no path in column 'image'"),
        (".", "the image file cannot be read"),
        ("0.png/x", "the image file cannot be read"),
        ("\0.png", "the image file cannot be read"),
        ("x" * 300, "the image file cannot be read"),
    ],
    ids=["missing", "none", "folder", "file as folder", "zero byte", "long"],
)
def test_an_image_file_that_cannot_be_read_is_a_bad_sample_that_names_row_and_path(
    tmp_path: Path, file: str, words: str
) -> None:
    lines = [["image", "caption"], [images(tmp_path, 1)[0], "thing 0"], [file, "thing 1"]]
    source = csv(table(tmp_path / "t.csv", lines))
    assert source.read(0).captions == ("thing 0",)
    with pytest.raises(BadSample) as caught:
        source.read(1)
    assert caught.value.skip.key == f"{tmp_path / 't.csv'} row 1: {file}"
    assert caught.value.skip.cause == "no image"
    assert caught.value.skip.message.startswith(words)


def test_a_table_all_of_whose_images_are_missing_is_refused_at_once(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [["image", "caption"], *[["gone.png", "a"]] * 9])
    with pytest.raises(ValueError, match=r"t\.csv row 0: gone\.png: the image file cannot be read"):
        csv(path)


@pytest.mark.parametrize(
    ("option", "column"), [("image_column", "file"), ("caption_key", "txt"), ("label_key", "class")]
)
def test_a_wrong_column_of_a_table_is_named_with_the_columns_there_are(
    tmp_path: Path, option: str, column: str
) -> None:
    path = table(tmp_path / "t.csv", [["image", "caption", "n"], [images(tmp_path, 1)[0], "a", "1"]])
    words = rf"t\.csv has no column '{column}', only \['image', 'caption', 'n'\]; set data\.{option}"
    with pytest.raises(ValueError, match=words):
        csv(path, **{option: column})


GARBAGE = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()


@pytest.mark.parametrize("columns", ["names", "numbers"])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\n\n\n",
        b"image,caption",
        b"image,caption\n",
        GARBAGE,
        plain_png(1),
        b"\x1f\x8b" + GARBAGE,
        bytes(1000),
        b"image,caption\n0.png,a\n0.png,b,c\n",
        b"image,caption\n0.png,a\n0.png\n",
        b"image,caption\n0.png,a, b\n0.png,c\n",
        "image,caption\n0.png,Käse\n".encode("latin-1"),
        "imagé,caption\n0.png,a\n".encode("latin-1"),
        "image,caption\n0.png,a\n".encode("utf-16"),
        b'image,caption\n0.png,"' + b"x" * 3_000_000 + b"\n",
    ],
    ids="""empty,blank lines,header without an end,header only,garbage,png,gzip,zeros,a field too many,a field too few,
    unquoted comma,latin-1,latin-1 header,utf-16,open quote""".replace("\n    ", "").split(","),
)
def test_what_is_no_table_is_refused_by_name(tmp_path: Path, content: bytes, columns: str) -> None:
    images(tmp_path, 1)
    path = tmp_path / "wrong.csv"
    path.write_bytes(content)
    options = {} if columns == "names" else {"image_column": "0", "caption_key": "1"}
    with pytest.raises(ValueError, match=r"wrong\.csv"):
        csv(path, **options)


@pytest.mark.parametrize(
    "after", ['2.png,"quoted, too"\n3.png,d\n', "2.png,c\n3.png,d\n"], ids=["closed later", "never"]
)
def test_a_quote_that_is_not_closed_is_named_by_its_line(tmp_path: Path, after: str) -> None:
    images(tmp_path, 4)
    path = tmp_path / "stray.csv"
    path.write_text('image,caption\n0.png,"two\nlines"\n1.png,"a 12" screen\n' + after)
    with pytest.raises(ValueError, match=r"stray\.csv: the quotes of the row at line 4 do not match"):
        csv(path)


def test_a_row_with_another_number_of_fields_is_named(tmp_path: Path) -> None:
    images(tmp_path, 2)
    path = tmp_path / "short.csv"
    path.write_text("image,caption\n0.png,a\n1.png\n")
    with pytest.raises(ValueError, match=r"short\.csv .*Row #3: Expected 2 columns, got 1: 1\.png"):
        csv(path)


def test_a_table_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.csv \(data\.path\)"):
        csv(tmp_path / "none.csv")
    with pytest.raises(FileNotFoundError, match="no file"):
        csv(tmp_path)


def test_no_random_damage_of_a_table_raises_anything_but_one_value_error_that_names_it(tmp_path: Path) -> None:
    lines = [["image", "caption", "n"], *([file, f"a, {file}", "3"] for file in images(tmp_path, 6))]
    whole = np.frombuffer(table(tmp_path / "t.csv", lines).read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    num_refused = num_bad = num_read = 0
    for trial in range(200):
        damaged = whole.copy()
        places = rng.integers(0, len(damaged), rng.integers(1, 6))
        damaged[places] = rng.choice(np.frombuffer(b'",\n\r\0\xff\t x7', np.uint8), len(places))
        (tmp_path / "t.csv").write_bytes(damaged[: rng.integers(len(damaged)) if trial % 4 == 0 else None].tobytes())
        try:
            source = csv(tmp_path / "t.csv", label_key="n")
        except ValueError as error:
            num_refused += 1
            named = str(error)
        else:
            named = "t.csv"
            for number in range(len(source)):
                try:
                    pair = source.read(number)
                    num_read += 1
                except BadSample as bad:
                    num_bad += 1
                    assert f"t.csv row {number}: " in bad.skip.key  # noqa: PT017
                else:
                    assert pair.image in [plain_png(value) for value in range(6)]
        assert "t.csv" in named
    assert num_refused > 50
    assert num_bad > 20
    assert num_read > 100


def test_several_tables_are_one_source(tmp_path: Path) -> None:
    for name, numbers in (("a", range(3)), ("b", range(3, 4)), ("c", range(4, 7))):
        images(tmp_path / name, 7)
        lines = [["caption", "image"][:: 1 if name == "a" else -1]]  # the columns of each in an order of its own
        for number in numbers:
            lines.append([f"thing {number}", f"{number}.png"][:: 1 if name == "a" else -1])
        table(tmp_path / name / "t.tsv", lines, "\t")
    source = csv(*(tmp_path / name / "t.tsv" for name in "abc"))
    assert len(source) == 7
    assert_things(source)
    assert [source.read(number).key for number in (2, 3, 6)] == [
        f"{tmp_path}/{name} row {row}: {file}.png"
        for name, row, file in (("a/t.tsv", 2, 2), ("b/t.tsv", 0, 3), ("c/t.tsv", 2, 6))
    ]
    with pytest.raises(ValueError, match=r"d\.csv holds no rows"):
        csv(tmp_path / "a" / "t.tsv", table(tmp_path / "d.csv", [["image", "caption"]]))


def test_labels_of_a_table_come_from_a_column_where_empty_is_none(tmp_path: Path) -> None:
    values = ["3", "", "0", "007", "-1", " 12 "]
    lines = [["image", "caption", "class"]]
    for number, (file, label) in enumerate(zip(images(tmp_path, 6), values, strict=True)):
        lines.append([file, f"thing {number}", label])
    path = table(tmp_path / "t.csv", lines)
    source = csv(path, label_key="class")
    assert labels(source) == [3, -1, 0, 7, -1, 12]
    assert_things(source)
    assert labels(csv(path)) == [-1] * 6


@pytest.mark.parametrize("label", ["cat", "-2", "1.0", "1e3", "true", "1 2", "9" * 19])
def test_a_wrong_label_of_a_table_names_its_row(tmp_path: Path, label: str) -> None:
    lines = [["image", "caption", "class"], [images(tmp_path, 1)[0], "a", "7"], ["0.png", "b", label]]
    source = csv(table(tmp_path / "t.csv", lines), label_key="class")
    assert source.read(0).label == 7
    with pytest.raises(BadSample, match=rf"t\.csv row 1: 0\.png: its label is '{label}'; .* see data\.label_key"):
        source.read(1)


def test_the_identity_of_a_table_changes_with_its_content_and_not_with_its_place(tmp_path: Path) -> None:
    lines = [["image", "caption"], *([file, f"thing {file}"] for file in images(tmp_path / "a", 3))]
    path = table(tmp_path / "a" / "t.csv", lines)
    before = csv(path).identity()
    shutil.copytree(tmp_path / "a", tmp_path / "b", copy_function=shutil.copy)
    assert csv(tmp_path / "b" / "t.csv").identity() == before
    fingerprints = {before[0]["fingerprint"]}
    for number, changed in enumerate(
        [lines[:-1], [*lines, lines[1]], [lines[0], *lines[:0:-1]], [*lines[:3], ["2.png", "x"]]]
    ):
        fingerprints.add(csv(table(path, changed)).identity()[0]["fingerprint"])
        assert len(fingerprints) == number + 2
    other = table(tmp_path / "b" / "u.csv", lines[:2])
    first, second = csv(tmp_path / "b" / "t.csv", other), csv(other, tmp_path / "b" / "t.csv")
    assert first.identity()[0]["fingerprint"] != second.identity()[0]["fingerprint"]


@pytest.fixture(scope="module")
def quick_collection() -> Iterator[None]:
    """A collection of garbage that passes over what was there before."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def rows(quick_collection: None) -> Iterator[datasets.Dataset]:
    """Five images with one and with two captions."""
    datasets.disable_progress_bars()
    columns = {
        "image": [{"bytes": plain_png(number), "path": None} for number in range(5)],
        "caption": [f"thing {number}" for number in range(5)],
        "many": [[f"thing {number}", "any"] for number in range(5)],
    }
    kinds = {
        "image": datasets.Image(),
        "caption": datasets.Value("string"),
        "many": datasets.List(datasets.Value("string")),
    }
    yield datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    gc.collect()  # so that what stayed open warns here, where it is expected


def hugging_face(path: Path, **options: str) -> PairSet:
    return open_set(DataConfig(format="huggingface", path=str(path), **({"caption_key": "caption"} | options)))  # type: ignore[arg-type]


def test_a_saved_hugging_face_data_set_gives_the_bytes_it_was_made_of(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.save_to_disk(tmp_path / "saved")
    source = hugging_face(tmp_path / "saved")
    assert len(source) == 5
    assert_things(source)
    assert_things(hugging_face(tmp_path / "saved", caption_key="many"), lambda number: (f"thing {number}", "any"))
    assert source.read(2).key.endswith("saved row 2")


def test_a_split_is_taken_from_a_saved_dictionary(rows: datasets.Dataset, tmp_path: Path) -> None:
    datasets.DatasetDict({"train": rows, "val": rows.select([0])}).save_to_disk(tmp_path / "saved")
    assert len(hugging_face(tmp_path / "saved")) == 5
    assert len(hugging_face(tmp_path / "saved", split="val")) == 1
    with pytest.raises(ValueError, match=r"saved.*split 'test'"):
        hugging_face(tmp_path / "saved", split="test")


def test_a_folder_of_parquet_files(rows: datasets.Dataset, tmp_path: Path) -> None:
    (tmp_path / "parquet").mkdir()
    rows.select(range(3)).to_parquet(tmp_path / "parquet" / "train-00000-of-00002.parquet")
    rows.select(range(3, 5)).to_parquet(tmp_path / "parquet" / "train-00001-of-00002.parquet")
    source = hugging_face(tmp_path / "parquet")
    assert len(source) == 5
    assert_things(source)
    with pytest.raises(ValueError, match=r"parquet.*split 'test'"):
        hugging_face(tmp_path / "parquet", split="test")


def test_images_stored_by_path_are_read_from_there(rows: datasets.Dataset, tmp_path: Path) -> None:
    files = []
    for number in range(2):
        files.append(str(tmp_path / f"{number}.png"))
        Path(files[-1]).write_bytes(plain_png(number))
    columns = {"picture": files, "caption": ["thing 0", "thing 1"]}
    by_path = datasets.Dataset.from_dict(columns).cast_column("picture", datasets.Image())
    by_path.save_to_disk(tmp_path / "saved")
    assert_things(hugging_face(tmp_path / "saved", image_column="picture"))


def test_labels_come_from_a_column_where_none_is_none(rows: datasets.Dataset, tmp_path: Path) -> None:
    rows.add_column("class", [3, None, 0, 12, -1]).save_to_disk(tmp_path / "saved")
    source = hugging_face(tmp_path / "saved", label_key="class")
    assert labels(source) == [3, -1, 0, 12, -1]
    assert_things(source)
    assert labels(hugging_face(tmp_path / "saved")) == [-1] * 5


@pytest.mark.parametrize("column", [[-2, 7], [1.5, None], ["cat", "7"]], ids=["negative", "float", "text"])
def test_a_wrong_label_names_its_row(rows: datasets.Dataset, tmp_path: Path, column: list[Any]) -> None:
    rows.select(range(2)).add_column("class", column).save_to_disk(tmp_path / "saved")
    source = hugging_face(tmp_path / "saved", label_key="class")
    assert source.read(1).label == (7 if column[1] else UNLABELLED)
    words = rf"saved row 0: its label is {column[0]!r}; .* see data\.label_key"
    with pytest.raises(BadSample, match=words):
        source.read(0)
    rows.select([0]).add_column("class", column[:1]).save_to_disk(tmp_path / "all" / "saved")
    with pytest.raises(ValueError, match=words):  # at once, where none of the first rows can be read
        hugging_face(tmp_path / "all" / "saved", label_key="class")


@pytest.mark.parametrize(
    ("option", "column"), [("image_column", "picture"), ("caption_key", "text"), ("label_key", "class")]
)
def test_a_wrong_column_is_named_with_the_columns_there_are(
    rows: datasets.Dataset, tmp_path: Path, option: str, column: str
) -> None:
    rows.save_to_disk(tmp_path / "saved")
    with pytest.raises(
        ValueError, match=rf"no column '{column}', only \['image', 'caption', 'many'\]; set data\.{option}"
    ):
        hugging_face(tmp_path / "saved", **{option: column})


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_data_set_without_rows_is_refused(rows: datasets.Dataset, tmp_path: Path, form: str) -> None:
    folder = tmp_path / form
    if form == "saved":
        rows.select([]).save_to_disk(folder)
    else:
        folder.mkdir()
        rows.select([]).to_parquet(folder / "train.parquet")
    with pytest.raises(ValueError, match=rf"{form}.*split 'train'"):
        hugging_face(folder)


@pytest.mark.parametrize(("column", "value"), [("caption", None), ("caption", ""), ("image", None)])
def test_a_null_in_a_row_names_the_row(rows: datasets.Dataset, tmp_path: Path, column: str, value: Any) -> None:
    other = datasets.Dataset.from_list(
        [*rows.to_list()[:1], {**rows.to_list()[1], column: value}], features=rows.features
    )
    other.save_to_disk(tmp_path / "saved")
    source = hugging_face(tmp_path / "saved")
    assert source.read(0).captions == ("thing 0",)
    with pytest.raises(ValueError, match="saved row 1"):
        source.read(1)


def as_parquet(rows: datasets.Dataset, folder: Path) -> None:
    folder.mkdir()
    rows.to_parquet(folder / "train.parquet")


def as_arrow(rows: datasets.Dataset, folder: Path) -> None:
    rows.save_to_disk(folder / "saved")
    for file in (folder / "saved").glob("*.json"):
        file.unlink()


def as_saved(rows: datasets.Dataset, folder: Path) -> None:
    rows.save_to_disk(folder)


def as_images(rows: datasets.Dataset, folder: Path) -> None:
    """The layout that datasets calls imagefolder."""
    folder.mkdir()
    lines = [["file_name", "caption", "class"]]
    for number, caption in enumerate(rows["caption"]):
        (folder / f"{number}.png").write_bytes(
            rows.cast_column("image", datasets.Image(decode=False))[number]["image"]["bytes"]
        )
        lines.append([f"{number}.png", caption, str(number + 3)])
    table(folder / "metadata.csv", lines)


FORMS = [as_saved, as_parquet, as_arrow, as_images]


@pytest.mark.parametrize("write", FORMS)
def test_every_form_of_a_folder_gives_the_same_pairs(rows: datasets.Dataset, tmp_path: Path, write: Any) -> None:
    write(rows, tmp_path / "data")
    source = hugging_face(tmp_path / "data")
    assert len(source) == 5
    assert_things(source)
    assert source.read(2).key == f"{tmp_path}/data row 2"
    assert source.identity()[0]["pairs"] == 5


def test_labels_come_from_the_metadata_of_an_image_folder(rows: datasets.Dataset, tmp_path: Path) -> None:
    as_images(rows, tmp_path / "data")
    assert labels(hugging_face(tmp_path / "data", label_key="class")) == [3, 4, 5, 6, 7]


def test_an_image_that_left_its_folder_is_a_bad_sample(rows: datasets.Dataset, tmp_path: Path) -> None:
    as_images(rows, tmp_path / "data")
    source = hugging_face(tmp_path / "data")
    (tmp_path / "data" / "3.png").unlink()
    with pytest.raises(BadSample, match="data row 3: the image file cannot be read") as caught:
        source.read(3)
    assert caught.value.skip.cause == "no image"


@pytest.mark.parametrize("write", FORMS)
def test_the_identity_of_a_data_set_stays_where_its_folder_is_copied(
    rows: datasets.Dataset, tmp_path: Path, write: Any
) -> None:
    write(rows, tmp_path / "here")
    before = hugging_face(tmp_path / "here").identity()
    assert hugging_face(tmp_path / "here").identity() == before
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)  # without the files' times
    assert hugging_face(tmp_path / "there").identity() == before


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("order", [range(4), range(4, -1, -1), [0, 1, 2, 3, 3]], ids=["fewer", "reversed", "other"])
def test_the_identity_of_a_data_set_changes_with_its_rows(
    rows: datasets.Dataset, tmp_path: Path, write: Any, order: Any
) -> None:
    write(rows, tmp_path / "before")
    write(rows.select(order), tmp_path / "after")
    before, after = (hugging_face(tmp_path / name).identity()[0]["fingerprint"] for name in ("before", "after"))
    assert before != after


@pytest.mark.parametrize("write", FORMS)
def test_a_damaged_data_set_is_one_value_error_that_names_it(
    rows: datasets.Dataset, tmp_path: Path, write: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    num_refused = 0
    wrong: list[str] = []
    for trial in range(12):
        folder = tmp_path / f"data{trial}"
        write(rows, folder)
        chosen = sorted(path for path in folder.rglob("*") if path.suffix in (".json", ".arrow", ".parquet", ".csv"))
        path = chosen[trial % len(chosen)]
        data = np.frombuffer(path.read_bytes(), np.uint8).copy()
        if trial < 4 or path.suffix == ".arrow":  # within whole messages Arrow trusts every byte, and may crash
            path.write_bytes(data[: len(data) * (trial % 4) // 4].tobytes())
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
            if f"data{trial}" not in str(error):
                wrong.append(f"{trial} {path.name}: unnamed: {error!r}"[:300])
        except Exception as error:
            wrong.append(f"{trial} {path.name}: {error!r}"[:300])
    assert not wrong, "\n".join(wrong)
    assert num_refused >= 2
