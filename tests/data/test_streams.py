"""Shards behind pipes and URLs: what comes, in which order, after a resume, and when something is wrong with them."""

import contextlib
import functools
import gc
import http.server
import io
import itertools
import json
import multiprocessing
import os
import shutil
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clipkd import distributed
from clipkd.config.data import DataConfig, SourceConfig
from clipkd.config.objective import ObjectiveConfig
from clipkd.config.terms import InfoNCETerm
from clipkd.config.train import TrainConfig
from clipkd.data import stream
from clipkd.data.loader import Feed
from clipkd.data.open import open_feed, open_pairs
from clipkd.data.skips import Skip
from clipkd.data.sources import PairSet
from clipkd.data.stream import StreamedShards, key_id, read_shard, streamed_batches
from clipkd.data.tar_index import scan_tar
from clipkd.errors import RunStopped
from clipkd.views import Batch, Views
from tests.data.samples import encode, plain_png, view_spec, write_tar

# Three loader processes are the point, also on a machine of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")

VIEWS = Views([view_spec(4)])
Members = list[tuple[str, bytes]]


def sample(key: str, number: int = 0) -> Members:
    return [(f"{key}.png", plain_png(number % 256)), (f"{key}.txt", f"thing {key}".encode())]


def write_shards(folder: Path, sizes: list[int]) -> list[str]:
    """Shards of so many samples behind pipes; returns what to set data.path to."""
    numbers = itertools.count()
    urls = []
    for shard, size in enumerate(sizes):
        members = itertools.chain(*(sample(f"s{(number := next(numbers)):04}", number) for _ in range(size)))
        urls.append(f"pipe:cat {write_tar(folder / f'{shard:05}.tar', members)}")
    return urls


def open_stream(
    *urls: str,
    batch_size: int = 2,
    workers: int = 0,
    places: Mapping[int, int] | None = None,
    rank: int = 0,
    world_size: int = 1,
    **options: Any,
) -> Feed:
    """One process's batches, in a run with so many."""
    data = DataConfig(path=urls, num_workers=workers, **options)
    shards = open_pairs(data)
    assert isinstance(shards, StreamedShards)
    numbers = {"batch_size": batch_size, "seed": 3, "rank": rank, "world_size": world_size}
    return streamed_batches(shards, data, VIEWS, places=places or {}, pin_memory=False, **numbers)


def take(feed: Feed, steps: int) -> list[Batch]:
    with contextlib.closing(feed):
        return [next(feed) for _ in range(steps)]


def keys_of(batches: list[Batch]) -> list[str]:
    """Without their shards: keys are unique here."""
    return [key.rsplit("/", 1)[1] for batch in batches for key in batch.keys]


def names(numbers: range) -> list[str]:
    return [f"s{number:04}" for number in numbers]


def read(url: str, config: SourceConfig | None = None) -> tuple[list[Any], list[Skip]]:
    skipped: list[Skip] = []
    return list(read_shard(url, config or SourceConfig(path=url), skipped)), skipped


@pytest.fixture
def unshuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples come in the order of their shard: the order is then that of the shards."""
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 0)


# What comes.


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if not self.path.startswith("/cut/"):
            return super().do_GET()
        content = Path(self.directory, self.path.removeprefix("/cut/")).read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        return None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Serves tmp_path; under /cut/ it hangs up after half of a file."""
    if not shutil.which("curl"):
        pytest.skip("webdataset fetches with curl")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def all_kinds() -> Members:
    """Whole samples of every shape: suffixes, folders, several images, several captions, a label."""
    record = json.dumps({"caption": ["one", " two "], "class": 7}).encode()
    return [
        *(("a.png", plain_png(1)), ("a.json", record)),
        *(("b.JSON", record), ("b.JPG", encode(Image.new("RGB", (8, 8)), "JPEG")), ("b.npy", b"\0" * 700)),
        *(("some/folder/c.x.png", plain_png(9)), ("some/folder/c.png", plain_png(3)), ("some/folder/c.json", record)),
        *(("d.jpeg", plain_png(4)), ("d.webp", plain_png(5)), ("d.json", b'{"caption": "x", "class": null}')),
    ]


