"""Image-text pairs from webdataset shards and Hugging Face data sets, built on the spot."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
from samples import plain_png, write_tar

from clipkd.config import DataConfig
from clipkd.data.sources import UNLABELLED, PairSource, WebdatasetPairs, open_source


def shard(path: Path, numbers: range, *, extension: str = "txt") -> Path:
    members = []
    for number in numbers:
        caption = f"thing {number}"
        text = caption if extension == "txt" else json.dumps({"caption": caption, "all": [caption, "any"], "n": 3})
        members += [(f"{number:04}.png", plain_png(number)), (f"{number:04}.{extension}", text.encode())]
    return write_tar(path, members)


def webdataset(path: str | Path, caption_key: str = "txt", label_key: str | None = None) -> PairSource:
    return open_source(DataConfig(path=str(path), caption_key=caption_key, label_key=label_key))


def labelled_shard(path: Path, extension: str, contents: list[bytes | None]) -> Path:
    """Pairs with a third member that may hold the label; None for a pair without it."""
    members = []
    for number, content in enumerate(contents):
        members += [(f"{number}.png", plain_png(number)), (f"{number}.txt", f"thing {number}".encode())]
        members += [] if content is None else [(f"{number}.{extension}", content)]
    return write_tar(path, members)


def labels(source: PairSource) -> list[int]:
    return [source.read(number).label for number in range(len(source))]


def assert_things(source: PairSource, captions: Any = lambda number: (f"thing {number}",)) -> None:
    for number in range(len(source)):
        pair = source.read(number)
        assert (pair.image, pair.captions) == (plain_png(number), captions(number)), pair.key


def test_pairs_of_a_folder_of_shards_come_in_order(tmp_path: Path) -> None:
    shard(tmp_path / "b.tar", range(3, 5))
    shard(tmp_path / "a.tar", range(3))
    source = webdataset(tmp_path)
    assert len(source) == 5
    assert_things(source)
    assert source.read(3).key == f"{tmp_path / 'b.tar'} at byte 512"
    assert source.read(4).image == plain_png(4)
    assert source.read(0).captions == ("thing 0",)  # any order, again and again


def test_pairs_of_one_shard_and_of_a_brace_pattern(tmp_path: Path) -> None:
    for number in range(12):
        shard(tmp_path / f"{number:05}.tar", range(number, number + 1))
    assert len(webdataset(tmp_path / "00003.tar")) == 1
    source = webdataset(f"{tmp_path}/{{00000..00010}}.tar")
    assert len(source) == 11
    assert_things(source)


def test_captions_come_from_a_key_of_the_json(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), extension="json")
    assert_things(webdataset(path, "caption"))
    assert_things(webdataset(path, "all"), lambda number: (f"thing {number}", "any"))


def test_a_sample_without_image_or_caption_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [
        *(("0.png", plain_png(0)), ("0.txt", b"thing 0")),
        *(("x.txt", b"no image"), ("y.png", plain_png(9)), ("z.json", b"{}")),
        *(("1.txt", b" thing 1\n"), ("1.JPG", plain_png(1))),
    ]
    source = webdataset(write_tar(tmp_path / "a.tar", members))
    assert isinstance(source, WebdatasetPairs)
    assert (len(source), source.num_incomplete) == (2, 3)
    assert_things(source)


def test_a_data_set_without_any_whole_sample_is_refused(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), extension="json")
    with pytest.raises(ValueError, match=r"a\.tar: none of 3 samples .*\.txt; see data\.caption_key"):
        webdataset(path)


def test_missing_shards_are_named(tmp_path: Path) -> None:
    shard(tmp_path / "00000.tar", range(1))
    with pytest.raises(FileNotFoundError, match=r"00001\.tar \(2 of 3 missing\)"):
        webdataset(f"{tmp_path}/{{00000..00002}}.tar")
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        webdataset(tmp_path / "none.tar")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no \.tar in the folder .*empty"):
        webdataset(tmp_path / "empty")


@pytest.mark.parametrize("path", ["https://host/a.tar", "s3://bucket/{0..3}.tar", "pipe:cat a.tar"])
def test_remote_shards_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="not local"):
        webdataset(path)


def test_an_empty_path_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        webdataset("")


@pytest.mark.parametrize(
    ("name", "content", "caption_key", "words"),
    [
        ("0.txt", b" \n\t", "txt", "every caption is empty"),
        ("0.txt", b"\xff\xfe\xfa", "txt", "cannot be read"),
        ("0.json", b'{"caption": ""}', "caption", "every caption is empty"),
        ("0.json", b'{"caption": ["", " "]}', "caption", "every caption is empty"),
        ("0.json", b'{"caption": []}', "caption", "every caption is empty"),
        ("0.json", b'{"caption": 3}', "caption", "expected a caption or a list of captions, got int"),
        ("0.json", b'{"caption": null}', "caption", "expected a caption or a list of captions"),
        ("0.json", b'{"caption": ["a", null]}', "caption", "expected a caption or a list of captions"),
        ("0.json", b'{"text": "a"}', "caption", r"no key 'caption'; see data\.caption_key"),
        ("0.json", b'{"caption"', "caption", "cannot be read"),
        ("0.json", b'["a caption"]', "caption", "caption"),
        ("0.json", b"null", "caption", "caption"),
    ],
)
def test_a_wrong_caption_names_its_sample(
    tmp_path: Path, name: str, content: bytes, caption_key: str, words: str
) -> None:
    good = b"thing" if caption_key == "txt" else b'{"caption": "thing"}'
    pairs = [
        ("1.png", plain_png(1)),
        (name.replace("0", "1"), good),
        ("2.png", plain_png(2)),
        (name.replace("0", "2"), content),
    ]
    source = webdataset(write_tar(tmp_path / "a.tar", pairs), caption_key)
    assert source.read(0).captions == ("thing",)
    with pytest.raises(ValueError, match=rf"a\.tar at byte 2560.*{words}"):  # the third of four members of two blocks
        source.read(1)


def test_a_caption_key_that_the_first_sample_lacks_is_refused_at_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), extension="json")
    with pytest.raises(ValueError, match=r"no key 'text'; see data\.caption_key"):
        webdataset(path, "text")


def test_empty_captions_among_others_are_left_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", plain_png(0)), ("0.json", b'{"all": ["", "thing 0 ", " "]}')])
    assert webdataset(path, "all").read(0).captions == ("thing 0",)


def test_labels_come_from_the_cls_member_of_the_pairs_that_have_one(tmp_path: Path) -> None:
    path = labelled_shard(tmp_path / "a.tar", "cls", [None, b"7", b" 0\n", None, b"-1", b"999"])
    source = webdataset(path, label_key="cls")
    assert labels(source) == [-1, 7, 0, -1, -1, 999]
    assert_things(source)


def test_labels_come_from_a_key_of_the_json_where_null_is_none(tmp_path: Path) -> None:
    contents = [b'{"class": 4}', b'{"class": null, "other": 5}', None, b'{"class": "12"}', b'{"class": -1}']
    source = webdataset(labelled_shard(tmp_path / "a.tar", "json", contents), label_key="class")
    assert labels(source) == [4, -1, -1, 12, -1]
    assert_things(source)


def test_caption_and_label_may_share_a_json(tmp_path: Path) -> None:
    source = webdataset(shard(tmp_path / "a.tar", range(3), extension="json"), "caption", "n")
    assert labels(source) == [3, 3, 3]
    assert_things(source)


def test_without_a_label_key_no_pair_has_a_label(tmp_path: Path) -> None:
    source = webdataset(labelled_shard(tmp_path / "a.tar", "cls", [b"7", b"no number"]))
    assert labels(source) == [UNLABELLED, UNLABELLED] == [-1, -1]


@pytest.mark.parametrize(
    ("label_key", "good", "wrong", "words"),
    [
        ("cls", b"7", b"cat", r"its label is 'cat'; .* see data\.label_key"),
        ("cls", b"7", b"-2", r"its label is '-2'; .* see data\.label_key"),
        ("cls", b"7", b"1.0", r"its label is '1\.0'; .* see data\.label_key"),
        ("cls", b"7", b"", r"its label is ''; .* see data\.label_key"),
        ("cls", b"7", b"\xff", "its label cannot be read"),
        ("class", b'{"class": 7}', b'{"class": "cat"}', r"its label is 'cat'; .* see data\.label_key"),
        ("class", b'{"class": 7}', b'{"class": -2}', r"its label is -2; .* see data\.label_key"),
        ("class", b'{"class": 7}', b'{"class": 1.0}', r"its label is 1\.0; .* see data\.label_key"),
        ("class", b'{"class": 7}', b'{"class": true}', r"its label is True; .* see data\.label_key"),
        ("class", b'{"class": 7}', b'{"class": [1]}', r"its label is \[1\]; .* see data\.label_key"),
        ("class", b'{"class": 7}', b'{"klass": 7}', r"its json has no key 'class'; see data\.label_key"),
        ("class", b'{"class": 7}', b'{"class"', "its label cannot be read"),
    ],
)
def test_a_wrong_label_names_its_sample(tmp_path: Path, label_key: str, good: bytes, wrong: bytes, words: str) -> None:
    extension = "cls" if label_key == "cls" else "json"
    source = webdataset(labelled_shard(tmp_path / "a.tar", extension, [good, wrong]), label_key=label_key)
    assert source.read(0).label == 7
    with pytest.raises(ValueError, match=rf"a\.tar at byte 3584: {words}"):  # the fourth of six members of two blocks
        source.read(1)


def test_a_label_key_that_the_first_sample_lacks_is_refused_at_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), extension="json")
    with pytest.raises(ValueError, match=r"a\.tar at byte 512: its json has no key 'class'; see data\.label_key"):
        webdataset(path, "caption", "class")


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> datasets.Dataset:
    """Five images with one and with two captions."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
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
    return datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))


def hugging_face(path: Path, **options: str) -> PairSource:
    return open_source(DataConfig(format="huggingface", path=str(path), **({"caption_key": "caption"} | options)))  # type: ignore[arg-type]


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


@pytest.mark.parametrize("column", [[-2, 7], [1.5, 7.0], ["cat", "7"]], ids=["negative", "float", "text"])
def test_a_wrong_label_names_its_row(rows: datasets.Dataset, tmp_path: Path, column: list[Any]) -> None:
    rows.select(range(2)).add_column("class", column).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match=rf"saved row 0: its label is {column[0]!r}; .* see data\.label_key"):
        hugging_face(tmp_path / "saved", label_key="class")


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
