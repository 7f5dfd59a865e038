"""The index of a shard against tarfile's own reading of it."""

import io
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipkd.data.tar_index import TarIndex, cache_paths, index_tar, index_whole_tar, is_indexed, scan_tar
from tests.data.samples import write_tar


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an index goes that cannot lie beside its shard."""
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


MEMBERS = [
    ("000.jpg", b"a" * 700),
    ("000.txt", b"one"),
    ("sub/001.PNG", b"b" * 513),
    ("sub/001.json", b"{}"),
    ("sub/001.seg.png", b"mask"),
    ("002.txt", b""),
    ("003.jpg", b"c" * 512),
    ("ünï/" + "long" * 40 + ".jpg", b"d" * 1025),
    ("ünï/" + "long" * 40 + ".txt", b"far away"),
]


def read_back(path: Path, index: TarIndex) -> list[tuple[str, bytes]]:
    """Name and content of every member, from the index and the bytes of the file alone."""
    data = path.read_bytes()
    return [
        (
            f"{index.keys[sample].decode()}.{extension.decode()}",
            data[offset : offset + size],
        )
        for sample, extension, offset, size in zip(index.sample, index.extension, index.offset, index.size, strict=True)
    ]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
def test_every_member_is_found_where_tarfile_finds_it(tmp_path: Path, format: int) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=format) as tar:
        folder = tarfile.TarInfo("sub")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "000.jpg"
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
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"12345"), ("a.txt", b"x"), ("b.txt", b"yz"), ("c.PNG", b"6")])
    index = index_tar(path)
    assert index.keys.tolist() == [b"a", b"b", b"c"]
    # A header of 512 bytes stands before each member, whose content is padded to 512.
    offset, size = index.select(("jpg", "png"))
    assert (offset[0], offset[2]) == (512, 3 * 1024 + 512)
    assert size.tolist() == [5, -1, 1]
    offset, size = index.select(("txt",))
    assert offset[:2].tolist() == [1024 + 512, 2048 + 512]
    assert size.tolist() == [1, 2, -1]


def test_an_extension_is_all_behind_the_first_dot(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", [("a.jpg", b"12"), ("a.mask.jpg", b"345")])
    index = index_tar(path)
    assert index.select(("jpg",))[1].tolist() == [2]
    assert index.select(("mask.jpg",))[1].tolist() == [3]


def cache_of(path: Path) -> Path:
    return path.with_name(path.name + ".clipkd-index.npz")


def test_the_index_is_cached_and_the_cache_is_used(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    first = index_tar(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.clipkd-index.npz"]
    with np.load(cache_of(path)) as stored:
        marked = dict(stored)
    marked["size"] = marked["size"] + 1
    np.savez(cache_of(path), **marked)
    assert np.array_equal(index_tar(path).size, first.size + 1)


@pytest.mark.parametrize("change", ["longer", "newer"])
def test_a_changed_shard_is_indexed_anew(tmp_path: Path, change: str) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    index_tar(path)
    before = path.stat()
    if change == "longer":
        write_tar(path, MEMBERS * 2)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    else:
        write_tar(path, [(name, content[::-1]) for name, content in MEMBERS[1:]] + MEMBERS[:1])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        assert path.stat().st_size == before.st_size
    assert read_back(path, index_tar(path)) == read_back(path, scan_tar(path))
    assert read_back(path, index_tar(path)) == read_back(path, scan_tar(path))


def npy(**arrays: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def lone_array() -> bytes:
    """np.load gives what is not even a mapping."""
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [b"", b"not a zip", "half", npy(), npy(stamp=np.arange(3)), lone_array()])
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: bytes | str) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    expected = index_tar(path)
    whole = cache_of(path).read_bytes()
    cache_of(path).write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    assert np.array_equal(index_tar(path).offset, expected.offset)
    assert np.array_equal(np.load(cache_of(path))["offset"], expected.offset)


def test_no_random_damage_of_a_cache_changes_what_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    expected = read_back(path, index_tar(path))
    whole = cache_of(path).read_bytes()
    rng = np.random.default_rng(0)
    wrong: list[str] = []
    for trial in range(300):
        damaged = np.frombuffer(whole, np.uint8).copy()
        places = rng.integers(0, len(damaged), rng.integers(1, 8))
        damaged[places] = rng.integers(0, 256, len(places))
        cache_of(path).write_bytes(damaged[: rng.integers(1, len(damaged)) if trial % 5 == 0 else None].tobytes())
        try:
            assert read_back(path, index_tar(path)) == expected
        except Exception as error:
            wrong.append(f"trial {trial}, bytes {sorted(places.tolist())}: {error!r}")
    assert not wrong, "\n".join(wrong)


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["stamp", "keys", "damage"])
def test_a_pickle_in_a_cache_is_not_executed_but_replaced(tmp_path: Path, name: str) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    expected = index_tar(path)
    with np.load(cache_of(path)) as stored:
        arrays = dict(stored)
    arrays[name] = np.array([Payload(tmp_path / "executed")], object)
    np.savez(cache_of(path), **arrays)
    np.load(cache_of(path), allow_pickle=True)[name]  # so that this test would see it
    (tmp_path / "executed").unlink()
    assert np.array_equal(index_tar(path).keys, expected.keys)
    assert not (tmp_path / "executed").exists()
    with np.load(cache_of(path)) as stored:
        assert np.array_equal(stored["keys"], expected.keys)


def test_a_shard_beside_which_nothing_can_be_written_has_its_index_in_the_users_cache(
    tmp_path: Path, user_cache: Path
) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    cache_of(path).mkdir()  # in the way, as a read-only folder would be
    assert not is_indexed(path)
    first = index_tar(path)
    assert len(first.keys) == 5
    assert is_indexed(path)
    (stored,) = (user_cache / "clipkd" / "shards").iterdir()
    assert cache_paths(path) == (cache_of(path), stored)
    with np.load(stored) as index:
        marked = dict(index)
    np.savez(stored, **(marked | {"size": marked["size"] + 1}))
    assert np.array_equal(index_tar(path).size, first.size + 1)


def test_a_folder_and_a_user_cache_that_take_nothing_are_indexed_all_the_same(tmp_path: Path, user_cache: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    cache_of(path).mkdir()
    (user_cache / "clipkd").write_text("a file where a folder should be")
    assert len(index_tar(path).keys) == 5
    assert not is_indexed(path)


def test_an_index_that_cannot_be_put_in_its_place_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    cache_of(path).mkdir()
    index_tar(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["s.tar", "s.tar.clipkd-index.npz"]


def shard() -> bytes:
    """Three samples of two members, each a header and 1,024 bytes of padded content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(3):
            for extension in ("jpg", "txt"):
                info = tarfile.TarInfo(f"{number}.{extension}")
                info.size = 700
                tar.addfile(info, io.BytesIO(bytes([number]) * 700))
    return buffer.getvalue()


