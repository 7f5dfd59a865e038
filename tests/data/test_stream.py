"""Shards behind pipes and URLs: their pairs, the order, the resume, and what is wrong with them."""

import contextlib
import functools
import gc
import http.server
import itertools
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from clipkd.config.data import DataConfig, SourceConfig
from clipkd.data import stream
from clipkd.data.loader import Feed
from clipkd.data.open import open_feed, open_pairs
from clipkd.data.skips import Skip
from clipkd.data.sources import Pair
from clipkd.data.stream import StreamedShards, key_id, read_shard
from clipkd.errors import RunStopped
from clipkd.views import Batch, Views
from tests.data import samples
from tests.data.samples import (
    as_process,
    coordinates,
    encode,
    open_set,
    pair_members,
    plain_png,
    take,
    train_config,
    view_spec,
    write_tar,
)

# Three loader processes are the point, also on a machine of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")

VIEWS = Views([view_spec(4)])


def write_shards(folder: Path, sizes: list[int], scheme: str = "pipe:cat ") -> list[str]:
    """Shards of so many samples; returns what to set data.path to."""
    return [f"{scheme}{path}" for path in samples.write_shards(folder, sizes)]


def open_stream(
    *urls: str,
    batch_size: int = 2,
    workers: int = 0,
    places: Mapping[int, int] | None = None,
    process: tuple[int, int] = (0, 1),
    **options: Any,
) -> Feed[Batch]:
    """Batches of one process of a run. process: its rank and their number."""
    data = DataConfig(path=urls, num_workers=workers, **options)
    with as_process(*process):
        return open_feed(open_pairs(data), train_config(data, batch_size=batch_size, seed=3), VIEWS, places=places)


def keys_of(batches: list[Batch]) -> list[str]:
    """Without their shards: keys are unique here."""
    return [key.rsplit("/", 1)[1] for batch in batches for key in batch.keys]


def names(numbers: range) -> list[str]:
    return [f"s{number:04}" for number in numbers]


def read(url: str, **options: Any) -> tuple[list[Any], list[Skip]]:
    found = list(read_shard(url, SourceConfig(path=url, **options)))
    return [pair for pair in found if isinstance(pair, Pair)], [skip for skip in found if isinstance(skip, Skip)]