@pytest.mark.parametrize("scheme", ["pipe", "file", "http"])
def test_a_stream_gives_the_pairs_of_the_indexed_reading(
    tmp_path: Path, scheme: str, request: pytest.FixtureRequest
) -> None:
    path = write_tar(tmp_path / "0.tar", all_kinds())
    if scheme == "http":
        url = f"{request.getfixturevalue('server')}/0.tar"
    else:
        url = {"pipe": f"pipe:cat {path}", "file": f"file://{path}"}[scheme]
    options = {"caption_key": "caption", "label_key": "class"}
    streamed, skipped = read(url, SourceConfig(path=url, **options))
    indexed = open_pairs(DataConfig(path=str(path), **options))
    assert isinstance(indexed, PairSet)
    assert len(streamed) == len(indexed) == 4
    for number, pair in enumerate(streamed):
        expected = indexed.read(number)
        assert (pair.image, pair.captions, pair.label) == (expected.image, expected.captions, expected.label)
        assert pair.key.removeprefix(url) == expected.key.removeprefix(str(path))
    assert [pair.key for pair in streamed] == [f"{url}/{key}" for key in ("a", "b", "some/folder/c", "d")]
    assert [pair.captions for pair in streamed] == [("one", "two")] * 3 + [("x",)]
    assert [pair.label for pair in streamed] == [7, 7, 7, -1]
    assert streamed[0].image == plain_png(1)
    assert skipped == []


def test_a_large_sample_comes_whole_through_a_pipe(tmp_path: Path) -> None:
    content = os.urandom(3_000_000)
    path = write_tar(tmp_path / "0.tar", [("a.png", content), ("a.txt", b"thing"), *sample("b")])
    (first, second), skipped = read(f"pipe:cat {path}")
    assert (first.image, second.captions, skipped) == (content, ("thing b",), [])


def test_brace_patterns_name_several_shards(tmp_path: Path) -> None:
    write_shards(tmp_path, [1, 1, 1])
    shards = open_pairs(DataConfig(path=f"pipe:cat {tmp_path}/{{00000..00002}}.tar"))
    assert isinstance(shards, StreamedShards)
    assert [url for url, _ in shards.shards] == [f"pipe:cat {tmp_path}/{number:05}.tar" for number in range(3)]
    assert shards.describe() == "3 streamed shards"


def test_the_identity_changes_with_the_shards_and_their_options(tmp_path: Path) -> None:
    urls = write_shards(tmp_path, [1, 1])
    configs = [
        DataConfig(path=tuple(urls)),
        DataConfig(path=tuple(urls[::-1])),
        DataConfig(path=urls[0]),
        DataConfig(path=tuple(urls), caption_key="text"),
        DataConfig(path=urls[0], mix=(SourceConfig(path=urls[1]),)),
    ]
    identities = [json.dumps(open_pairs(config).identity()) for config in configs]
    assert len(set(identities)) == 5
    assert identities[0] == json.dumps(open_pairs(configs[0]).identity())


def test_pixels_tokens_and_ids_of_a_batch_belong_together(tmp_path: Path, unshuffled: None) -> None:
    (url,) = write_shards(tmp_path, [4])
    batches = take(open_stream(url), 2)
    assert keys_of(batches) == names(range(4))
    for batch, reds in zip(batches, ([0, 1], [2, 3]), strict=True):
        assert batch.pixels[0].dtype == torch.uint8
        assert batch.pixels[0].shape == (2, 3, 4, 4)
        assert [image[0].unique().tolist() for image in batch.pixels[0]] == [[red] for red in reds]
        assert batch.texts[0].tolist() == [[ord(letter) for letter in "thin"]] * 2
        assert batch.ids.tolist() == [key_id(key) for key in batch.keys]
        assert batch.labels.tolist() == [-1, -1]


def test_an_id_is_half_the_hash_of_the_key() -> None:
    # printf 'pipe:cat a.tar/000' | b2sum -l 64 gives 7ed4656d4664cf19.
    assert key_id("pipe:cat a.tar/000") == 0x7ED4656D4664CF19 >> 1
    ids = {key_id(f"pipe:cat a.tar/{number}") for number in range(1000)}
    assert len(ids) == 1000
    assert all(0 <= id < 1 << 63 for id in ids)


