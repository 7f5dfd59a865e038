"""The index of a shard against tarfile's own reading of it."""

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from samples import write_tar

from clipkd.data.tar_index import TarIndex, index_tar, scan_tar

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


@pytest.mark.parametrize("damage", [b"", b"not a zip", "half"])
def test_a_damaged_cache_is_replaced(tmp_path: Path, damage: bytes | str) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    expected = index_tar(path)
    whole = cache_of(path).read_bytes()
    cache_of(path).write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    assert np.array_equal(index_tar(path).offset, expected.offset)
    assert np.array_equal(np.load(cache_of(path))["offset"], expected.offset)


def test_a_folder_that_takes_no_cache_is_indexed_all_the_same(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "s.tar", MEMBERS)
    cache_of(path).mkdir()
    assert len(index_tar(path).keys) == 5


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


@pytest.mark.parametrize("cut", [1, 511, 513, 1000, 2049, 2148, 6 * 1536 - 600])
def test_a_shard_cut_inside_a_member_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "cut.tar"
    path.write_bytes(shard()[:cut])
    with pytest.raises(ValueError, match=rf"cut\.tar is not a whole.*{cut} bytes"):
        index_tar(path)
    assert not cache_of(path).exists()


@pytest.mark.parametrize("cut", [1536, 1536 + 1, 2 * 1536, 5 * 1536, 5 * 1536 + 511])
def test_a_shard_cut_at_or_in_a_header_is_refused_by_name(tmp_path: Path, cut: int) -> None:
    # A tar ends with blocks of zeros: without them the rest of the samples would be missing in silence.
    path = tmp_path / "cut.tar"
    path.write_bytes(shard()[:cut])
    with pytest.raises(ValueError, match=r"cut\.tar"):
        index_tar(path)


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(shard())
    data[3 * 1536 : 3 * 1536 + 512] = b"x" * 512
    path = tmp_path / "damaged.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged\.tar"):
        index_tar(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a whole uncompressed tar"),
        (b"no tar at all " * 100, "not a whole uncompressed tar"),
        (b"\x1f\x8b" + b"\0" * 1022, "not a whole uncompressed tar"),
        (b"\0" * 10240, "holds no samples"),
    ],
    ids=["empty file", "text", "compressed", "empty tar"],
)
def test_what_holds_no_samples_is_refused_by_name(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "wrong.tar"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"wrong\.tar.*{words}|wrong\.tar {words}"):
        index_tar(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.tar"):
        index_tar(tmp_path / "none.tar")
