"""Image-text pairs from local webdataset shards and from mixtures, built on the spot."""

import contextlib
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data.open import open_pairs
from clipkd.data.shards import WebdatasetPairs
from clipkd.data.skips import BadSample
from clipkd.data.sources import MOST_CHARACTERS, UNLABELLED, PairSet
from clipkd.data.stream import StreamedShards
from tests.data.samples import plain_png, write_tar


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where indexes go that cannot lie beside their shard."""
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def shard(path: Path, numbers: range, *, extension: str = "txt") -> Path:
    members = []
    for number in numbers:
        caption = f"thing {number}"
        text = caption if extension == "txt" else json.dumps({"caption": caption, "all": [caption, "any"], "n": 3})
        members += [(f"{number:04}.png", plain_png(number)), (f"{number:04}.{extension}", text.encode())]
    return write_tar(path, members)


def webdataset(*paths: str | Path, caption_key: str = "txt", label_key: str | None = None) -> PairSet:
    config = DataConfig(path=tuple(map(str, paths)), caption_key=caption_key, label_key=label_key)
    pairs = open_pairs(config)
    assert isinstance(pairs, PairSet)
    return pairs


def labelled_shard(path: Path, extension: str, contents: list[bytes | None]) -> Path:
    """Pairs with a third member that may hold the label; None for a pair without it."""
    members = []
    for number, content in enumerate(contents):
        members += [(f"{number}.png", plain_png(number)), (f"{number}.txt", f"thing {number}".encode())]
        members += [] if content is None else [(f"{number}.{extension}", content)]
    return write_tar(path, members)


def labels(source: PairSet) -> list[int]:
    return [source.read(number).label for number in range(len(source))]


def assert_things(source: PairSet, captions: Any = lambda number: (f"thing {number}",)) -> None:
    for number in range(len(source)):
        pair = source.read(number)
        assert (pair.image, pair.captions) == (plain_png(number), captions(number)), pair.key


def test_pairs_of_a_folder_of_shards_come_in_order(tmp_path: Path) -> None:
    shard(tmp_path / "b.tar", range(3, 5))
    shard(tmp_path / "a.tar", range(3))
    source = webdataset(tmp_path)
    assert len(source) == 5
    assert_things(source)
    assert source.read(3).key == f"{tmp_path / 'b.tar'}/0003"
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
    assert_things(webdataset(path, caption_key="caption"))
    assert_things(webdataset(path, caption_key="all"), lambda number: (f"thing {number}", "any"))


def test_a_sample_without_image_or_caption_is_left_out_and_counted(tmp_path: Path) -> None:
    members = [
        *(("0.png", plain_png(0)), ("0.txt", b"thing 0")),
        *(("x.txt", b"no image"), ("y.png", plain_png(9)), ("z.json", b"{}")),
        *(("1.txt", b" thing 1\n"), ("1.JPG", plain_png(1))),
    ]
    source = webdataset(write_tar(tmp_path / "a.tar", members))
    assert len(source) == 2
    assert source.left_out.counts == {"no image": 2, "no caption": 1}
    assert {skip.key for skip in source.left_out.examples} == {f"{tmp_path / 'a.tar'}/{key}" for key in "xyz"}
    assert source.describe() == "2 pairs; left out: 2 × no image, 1 × no caption"
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


@pytest.mark.parametrize(
    ("path", "num_shards"), [("https://host/a.tar", 1), ("gs://bucket/{0..3}.tar", 4), ("pipe:cat a.tar", 1)]
)
def test_remote_shards_are_streamed(path: str, num_shards: int) -> None:
    pairs = open_pairs(DataConfig(path=path))
    assert isinstance(pairs, StreamedShards)
    assert len(pairs.shards) == num_shards
    assert pairs.describe() == f"{num_shards} streamed shards"


def test_remote_and_local_shards_in_one_run_are_refused(tmp_path: Path) -> None:
    path, url = str(shard(tmp_path / "a.tar", range(3))), "https://host/a.tar"
    with pytest.raises(ValueError, match="streams all or indexes all"):
        open_pairs(DataConfig(path=(path, url)))
    with pytest.raises(ValueError, match="streams all or indexes all"):
        open_pairs(DataConfig(path=path, mix=(SourceConfig(path=url),)))


def test_an_empty_path_is_refused() -> None:
    for paths in [("",), (), ("", "")]:
        with pytest.raises(ValueError, match=r"data\.path is empty"):
            webdataset(*paths)
    with pytest.raises(ValueError, match=r"data\.mix\[1\]\.path is empty"):
        open_pairs(DataConfig(path="a", mix=(SourceConfig(path="b"), SourceConfig())))


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
        ("0.json", b'{"text": "a"}', "caption", r"no key 'caption', only \['text'\]; see data\.caption_key"),
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
    source = webdataset(write_tar(tmp_path / "a.tar", pairs), caption_key=caption_key)
    assert source.read(0).captions == ("thing",)
    with pytest.raises(BadSample, match=rf"a\.tar/2: .*{words}") as caught:
        source.read(1)
    assert caught.value.skip.key == f"{tmp_path / 'a.tar'}/2"
    assert caught.value.skip.cause in ("empty caption", "unreadable caption", "no caption")


def test_a_caption_key_that_the_first_samples_lack_is_refused_at_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), extension="json")
    with pytest.raises(
        ValueError, match=r"a\.tar/0000: .*no key 'text', only \['all', 'caption', 'n'\]; see data\.caption_key"
    ):
        webdataset(path, caption_key="text")


@pytest.mark.parametrize(("num_bad", "refused"), [(7, False), (8, True)])
def test_bad_captions_are_refused_at_once_only_if_none_of_the_first_eight_is_good(
    tmp_path: Path, num_bad: int, refused: bool
) -> None:
    members = []
    for number in range(10):
        caption = b" " if number < num_bad else b"thing"
        members += [(f"{number}.png", plain_png(number)), (f"{number}.txt", caption)]
    path = write_tar(tmp_path / "a.tar", members)
    if refused:
        with pytest.raises(ValueError, match=r"a\.tar/0: every caption is empty"):
            webdataset(path)
    else:
        assert webdataset(path).read(num_bad).captions == ("thing",)


def test_empty_captions_among_others_are_left_out(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("0.png", plain_png(0)), ("0.json", b'{"all": ["", "thing 0 ", " "]}')])
    assert webdataset(path, caption_key="all").read(0).captions == ("thing 0",)


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
    source = webdataset(shard(tmp_path / "a.tar", range(3), extension="json"), caption_key="caption", label_key="n")
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
        (
            "class",
            b'{"class": 7}',
            b'{"klass": 7}',
            r"its json has no key 'class', only \['klass'\]; see data\.label_key",
        ),
        ("class", b'{"class": 7}', b'{"class"', "its label cannot be read"),
    ],
)
def test_a_wrong_label_names_its_sample(tmp_path: Path, label_key: str, good: bytes, wrong: bytes, words: str) -> None:
    extension = "cls" if label_key == "cls" else "json"
    source = webdataset(labelled_shard(tmp_path / "a.tar", extension, [good, wrong]), label_key=label_key)
    assert source.read(0).label == 7
    with pytest.raises(ValueError, match=rf"a\.tar/1: {words}"):
        source.read(1)


def test_a_label_key_that_the_first_samples_lack_is_refused_at_once(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), extension="json")
    with pytest.raises(
        ValueError,
        match=r"a\.tar/0000: its json has no key 'class', only \['all', 'caption', 'n'\]; see data\.label_key",
    ):
        webdataset(path, caption_key="caption", label_key="class")
    with pytest.raises(ValueError, match=r"a\.tar: no sample has a \.cls for its label; see data\.label_key"):
        webdataset(path, caption_key="caption", label_key="cls")


def test_folders_tars_and_patterns_are_taken_in_the_order_of_the_list(tmp_path: Path) -> None:
    shard(tmp_path / "second" / "a.tar", range(4, 6))
    shard(tmp_path / "first" / "b.tar", range(2, 4))
    shard(tmp_path / "first" / "a.tar", range(2))
    for number in (6, 7):
        shard(tmp_path / f"{number}.tar", range(number, number + 1))
    source = webdataset(tmp_path / "first", tmp_path / "second" / "a.tar", tmp_path / "{6..7}.tar")
    assert len(source) == 8
    assert_things(source)


@pytest.mark.parametrize("again", ["a.tar", "", "{a..b}.tar", "../folder/a.tar"])
def test_a_shard_that_is_named_twice_is_refused(tmp_path: Path, again: str) -> None:
    folder = tmp_path / "folder"
    for name in ("a.tar", "b.tar"):
        shard(folder / name, range(2))
    with pytest.raises(ValueError, match=r"names .*a\.tar more than once; weigh a source instead \(data\.weight\)"):
        webdataset(folder / "a.tar", f"{folder}/{again}")


def test_a_mixture_counts_its_ids_through_every_source_and_reads_the_right_pairs(tmp_path: Path) -> None:
    mixed = mixture(tmp_path)
    assert [len(source.shard_sizes) for source in mixed.sources] == [2, 1, 1, 1]
    assert [source.shard_sizes.sum() for source in mixed.sources] == [5, 3, 4, 5]
    assert len(mixed) == 17
    expected = [*range(5), *range(10, 13), *range(20, 24), *range(30, 35)]
    for id, number in enumerate(expected):
        pair = mixed.read(id)
        assert (pair.image, pair.captions, pair.label) == (plain_png(number), (f"thing {number}",), UNLABELLED)
    assert mixed.read(16).key == f"{tmp_path}/saved row 4"
    assert mixed.describe() == "17 pairs"


def mixture(root: Path) -> PairSet:
    """Things 0…4 and 10…12 in shards, 20…23 in a table and 30…34 in a Hugging Face data set."""
    shard(root / "one" / "a.tar", range(3))
    shard(root / "one" / "b.tar", range(3, 5))
    shard(root / "two" / "a.tar", range(10, 13), extension="json")
    write_table(root / "table.csv", range(20, 24))
    rows(range(30, 35)).save_to_disk(root / "saved")
    return open_mixture(root)


def write_table(path: Path, numbers: range) -> None:
    for number in numbers:
        (path.parent / f"{number}.png").write_bytes(plain_png(number))
    path.write_text("image,caption\n" + "".join(f"{number}.png,thing {number}\n" for number in numbers))


def rows(numbers: range) -> datasets.Dataset:
    datasets.disable_progress_bars()
    columns = {
        "image": [{"bytes": plain_png(number), "path": None} for number in numbers],
        "caption": [f"thing {number}" for number in numbers],
    }
    kinds = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict(columns, features=kinds)


def open_mixture(root: Path) -> PairSet:
    pairs = open_pairs(
        DataConfig(
            path=str(root / "one"),
            mix=(
                SourceConfig(path=str(root / "two" / "a.tar"), caption_key="caption", weight=2.0),
                SourceConfig(format="csv", path=str(root / "table.csv"), caption_key="caption"),
                SourceConfig(format="huggingface", path=str(root / "saved"), caption_key="caption"),
            ),
        )
    )
    assert isinstance(pairs, PairSet)
    return pairs


def test_the_identity_of_a_mixture_stays_where_its_folder_is_copied(tmp_path: Path) -> None:
    before = mixture(tmp_path / "here").identity()
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)  # without the files' times
    for cache in (tmp_path / "there").rglob("*.clipkd-index.npz"):
        cache.unlink()
    assert open_mixture(tmp_path / "there").identity() == before
    assert json.loads(json.dumps(before)) == before  # a checkpoint keeps it
    assert [part["pairs"] for part in before] == [5, 3, 4, 5]
    assert [part["weight"] for part in before] == [1.0, 2.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (0, lambda root: shard(root / "one" / "b.tar", range(3, 6))),
        (0, lambda root: shard(root / "one" / "c.tar", range(6, 7))),
        (0, lambda root: (root / "one" / "b.tar").rename(root / "one" / "0.tar")),
        (0, lambda root: (root / "one" / "a.tar").unlink()),
        (1, lambda root: shard(root / "two" / "a.tar", range(12, 9, -1), extension="json")),  # type: ignore[arg-type]
        (2, lambda root: write_table(root / "table.csv", range(21, 24))),
        (2, lambda root: (root / "table.csv").write_text((root / "table.csv").read_text().replace("thing", "what"))),
        (3, lambda root: rows(range(30, 34)).save_to_disk(root / "saved")),
        (3, lambda root: rows(range(34, 29, -1)).save_to_disk(root / "saved")),
    ],
    ids=["sample", "shard", "order", "removed", "reversed", "row", "caption", "fewer rows", "reversed rows"],
)
def test_the_identity_of_a_mixture_changes_with_the_content_of_one_part(
    tmp_path: Path, part: int, change: Callable[[Path], Any]
) -> None:
    before = mixture(tmp_path).identity()
    change(tmp_path)
    after = open_mixture(tmp_path).identity()
    assert [number for number in range(4) if after[number] != before[number]] == [part]
    assert after[part]["fingerprint"] != before[part]["fingerprint"]


def test_shards_beside_which_nothing_can_be_written_are_indexed_in_the_users_cache(
    tmp_path: Path, user_cache: Path
) -> None:
    paths = [shard(tmp_path / f"{name}.tar", range(number, number + 2)) for number, name in ((0, "a"), (2, "b"))]
    for path in paths:
        path.with_name(path.name + ".clipkd-index.npz").mkdir()  # in the way, as a read-only folder would be
    assert_things(webdataset(tmp_path))
    cached = sorted((user_cache / "clipkd" / "shards").iterdir())
    assert len(cached) == 2
    times = [file.stat().st_mtime_ns for file in cached]
    assert_things(webdataset(tmp_path))
    assert [file.stat().st_mtime_ns for file in cached] == times  # used, not written again


def test_a_folder_and_a_user_cache_that_take_nothing_are_read_all_the_same(tmp_path: Path, user_cache: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3))
    path.with_name(path.name + ".clipkd-index.npz").mkdir()
    (user_cache / "clipkd").write_text("a file where a folder should be")
    assert_things(webdataset(path))


def test_few_rows_stay_in_memory_and_any_order_reads_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = [0, 4, 5, 9, 12, 16, 17]
    for start, stop in itertools.pairwise(starts):
        shard(tmp_path / f"{start:02}.tar", range(start, stop))
    monkeypatch.setattr("clipkd.data.shards.MOST_ROWS_KEPT", 6)
    pairs = webdataset(tmp_path)
    (source,) = pairs.sources
    assert isinstance(source, WebdatasetPairs)
    most_rows = most_shards = 0
    for number in np.random.default_rng(0).integers(0, 17, 300).tolist():
        pair = pairs.read(number)
        assert (pair.image, pair.captions) == (plain_png(number), (f"thing {number}",))
        most_rows = max(most_rows, sum(len(rows.keys) for rows in source.opened.values()))
        most_shards = max(most_shards, len(source.opened))
    assert most_rows == 6  # 5 or 6 of shards with 1, 3 and 4 samples
    assert most_shards == 3  # 1 + 1 + 3 or 4
    monkeypatch.setattr("clipkd.data.shards.MOST_ROWS_KEPT", 2)
    for number in range(17):
        pairs.read(number)
        assert len(source.opened) <= 2  # a shard larger than the bound alone


def replaced_by(path: Path, numbers: range) -> None:
    """Another shard put in the place of this one."""
    shard(path.with_name("new"), numbers)
    os.replace(path.with_name("new"), path)


@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 5 * 1024),
        lambda path: os.truncate(path, 0),
        lambda path: path.write_bytes(b"no tar " * 4096),
        lambda path: replaced_by(path, range(4)),
        lambda path: replaced_by(path, range(10, 16)),
        lambda path: replaced_by(path, range(15, 20)),
    ],
    ids=["vanished", "shrunk", "emptied", "overwritten", "fewer samples", "more samples", "other samples"],
)
def test_a_shard_that_changes_after_the_run_began_gives_bad_samples_and_the_others_stay(
    tmp_path: Path, change: Callable[[Path], Any], read_before: bool
) -> None:
    shard(tmp_path / "a.tar", range(5))
    shard(tmp_path / "b.tar", range(5, 8))
    source = webdataset(tmp_path)
    if not read_before:
        source.sources[0].opened.clear()  # type: ignore[attr-defined]  # by the look at the first samples
    change(tmp_path / "a.tar")
    for number in range(2, 5):  # the first two would still stand in a shard cut after 5 KB
        with pytest.raises(BadSample, match=r"a\.tar.*: the shard cannot be read any more") as caught:
            source.read(number)
        assert caught.value.skip.cause == "unreadable shard"
    for number in range(5, 8):
        assert source.read(number).captions == (f"thing {number}",)


def test_more_damaged_shards_than_may_be_skipped_are_refused_and_named(tmp_path: Path) -> None:
    for number in range(10):
        shard(tmp_path / f"{number}.tar", range(number, number + 1))
    (tmp_path / "3.tar").write_bytes(b"")
    with pytest.raises(ValueError, match=r"3\.tar is not a whole .*; 1 of 10 shards are damaged"):
        open_pairs(DataConfig(path=str(tmp_path), max_skipped=0.09))


@pytest.mark.parametrize("num_damaged", [1, 5, 9])
def test_a_share_of_damaged_shards_up_to_max_skipped_is_left_out_and_told(tmp_path: Path, num_damaged: int) -> None:
    for number in range(10):
        path = shard(tmp_path / f"{number}.tar", range(number, number + 1))
        if number >= 10 - num_damaged:
            path.write_bytes(b"")
    pairs = open_pairs(DataConfig(path=str(tmp_path), max_skipped=num_damaged / 10))
    assert isinstance(pairs, PairSet)
    assert_things(pairs)
    assert len(pairs) == 10 - num_damaged
    assert pairs.unusable().counts == {"damaged shard": num_damaged}


def test_too_many_left_out_samples_are_refused_with_one_of_them_named(tmp_path: Path) -> None:
    # A hundredth of at least 1,000 samples.
    lonely = [(f"x{number}.png", plain_png(number)) for number in range(11)]
    members = [("0.png", plain_png(0)), ("0.txt", b"thing 0"), *lonely]
    assert len(webdataset(write_tar(tmp_path / "a.tar", members[:-1]))) == 1
    words = r"11 of 12 samples cannot be used \(11 × no caption\), such as .*b\.tar/x0: has no \.txt; raise data\.max_skipped"
    with pytest.raises(ValueError, match=words):
        webdataset(write_tar(tmp_path / "b.tar", members))


def test_the_first_sample_of_a_key_counts_and_later_ones_are_left_out(tmp_path: Path) -> None:
    first = [("a.png", plain_png(0)), ("a.txt", b"thing 0"), ("b.png", plain_png(1)), ("b.txt", b"thing 1")]
    again = [("a.png", plain_png(8)), ("a.txt", b"other"), ("a.txt", b"and another"), ("b.png", plain_png(9))]
    source = webdataset(write_tar(tmp_path / "a.tar", [*first, *again]))
    assert len(source) == 2
    assert_things(source)
    assert source.left_out.counts == {"duplicate key": 3}
    assert source.left_out.examples[0].key == f"{tmp_path / 'a.tar'}/a"


def test_a_caption_that_no_tokenizer_can_take_is_a_bad_sample_or_mended(tmp_path: Path) -> None:
    # Half an emoji, as in captions that were cut at a number of UTF-16 units: Python's json takes it, UTF-8 does not.
    members = [("0.png", plain_png(0)), ("0.json", b'{"caption": "a"}')]
    members += [("1.png", plain_png(1)), ("1.json", b'{"caption": "smile \\ud83d"}')]
    source = webdataset(write_tar(tmp_path / "a.tar", members), caption_key="caption")
    with contextlib.suppress(BadSample):
        (caption,) = source.read(1).captions
        assert caption.encode("utf-8").startswith(b"smile")


@pytest.mark.parametrize("depth", [10, 300, 600, 900, 980, 990, 1000, 3000, 100_000])
def test_a_deeply_nested_json_is_a_bad_sample(tmp_path: Path, depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    good = b'{"caption": "a", "class": 1}'
    members = [("0.png", plain_png(0)), ("0.json", good)]
    members += [("1.png", plain_png(1)), ("1.json", b'{"class": 1, "caption": ' + nested + b"}")]
    members += [("2.png", plain_png(2)), ("2.json", b'{"caption": "a", "class": ' + nested + b"}")]
    source = webdataset(write_tar(tmp_path / "a.tar", members), caption_key="caption", label_key="class")
    for number in (1, 2):
        with pytest.raises(BadSample, match=rf"a\.tar/{number}: "):
            source.read(number)


def test_a_caption_of_megabytes_is_cut_before_a_tokenizer_chokes_on_it(tmp_path: Path) -> None:
    caption = "word " * 1_000_000
    path = write_tar(tmp_path / "a.tar", [("0.png", plain_png(0)), ("0.txt", caption.encode())])
    assert webdataset(path).read(0).captions == (caption[:MOST_CHARACTERS].strip(),)
