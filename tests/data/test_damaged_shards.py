"""Damaged and malicious shards: both readers give samples, counted skips or one error that names the shard, nothing else."""

import functools
import json
import re
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data.loader import Augment, AugmentedPairs
from clipkd.data.skips import BadSample, Skip
from clipkd.data.sources import Pair
from clipkd.data.stream import key_id, read_shard
from clipkd.data.tar_index import index_whole_tar
from clipkd.images import BadImage, open_image, to_rgb
from clipkd.views import Views
from tests.data.samples import encode, open_set, view_spec, write_tar

BLOCK = tarfile.BLOCKSIZE
NUM_SAMPLES = 8
SECONDS_PER_SHARD = 5


class Hung(BaseException):
    """Not an Exception, so that nothing takes it for damage."""


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[Callable[[], None]]:
    """Called, it grants the next seconds."""

    def end(*_: object) -> None:
        raise Hung(f"no end after {SECONDS_PER_SHARD} seconds")

    before = signal.signal(signal.SIGALRM, end)
    yield lambda: signal.alarm(SECONDS_PER_SHARD) and None
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


# A caption names its key twice and an image's colour is drawn for its key, so that no damage of a few bytes turns one
# sample's into another's.


@functools.cache
def colours() -> list[tuple[int, ...]]:
    return [tuple(colour) for colour in np.random.default_rng(7).integers(0, 256, (1000, 3)).tolist()]


def picture(number: int) -> bytes:
    """Uncompressed, so that damage in it shows."""
    return encode(Image.new("RGB", (8, 6), colours()[number]), "BMP")  # type: ignore[arg-type]


def caption(number: int) -> bytes:
    return f"thing {number:04}, the thing {number:04}".encode()


def sample(number: int, name: str = "{:04}") -> list[tuple[str, bytes]]:
    return [(name.format(number) + ".jpg", picture(number)), (name.format(number) + ".txt", caption(number))]


def assert_its_own(pair: Pair) -> None:
    """Caption and image belong to the key, except for damaged bytes."""
    found = re.search(r"(\d{4})\s*$", pair.key)
    assert found, pair.key
    own = int(found[1])
    named = {int(number) for text in pair.captions for number in re.findall(r"thing (\d{4}), the thing \1", text)}
    assert named <= {own}, f"{pair.key} has the caption {pair.captions}"
    try:
        image = to_rgb(open_image(pair.image))
    except BadImage:
        return
    colour = tuple(np.median(np.asarray(image).reshape(-1, 3), axis=0).astype(int).tolist())
    assert colour == colours()[own] or colour not in colours(), f"{pair.key} has another's image"