def assert_refused_as_a_whole(path: Path, words: str) -> None:
    """An evaluation set takes no part of a shard."""
    with pytest.raises(ValueError, match=rf"{path.name} .*{words}"):
        index_whole_tar(path)


@pytest.mark.parametrize(
    ("cut", "num_members"),
    [
        (1, 0),
        (511, 0),
        (513, 0),
        (1000, 0),
        (1212, 1),
        (2049, 1),
        (2148, 1),
        (2747, 1),
        (2748, 2),
        (8616, 5),
        (8900, 6),
    ],
)
def test_a_shard_cut_inside_a_member_says_so_and_keeps_the_members_before(
    tmp_path: Path, cut: int, num_members: int
) -> None:
    # Members begin every 1,536 bytes: 512 of a header, 700 of content, 324 of padding.
    path = tmp_path / "cut.tar"
    path.write_bytes(shard()[:cut])
    expected = [(f"{n // 2}.{('jpg', 'txt')[n % 2]}", bytes([n // 2]) * 700) for n in range(num_members)]
    for _ in range(2):  # scanned, then from the cache
        index = index_tar(path)
        assert re.fullmatch(rf"is not a whole .*after {num_members} files\)", str(index.damage))
        assert read_back(path, index) == expected
        assert len(index.keys) == -(-num_members // 2)
    assert_refused_as_a_whole(path, "is not a whole.*copy or write it again")


@pytest.mark.parametrize("cut", [1536, 1536 + 1, 2 * 1536, 5 * 1536, 5 * 1536 + 511, 6 * 1536])
def test_a_shard_cut_at_or_in_a_header_says_so_and_keeps_the_members_before(tmp_path: Path, cut: int) -> None:
    # A tar ends with blocks of zeros: without them the rest of the samples would be missing in silence.
    path = tmp_path / "cut.tar"
    path.write_bytes(shard()[:cut])
    index = index_tar(path)
    assert f"after {cut // 1536} files" in str(index.damage)
    assert len(read_back(path, index)) == cut // 1536
    assert_refused_as_a_whole(path, "is not a whole")


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(shard())
    data[3 * 1536 : 3 * 1536 + 512] = b"x" * 512
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    index = index_tar(path)
    assert re.search("no end of archive at byte 4608.* after 3 files", str(index.damage))
    assert index.keys.tolist() == [b"0", b"1"]
    assert_refused_as_a_whole(path, "is not a whole")


@pytest.mark.parametrize("cause", ["a hole", "two tars"])
def test_what_lies_behind_zeros_in_the_middle_is_not_lost_in_silence(tmp_path: Path, cause: str) -> None:
    # A hole that a broken copy left, or a tar appended to another with `cat`: told, or read on.
    data = bytearray(shard())
    if cause == "a hole":
        data[3 * 1536 : 4 * 1536] = bytes(1536)
        expected = [b"0", b"1", b"2"]
    else:
        data += write_tar(tmp_path / "other.tar", [("7.jpg", b"7")]).read_bytes()
        expected = [b"0", b"1", b"2", b"7"]
    path = tmp_path / "zeros.tar"
    path.write_bytes(data)
    index = index_tar(path)
    assert str(index.damage) or index.keys.tolist() == expected


def test_a_sparse_member_is_not_read_beyond_its_content(tmp_path: Path) -> None:
    # Its size counts the holes, which the tar does not hold: the bytes behind belong to the next member.
    path = tmp_path / "sparse.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for number in range(2):
            info = tarfile.TarInfo(f"{number}.txt")
            info.size = 5
            info.pax_headers = {"GNU.sparse.size": "3000"} if number == 0 else {}
            tar.addfile(info, io.BytesIO(b"short"))
    assert [content for _, content in read_back(path, index_tar(path)) if content != b"short"] == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is not a whole uncompressed tar"),
        (b"no tar at all " * 100, "is not a whole uncompressed tar"),
        (b"\x1f\x8b" + b"\0" * 1022, "is not a whole uncompressed tar"),
        (b"\0" * 10240, "holds no samples"),
    ],
    ids=["empty file", "text", "compressed", "empty tar"],
)
def test_what_holds_no_samples_says_so(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.tar"
    path.write_bytes(content)
    index = index_tar(path)
    assert str(index.damage).startswith(words)
    assert (len(index.keys), len(index.size), len(index.select(("jpg",))[0])) == (0, 0, 0)
    assert_refused_as_a_whole(path, words)


def test_a_key_that_comes_again_is_told_and_its_first_sample_kept(tmp_path: Path) -> None:
    first = [("a.jpg", b"1"), ("a.txt", b"2"), ("b.jpg", b"3")]
    path = write_tar(tmp_path / "s.tar", [*first, ("a.jpg", b"4"), ("c.jpg", b"5"), ("c.jpg", b"6"), ("c.jpg", b"7")])
    for _ in range(2):  # scanned, then from the cache
        index = index_tar(path)
        assert read_back(path, index) == [*first, ("c.jpg", b"5")]
        assert index.duplicates.tolist() == [b"a", b"c", b"c"]
        assert str(index.damage) == ""
    assert_refused_as_a_whole(path, "holds 'a' more than once")


def test_a_key_that_is_no_utf_8_and_comes_again_is_refused_by_name(tmp_path: Path) -> None:
    name = b"caf\xe9.jpg".decode("utf-8", "surrogateescape")
    path = write_tar(tmp_path / "s.tar", [(name, b"1"), (name, b"2")])
    assert index_tar(path).keys.tolist() == [b"caf\xe9"]
    assert_refused_as_a_whole(path, "holds 'caf.* more than once")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        index_tar(tmp_path / "none.tar")
