"""The index of a shard against tarfile's own reading of it, its cache, and damage by hand."""

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipkd.data.tar_index import TarIndex, cache_paths, index_tar, index_whole_tar, scan_tar
from tests.data.samples import write_tar

MEMBERS = [
    *(("000.jpg", b"a" * 700), ("000.txt", b"one")),
    *(("sub/001.PNG", b"b" * 513), ("sub/001.json", b"{}"), ("sub/001.seg.png", b"mask")),
    *(("002.txt", b""), ("003.jpg", b"c" * 512)),
    *(("ünï/" + "long" * 40 + ".jpg", b"d" * 1025), ("ünï/" + "long" * 40 + ".txt", b"far away")),
]


def read_back(path: Path, index: TarIndex) -> list[tuple[str, bytes]]:
    """Name and content of every member, from the index and the bytes of the file alone."""
    data = path.read_bytes()
    return [
        (f"{index.keys[sample].decode()}.{extension.decode()}", data[offset : offset + size])
        for sample, extension, offset, size in zip(index.sample, index.extension, index.offset, index.size, strict=True)
    ]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_every_member_is_found_where_tarfile_finds_it(tmp_path: Path, format: int) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=format) as tar:
        folder, link = tarfile.TarInfo("sub"), tarfile.TarInfo("link.jpg")
        folder.type, link.type, link.linkname = tarfile.DIRTYPE, tarfile.SYMTYPE, "000.jpg"
        tar.addfile(folder)
        tar.addfile(link)
        for name, content in MEMBERS:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(path) as tar:
        expected = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers() if m.isreg()]  # type: ignore[union-attr]
    found = read_back(path, index_tar(path))
    assert found == [(name.replace(".PNG", ".png"), content) for name, content in expected]
    assert len(found) == len(MEMBERS)


def test_select_gives_one_span_per_sample_by_hand(tmp_path: Path) -> None:
    members = [("a.jpg", b"12345"), ("a.txt", b"x"), ("b.txt", b"yz"), ("c.PNG", b"6"), ("c.mask.jpg", b"789")]
    index = index_tar(write_tar(tmp_path / "s.tar", members))
    assert index.keys.tolist() == [b"a", b"b", b"c"]
    # A header of 512 bytes stands before each member, whose content is padded to 512.
    offset, size = index.select(("jpg", "png"))
    assert (offset[0], offset[2]) == (512, 3 * 1024 + 512)
    assert size.tolist() == [5, -1, 1]
    offset, size = index.select(("txt",))
    assert offset[:2].tolist() == [1024 + 512, 2048 + 512]
    assert size.tolist() == [1, 2, -1]
    assert index.select(("mask.jpg",))[1].tolist() == [-1, -1, 3]  # an extension is all behind the first dot


def cache_of(path: Path) -> Path:
    return path.with_name(path.name + ".clipkd-index.npz")


def mark(cache: Path) -> None:
    """Change a stored index so that its use shows."""
    with np.load(cache) as stored:
        arrays = dict(stored)
    np.savez(cache, **(arrays | {"size": arrays["size"] + 1}))


def test_the_index_is_cached_and_the_cache_is_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    first = index_tar(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.clipkd-index.npz"]
    mark(cache_of(path))
    assert np.array_equal(index_tar(path).size, first.size + 1)


@pytest.mark.parametrize("change", ["longer", "newer"])
def test_a_changed_shard_is_indexed_again(tmp_path: Path, change: str) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    index_tar(path)
    before = path.stat()
    write_tar(path, MEMBERS * 2 if change == "longer" else MEMBERS[1:] + MEMBERS[:1])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + (change == "newer")))
    for _ in range(2):  # scanned, then from the cache
        assert read_back(path, index_tar(path)) == read_back(path, scan_tar(path))


def saved(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [b"", saved(), saved(stamp=np.arange(3)), saved(stamp=np.array([print], object))])
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: bytes) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    expected = index_tar(path)
    cache_of(path).write_bytes(damage)
    assert np.array_equal(index_tar(path).offset, expected.offset)
    assert np.array_equal(np.load(cache_of(path))["offset"], expected.offset)