def test_equal_keys_have_equal_ids_pass_after_pass_and_another_crop_each_time(tmp_path: Path, unshuffled: None) -> None:
    pixels = [(5 * x, 5 * y, 0) for y in range(48) for x in range(48)]
    image = Image.new("RGB", (48, 48))
    image.putdata(pixels)
    path = write_tar(tmp_path / "0.tar", [("a.png", encode(image, "PNG")), ("a.txt", b"a"), *sample("b")])
    batches = take(open_stream(f"pipe:cat {path}", min_crop=0.2), 3)
    assert {tuple(batch.ids.tolist()) for batch in batches} == {tuple(map(key_id, batches[0].keys))}
    crops = [batch.pixels[0][0] for batch in batches]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(crops, 2))
    assert len({batch.pixels[0][1, 0].unique().item() for batch in batches}) == 1


# The order.


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 1)])
def test_the_order_is_the_same_every_time_with_as_many_readers(tmp_path: Path, world_size: int, workers: int) -> None:
    urls = write_shards(tmp_path, [5, 3, 9, 4])

    def run(seed_free: int) -> list[tuple[tuple[str, ...], list[int], bytes, Any]]:
        options = {"rank": seed_free, "world_size": world_size, "workers": workers, "batch_size": 2 * world_size}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stream, "SHUFFLE_BUFFER", 4)
            batches = take(open_stream(*urls, **options), 12)
        return [(b.keys, b.ids.tolist(), b.pixels[0].numpy().tobytes(), b.place) for b in batches]

    for rank in range(world_size):
        assert run(rank) == run(rank)


def test_samples_of_several_shards_are_shuffled_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 20)
    urls = write_shards(tmp_path, [10] * 8)
    shards = [key.split("/")[-2] for batch in take(open_stream(*urls), 20) for key in batch.keys]
    # Forty samples come without a shuffle from four shards, one after another.
    assert len(list(itertools.groupby(shards))) > 20
    assert len(set(keys_of(take(open_stream(*urls), 30)))) > 40


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 1), (1, 3), (2, 0), (2, 2), (3, 0)])
def test_readers_share_the_shards(tmp_path: Path, unshuffled: None, world_size: int, workers: int) -> None:
    urls = write_shards(tmp_path, [4] * 6)
    readers = world_size * max(1, workers)
    came: dict[int, list[str]] = {}
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "workers": workers, "batch_size": 2 * world_size}
        # Every reader gives two batches per shard, and the readers of a process take turns.
        steps = 2 * -(-6 // readers) * max(1, workers)
        for batch in take(open_stream(*urls, **options), steps):
            assert batch.place is not None
            came.setdefault(batch.place[0], []).extend(keys_of([batch]))
    assert sorted(came) == list(range(readers))
    # Reader r reads the shards at the places r, r + readers, … of the first six.
    first_pass = [key for reader, keys in came.items() for key in keys[: 4 * len(range(reader, 6, readers))]]
    assert sorted(first_pass) == names(range(24))
    shards = [{number // 4 for number in range(24) if f"s{number:04}" in keys[:4]} for keys in came.values()]
    assert all(len(numbers) == 1 for numbers in shards)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 3), (4, 0)])
def test_more_readers_than_shards_read_them_in_turn(
    tmp_path: Path, unshuffled: None, world_size: int, workers: int
) -> None:
    urls = write_shards(tmp_path, [4, 4])
    for rank in range(world_size):
        options = {"rank": rank, "world_size": world_size, "workers": workers, "batch_size": 4 * world_size}
        batches = take(open_stream(*urls, **options), 6)
        assert len(batches) == 6
        assert all(len(set(keys_of([batch]))) == 4 for batch in batches)