@pytest.fixture
def unshuffled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples come in the order of their shard: the order is then that of the shards."""
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 0)


# Pairs.


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


@pytest.mark.parametrize("scheme", ["pipe", "file", "http"])
def test_a_stream_gives_the_pairs_of_the_indexed_reading(
    tmp_path: Path, scheme: str, request: pytest.FixtureRequest
) -> None:
    record, large = json.dumps({"caption": ["one", " two "], "class": 7}).encode(), os.urandom(3_000_000)
    members = [
        *(("a.png", plain_png(1)), ("a.json", record)),
        *(("b.JSON", record), ("b.JPG", large), ("b.npy", b"\0" * 700)),
        *(("some/folder/c.x.png", plain_png(9)), ("some/folder/c.png", plain_png(3)), ("some/folder/c.json", record)),
        *(("d.jpeg", plain_png(4)), ("d.webp", plain_png(5)), ("d.json", b'{"caption": "x", "class": null}')),
    ]
    path, options = write_tar(tmp_path / "0.tar", members), {"caption_key": "caption", "label_key": "class"}
    url = {"pipe": f"pipe:cat {path}", "file": f"file://{path}"}.get(scheme)
    url = url or f"{request.getfixturevalue('server')}/0.tar"
    streamed, skipped = read(url, **options)
    indexed = open_set(path, **options)
    assert len(streamed) == len(indexed) == 4
    for number, pair in enumerate(streamed):
        expected = indexed.read(number)
        assert (pair.image, pair.captions, pair.label) == (expected.image, expected.captions, expected.label)
        assert pair.key.removeprefix(url) == expected.key.removeprefix(str(path))
    assert [pair.key for pair in streamed] == [f"{url}/{key}" for key in ("a", "b", "some/folder/c", "d")]
    assert [pair.captions for pair in streamed] == [("one", "two")] * 3 + [("x",)]
    assert [pair.label for pair in streamed] == [7, 7, 7, -1]
    assert [streamed[0].image, streamed[1].image, skipped] == [plain_png(1), large, []]


def test_the_identity_changes_with_the_shards_and_their_options() -> None:
    urls = (first, second) = ("pipe:cat 0.tar", "pipe:cat 1.tar")
    configs = [
        *(DataConfig(path=urls), DataConfig(path=urls[::-1]), DataConfig(path=first)),
        *(DataConfig(path=urls, caption_key="text"), DataConfig(path=first, mix=(SourceConfig(path=second),))),
    ]
    identities = [json.dumps(open_pairs(config).identity()) for config in configs]
    assert len(set(identities)) == 5
    assert identities[0] == json.dumps(open_pairs(DataConfig(path="pipe:cat {0..1}.tar")).identity())


def test_pixels_tokens_and_ids_of_a_batch_belong_together(tmp_path: Path, unshuffled: None) -> None:
    batches = take(open_stream(*write_shards(tmp_path, [4])), 2)
    assert keys_of(batches) == names(range(4))
    for batch, reds in zip(batches, ([0, 1], [2, 3]), strict=True):
        assert (batch.pixels[0].dtype, batch.pixels[0].shape) == (torch.uint8, (2, 3, 4, 4))
        assert [image[0].unique().tolist() for image in batch.pixels[0]] == [[red] for red in reds]
        assert batch.texts[0].tolist() == [[ord(letter) for letter in "thin"]] * 2
        assert batch.ids.tolist() == [key_id(key) for key in batch.keys]
        assert batch.labels.tolist() == [-1, -1]


def test_an_id_is_half_the_hash_of_the_key() -> None:
    # printf 'pipe:cat a.tar/000' | b2sum -l 64 gives 7ed4656d4664cf19.
    assert key_id("pipe:cat a.tar/000") == 0x7ED4656D4664CF19 >> 1


def test_a_sample_keeps_its_id_and_gets_another_crop_in_every_pass(tmp_path: Path, unshuffled: None) -> None:
    members = [("a.png", encode(coordinates(), "PNG")), ("a.txt", b"a"), *pair_members([1])]
    batches = take(open_stream(f"pipe:cat {write_tar(tmp_path / '0.tar', members)}", min_crop=0.2), 3)
    assert {tuple(batch.ids.tolist()) for batch in batches} == {tuple(map(key_id, batches[0].keys))}
    crops = [batch.pixels[0][0] for batch in batches]
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(crops, 2))


def test_a_batch_counts_every_sample_that_was_read_ahead_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 20)
    members = [(f"bad{number}.png", plain_png(0)) for number in range(3)] + pair_members(range(40))
    batches = take(open_stream(f"pipe:cat {write_tar(tmp_path / '0.tar', members)}"), 3)
    # Three without a caption, twenty into the buffer and two to draw; then two for each batch.
    assert [(batch.num_read, len(batch.skipped), batch.shards_opened) for batch in batches] == [
        *((25, 3, 1), (2, 0, 0), (2, 0, 0))
    ]


# The order.


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 1)])
def test_the_order_is_the_same_every_time_with_as_many_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world_size: int, workers: int
) -> None:
    urls = write_shards(tmp_path, [5, 3, 9, 4])
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 4)

    def run(rank: int) -> list[tuple[tuple[str, ...], list[int], bytes, Any]]:
        feed = open_stream(*urls, process=(rank, world_size), workers=workers, batch_size=2 * world_size)
        return [(b.keys, b.ids.tolist(), b.pixels[0].numpy().tobytes(), b.place) for b in take(feed, 12)]

    for rank in range(world_size):
        assert run(rank) == run(rank)


def test_samples_of_several_shards_are_shuffled_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 20)
    shards = [
        key.split("/")[-2] for batch in take(open_stream(*write_shards(tmp_path, [10] * 8)), 20) for key in batch.keys
    ]
    # Forty samples come without a shuffle from four shards, one after another.
    assert len(list(itertools.groupby(shards))) > 20


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 0), (2, 2), (3, 0), (8, 0)])
def test_readers_share_the_shards(tmp_path: Path, unshuffled: None, world_size: int, workers: int) -> None:
    urls = write_shards(tmp_path, [4] * 6)
    readers = world_size * max(1, workers)
    came: dict[int, list[str]] = {}
    for rank in range(world_size):
        # Every reader gives two batches per shard, and the readers of a process take turns.
        steps = 2 * -(-6 // readers) * max(1, workers)
        for batch in take(
            open_stream(*urls, process=(rank, world_size), workers=workers, batch_size=2 * world_size), steps
        ):
            assert batch.place is not None
            came.setdefault(batch.place[0], []).extend(keys_of([batch]))
    assert sorted(came) == list(range(readers))  # more readers than shards begin the second pass
    # Reader r reads the shards at the places r, r + readers, … of the first six.
    first_pass = [key for reader, keys in came.items() for key in keys[: 4 * len(range(reader, 6, readers))]]
    assert sorted(first_pass) == names(range(24))
    shards = [{number // 4 for number in range(24) if f"s{number:04}" in keys[:4]} for keys in came.values()]
    assert all(len(numbers) == 1 for numbers in shards)


@pytest.mark.parametrize(("workers", "steps"), [(0, 4), (2, 8)])
def test_an_epoch_reads_each_source_as_often_as_its_weight_says(
    tmp_path: Path, unshuffled: None, workers: int, steps: int
) -> None:
    thrice, once = write_shards(tmp_path / "a", [1, 1]), write_shards(tmp_path / "b", [1, 1])
    mix = (SourceConfig(path=tuple(once)),)
    feed = open_stream(*thrice, weight=3.0, mix=mix, workers=workers)
    assert feed.epoch(0) == 0
    shards = [key.split("cat ")[1].rsplit("/", 1)[0] for batch in take(feed, steps) for key in batch.keys]
    per_epoch = Counter(
        {f"{tmp_path}/{folder}/{n:05}.tar": times for folder, times in (("a", 3), ("b", 1)) for n in (0, 1)}
    )
    for start in range(0, 2 * steps, 8):
        assert Counter(shards[start : start + 8]) == per_epoch
    assert feed.epoch(steps) == pytest.approx(2 * steps / 8, abs=(2 * workers + 1) / 8)


# After a resume.


def readers_at(urls: list[str], readers: int, places: Mapping[int, int]) -> list[Feed[Batch]]:
    """One feed per reader, as of so many processes without loader processes."""
    return [
        open_stream(*urls, process=(rank, readers), batch_size=2 * readers, places=places) for rank in range(readers)
    ]


def give(feeds: list[Feed[Batch]], steps: int) -> tuple[list[list[str]], dict[int, int]]:
    """Keys that each reader gave, and the positions that a checkpoint would hold."""
    given = [keys_of(take(feed, steps)) for feed in feeds]
    return given, {reader: place for feed in feeds for reader, place in feed.places.items()}


def finish(feeds: list[Feed[Batch]], end: int) -> list[str]:
    """Keys until every reader has given all shards before a place."""
    given = []
    for feed in feeds:
        with feed:
            while min(feed.places.values()) < end:
                given += keys_of([next(feed)])
    return given


RESUMED = [(1, 1), (3, 3), (1, 3), (3, 1), (2, 4), (4, 2)]
"""Readers before and after."""


@pytest.mark.parametrize(("before", "after"), RESUMED)
@pytest.mark.parametrize(("buffer", "sizes"), [(7, [6] * 8), (5, [1, 9, 2, 14, 3, 1, 8, 2])])
def test_no_sample_is_lost_over_a_resume_with_any_number_of_readers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, buffer: int, sizes: list[int], before: int, after: int
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", buffer)
    urls = write_shards(tmp_path, sizes, "file://")  # faster than starting a program
    for steps in (1, 4):
        given, places = give(readers_at(urls, before, {}), steps)
        assert sorted(places) == list(range(before))
        rest = finish(readers_at(urls, after, places), end=len(sizes))
        assert set(names(range(sum(sizes)))) <= {*itertools.chain(*given), *rest}, (steps, places)


@pytest.mark.parametrize(("before", "after"), RESUMED)
def test_without_a_shuffle_at_most_the_shard_in_each_readers_hands_comes_again(
    tmp_path: Path, unshuffled: None, before: int, after: int
) -> None:
    # More shards than have to come, so that none comes from the second pass.
    urls = write_shards(tmp_path, [6] * 15, "file://")
    for steps in (1, 2, 3, 5):
        given, places = give(readers_at(urls, before, {}), steps)
        # Shards of three batches: after 1, 2 and 3 the first is in hand (complete or not), after 5 the second.
        assert places == {reader: reader + before * (steps == 5) for reader in range(before)}
        rest = Counter(finish(readers_at(urls, after, places), end=9))
        again = [key for keys in given for key in keys if rest[key]]
        assert len(again) <= 6 * before
        assert not {key for keys in given for key in keys[: 6 * (steps == 5)]} & set(again)
        assert max(rest.values()) == 1


def test_loader_processes_resume_where_they_were(tmp_path: Path, unshuffled: None) -> None:
    urls = write_shards(tmp_path, [4] * 9)
    with open_stream(*urls, workers=3) as feed:
        first = [next(feed) for _ in range(6)]  # each of the readers has given its first shard, and holds it
        places = dict(feed.places)
        rest = [next(feed) for _ in range(12)]
    assert places == {0: 0, 1: 1, 2: 2}
    resumed = open_stream(*urls, workers=3, places=places)
    assert [batch.keys for batch in take(resumed, 18)] == [batch.keys for batch in [*first, *rest]]
    resumed = open_stream(*urls, workers=3, places={0: 3, 1: 4, 2: 5})  # one batch further
    assert [batch.keys for batch in take(resumed, 12)] == [batch.keys for batch in rest]


# Damage. test_damaged_shards.py has the damage inside a tar.


def test_padding_of_any_length_is_no_damage(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "0.tar", pair_members(range(2)))
    content = path.read_bytes()
    for length in (2 * 2048 + 512, 2 * 2048 + 1024, len(content), 1_000_000):
        path.write_bytes(content[:length].ljust(length, b"\0"))
        for url in (f"file://{path}", f"pipe:cat {path}"):
            pairs, skipped = read(url)
            assert (len(pairs), skipped) == (2, []), (url, length)


def test_each_problem_is_counted_with_its_cause_and_the_rest_comes(
    tmp_path: Path, unshuffled: None, capfd: pytest.CaptureFixture[str]
) -> None:
    good = write_tar(tmp_path / "good.tar", pair_members([1, 2], "g{}"))
    cut = write_tar(tmp_path / "cut.tar", [*pair_members([1, 2], "c{}"), ("c3.png", bytes(5000))])
    cut.write_bytes(cut.read_bytes()[: 2 * 2048 + 1000])
    (tmp_path / "text.tar").write_text("no tar at all\n" * 100)
    wrong = [
        *(*pair_members([1], "w{}"), ("w2.png", plain_png(0)), ("w3.txt", b"no picture"), ("w4.png", b"no image")),
        *(("w4.txt", b"thing"), ("w5.png", b""), ("w5.txt", b"thing"), ("w6.png", plain_png(0)), ("w6.txt", b" \n")),
        *(("w7.png", plain_png(0)), ("w7.txt", b"\xff\xfe"), *pair_members([8, 1, 8], "w{}")),
    ]
    write_tar(tmp_path / "wrong.tar", wrong)
    write_tar(tmp_path / "empty.tar", [])
    cat = f"pipe:cat {tmp_path}"
    damaged = [f"{cat}/{name}.tar" for name in ("cut", "text", "empty", "missing")]
    damaged += ["pipe:false", f"pipe:cat {good}; sleep 0.1; exit 3", f"file://{tmp_path}/nothing.tar"]
    causes = ["no caption", "no image", "undecodable image", "empty image", "empty caption", "unreadable caption"]
    expected = dict.fromkeys(damaged, "damaged shard")
    expected |= {f"{cat}/wrong.tar/w{number}": cause for number, cause in enumerate(causes, 2)}
    expected |= {f"{cat}/wrong.tar/w{number}": "duplicate key" for number in (1, 8)}
    for workers in (0, 1):
        # Nine shards hold g1 and g2 twice, c1 and c2, w1 and w8: after 14 samples the second pass has begun.
        batches = take(open_stream(f"{cat}/good.tar", f"{cat}/wrong.tar", *damaged, workers=workers), 7)
        assert set(keys_of(batches)) == {"g1", "g2", "c1", "c2", "w1", "w8"}
        skipped = [Skip(*skip) for batch in batches for skip in batch.skipped]
        assert {skip.key: skip.cause for skip in skipped} == expected
        # Two passes at most, of which the end of the second may not have come.
        assert all(count <= 2 for count in Counter(skip.key for skip in skipped).values())
        assert all(skip.message and "\n" not in skip.message for skip in skipped)
    assert "No such file" in capfd.readouterr().err


def test_a_download_that_fails_or_breaks_off_is_a_damaged_shard(tmp_path: Path, server: str) -> None:
    large = [("b.png", os.urandom(300_000)), ("b.txt", b"thing")]
    write_tar(tmp_path / "0.tar", [*pair_members([1]), *large, *pair_members([3])])
    pairs, skipped = read(f"{server}/cut/0.tar")
    assert [pair.captions for pair in pairs] == [("thing 1",)]
    assert [skip[:2] for skip in skipped] == [(f"{server}/cut/0.tar", "damaged shard")]
    pairs, skipped = read(f"{server}/nothing.tar")
    assert (pairs, [skip[:2] for skip in skipped]) == ([], [(f"{server}/nothing.tar", "damaged shard")])
    assert "22" in skipped[0].message  # curl's status of an HTTP error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("url", "words"), [("pipe:exit 5", "status 5"), ("file:///no/such/{0..3}.tar", "No such file")]
)
def test_a_run_whose_shards_all_fail_stops(url: str, words: str, workers: int) -> None:
    feed = open_stream(url, workers=workers)
    with pytest.raises(RunStopped, match=rf"20 streamed shards in a row gave no sample: .*{words}"):
        next(feed)
    gc.collect()  # the exception holds the loader; test_loader_processes.py is about that
    feed.close()
    assert within(10, lambda: not multiprocessing.active_children())


def test_a_run_without_usable_samples_stops(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_BUFFER", 10)
    images = [(f"{n}.{kind}", content) for n in range(10) for kind, content in (("png", b"no"), ("txt", b"thing"))]
    with pytest.raises(RunStopped, match=r"100 samples in a row cannot be used.*cannot be decoded"):
        next(open_stream(f"file://{write_tar(tmp_path / '0.tar', images)}"))


def test_impossible_configurations_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s3:// cannot be opened.*pipe:aws s3 cp s3://bucket/\{0\.\.3\}\.tar -"):
        open_stream("s3://bucket/{0..3}.tar")
    with pytest.raises(ValueError, match=r"batch_size 8 .* 3 processes"):
        open_stream("pipe:cat 0.tar", batch_size=8, process=(0, 3))
    pairs = open_pairs(DataConfig(path=("https://host/a.tar", "gs://bucket/{0..3}.tar")))
    assert isinstance(pairs, StreamedShards)
    assert pairs.describe() == "5 streamed shards"


# Programs and processes.


def within(seconds: float, condition: Any) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_closed_stream_leaves_no_program_thread_or_process(tmp_path: Path, unshuffled: None, workers: int) -> None:
    # A megabyte after the first samples: the programs that send it wait for a reader.
    large = [(f"{key}.{end}", bytes(1 << 20)) for key in "cd" for end in ("png", "txt")]
    path = write_tar(tmp_path / "0.tar", [*pair_members(range(2)), *large])
    (tmp_path / "pids").mkdir()
    before = threading.active_count()
    feed = open_stream(f"pipe:touch {tmp_path}/pids/$$; exec cat {path}", workers=workers)
    next(feed)
    programs = [int(file.name) for file in (tmp_path / "pids").iterdir()]
    assert programs
    feed.close()
    assert within(30, lambda: not any(map(running, programs)))
    assert within(30, lambda: not multiprocessing.active_children())
    assert within(30, lambda: threading.active_count() == before)
