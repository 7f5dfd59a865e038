"""Image-text pairs from local webdataset shards and from mixtures of all formats."""

import itertools
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data import stream
from clipkd.data.open import open_pairs
from clipkd.data.shards import WebdatasetPairs
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import Pair, PairSet
from tests.data.samples import (
    assert_things,
    labels,
    pair_members,
    picture_rows,
    plain_png,
    write_images,
    write_table,
    write_tar,
)
from tests.data.samples import open_set as webdataset


def shard(path: Path, numbers: range, *, json_captions: bool = False) -> Path:
    members = pair_members(numbers)
    if json_captions:
        for place, number in enumerate(numbers):
            record = {"caption": f"thing {number}", "all": [f"thing {number}", "any"], "n": 3}
            members[2 * place + 1] = (f"{number:04}.json", json.dumps(record).encode())
    return write_tar(path, members)


def test_folders_tars_and_patterns_are_taken_in_the_order_of_the_list(tmp_path: Path) -> None:
    shard(tmp_path / "second" / "a.tar", range(4, 6))
    shard(tmp_path / "first" / "b.tar", range(2, 4))
    shard(tmp_path / "first" / "a.tar", range(2))
    for number in (6, 7):
        shard(tmp_path / f"{number}.tar", range(number, number + 1))
    source = webdataset(tmp_path / "first", tmp_path / "second" / "a.tar", tmp_path / "{6..7}.tar")
    assert len(source) == 8
    assert_things(source)
    assert source.read(3).key == f"{tmp_path / 'first' / 'b.tar'}/0003"
    assert source.read(0).captions == ("thing 0",)  # in any order, repeatedly