def test_an_epoch_reads_each_source_as_often_as_its_weight_says(tmp_path: Path, unshuffled: None) -> None:
    thrice, once = write_shards(tmp_path / "a", [1, 1]), write_shards(tmp_path / "b", [1, 1])
    mix = (SourceConfig(path=tuple(once)),)
    for workers, steps in ((0, 8), (2, 16)):
        feed = open_stream(*thrice, weight=3.0, mix=mix, batch_size=1, workers=workers)
        assert feed.epoch(0) == 0
        batches = take(feed, steps)
        shards = [key.split("cat ")[1].rsplit("/", 1)[0] for batch in batches for key in batch.keys]
        per_epoch = Counter({f"{tmp_path}/a/{n:05}.tar": 3 for n in range(2)})
        per_epoch.update(f"{tmp_path}/b/{n:05}.tar" for n in range(2))
        for start in range(0, steps, 8):
            assert Counter(shards[start : start + 8]) == per_epoch
        assert feed.epoch(steps) == pytest.approx(steps / 8, abs=workers / 8 + 1 / 8)


# After a resume.


def readers_at(urls: list[str], readers: int, places: Mapping[int, int], batch: int = 2) -> list[Feed]:
    """One feed per reader, as of so many processes without loader processes."""
    options = {"batch_size": batch * readers, "world_size": readers, "places": places}
    return [open_stream(*urls, rank=rank, **options) for rank in range(readers)]


def give(feeds: list[Feed], steps: int) -> tuple[list[list[str]], dict[int, int]]:
    """Keys that each reader gave, and what a checkpoint would hold of where they are."""
    given = [keys_of([next(feed) for _ in range(steps)]) for feed in feeds]
    places = {reader: place for feed in feeds for reader, place in feed.places.items()}
    for feed in feeds:
        feed.close()
    return given, places


def finish(feeds: list[Feed], end: int) -> list[str]:
    """Keys until every reader has given all shards before a place."""
    given = []
    for feed in feeds:
        while min(feed.places.values()) < end:
            given += keys_of([next(feed)])
        feed.close()
    return given


RESUMED = [(1, 1), (3, 3), (1, 3), (3, 1), (2, 4), (4, 2)]


@pytest.mark.parametrize(("before", "after"), RESUMED)
@pytest.mark.parametrize(
    ("buffer", "sizes"),
    [(7, [6] * 8), (0, [1, 9, 2, 14, 3, 1, 8, 2]), (5, [1, 9, 2, 14, 3, 1, 8, 2])],
    ids=["even, shuffled", "uneven", "uneven, shuffled"],
)
def test_no_sample_is_lost_over_a_resume_with_any_number_of_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, sizes: list[int], before: int, after: int
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", buffer)
    # Opening a file is faster than starting a program.
    urls = [url.replace("pipe:cat ", "file://") for url in write_shards(tmp_path, sizes)]
    everything = names(range(sum(sizes)))
    for steps in (1, 4):
        given, places = give(readers_at(urls, before, {}), steps)
        assert sorted(places) == list(range(before))
        resumed = readers_at(urls, after, places)
        rest = finish(resumed, end=len(sizes))
        assert set(everything) <= {*itertools.chain(*given), *rest}, (steps, places)


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_without_a_shuffle_at_most_the_shard_in_each_readers_hands_comes_again(
    tmp_path: Path, unshuffled: None, before: int, after: int
) -> None:
    # More of them than have to come, so that none comes from the second pass.
    urls = [url.replace("pipe:cat ", "file://") for url in write_shards(tmp_path, [6] * 15)]
    for steps in (1, 2, 3, 5):
        given, places = give(readers_at(urls, before, {}), steps)
        # Shards of three batches: after 1, 2 and 3 the first is in hand (whole or not), after 5 the second.
        assert places == {reader: reader + before * (steps == 5) for reader in range(before)}
        rest = Counter(finish(readers_at(urls, after, places), end=9))
        again = [key for keys in given for key in keys if rest[key]]
        assert len(again) <= 6 * before
        whole = {keys[number] for keys in given for number in range(6 * (steps == 5))}
        assert not whole & set(again)
        assert max(rest.values()) == 1