@pytest.mark.parametrize("writable", [True, False], ids=["user cache", "nowhere"])
def test_the_index_of_a_read_only_folder_is_in_the_users_cache(
    tmp_path: Path, user_cache: Path, writable: bool
) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    cache_of(path).mkdir()  # in the way, as a read-only folder would be
    if not writable:
        (user_cache / "clipkd").write_text("a file where a folder should be")
    first = index_tar(path)
    assert len(first.keys) == 5
    if writable:
        (stored,) = (user_cache / "clipkd" / "shards").iterdir()
        assert cache_paths(path) == (cache_of(path), stored)
        mark(stored)
        assert np.array_equal(index_tar(path).size, first.size + 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.clipkd-index.npz"]


def assert_refused_as_a_whole(path: Path, words: str) -> None:
    """An evaluation set takes no part of a shard."""
    with pytest.raises(ValueError, match=rf"{path.name} .*{words}"):
        index_whole_tar(path)


THREE = [(f"{number}.{extension}", bytes([number]) * 700) for number in range(3) for extension in ("jpg", "txt")]
"""Members that begin every 1,536 bytes: 512 of a header, 700 of content, 324 of padding."""


@pytest.mark.parametrize(
    ("cut", "num_members"),
    [(1, 0), (513, 0), (1212, 1), (1536, 1), (2049, 1), (2748, 2), (5 * 1536 + 511, 5), (8900, 6), (6 * 1536, 6)],
)
def test_a_cut_shard_is_reported_and_keeps_the_members_before_the_cut(
    tmp_path: Path, cut: int, num_members: int
) -> None:
    # A tar ends with blocks of zeros: a cut between members would otherwise lose the rest in silence.
    path = write_tar(tmp_path / "cut.tar", THREE)
    path.write_bytes(path.read_bytes()[:cut])
    for _ in range(2):  # scanned, then from the cache
        index = index_tar(path)
        assert re.fullmatch(rf"is not a complete .*after {num_members} files\)", str(index.damage))
        assert read_back(path, index) == THREE[:num_members]
    assert_refused_as_a_whole(path, "is not a complete.*copy or write it again")


@pytest.mark.parametrize("cause", ["a hole", "two tars"])
def test_data_behind_zeros_is_reported(tmp_path: Path, cause: str) -> None:
    # A hole that a broken copy left, or a tar appended to another with `cat`.
    path = write_tar(tmp_path / "zeros.tar", THREE)
    data = bytearray(path.read_bytes())
    if cause == "a hole":
        data[3 * 1536 : 4 * 1536] = bytes(1536)
    else:
        data += write_tar(tmp_path / "other.tar", [("7.jpg", b"7")]).read_bytes()
    path.write_bytes(data)
    assert "data behind the end of the archive" in str(index_tar(path).damage)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        *(
            (b"", "is not a complete"),
            (b"no tar at all " * 100, "is not a complete"),
            (b"\0" * 10240, "holds no samples"),
        ),
        (b"\x1f\x8b" + b"\0" * 1022, "is not a complete uncompressed tar"),
    ],
    ids=["empty file", "text", "empty tar", "compressed"],
)
def test_a_file_without_samples_is_reported(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.tar"
    path.write_bytes(content)
    index = index_tar(path)
    assert str(index.damage).startswith(words)
    assert (len(index.keys), len(index.size), len(index.select(("jpg",))[0])) == (0, 0, 0)
    assert_refused_as_a_whole(path, words)


def test_of_a_repeated_key_the_first_sample_is_kept(tmp_path: Path) -> None:
    first, odd = [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3")], "caf\udce9.jpg"
    again = [("a.jpg", b"4"), ("c.jpg", b"5"), ("c.jpg", b"6"), ("c.jpg", b"7")]
    path = write_tar(tmp_path / "s.tar", [*first, *again])
    for _ in range(2):  # scanned, then from the cache
        index = index_tar(path)
        assert read_back(path, index) == [*first, ("c.jpg", b"5")]
        assert index.duplicates.tolist() == [b"a", b"c", b"c"]
        assert str(index.damage) == ""
    assert_refused_as_a_whole(path, "holds 'a' more than once")
    assert_refused_as_a_whole(write_tar(tmp_path / "t.tar", [(odd, b"1"), (odd, b"2")]), "holds 'caf.* more than once")