def test_captions_come_from_a_key_of_the_json(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar", range(3), json_captions=True)
    assert_things(webdataset(path, caption_key="caption"))
    assert_things(webdataset(path, caption_key="all"), lambda number: (f"thing {number}", "any"))
    assert labels(webdataset(path, caption_key="caption", label_key="n")) == [3, 3, 3]
    with pytest.raises(ValueError, match=r"a\.tar: none of 3 samples .*\.txt; see data\.caption_key"):
        webdataset(path)
    words = r"a\.tar/0000: .*no key 'text', only \['all', 'caption', 'n'\]; see data\."
    with pytest.raises(ValueError, match=words + "caption_key"):
        webdataset(path, caption_key="text")
    with pytest.raises(ValueError, match=words + "label_key"):
        webdataset(path, caption_key="caption", label_key="text")
    with pytest.raises(ValueError, match=r"a\.tar: no sample has a \.cls for its label; see data\.label_key"):
        webdataset(path, caption_key="caption", label_key="cls")


def test_images_alone_come_from_tars_tables_and_plain_folders(tmp_path: Path) -> None:
    folder = tmp_path / "folder" / "inner"
    names = write_images(folder, range(3))
    (tmp_path / "table.csv").write_text("image\n" + "".join(f"folder/inner/{name}\n" for name in names))
    places = {
        "webdataset": write_tar(tmp_path / "a.tar", [(name, (folder / name).read_bytes()) for name in names]),
        "csv": tmp_path / "table.csv",
        "huggingface": tmp_path / "folder",
    }
    for format, path in places.items():
        source = webdataset(path, format=format, caption_key=None)
        assert [source.read(number).image for number in range(len(source))] == [*map(plain_png, range(3))]
        assert source.read(0, image=False).captions == ("",)
        assert source.identity()[0]["caption_key"] is None
    before = source.identity()
    write_images(folder, [3])
    assert webdataset(tmp_path / "folder", format="huggingface", caption_key=None).identity() != before
    with pytest.raises(ValueError, match="some sources have a caption_key and others null"):
        DataConfig(path="a", caption_key=None, mix=(SourceConfig(path="b"),))


def test_incomplete_and_repeated_samples_are_left_out_and_counted(tmp_path: Path) -> None:
    members = [
        *(("0.png", plain_png(0)), ("0.txt", b"thing 0")),
        *(("x.txt", b"no image"), ("y.png", plain_png(9)), ("z.json", b"{}")),
        *(("1.txt", b" thing 1\n"), ("1.JPG", plain_png(1))),
        *(("0.png", plain_png(8)), ("0.txt", b"other"), ("0.txt", b"and another")),
    ]
    source = webdataset(write_tar(tmp_path / "a.tar", members))
    assert source.left_out.counts == {"no image": 2, "no caption": 1, "duplicate key": 2}
    assert {skip.key for skip in source.left_out.examples} == {f"{tmp_path / 'a.tar'}/{key}" for key in "xyz0"}
    assert source.describe() == "2 pairs; left out: 2 × no image, 2 × duplicate key, 1 × no caption"
    assert_things(source)


def both(path: Path, **options: Any) -> tuple[list[tuple[str, bytes, tuple[str, ...]]], dict[str, int], dict[str, int]]:
    """Key, image and captions of every pair of a shard, and what was left out by the index and by the stream."""
    source = webdataset(path, **options)
    found = list(stream.read_shard(f"file://{path}", SourceConfig(path=str(path))))
    pairs = [pair for pair in found if isinstance(pair, Pair)]
    streamed = [(pair.key.removeprefix(f"file://{path}/"), pair.image, pair.captions) for pair in pairs]
    indexed = [source.read(number) for number in range(len(source))]
    assert [(pair.key.removeprefix(f"{path}/"), pair.image, pair.captions) for pair in indexed] == streamed
    return streamed, source.left_out.counts, Skips(skip for skip in found if isinstance(skip, Skip)).counts


def test_a_name_with_several_dots_ends_at_its_last_one_where_the_first_one_would_lose_its_image(tmp_path: Path) -> None:
    dotted = pair_members(range(60), "www.host.com_{}.1")
    plain = [*pair_members([60], "b"), ("b.mask.png", b"mask"), ("c.json", b"{}"), *pair_members([61], "c")]
    pairs, *left_out = both(write_tar(tmp_path / "a.tar", [*dotted, *plain]))
    assert [key for key, *_ in pairs] == [*(f"www.host.com_{number}.1" for number in range(60)), "b", "c"]
    assert [pair[1:] for pair in pairs] == [(plain_png(n), (f"thing {n}",)) for n in range(62)]
    assert left_out == [{}, {}]


def test_a_mask_beside_an_image_is_no_pair_where_images_need_no_caption(tmp_path: Path) -> None:
    members = [(f"{n}.{end}", plain_png(n)) for n in range(20) for end in ("png", "mask.png")]
    source = webdataset(write_tar(tmp_path / "a.tar", members), caption_key=None)
    assert (len(source), source.left_out.counts) == (20, {})


def test_a_pair_that_stands_in_another_pairs_sample_is_counted_by_name(tmp_path: Path) -> None:
    members = [member for n in range(20) for name in ("a{}", "a{}.v2") for member in pair_members([n], name)]
    path = write_tar(tmp_path / "a.tar", members)
    pairs, *left_out = both(path, max_skipped=1.0)
    assert [key for key, *_ in pairs] == [f"a{number}" for number in range(20)]
    assert left_out == [{"several dots": 20}] * 2
    with pytest.raises(ValueError, match=r"20 of 40 .*20 × several dots.*a\.tar/a0\.v2: it belongs to .*; rename it"):
        webdataset(path)


def test_hidden_files_are_counted_and_are_neither_samples_nor_shards(tmp_path: Path) -> None:
    names = ["d/._{}", "__MACOSX/d/{}", "d/@eaDir/{}", ".cache/{}", "./d/{}"]
    members = [member for n in range(30) for name in names for member in pair_members([n], name)]
    path = write_tar(tmp_path / "a.tar", [("d/.DS_Store", b"x"), *members])
    write_tar(tmp_path / "._a.tar", [("a.png", b"no shard")])
    pairs, *left_out = both(path)
    assert [pair[1:] for pair in pairs] == [(plain_png(n), (f"thing {n}",)) for n in range(30)]
    assert left_out == [{"hidden file": 30 * 4 * 2 + 1}] * 2
    assert webdataset(tmp_path).describe() == "30 pairs; left out: 241 × hidden file"


def test_a_hard_link_is_the_file_that_it_names(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"thing {number}")
    (tmp_path / "0.png").write_bytes(plain_png(0))
    os.link(tmp_path / "0.png", tmp_path / "1.png")
    with tarfile.open(path, "w") as tar:
        for name in ("0.png", "0.txt", "1.png", "1.txt"):
            tar.add(tmp_path / name, name)
    with tarfile.open(path) as tar:
        assert tar.getmember("1.png").islnk()
    source = webdataset(path)
    assert [source.read(number).image for number in range(len(source))] == [plain_png(0)] * 2
    found = list(stream.read_shard(f"file://{path}", SourceConfig(path=str(path))))
    assert [getattr(each, "cause", "pair") for each in found] == ["pair", "no image"]  # its bytes have passed


def test_missing_and_repeated_paths_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    path = shard(folder / "0.tar", range(1))
    for paths, words in [
        (f"{folder}/{{0..2}}.tar", r"1\.tar \(2 of 3 missing\)"),
        (f"{folder}/*.tar", r"missing\).*write a folder, a brace pattern"),
        (str(tmp_path), r"no \.tar in the folder"),
    ]:
        with pytest.raises(FileNotFoundError, match=words):
            webdataset(paths)
    for again in (path, folder, f"{folder}/{{0..0}}.tar", f"{folder}/../folder/0.tar"):
        with pytest.raises(ValueError, match=r"names .*0\.tar more than once; weigh a source instead \(data\.weight\)"):
            webdataset(path, again)
    with pytest.raises(ValueError, match=r"data\.path is empty"):
        webdataset("", "")
    with pytest.raises(ValueError, match=r"data\.mix\[1\]\.path is empty"):
        webdataset("a", mix=(SourceConfig(path="b"), SourceConfig()))


def test_remote_and_local_data_in_one_run_are_refused(tmp_path: Path) -> None:
    path, url = str(shard(tmp_path / "a.tar", range(3))), "https://host/a.tar"
    table = SourceConfig(path="pairs.csv", format="csv", caption_key="text")
    for options in (
        {"path": (path, url)},
        {"path": path, "mix": (SourceConfig(path=url),)},
        {"path": url, "mix": (table,)},
    ):
        with pytest.raises(ValueError, match=r"both remote shards \(URLs or pipes\) and local data"):
            open_pairs(DataConfig(**options))


WRONG_CAPTIONS = [
    *(("txt", b" \n\t", "every caption is empty"), ("txt", b"\xff\xfe\xfa", "cannot be read")),
    *(("caption", b'{"caption": ["", " "]}', "every caption is empty"), ("caption", b'{"caption": []}', "is empty")),
    *(
        ("caption", b'{"caption": 3}', "or a list of captions, got int"),
        ("caption", b'{"caption": null}', "expected a"),
    ),
    *(("caption", b'{"caption": ["a", null]}', "or a list of captions"), ("caption", b'{"caption"', "cannot be read")),
    *(
        ("caption", b'{"text": "a"}', r"no key 'caption', only \['text'\]; see data\.caption_key"),
        ("caption", b"null", ""),
    ),
    ("caption", b'{"caption": "smile \\ud83d"}', "cannot be read"),  # half an emoji, which UTF-8 cannot hold
]


@pytest.mark.parametrize(("caption_key", "content", "words"), WRONG_CAPTIONS)
def test_a_wrong_caption_names_its_sample(tmp_path: Path, caption_key: str, content: bytes, words: str) -> None:
    extension, good = ("txt", b"thing") if caption_key == "txt" else ("json", b'{"caption": ["", " thing "]}')
    members = [
        (f"{n}.{end}", data)
        for n, text in ((1, good), (2, content))
        for end, data in (("png", b"x"), (extension, text))
    ]
    source = webdataset(write_tar(tmp_path / "a.tar", members), caption_key=caption_key)
    assert source.read(0).captions == ("thing",)
    with pytest.raises(BadSample, match=rf"a\.tar/2: .*{words}") as caught:
        source.read(1)
    assert caught.value.skip.key == f"{tmp_path / 'a.tar'}/2"
    assert caught.value.skip.cause in ("empty caption", "unreadable caption", "no caption")


@pytest.mark.parametrize(("num_bad", "refused"), [(7, False), (8, True)])
def test_bad_captions_are_refused_at_once_only_if_none_of_the_first_eight_is_good(
    tmp_path: Path, num_bad: int, refused: bool
) -> None:
    texts = [b" " if number < num_bad else b"thing" for number in range(10)]
    members = [(f"{n}.{end}", data) for n, text in enumerate(texts) for end, data in (("png", b"x"), ("txt", text))]
    path = write_tar(tmp_path / "a.tar", members)
    if refused:
        with pytest.raises(ValueError, match=r"a\.tar/0: every caption is empty"):
            webdataset(path)
    else:
        assert webdataset(path).read(num_bad).captions == ("thing",)


def labelled(path: Path, extension: str, contents: list[bytes | None]) -> Path:
    """Pairs with a third member that may hold the label; None for a pair without it."""
    members = []
    for number, content in enumerate(contents):
        members += pair_members([number])
        members += [] if content is None else [(f"{number:04}.{extension}", content)]
    return write_tar(path, members)


def test_labels_come_from_the_cls_member_or_a_key_of_the_json(tmp_path: Path) -> None:
    path = labelled(tmp_path / "a.tar", "cls", [None, b"7", b" 0\n", None, b"-1", b"999"])
    assert labels(webdataset(path, label_key="cls")) == [-1, 7, 0, -1, -1, 999]
    assert labels(webdataset(path)) == [-1] * 6
    contents = [b'{"class": 4}', b'{"class": null, "other": 5}', None, b'{"class": "12"}', b'{"class": -1}']
    source = webdataset(labelled(tmp_path / "b.tar", "json", contents), label_key="class")
    assert labels(source) == [4, -1, -1, 12, -1]
    assert_things(source)


DEEP = b'{"class": ' + b"[" * 3000 + b"]" * 3000 + b"}"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        *(("cls", label) for label in (b"cat", b"-2", b"1.0", b"", b"\xff")),
        *(("class", label) for label in (b'{"class": true}', b'{"class": [1]}', b'{"class": 1, "class', DEEP)),
    ],
)
def test_a_wrong_label_names_its_sample(tmp_path: Path, key: str, wrong: bytes) -> None:
    extension, good = ("cls", b"7") if key == "cls" else ("json", b'{"class": 7}')
    source = webdataset(labelled(tmp_path / "a.tar", extension, [good, wrong]), label_key=key)
    assert source.read(0).label == 7
    with pytest.raises(BadSample, match=r"a\.tar/0001: its label (is .*; .* see data\.label_key|cannot be read)"):
        source.read(1)