@pytest.mark.parametrize("readers", [1, 3])
def test_with_a_shuffle_what_was_given_whole_before_the_place_does_not_come_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, readers: int
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 8)
    urls = [url.replace("pipe:cat ", "file://") for url in write_shards(tmp_path, [6] * 80)]
    given, places = give(readers_at(urls, readers, {}), 60 // readers)
    assert min(places.values()) > 2
    rest = Counter(finish(readers_at(urls, readers, places), end=40))
    assert max(rest.values()) == 1  # no second pass yet
    again = [key for key in itertools.chain(*given) if rest[key]]
    # 120 were given; each reader holds 8, and each sample that it holds waits for 8 draws on average.
    assert 0 < len(again) <= readers * (6 + 4 * 8)
    order = StreamedShards([SourceConfig(path=tuple(urls))]).mixture(seed=3).between(0, 40)
    whole = {key for _, shard in order for key in names(range(6 * shard, 6 * shard + 6))}
    assert whole <= {*itertools.chain(*given), *rest}


def test_a_chain_of_resumes_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 3)
    urls = [url.replace("pipe:cat ", "file://") for url in write_shards(tmp_path, [5] * 20)]
    places: dict[int, int] = {}
    seen: set[str] = set()
    for readers in (1, 3, 3, 2, 4, 1):
        given, places = give(readers_at(urls, readers, places), 4)
        seen |= set(itertools.chain(*given))
        assert len({place % readers for place in places.values()}) == readers
    seen |= set(finish(readers_at(urls, 2, places), end=20))
    assert seen == set(names(range(100)))


def test_loader_processes_resume_where_they_were(tmp_path: Path, unshuffled: None) -> None:
    urls = write_shards(tmp_path, [4] * 9)
    whole = open_stream(*urls, workers=3)
    first = [next(whole) for _ in range(6)]  # each of the readers has given its first shard, and holds it
    places = dict(whole.places)
    rest = take(whole, 12)
    assert places == {0: 0, 1: 1, 2: 2}
    resumed = open_stream(*urls, workers=3, places=places)
    assert [batch.keys for batch in take(resumed, 18)] == [batch.keys for batch in [*first, *rest]]
    places = {0: 3, 1: 4, 2: 5}  # one batch further
    resumed = open_stream(*urls, workers=3, places=places)
    assert resumed.places == places
    assert [batch.keys for batch in take(resumed, 12)] == [batch.keys for batch in rest]


# What is wrong.


def cut_at(path: Path, length: int) -> str:
    cut = path.with_name(f"cut{length}.tar")
    cut.write_bytes(path.read_bytes()[:length])
    return f"file://{cut}"


CUTS = [1, 511, 512, 513, 1024, 1030, 1536, 2047, 2048, 2100, 2560, 3072, 4095, 4096, 4400, 4608, 5000, 6144]
"""Bytes of three samples of four blocks each: 0, 2048 and 4096 begin one, 6144 is the end of the last."""


@pytest.mark.parametrize("length", [0, *CUTS])
def test_a_stream_that_is_cut_anywhere_is_counted_as_damaged(tmp_path: Path, length: int) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b"), *sample("c")])
    url = cut_at(path, length)
    assert str(scan_tar(Path(url.removeprefix("file://"))).damage)  # as the indexed reading says
    _, skipped = read(url)
    assert [skip.key for skip in skipped if skip.cause == "damaged shard"] == [url]


@pytest.mark.parametrize("length", CUTS)
def test_a_stream_that_is_cut_gives_the_samples_before_the_cut(tmp_path: Path, length: int) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b"), *sample("c")])
    assert len(plain_png(0)) < 512
    pairs, _ = read(cut_at(path, length))
    expected = [f"thing {key}" for key, end in zip("abc", (1536 + 7, 3584 + 7, 5632 + 7), strict=True) if length >= end]
    assert [pair.captions for pair in pairs] == [(caption,) for caption in expected]


