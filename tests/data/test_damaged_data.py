"""Damaged and malicious shards and images: samples, counted skips or one error that names the shard, and nothing else."""

import functools
import json
import re
import signal
import struct
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data.images import decode, open_image
from clipkd.data.loader import Augment, AugmentedPairs, Collate
from clipkd.data.open import open_pairs
from clipkd.data.skips import BadSample, Skip
from clipkd.data.sources import Pair, PairSet
from clipkd.data.stream import key_id, read_shard
from clipkd.data.tar_index import index_tar, index_whole_tar
from clipkd.errors import RunStopped
from clipkd.views import Views
from tests.data.samples import encode, view_spec, write_tar

BLOCK = tarfile.BLOCKSIZE
NUM_SAMPLES = 8
MOST_SECONDS = 5
"""For one shard of a few kilobytes."""


@pytest.fixture(autouse=True)
def user_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("user_cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


class Hung(BaseException):
    """Not an Exception, so that nothing takes it for damage."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[Callable[[], None]]:
    """Called, it grants the next seconds."""

    def end(*_: object) -> None:
        raise Hung(f"no end after {MOST_SECONDS} seconds")

    def grant() -> None:
        signal.alarm(MOST_SECONDS)

    before = signal.signal(signal.SIGALRM, end)
    yield grant
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# A caption names its key twice and an image's colour is drawn for its key, so that no damage of a few bytes turns one
# sample's into another's.


@functools.cache
def colours() -> list[tuple[int, ...]]:
    return [tuple(colour) for colour in np.random.default_rng(7).integers(0, 256, (1000, 3)).tolist()]


def picture(number: int) -> bytes:
    """Uncompressed: what is damaged in it still shows."""
    return encode(Image.new("RGB", (8, 6), colours()[number]), "BMP")  # type: ignore[arg-type]


def caption(number: int) -> bytes:
    return f"thing {number:04}, the thing {number:04}".encode()


def sample(number: int, name: str = "{:04}") -> list[tuple[str, bytes]]:
    return [(name.format(number) + ".jpg", picture(number)), (name.format(number) + ".txt", caption(number))]


def samples(*numbers: int) -> list[tuple[str, bytes]]:
    return [member for number in numbers or range(NUM_SAMPLES) for member in sample(number)]


def assert_its_own(pair: Pair) -> None:
    """Caption and image are the key's, but for bytes that were damaged in them."""
    found = re.search(r"(\d{4})\s*$", pair.key)
    assert found, pair.key
    own = int(found[1])
    named = {int(number) for text in pair.captions for number in re.findall(r"thing (\d{4}), the thing \1", text)}
    assert named <= {own}, f"{pair.key} has the caption {pair.captions}"
    try:
        image = decode(open_image(pair.image, pair.key), pair.key, background=(0, 0, 0))
    except BadSample:
        return
    colour = tuple(np.median(np.asarray(image).reshape(-1, 3), axis=0).astype(int).tolist())
    assert colour == colours()[own] or colour not in colours(), f"{pair.key} has another's image"


def header(name: bytes | str, size: int | bytes, kind: bytes = tarfile.REGTYPE, *, valid: bool = True) -> bytes:
    """A block of a tar. size: a number, or the twelve bytes of its field."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    name = name.encode() if isinstance(name, str) else name
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = size if isinstance(size, bytes) else f"{size:011o}\0".encode()
    block[156:157] = kind
    return checked(block) if valid else bytes(block)


def checked(block: bytearray | bytes) -> bytes:
    """The block with the checksum that belongs to it."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base_256(number: int) -> bytes:
    """A size as GNU tar writes what has no room in eleven octal digits."""
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else (256**12 + number).to_bytes(12, "big")


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def member(name: bytes | str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + padded(content)


def tar(*parts: bytes) -> bytes:
    return b"".join(parts) + bytes(2 * BLOCK)


def members(pairs: list[tuple[str, bytes]]) -> list[bytes]:
    return [member(name, content) for name, content in pairs]


def record(keyword: str, value: str | bytes) -> bytes:
    """Of a pax header: its own length, keyword and value."""
    rest = b" " + keyword.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
    length = len(rest) + len(str(len(rest) + 3)) if len(rest) > 8 else len(rest) + 1
    while len(str(length).encode() + rest) != length:
        length += 1
    return str(length).encode() + rest


def inserted(rng: np.random.Generator, *parts: bytes) -> bytes:
    """A whole shard with further parts between two of its samples."""
    whole = members(samples())
    place = 2 * int(rng.integers(1, NUM_SAMPLES))
    return tar(*whole[:place], *parts, *whole[place:])


Damage = Callable[[np.random.Generator], bytes]


def cut(rng: np.random.Generator) -> bytes:
    whole = tar(*members(samples()))
    return whole[: rng.integers(1, len(whole))]


def flipped(rng: np.random.Generator) -> bytes:
    whole = np.frombuffer(tar(*members(samples())), np.uint8).copy()
    places = rng.integers(0, len(whole), rng.integers(1, 40))
    whole[places] = rng.integers(0, 256, len(places))
    return whole.tobytes()


def flipped_header(rng: np.random.Generator) -> bytes:
    """Any field but the name, in a header whose checksum is right."""
    parts = members(samples())
    for place in rng.integers(0, len(parts), rng.integers(1, 4)).tolist():
        block = bytearray(parts[place][:BLOCK])
        for byte in rng.integers(100, BLOCK, rng.integers(1, 6)).tolist():
            block[byte] = int(rng.choice([0, 32, 48, 49, 53, 55, 83, 128, 255]))
        parts[place] = checked(block) + parts[place][BLOCK:]
    return tar(*parts)


def swapped(rng: np.random.Generator) -> bytes:
    parts = members(samples())
    return tar(*(parts[place] for place in rng.permutation(len(parts))))


def zeroed(rng: np.random.Generator) -> bytes:
    parts = members(samples())
    place = int(rng.integers(1, len(parts)))
    if rng.integers(2):  # between members, else in place of some of them
        return tar(*parts[:place], bytes(BLOCK * int(rng.integers(1, 5))), *parts[place:])
    lost = b"".join(parts[place : place + int(rng.integers(1, 4))])
    return tar(*parts[:place], bytes(len(lost)), *parts[place + lost.count(b"ustar") :])


SIZES = [-1, -512, -513, -1024, -5120, -(2**40), -(2**63), 0, 1, 10**4, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**87]
SIZE_FIELDS = [
    *map(base_256, SIZES),
    *(
        b"77777777777\0",
        b"-0000000777\0",
        b"\xff" * 12,
        b"\0" * 12,
        b"9" * 12,
        b" " * 12,
        b"1_0\0" + bytes(8),
        b"0x10\0" * 2 + b"\0\0",
    ),
]


def absurd_size(rng: np.random.Generator) -> bytes:
    field = SIZE_FIELDS[rng.integers(len(SIZE_FIELDS))]
    return inserted(rng, header("0900.jpg", field, b"0") + padded(picture(900)), member("0900.txt", caption(900)))


def absurd_size_of_another_kind(rng: np.random.Generator) -> bytes:
    """Long names, pax headers, sparse files, folders, links, devices and kinds that do not exist."""
    field = SIZE_FIELDS[rng.integers(len(SIZE_FIELDS))]
    kind = b"LKxgXS12345672ZDVM"[(at := int(rng.integers(18))) : at + 1]
    return inserted(rng, header("0900.jpg", field, kind) + padded(picture(900)))


PAX_RECORDS = [
    b"",
    b"0 path=a.txt\n",
    b"5 path=a.txt\n",
    b"99999 path=a.txt\n",
    b"-12 path=a.txt\n",
    b"9" * 400 + b" path=a.txt\n",
    b"no record at all",
    b"12 path=\n",
    b"12 path a.txt",
    bytes(100),
    b"\xff" * 100,
    *(
        record("size", size)
        for size in ("abc", "-1", "-512", "-1024", "-5120", "1e9", "nan", "9" * 30, "9" * 5000, "0")
    ),
    *(
        record("path", name)
        for name in ("", "\0", "/", ".", b"\xff\xfe.txt", "a" * 5000 + ".txt", "a\nb.txt", "a\0b.txt")
    ),
    *(record("mtime", time) for time in ("inf", "nan", "-1e400", "x")),
    *(record("hdrcharset", name) + record("path", b"\xe9.txt") for name in ("BINARY", "klingon", "utf-16")),
    *(record("GNU.sparse.size", size) for size in ("0", "3000", "-1", "x", "9" * 30)),
    *(record("GNU.sparse.map", text) for text in ("", "0", "0,1,2", "x,y", "0,9999999999")),
    record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.realsize", "3000"),
    record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0"),
    record("GNU.sparse.realsize", "3000") + record("GNU.sparse.name", "0900.txt"),
    record("GNU.sparse.offset", "0") + record("GNU.sparse.numbytes", "99") + record("GNU.sparse.size", "3000"),
]


def damaged_pax(rng: np.random.Generator) -> bytes:
    content = PAX_RECORDS[rng.integers(len(PAX_RECORDS))]
    # One for all members behind it may rename them all, which is no damage.
    kind = b"g" if rng.integers(2) and b"path" not in content and b"name" not in content else b"x"
    return inserted(rng, member("pax", content, kind))


def headers_without_end(rng: np.random.Generator) -> bytes:
    """Each waits for the member that it is about."""
    kind = b"LKxg"[(at := int(rng.integers(4))) : at + 1]
    content = {b"L": b"0900.txt\0", b"K": b"0900.txt\0"}.get(kind, record("comment", "x"))
    return inserted(rng, member("more", content, kind) * int(rng.integers(2, 4000)))


def duplicated(rng: np.random.Generator) -> bytes:
    parts = members(samples())
    for place in rng.integers(0, len(parts), 5).tolist():
        parts.insert(int(rng.integers(len(parts))), parts[place])
    return tar(*parts)


def other_kind(rng: np.random.Generator) -> bytes:
    """Folders, links, devices and pipes, with or without content, between samples or within one."""
    kind = b"123456"[(at := int(rng.integers(6))) : at + 1]
    block = bytearray(
        header(rng.choice(["folder", "0003.jpg", "0900.jpg", "0900.txt"]), int(rng.choice([0, 10, 600])), kind)
    )
    block[157:257] = rng.choice(["0001.jpg", "/etc/passwd", "../../x", ""]).encode().ljust(100, b"\0")
    parts = members(samples())
    parts.insert(int(rng.integers(1, len(parts))), checked(block))
    return tar(*parts)


NAMES = [
    *(
        "../../{}",
        "/{}",
        "/etc/{}",
        "a/../../{}",
        "./{}",
        "~/{}",
        "$HOME/{}",
        "a b/{}",
        "{}",
        "C:\\{}",
        "a//{}",
        "\x7f\x1b[31m{}",
    ),
    *("ä" * 30 + "{}", "`touch x`{}", "-rf {}", "%s%n{}", "{{}}{}", "\n{}", "con/{}", "a.b/{}", "..{}", "{}\r"),
]
ODD_NAMES = [
    b"",
    b".",
    b"..",
    b"...",
    b"/",
    b"noname",
    b"a/",
    b".jpg",
    b".txt",
    b"a.",
    b"\xff\xfe.jpg",
    b"\xe9.txt",
    b"a\xc3.txt",
    b" ",
    b"\n",
    b"a/.txt",
    b"x" * 100,
]


def odd_names(rng: np.random.Generator) -> bytes:
    parts = members(samples())
    number = 500
    for name in rng.choice(NAMES, 3, replace=False).tolist():
        parts += members(sample(number, name.replace("{}", "{:04}")))
        number += 1
    for name in rng.permutation(len(ODD_NAMES))[:5].tolist():
        parts.insert(2 * int(rng.integers(NUM_SAMPLES)), member(ODD_NAMES[name], b"\0 what lies here is nobody's"))
    return tar(*parts)


DAMAGES: dict[Damage, int] = {
    cut: 25,
    flipped: 40,
    flipped_header: 60,
    swapped: 10,
    zeroed: 20,
    absurd_size: 50,
    absurd_size_of_another_kind: 80,
    damaged_pax: 80,
    headers_without_end: 8,
    duplicated: 15,
    other_kind: 40,
    odd_names: 30,
}
"""Each with a number of trials."""


def shards_of(damage: Damage, folder: Path, no_hang: Callable[[], None]) -> Iterator[Path]:
    for trial in range(DAMAGES[damage]):
        path = folder / f"{damage.__name__}{trial}.tar"
        path.write_bytes(damage(np.random.default_rng((trial, *damage.__name__.encode()))))
        no_hang()
        yield path


def test_there_are_enough_damaged_shards() -> None:
    assert sum(DAMAGES.values()) == 458
    assert tar(*members(samples()))[:BLOCK] == header("0000.jpg", len(picture(0)))
    assert record("path", "a.txt") == b"14 path=a.txt\n"
    assert base_256(-1) == b"\xff" * 12
    assert base_256(258) == b"\x80" + bytes(9) + b"\x01\x02"


def open_all(path: Path) -> PairSet:
    pairs = open_pairs(DataConfig(path=str(path), max_skipped=1))
    assert isinstance(pairs, PairSet)
    return pairs


def test_an_undamaged_shard_gives_every_sample(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar(*members(samples())))
    pairs = open_all(tmp_path / "s.tar")
    assert len(pairs) == NUM_SAMPLES
    for number in range(NUM_SAMPLES):
        pair = pairs.read(number)
        assert_its_own(pair)
        assert (pair.captions, pair.image) == ((caption(number).decode(),), picture(number))
    with pytest.raises(AssertionError, match="has the caption"):
        assert_its_own(Pair("s.tar/0001", picture(1), (caption(2).decode(),)))
    with pytest.raises(AssertionError, match="another's image"):
        assert_its_own(Pair("s.tar/0001", picture(2), (caption(1).decode(),)))


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_gives_its_own_samples_and_tells_what_is_missing(
    damage: Damage, tmp_path: Path, no_hang: Callable[[], None]
) -> None:
    wrong: list[str] = []
    num_given = 0
    for path in shards_of(damage, tmp_path, no_hang):
        try:
            given, told = outcome(path)
            num_given += given
            assert given >= NUM_SAMPLES or told, f"{NUM_SAMPLES - given} samples are lost in silence"
        except (Exception, Hung) as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {str(error)[:200]}")
            if len(wrong) == 3 or isinstance(error, Hung):
                break
    assert not wrong, "\n".join(wrong)
    assert num_given >= DAMAGES[damage] // 2  # so that something was checked


def outcome(path: Path) -> tuple[int, bool]:
    """Samples that a shard gives, and whether anything was said about others."""
    try:
        pairs = open_all(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
        return 0, True
    given, skipped = 0, list[Skip]()
    for number in range(len(pairs)):
        try:
            pair = pairs.read(number)
        except BadSample as bad:
            skipped.append(bad.skip)
        else:
            given += 1
            assert_its_own(pair)
    assert all(path.name in skip.key for skip in (*skipped, *pairs.unusable().examples))
    return given, bool(skipped or pairs.unusable())


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_streamed_shard_gives_its_own_samples_and_tells_what_is_missing(
    damage: Damage, tmp_path: Path, no_hang: Callable[[], None]
) -> None:
    wrong: list[str] = []
    for path in shards_of(damage, tmp_path, no_hang):
        skipped: list[Skip] = []
        given = 0
        try:
            for pair in read_shard(str(path), SourceConfig(path=str(path)), skipped):
                given += 1
                assert_its_own(pair)
            assert all(path.name in skip.key for skip in skipped)
            assert given >= NUM_SAMPLES or skipped, f"{NUM_SAMPLES - given} samples are lost in silence"
        except (Exception, Hung) as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {str(error)[:200]}")
            if len(wrong) == 3 or isinstance(error, Hung):
                break
    assert not wrong, "\n".join(wrong)


def test_a_name_that_is_no_utf_8_has_a_key_that_can_be_written_and_an_id(tmp_path: Path) -> None:
    # Zipped on a system with another encoding; keys go into skipped.jsonl, messages and, where streamed, ids.
    path = tmp_path / "s.tar"
    path.write_bytes(tar(member(b"caf\xe9-0003.jpg", picture(3)), member(b"caf\xe9-0003.txt", caption(3))))
    indexed = open_all(path).read(0)
    skipped: list[Skip] = []
    (streamed,) = read_shard(str(path), SourceConfig(path=str(path)), skipped)
    for pair in (indexed, streamed):
        assert_its_own(pair)
        assert pair.key.encode("utf-8").startswith(str(path).encode() + b"/caf")
        assert 0 <= key_id(pair.key) < 2**63


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_of_an_evaluation_set_is_whole_or_refused_by_name(
    damage: Damage, tmp_path: Path, no_hang: Callable[[], None]
) -> None:
    wrong: list[str] = []
    for path in shards_of(damage, tmp_path, no_hang):
        try:
            index = index_whole_tar(path)
            length = path.stat().st_size
            assert (index.size >= 0).all(), "a size is negative"
            assert (index.offset + index.size <= length).all(), "a member lies behind the end"
        except ValueError as error:
            if path.name not in str(error):
                wrong.append(f"{path.name} is not named: {str(error)[:200]}")
        except (Exception, Hung) as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {str(error)[:200]}")
            if len(wrong) == 3 or isinstance(error, Hung):
                break
    assert not wrong, "\n".join(wrong)


# Nothing outside.


events: list[str] | None = None
"""Files that were opened for writing, made, moved or removed, and programs that were started, while not None."""


def listen(event: str, arguments: tuple[Any, ...]) -> None:
    if events is None:
        return
    if event == "open":
        path, mode, flags = arguments
        if (isinstance(mode, str) and set(mode) & set("wax+")) or flags & 0o1103:  # O_WRONLY, O_RDWR, O_CREAT, O_TRUNC
            events.append(f"open {path}")
    elif event.startswith(("os.", "subprocess.", "shutil.", "pty.")) and event not in (
        "os.listdir",
        "os.scandir",
        "os.putenv",
        "os.unsetenv",
    ):
        events.append(" ".join(map(str, (event, *arguments))))


@pytest.fixture
def audit() -> Iterator[list[str]]:
    """What happens to files while a test runs."""
    global events
    if not getattr(listen, "installed", False):
        sys.addaudithook(listen)  # for good: there is no way to take one off
        listen.installed = True  # type: ignore[attr-defined]
    events = []
    yield events
    events = None


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.lstat().st_size for path in folder.rglob("*")}


def test_the_audit_sees_what_is_written(tmp_path: Path, audit: list[str]) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "a").read_text()
    (tmp_path / "a").rename(tmp_path / "b")
    assert [event.split()[0] for event in audit] == ["open", "os.rename"]


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_names_that_lead_outside_are_read_like_any_other_and_nothing_is_written_there(
    tmp_path: Path, streamed: bool, audit: list[str]
) -> None:
    names = ["../../evil{:04}", "/etc/evil{:04}", "/evil{:04}", "a/../../../evil{:04}", "~/evil{:04}"]
    path = write_tar(
        tmp_path / "deep" / "shards" / "s.tar", [part for n, name in enumerate(names) for part in sample(n, name)]
    )
    before = tree(tmp_path)
    audit.clear()
    if streamed:
        skipped: list[Skip] = []
        pairs = list(read_shard(str(path), SourceConfig(path=str(path)), skipped))
        assert skipped == []
    else:
        source = open_all(path)
        pairs = [source.read(number) for number in range(len(source))]
    written = [event for event in audit if event.split()[:2] != ["os.mkdir", str(path.parent)]]  # it is there
    assert [pair.key for pair in pairs] == [f"{path}/{name.format(n)}" for n, name in enumerate(names)]
    for number, pair in enumerate(pairs):
        assert (pair.image, pair.captions) == (picture(number), (caption(number).decode(),))
    index = str(path) + ".clipkd-index.npz"
    assert all(index in event for event in written)
    assert len(written) == (0 if streamed else 2)  # the index is opened for writing, and moved to its place
    added = set(tree(tmp_path)) - set(before)
    assert added == (set() if streamed else {"deep/shards/s.tar.clipkd-index.npz"})
    assert not [path for folder in ("/", "/etc", "~") for path in Path(folder).expanduser().glob("evil*")]


def test_links_and_devices_are_not_followed_nor_made(tmp_path: Path, audit: list[str]) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    parts = members(samples())
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        block = bytearray(header("0900.txt", 0, kind))
        block[157:257] = str(tmp_path / "secret.txt").encode()[:100].ljust(100, b"\0")
        parts += [checked(block), member("0900.jpg", picture(900))]
    path = tmp_path / "s.tar"
    path.write_bytes(tar(*parts))
    audit.clear()
    pairs = open_all(path)
    captions = [pairs.read(number).captions[0] for number in range(len(pairs))]
    assert captions == [caption(number).decode() for number in range(NUM_SAMPLES)]
    assert pairs.left_out.counts.total() == 5  # five images of one key, without a caption
    assert all("clipkd-index" in event for event in audit if event.split()[:2] != ["os.mkdir", str(tmp_path)])
    assert set(tree(tmp_path)) == {"secret.txt", "s.tar", "s.tar.clipkd-index.npz"}


class Payload:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_an_index_is_not_executed_but_replaced(tmp_path: Path, audit: list[str]) -> None:
    path = tmp_path / "s.tar"
    path.write_bytes(tar(*members(samples())))
    cache = Path(f"{path}.clipkd-index.npz")
    index_tar(path)
    with np.load(cache) as stored:
        arrays = dict(stored)
    arrays["keys"] = np.array([Payload(tmp_path / "executed")] * NUM_SAMPLES, object)
    np.savez(cache, **arrays)
    audit.clear()
    pairs = open_all(path)
    assert [pairs.read(number).captions for number in range(len(pairs))] == [(caption(n).decode(),) for n in range(8)]
    assert not (tmp_path / "executed").exists()
    assert not any("executed" in event for event in audit)
    with np.load(cache) as stored:
        assert stored["keys"].tolist() == [f"{number:04}".encode() for number in range(8)]


def test_a_nested_json_and_a_long_text_neither_crash_nor_stop_a_run(tmp_path: Path) -> None:
    nested = b'{"caption": ' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    long = json.dumps({"caption": "word " * 1_000_000}).encode()
    good = json.dumps({"caption": "thing"}).encode()
    contents = [
        ("0000", good),
        ("0001", nested),
        ("0002", long),
        ("0003", b"[" * 100_000),
        ("0004", b'{"a":' * 100_000),
    ]
    parts = [(f"{key}.{end}", data) for key, json_ in contents for end, data in (("jpg", picture(0)), ("json", json_))]
    config = DataConfig(path=str(write_tar(tmp_path / "s.tar", parts)), caption_key="caption")
    pairs = open_pairs(config)
    assert isinstance(pairs, PairSet)
    given = AugmentedPairs(pairs, Augment(config, Views([view_spec(4)]), seed=0))
    for number, lengths in enumerate([{5}, {5, 1999}, {1999}, {5, 1999}, {5, 1999}]):
        taken = given[0, number]
        assert len(taken.caption) in lengths
        assert [skip.key for skip in taken.skipped][:1] == (
            [f"{tmp_path}/s.tar/{number:04}"] if number in (1, 3, 4) else []
        )
        assert {skip.cause for skip in taken.skipped} <= {"unreadable caption"}


# Images.


@functools.cache
def originals() -> dict[str, bytes]:
    rng = np.random.default_rng(3)
    smooth = np.linspace(0, 255, 41 * 30 * 3).reshape(30, 41, 3)
    image = Image.fromarray((smooth * 0.7 + rng.uniform(0, 70, smooth.shape)).astype(np.uint8))
    large = image.resize((200, 150))
    palette = image.quantize(16)
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray((smooth[..., 0] * 257).astype(np.uint16))
    return {
        "jpeg": encode(large, "JPEG"),
        "progressive": encode(large, "JPEG", progressive=True),
        "exif": encode(image, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image, "PNG"),
        "png palette": encode(palette, "PNG", transparency=3),
        "png alpha": encode(alpha, "PNG"),
        "png 16 bits": encode(deep, "PNG"),
        "webp": encode(large, "WEBP"),
        "webp lossless": encode(alpha, "WEBP", lossless=True),
        "gif": encode(palette, "GIF"),
        "gif frames": encode(palette, "GIF", save_all=True, append_images=[palette.rotate(90)]),
        "bmp": encode(image, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "tiff": encode(image, "TIFF"),
        "tiff lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(image, "TIFF", compression="jpeg"),
        "tiff 16 bits": encode(deep, "TIFF"),
    }


def damaged_image(data: bytes, rng: np.random.Generator) -> bytes:
    damaged = bytearray(data)
    kind = int(rng.integers(5))
    if kind == 0:
        return bytes(damaged[: rng.integers(0, len(damaged))])
    if kind == 1:  # anywhere
        for place in rng.integers(0, len(damaged), rng.integers(1, 30)).tolist():
            damaged[place] = int(rng.integers(256))
    elif kind == 2:  # in the header
        for place in rng.integers(0, min(64, len(damaged)), rng.integers(1, 6)).tolist():
            damaged[place] = int(rng.choice([0, 1, 127, 128, 255]))
    elif kind == 3:  # sizes
        place = int(rng.integers(0, min(64, len(damaged) - 4)))
        damaged[place : place + 4] = struct.pack(
            rng.choice(["<I", ">I"]), rng.choice([0, 1, 65535, 2**31 - 1, 2**32 - 1])
        )
    else:
        first, last = sorted(rng.integers(0, len(damaged), 2).tolist())
        damaged[first:last] = b"" if rng.integers(2) else damaged[first:last] * 2
    return bytes(damaged)


class ListedPairs:
    """Pairs in memory, in place of a data set."""

    def __init__(self, contents: list[bytes]) -> None:
        self.contents = contents

    def __len__(self) -> int:
        return len(self.contents)

    def read(self, index: int) -> Pair:
        return Pair(f"list/{index}", self.contents[index], (f"thing {index}",))


def augmented(contents: list[bytes], background: str = "random") -> AugmentedPairs:
    config = DataConfig(background=background)  # type: ignore[arg-type]
    views = Views([view_spec(16), view_spec(7, tokenizer_name="others")])
    return AugmentedPairs(ListedPairs(contents), Augment(config, views, seed=1))  # type: ignore[arg-type]


def test_every_undamaged_image_is_taken() -> None:
    whole = list(originals().values())
    given = augmented(whole)
    for number in range(len(whole)):
        taken = given[0, number]
        assert (taken.id, taken.key, taken.skipped) == (number, f"list/{number}", ())


@pytest.mark.parametrize("name", originals())
def test_a_damaged_image_is_taken_or_another_comes_in_its_place_and_it_is_told(
    name: str, no_hang: Callable[[], None]
) -> None:
    rng = np.random.default_rng((5, *name.encode()))
    good = originals()["png"]
    num_skipped = 0
    views = Views([view_spec(16), view_spec(7, tokenizer_name="others")])
    for trial in range(15):
        damaged = damaged_image(originals()[name], rng)
        no_hang()
        taken = augmented([damaged, good, good])[trial, 0]
        batch = Collate(views)([taken, augmented([good])[0, 0]])
        assert [(part.shape, part.dtype) for part in batch.pixels] == [
            ((2, 3, 16, 16), torch.uint8),
            ((2, 3, 7, 7), torch.uint8),
        ]
        assert batch.skipped == taken.skipped
        if taken.skipped:
            num_skipped += 1
            assert taken.id in (1, 2)
            assert taken.caption == f"thing {taken.id}"
            assert {(skip.key, skip.cause) for skip in taken.skipped} <= {
                ("list/0", cause) for cause in ("empty image", "undecodable image", "too many pixels")
            }
            assert all("\n" not in skip.message and len(skip.message) < 500 for skip in taken.skipped)
        else:
            assert taken.id == 0
    assert num_skipped >= 3


def test_formats_that_a_data_set_does_not_hold_are_not_even_tried() -> None:
    image = Image.new("RGB", (16, 16), (1, 2, 3))
    contents = [encode(image, format) for format in ("PPM", "EPS", "ICO", "TGA", "PCX", "PDF", "SGI", "DDS")]
    contents += [
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS\n(/etc/passwd) run\n",
        b"<html>404</html>",
        b"\0" * 99,
    ]
    for content in contents:
        taken = augmented([content, originals()["png"]])[0, 0]
        assert taken.id == 1
        assert taken.skipped[0].cause == "undecodable image"


@pytest.mark.parametrize(("width", "height"), [(1, 1), (1, 500), (500, 1), (3, 4000), (2, 2)])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_the_thinnest_images_are_taken(width: int, height: int, format: str) -> None:
    given = augmented([encode(Image.new("RGB", (width, height), (9, 200, 90)), format)])
    for view in range(20):
        taken = given[view, 0]
        assert taken.skipped == ()
        assert np.abs(taken.pixels[0].astype(int) - (9, 200, 90)).max() <= 6


@pytest.mark.parametrize(
    ("width", "height"), [(9_000, 9_000), (60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2**31 - 1)]
)
def test_an_image_that_claims_too_many_pixels_is_skipped_without_decoding_them(width: int, height: int) -> None:
    claim = b"IHDR" + struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    whole = encode(Image.new("1", (16, 16)), "PNG")
    bomb = whole[:12] + claim + struct.pack(">I", zlib.crc32(claim)) + whole[33:]
    taken = augmented([bomb, originals()["png"]])[0, 0]
    assert taken.id == 1
    assert [(skip.key, skip.cause) for skip in taken.skipped] == [("list/0", "too many pixels")]


def test_a_hundred_bad_samples_in_a_row_stop_the_run_with_the_last_one_named() -> None:
    with pytest.raises(RunStopped, match=r"^100 samples in a row cannot be used, the last of them list/\d: the image "):
        augmented([b"", b"no image", originals()["jpeg"][:50]])[0, 0]
    assert augmented([b""] * 20 + [originals()["png"]] * 2)[0, 0].id in (20, 21)


def test_what_comes_in_the_place_of_a_bad_sample_depends_on_its_position_alone() -> None:
    contents = [b"bad"] * 10 + [originals()["png"]] * 30
    first, second = augmented(contents), augmented(contents)
    for position in [(view, id) for view in range(3) for id in range(10)]:
        other = first[position]
        second[0, 39]
        again = second[position]
        assert (again.id, again.caption, again.skipped) == (other.id, other.caption, other.skipped)
        assert all(np.array_equal(*parts) for parts in zip(again.pixels, other.pixels, strict=True))
    assert len({first[view, 0].id for view in range(20)}) > 5