# Mixtures.


def mixture(root: Path) -> PairSet:
    """Things 0…4 and 10…12 in shards, 20…23 in a table and 30…34 in a Hugging Face data set."""
    shard(root / "one" / "a.tar", range(3))
    shard(root / "one" / "b.tar", range(3, 5))
    shard(root / "two" / "a.tar", range(10, 13), json_captions=True)
    write_table(root / "table.csv", range(20, 24))
    rows(range(30, 35)).save_to_disk(root / "saved")
    return open_mixture(root)


def rows(numbers: range) -> Any:
    return picture_rows(numbers, caption=[f"thing {number}" for number in numbers])


def open_mixture(root: Path) -> PairSet:
    return webdataset(
        root / "one",
        mix=(
            SourceConfig(path=str(root / "two" / "a.tar"), caption_key="caption", weight=2.0),
            SourceConfig(format="csv", path=str(root / "table.csv"), caption_key="caption"),
            SourceConfig(format="huggingface", path=str(root / "saved"), caption_key="caption"),
        ),
    )


def test_a_mixture_counts_its_ids_through_every_source_and_reads_the_right_pairs(tmp_path: Path) -> None:
    mixed = mixture(tmp_path)
    assert [source.shard_sizes.tolist() for source in mixed.sources] == [[3, 2], [3], [4], [5]]
    for id, number in enumerate([*range(5), *range(10, 13), *range(20, 24), *range(30, 35)]):
        pair = mixed.read(id)
        assert (pair.image, pair.captions, pair.label) == (plain_png(number), (f"thing {number}",), -1)
        assert mixed.read(id, image=False).captions == pair.captions
    assert mixed.read(16).key == f"{tmp_path}/saved row 4"
    assert mixed.describe() == "17 pairs"