def test_a_whole_stream_has_no_damage_with_any_padding(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b")])
    for length in (2 * 2048 + 512, 2 * 2048 + 1024, path.stat().st_size):
        pairs, skipped = read(cut_at(path, length))
        assert (len(pairs), skipped) == (2, [])
    padded = tmp_path / "padded.tar"
    padded.write_bytes(path.read_bytes() + bytes(1_000_000))
    for url in (f"file://{padded}", f"pipe:cat {padded}"):
        pairs, skipped = read(url)
        assert (len(pairs), skipped) == (2, []), url


def with_header(path: Path, block: int, field: slice, value: bytes) -> Path:
    """A copy of a tar of which a field of one header is replaced, with a checksum that fits."""
    content = bytearray(path.read_bytes())
    header = bytearray(content[512 * block : 512 * (block + 1)])
    header[field] = value
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    content[512 * block : 512 * (block + 1)] = header
    (changed := path.with_name("changed.tar")).write_bytes(content)
    return changed


SIZE, TYPE = slice(124, 136), slice(156, 157)


@pytest.mark.parametrize("kind", [b"S", b"x", b"g", b"L", b"K", b"1", b"5", b"?"])
def test_a_member_of_another_kind_hides_no_other_sample(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b"), *sample("c")])
    pairs, _ = read(f"file://{with_header(path, 4, TYPE, kind)}")
    assert pairs[0].captions == ("thing a",)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (SIZE, b"\x80" + (1 << 62).to_bytes(11, "big")),
        (SIZE, b"\x80" + (1 << 80).to_bytes(11, "big")),
        (SIZE, b"\xff" * 11 + b"\0"),
        (SIZE, b"77777777777\0"),
        (SIZE, b"not a number"),
        (TYPE, b"2"),  # a link has no content: its bytes would be the next header
    ],
    ids=["2 to the 62", "2 to the 80", "negative", "8 GiB", "no number", "link"],
)
def test_a_header_with_absurd_numbers_is_damage_and_no_error(tmp_path: Path, field: slice, value: bytes) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b"), *sample("c")])
    pairs, skipped = read(f"file://{with_header(path, 4, field, value)}")  # of the second sample's image
    assert pairs[0].captions == ("thing a",)
    assert ("damaged shard", f"file://{tmp_path}/changed.tar") in [(skip.cause, skip.key) for skip in skipped]


def test_a_header_that_is_garbage_is_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b"), *sample("c")])
    content = bytearray(path.read_bytes())
    content[2048:2560] = os.urandom(512)
    path.write_bytes(content)
    pairs, skipped = read(f"file://{path}")
    assert [pair.captions for pair in pairs] == [("thing a",)]
    assert str(scan_tar(path).damage)  # the indexed reading says so
    assert [skip.cause for skip in skipped] == ["damaged shard"]