def header(name: bytes | str, size: int | bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    """A block of a tar. size: a number, or the twelve bytes of its field."""
    block = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    name = name.encode() if isinstance(name, str) else name
    block[:100] = name[:100].ljust(100, b"\0")
    block[124:136] = size if isinstance(size, bytes) else f"{size:011o}\0".encode()
    block[156:157] = kind
    return checked(block)


def checked(block: bytearray | bytes) -> bytes:
    """The block with the checksum that belongs to it."""
    block = bytearray(block)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def base_256(number: int) -> bytes:
    """A size as GNU tar writes it if eleven octal digits are too few."""
    return b"\x80" + number.to_bytes(11, "big") if number >= 0 else (256**12 + number).to_bytes(12, "big")


def padded(content: bytes) -> bytes:
    return content + bytes(-len(content) % BLOCK)


def member(name: bytes | str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    return header(name, len(content), kind) + padded(content)


def tar(*parts: bytes) -> bytes:
    return b"".join(parts) + bytes(2 * BLOCK)


def members(numbers: range = range(NUM_SAMPLES)) -> list[bytes]:
    return [member(name, content) for number in numbers for name, content in sample(number)]


def record(keyword: str, value: str | bytes) -> bytes:
    """Of a pax header: its own length, keyword and value."""
    rest = b" " + keyword.encode() + b"=" + (value if isinstance(value, bytes) else value.encode()) + b"\n"
    length = len(rest) + 1
    while len(str(length).encode() + rest) != length:
        length += 1
    return str(length).encode() + rest


def inserted(rng: np.random.Generator, *parts: bytes) -> bytes:
    """A complete shard with further parts between two of its samples."""
    place = 2 * int(rng.integers(1, NUM_SAMPLES))
    return tar(*members()[:place], *parts, *members()[place:])


Damage = Callable[[np.random.Generator], bytes]


def flipped(rng: np.random.Generator) -> bytes:
    data = np.frombuffer(tar(*members()), np.uint8).copy()
    places = rng.integers(0, len(data), rng.integers(1, 40))
    data[places] = rng.integers(0, 256, len(places))
    return data.tobytes()


def flipped_header(rng: np.random.Generator) -> bytes:
    """Any field but the name, in a header whose checksum is right."""
    parts = members()
    for place in rng.integers(0, len(parts), rng.integers(1, 4)).tolist():
        block = bytearray(parts[place][:BLOCK])
        for byte in rng.integers(100, BLOCK, rng.integers(1, 6)).tolist():
            block[byte] = int(rng.choice([0, 32, 48, 49, 53, 55, 83, 128, 255]))
        parts[place] = checked(block) + parts[place][BLOCK:]
    return tar(*parts)


def zeroed(rng: np.random.Generator) -> bytes:
    parts = members()
    place = int(rng.integers(1, len(parts)))
    if rng.integers(2):  # between members, else in place of some of them
        return tar(*parts[:place], bytes(BLOCK * int(rng.integers(1, 5))), *parts[place:])
    lost = b"".join(parts[place : place + int(rng.integers(1, 4))])
    return tar(*parts[:place], bytes(len(lost)), *parts[place + lost.count(b"ustar") :])


SIZES = [-1, -512, -513, -1024, -5120, -(2**40), -(2**63), 0, 1, 10**4, 2**33, 2**40, 2**62, 2**63 - 1, 2**63, 2**87]
SIZE_FIELDS = [
    *map(base_256, SIZES),
    *(b"77777777777\0", b"-0000000777\0", b"\xff" * 12, b"\0" * 12, b"9" * 12, b" " * 12, b"1_0\0" + bytes(8)),
]


def absurd_size(rng: np.random.Generator) -> bytes:
    """Of a file, a long name, pax header, sparse file, folder, link, device or a kind that does not exist."""
    field = SIZE_FIELDS[rng.integers(len(SIZE_FIELDS))]
    kind = b"000000000LKxgXS12345672ZDVM"[(at := int(rng.integers(27))) : at + 1]
    return inserted(rng, header("0900.jpg", field, kind) + padded(picture(900)), member("0900.txt", caption(900)))


PAX_RECORDS = [
    *(b"", b"0 path=a.txt\n", b"5 path=a.txt\n", b"99999 path=a.txt\n", b"-12 path=a.txt\n", b"12 path=\n"),
    *(b"9" * 400 + b" path=a.txt\n", b"no record at all", b"12 path a.txt", bytes(100), b"\xff" * 100),
    *(record("size", size) for size in ("abc", "-1", "-512", "-5120", "1e9", "nan", "9" * 30, "9" * 5000, "0")),
    *(record("path", name) for name in ("", "\0", "/", ".", b"\xff\xfe.txt", "a" * 5000 + ".txt", "a\nb.txt")),
    *(record("mtime", time) for time in ("inf", "nan", "-1e400", "x")),
    *(record("hdrcharset", name) + record("path", b"\xe9.txt") for name in ("BINARY", "klingon", "utf-16")),
    *(record("GNU.sparse.size", size) for size in ("0", "3000", "-1", "x", "9" * 30)),
    *(record("GNU.sparse.map", text) for text in ("", "0", "0,1,2", "x,y", "0,9999999999")),
    record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0") + record("GNU.sparse.realsize", "3000"),
    record("GNU.sparse.realsize", "3000") + record("GNU.sparse.name", "0900.txt"),
]


def damaged_pax(rng: np.random.Generator) -> bytes:
    content = PAX_RECORDS[rng.integers(len(PAX_RECORDS))]
    # A global one may rename all members behind it, which is no damage.
    kind = b"g" if rng.integers(2) and b"path" not in content and b"name" not in content else b"x"
    return inserted(rng, member("pax", content, kind))


def headers_without_end(rng: np.random.Generator) -> bytes:
    """Each waits for the member that it is about."""
    kind = b"LKxg"[(at := int(rng.integers(4))) : at + 1]
    content = {b"L": b"0900.txt\0", b"K": b"0900.txt\0"}.get(kind, record("comment", "x"))
    return inserted(rng, member("more", content, kind) * int(rng.integers(2, 4000)))


NAMES = ["../../{}", "/{}", "/etc/{}", "a/../../{}", "./{}", "~/{}", "a b/{}", "C:\\{}", "a//{}", "\x7f\x1b[31m{}"]
NAMES += ["ä" * 30 + "{}", "`touch x`{}", "-rf {}", "%s%n{}", "{{}}{}", "\n{}", "a.b/{}", "..{}", "{}\r"]
ODD_NAMES = [b"", b".", b"..", b"...", b"/", b"noname", b"a/", b".jpg", b"a.", b"\xff\xfe.jpg", b"\xe9.txt", b"a/.txt"]


def odd_names(rng: np.random.Generator) -> bytes:
    parts = members()
    for number, name in enumerate(rng.choice(NAMES, 3, replace=False).tolist(), 500):
        parts += [member(*part) for part in sample(number, name.replace("{}", "{:04}"))]
    for name in rng.permutation(len(ODD_NAMES))[:5].tolist():
        parts.insert(2 * int(rng.integers(NUM_SAMPLES)), member(ODD_NAMES[name], b"\0 of no sample"))
    return tar(*parts)


TRIALS: dict[Damage, int] = {
    flipped: 40,
    flipped_header: 60,
    zeroed: 20,
    absurd_size: 120,
    damaged_pax: 80,
    headers_without_end: 8,
    odd_names: 30,
}


open_all = functools.partial(open_set, max_skipped=1)


def read_indexed(path: Path) -> tuple[int, bool]:
    """Number of samples that a shard gives, and whether anything was reported about others."""
    try:
        pairs = open_all(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
        return 0, True
    given, skipped = 0, list[Skip]()
    for number in range(len(pairs)):
        try:
            assert_its_own(pairs.read(number))
            given += 1
        except BadSample as bad:
            skipped.append(bad.skip)
    assert all(path.name in skip.key for skip in (*skipped, *pairs.unusable().examples))
    return given, bool(skipped or pairs.unusable())


def stream(path: Path) -> list[Pair | Skip]:
    return list(read_shard(str(path), SourceConfig(path=str(path))))


def read_streamed(path: Path) -> tuple[int, bool]:
    found = stream(path)
    for pair in found:
        assert path.name in pair.key
        if isinstance(pair, Pair):
            assert_its_own(pair)
    skips = [skip for skip in found if isinstance(skip, Skip)]
    return len(found) - len(skips), bool(skips)


def read_for_evaluation(path: Path) -> tuple[int, bool]:
    """All or nothing."""
    try:
        index = index_whole_tar(path)
    except ValueError as error:
        assert path.name in str(error)  # noqa: PT017
        return 0, True
    assert (index.size >= 0).all(), "a size is negative"
    assert (index.offset + index.size <= path.stat().st_size).all(), "a member lies behind the end"
    return len(index.keys), True


@pytest.mark.parametrize("read", [read_indexed, read_streamed, read_for_evaluation])
@pytest.mark.parametrize("damage", TRIALS, ids=lambda damage: damage.__name__)
def test_a_damaged_shard_gives_its_own_samples_and_reports_missing_ones(
    damage: Damage, read: Callable[[Path], tuple[int, bool]], tmp_path: Path, no_hang: Callable[[], None]
) -> None:
    wrong: list[str] = []
    num_given = 0
    for trial in range(TRIALS[damage]):
        path = tmp_path / f"{damage.__name__}{trial}.tar"
        path.write_bytes(damage(np.random.default_rng((trial, *damage.__name__.encode()))))
        no_hang()
        try:
            given, reported = read(path)
            num_given += given
            assert given >= NUM_SAMPLES or reported, f"{NUM_SAMPLES - given} samples are lost in silence"
        except (Exception, Hung) as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {str(error)[:200]}")
            if len(wrong) == 3 or isinstance(error, Hung):
                break
    assert not wrong, "\n".join(wrong)
    assert num_given >= TRIALS[damage] // 2 or read is read_for_evaluation  # so that something was checked


def test_an_undamaged_shard_gives_every_sample(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(tar(*members()))
    for read in (read_indexed, read_streamed):
        assert read(tmp_path / "s.tar") == (NUM_SAMPLES, False)
    assert read_for_evaluation(tmp_path / "s.tar")[0] == NUM_SAMPLES
    with pytest.raises(AssertionError, match="has the caption"):
        assert_its_own(Pair("s.tar/0001", picture(1), (caption(2).decode(),)))
    with pytest.raises(AssertionError, match="another's image"):
        assert_its_own(Pair("s.tar/0001", picture(2), (caption(1).decode(),)))
    assert record("path", "a.txt") == b"14 path=a.txt\n"
    assert base_256(-1) == b"\xff" * 12
    assert base_256(258) == b"\x80" + bytes(9) + b"\x01\x02"


def test_a_name_that_is_no_utf_8_has_a_key_that_can_be_written_and_an_id(tmp_path: Path) -> None:
    # Keys go into skipped.jsonl, messages and, of streamed samples, ids.
    path = tmp_path / "s.tar"
    path.write_bytes(tar(member(b"caf\xe9-0003.jpg", picture(3)), member(b"caf\xe9-0003.txt", caption(3))))
    for pair in (open_all(path).read(0), *stream(path)):
        assert isinstance(pair, Pair)
        assert_its_own(pair)
        assert pair.key.encode("utf-8").startswith(str(path).encode() + b"/caf")
        assert 0 <= key_id(pair.key) < 2**63


@pytest.mark.parametrize("depth", [10, 990, 1000, 100_000])
def test_a_nested_json_is_a_bad_sample_and_a_long_text_is_cut(tmp_path: Path, depth: int) -> None:
    nested = b'{"caption": ' + b"[" * depth + b"]" * depth + b"}"
    texts = [b'{"caption": "thing"}', nested, json.dumps({"caption": "word " * 1_000_000}).encode(), b"[" * depth]
    parts = [
        (f"{n}.{end}", data) for n, text in enumerate(texts) for end, data in (("jpg", picture(0)), ("json", text))
    ]
    pairs = open_set(write_tar(tmp_path / "s.tar", parts), caption_key="caption")
    given = AugmentedPairs(pairs, Augment(DataConfig(path="x"), Views([view_spec(4)]), seed=0))
    for number, lengths in enumerate([{5}, {5, 1999}, {1999}, {5, 1999}]):
        taken = given[0, number]
        assert len(taken.caption) in lengths
        expected = [f"{tmp_path}/s.tar/{number}"] if number in (1, 3) else []
        assert [skip.key for skip in taken.skipped][:1] == expected


@pytest.mark.parametrize("streamed", [False, True], ids=["indexed", "streamed"])
def test_names_that_lead_outside_links_and_devices_write_nothing_outside(tmp_path: Path, streamed: bool) -> None:
    names = ["../../evil{:04}", "/etc/evil{:04}", "/evil{:04}", "a/../../../evil{:04}", "~/evil{:04}"]
    parts = [member(*part) for number, name in enumerate(names) for part in sample(number, name)]
    for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        block = bytearray(header("0900.txt", 0, kind))
        block[157:257] = b"/etc/passwd".ljust(100, b"\0")
        parts += [checked(block), member("0900.jpg", picture(900))]
    path = tmp_path / "s.tar"
    path.write_bytes(tar(*parts))
    if streamed:
        pairs = [pair for pair in stream(path) if isinstance(pair, Pair)]
    else:
        source = open_all(path)
        pairs = [source.read(number) for number in range(len(source))]
    assert [pair.key for pair in pairs] == [f"{path}/{name.format(n)}" for n, name in enumerate(names)]
    for number, pair in enumerate(pairs):
        assert (pair.image, pair.captions) == (picture(number), (caption(number).decode(),))
    assert {file.name for file in tmp_path.iterdir()} <= {"s.tar", "s.tar.clipkd-index.npz"}
    assert not [path for folder in ("/", "/etc", "~") for path in Path(folder).expanduser().glob("evil*")]