def test_the_identity_of_a_mixture_is_the_same_for_a_copy(tmp_path: Path) -> None:
    before = mixture(tmp_path / "here").identity()
    shutil.copytree(tmp_path / "here", tmp_path / "there", copy_function=shutil.copy)  # without the files' times
    for cache in (tmp_path / "there").rglob("*.clipkd-index.npz"):
        cache.unlink()
    assert open_mixture(tmp_path / "there").identity() == before
    assert json.loads(json.dumps(before)) == before  # a checkpoint keeps it
    assert [(part["pairs"], part["weight"]) for part in before] == [(5, 1.0), (3, 2.0), (4, 1.0), (5, 1.0)]


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (0, lambda root: shard(root / "one" / "b.tar", range(3, 6))),
        (0, lambda root: (root / "one" / "b.tar").rename(root / "one" / "0.tar")),
        (2, lambda root: (root / "table.csv").write_text((root / "table.csv").read_text().replace("thing", "what"))),
        (3, lambda root: rows(range(34, 29, -1)).save_to_disk(root / "saved")),
    ],
    ids=["sample", "order", "caption", "reversed rows"],
)
def test_the_identity_of_a_mixture_changes_with_the_content_of_one_part(
    tmp_path: Path, part: int, change: Callable[[Path], Any]
) -> None:
    before = mixture(tmp_path).identity()
    change(tmp_path)
    after = open_mixture(tmp_path).identity()
    assert [number for number in range(4) if after[number]["fingerprint"] != before[number]["fingerprint"]] == [part]