def test_any_flipped_byte_leaves_the_other_samples_and_raises_nothing(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", [*sample("a"), *sample("b")])
    content = path.read_bytes()
    for place in range(2048, 4096 + 512, 23):
        flipped = bytearray(content)
        flipped[place] ^= 0xFF
        path.write_bytes(flipped)
        pairs, _ = read(f"file://{path}")
        assert pairs[0].captions == ("thing a",)


def test_each_thing_that_is_wrong_is_counted_with_its_cause_and_the_rest_comes(
    tmp_path: Path, unshuffled: None, capfd: pytest.CaptureFixture[str]
) -> None:
    good = write_tar(tmp_path / "good.tar", [*sample("g1"), *sample("g2")])
    cut = write_tar(tmp_path / "cut.tar", [*sample("c1"), *sample("c2"), ("c3.png", bytes(5000))])
    cut.write_bytes(cut.read_bytes()[: 2 * 2048 + 1000])
    (tmp_path / "text.tar").write_text("no tar at all\n" * 100)
    wrong = [
        *(*sample("w1"), ("w2.png", plain_png(0)), ("w3.txt", b"no picture"), ("w4.png", b"no image")),
        *(("w4.txt", b"thing"), ("w5.png", b""), ("w5.txt", b"thing"), ("w6.png", plain_png(0)), ("w6.txt", b" \n")),
        *(("w7.png", plain_png(0)), ("w7.txt", b"\xff\xfe"), *sample("w8"), *sample("w1"), *sample("w8")),
    ]
    write_tar(tmp_path / "wrong.tar", wrong)
    write_tar(tmp_path / "empty.tar", [])
    urls = [f"pipe:cat {tmp_path}/{name}.tar" for name in ("good", "cut", "text", "wrong", "empty", "missing")]
    urls += ["pipe:false", f"pipe:cat {good}; sleep 0.1; exit 3", f"file://{tmp_path}/nothing.tar"]
    cat = f"pipe:cat {tmp_path}"
    expected = {
        f"{cat}/cut.tar": "damaged shard",
        f"{cat}/text.tar": "damaged shard",
        f"{cat}/empty.tar": "damaged shard",
        f"{cat}/missing.tar": "damaged shard",
        "pipe:false": "damaged shard",
        f"pipe:cat {good}; sleep 0.1; exit 3": "damaged shard",
        f"file://{tmp_path}/nothing.tar": "damaged shard",
        f"{cat}/wrong.tar/w2": "no caption",
        f"{cat}/wrong.tar/w3": "no image",
        f"{cat}/wrong.tar/w4": "undecodable image",
        f"{cat}/wrong.tar/w5": "empty image",
        f"{cat}/wrong.tar/w6": "empty caption",
        f"{cat}/wrong.tar/w7": "unreadable caption",
        f"{cat}/wrong.tar/w1": "duplicate key",
        f"{cat}/wrong.tar/w8": "duplicate key",
    }
    for workers in (0, 1):
        # Nine shards hold g1 and g2 twice, c1 and c2, w1 and w8: after 14 samples the second pass has begun.
        batches = take(open_stream(*urls, batch_size=1, workers=workers), 14)
        assert set(keys_of(batches)) - {"c2"} == {"g1", "g2", "c1", "w1", "w8"}  # c2: see the test of cuts
        skipped = [Skip(*skip) for batch in batches for skip in batch.skipped]
        assert {skip.key: skip.cause for skip in skipped} == expected
        # Two passes at most, of which the end of the second may not have come.
        assert all(count <= 2 for count in Counter(skip.key for skip in skipped).values())
        assert all(skip.message and "\n" not in skip.message for skip in skipped)
    assert "No such file" in capfd.readouterr().err


def test_a_download_that_fails_or_breaks_off_is_a_damaged_shard(tmp_path: Path, server: str) -> None:
    content = os.urandom(300_000)
    write_tar(tmp_path / "0.tar", [*sample("a"), ("b.png", content), ("b.txt", b"thing"), *sample("c")])
    assert read(f"{server}/0.tar")[1] == []
    pairs, skipped = read(f"{server}/cut/0.tar")
    assert [pair.captions for pair in pairs] == [("thing a",)]
    assert [skip[:2] for skip in skipped] == [(f"{server}/cut/0.tar", "damaged shard")]
    pairs, skipped = read(f"{server}/nothing.tar")
    assert pairs == []
    assert [skip[:2] for skip in skipped] == [(f"{server}/nothing.tar", "damaged shard")]
    assert "22" in skipped[0].message  # curl's status of an HTTP error


def test_a_name_that_is_no_utf8_is_a_key_like_others(tmp_path: Path, unshuffled: None) -> None:
    members = [("caf\udce9.png", plain_png(0)), ("caf\udce9.txt", b"thing"), *sample("b")]
    with tarfile.open(tmp_path / "0.tar", "w", errors="surrogateescape") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    indexed = open_pairs(DataConfig(path=str(tmp_path / "0.tar")))
    assert isinstance(indexed, PairSet)
    assert indexed.read(0).key.endswith("/caf\N{REPLACEMENT CHARACTER}")
    (batch,) = take(open_stream(f"pipe:cat {tmp_path}/0.tar"), 1)
    assert len(set(batch.ids.tolist())) == 2
    json.dumps(batch.keys).encode()
    assert [key.encode() for key in batch.keys]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("urls", "words"),
    [
        (["pipe:false", "pipe:exit 5", "pipe:exit 6"], "damaged|cannot be read|exit"),
        (["file:///no/such/{0..3}.tar"], "No such file"),
    ],
)
def test_a_run_whose_shards_all_fail_stops(urls: list[str], words: str, workers: int) -> None:
    begin = time.monotonic()
    feed = open_stream(*urls, workers=workers)
    with pytest.raises(RunStopped, match=rf"20 streamed shards in a row gave no sample: .*({words})"):
        next(feed)
    assert time.monotonic() - begin < 20
    gc.collect()  # the exception holds the loader; test_loader_processes.py is about that
    feed.close()
    assert gone_within(5)


def test_what_nothing_opens_is_refused_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"nothing opens s3:// here.*pipe:aws s3 cp s3://bucket/\{0\.\.3\}\.tar -"):
        open_stream("s3://bucket/{0..3}.tar")


def test_a_run_whose_images_are_all_unusable_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 10)
    members = [(f"{n}.{kind}", content) for n in range(10) for kind, content in (("png", b"no"), ("txt", b"thing"))]
    url = f"file://{write_tar(tmp_path / '0.tar', members)}"
    shards, original = itertools.count(1), read_shard

    def counted(*arguments: Any) -> Iterator[Any]:
        assert next(shards) < 60, "goes on for ever"
        return original(*arguments)

    monkeypatch.setattr(stream, "read_shard", counted)
    with pytest.raises(RunStopped, match=r"undecodable|cannot be decoded"):
        next(open_stream(url))


def test_a_caption_key_that_no_sample_has_stops_the_run(tmp_path: Path, unshuffled: None) -> None:
    record = [("0.png", plain_png(0)), ("0.json", b'{"text": "thing"}')]
    url = f"file://{write_tar(tmp_path / '0.tar', record)}"
    with pytest.raises(RunStopped, match=r"no key 'caption', only \['text'\]; see data\.caption_key"):
        next(open_stream(url, caption_key="caption"))


# What is refused.


@pytest.mark.parametrize("others", ["shards", "table", "mix"])
def test_local_and_remote_shards_together_are_refused(tmp_path: Path, others: str) -> None:
    (url,) = write_shards(tmp_path, [2])
    table = SourceConfig(path="pairs.csv", format="csv", image_column="file", caption_key="text")
    config = {
        "shards": DataConfig(path=(url, str(tmp_path))),
        "table": DataConfig(path=url, mix=(table,)),
        "mix": DataConfig(path=str(tmp_path), mix=(SourceConfig(path=url),)),
    }[others]
    with pytest.raises(ValueError, match=r"data\.path and data\.mix name shards behind URLs or pipes and local data"):
        open_pairs(config)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (url,) = write_shards(tmp_path, [2])
    objective = ObjectiveConfig(info_nce=InfoNCETerm(weight=1.0))
    config = TrainConfig(data=DataConfig(path=url, num_workers=0), batch_size=8, steps=2, objective=objective)
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 3)
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match=r"batch_size 8 .* 3 processes"):
        open_feed(open_pairs(config.data), config, VIEWS)
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    (batch,) = take(open_feed(open_pairs(config.data), config, VIEWS, places={0: 5, 1: 6, 2: 7, 3: 8}), 1)
    assert len(batch.keys) == 2
    assert batch.place is not None
    assert batch.place[0] == 0
    assert batch.place[1] >= 5


# What is left behind.


def gone_within(seconds: float) -> bool:
    end = time.monotonic() + seconds
    while multiprocessing.active_children() and time.monotonic() < end:
        time.sleep(0.01)
    return not multiprocessing.active_children()


def running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_stream_leaves_no_program_thread_or_process(tmp_path: Path, unshuffled: None, workers: int) -> None:
    # A megabyte after the first sample: the programs that send it wait for a reader.
    members = [*sample("a"), *sample("b"), ("c.png", bytes(1 << 20)), ("c.txt", b"thing")]
    path = write_tar(tmp_path / "0.tar", members)
    (tmp_path / "pids").mkdir()
    before = threading.active_count()
    feed = open_stream(f"pipe:touch {tmp_path}/pids/$$; exec cat {path}", batch_size=1, workers=workers)
    next(feed)
    programs = [int(file.name) for file in (tmp_path / "pids").iterdir()]
    assert programs
    feed.close()
    end = time.monotonic() + 10
    while any(map(running, programs)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not any(map(running, programs))
    assert gone_within(5)
    while threading.active_count() > before and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() == before