# Damage.


def test_few_rows_stay_in_memory_and_any_order_reads_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, stop in itertools.pairwise([0, 4, 5, 9, 12, 16, 17]):
        shard(tmp_path / f"{start:02}.tar", range(start, stop))
    monkeypatch.setattr("clipkd.data.shards.MAX_ROWS_KEPT", 6)
    pairs = webdataset(tmp_path)
    (source,) = pairs.sources
    assert isinstance(source, WebdatasetPairs)
    sizes = []
    for number in np.random.default_rng(0).integers(0, 17, 300).tolist():
        assert pairs.read(number).captions == (f"thing {number}",)
        sizes.append([len(rows.keys) for rows in source.opened.values()])
    assert max(map(sum, sizes)) == 6  # 5 or 6 of shards with 1, 3 and 4 samples
    assert max(map(len, sizes)) == 3  # 1 + 1 + 3 or 4


@pytest.mark.parametrize("read_before", [False, True], ids=["unread", "read"])
@pytest.mark.parametrize(
    "change",
    [
        lambda path: path.unlink(),
        lambda path: os.truncate(path, 5 * 1024),
        lambda path: path.write_bytes(b"no tar " * 4096),
        lambda path: os.replace(shard(path.with_name("new"), range(4)), path),
        lambda path: os.replace(shard(path.with_name("new"), range(15, 20)), path),
    ],
    ids=["vanished", "shrunk", "overwritten", "fewer samples", "other samples"],
)
def test_a_shard_that_changes_after_the_run_began_gives_bad_samples_and_the_others_stay(
    tmp_path: Path, change: Callable[[Path], Any], read_before: bool
) -> None:
    shard(tmp_path / "a.tar", range(5))
    shard(tmp_path / "b.tar", range(5, 8))
    source = webdataset(tmp_path)
    if not read_before:
        source.sources[0].opened.clear()  # type: ignore[attr-defined]  # filled by the probe
    change(tmp_path / "a.tar")
    for number in range(2, 5):  # the first two would still stand in a shard cut after 5 KB
        with pytest.raises(BadSample, match=r"a\.tar.*: the shard can no longer be read") as caught:
            source.read(number)
        assert caught.value.skip.cause == "unreadable shard"
    for number in range(5, 8):
        assert source.read(number).captions == (f"thing {number}",)


@pytest.mark.parametrize("num_damaged", [1, 9])
def test_a_share_of_damaged_shards_up_to_max_skipped_is_left_out(tmp_path: Path, num_damaged: int) -> None:
    for number in range(10):
        path = shard(tmp_path / f"{number}.tar", range(number, number + 1))
        if number >= 10 - num_damaged:
            path.write_bytes(b"")
    pairs = webdataset(tmp_path, max_skipped=num_damaged / 10)
    assert len(pairs) == 10 - num_damaged
    assert_things(pairs)
    assert pairs.unusable().counts == {"damaged shard": num_damaged}
    with pytest.raises(ValueError, match=rf"\.tar is not a complete .*; {num_damaged} of 10 shards are damaged"):
        webdataset(tmp_path, max_skipped=num_damaged / 10 - 0.01)


def test_too_many_left_out_samples_are_refused_with_one_of_them_named(tmp_path: Path) -> None:
    lonely = [(f"x{number}.png", plain_png(number)) for number in range(11)]  # 0.01 of at least 1,000 samples are 10
    assert len(webdataset(write_tar(tmp_path / "a.tar", [*pair_members([0]), *lonely[:-1]]))) == 1
    words = r"11 of 12 samples cannot be used \(11 × no caption\), such as .*b\.tar/x0: has no \.txt.*data\.max_skipped"
    with pytest.raises(ValueError, match=words):
        webdataset(write_tar(tmp_path / "b.tar", [*pair_members([0]), *lonely]))
