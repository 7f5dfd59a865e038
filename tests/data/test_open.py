"""An epoch uses every sample once, by key, for any shards, processes and loader processes.

Run as a program, this file is one of two real processes: test_open.py RANK FOLDER.
"""

import hashlib
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clipkd.config.data import DataConfig
from clipkd.data import tar_index
from clipkd.data.loader import Feed
from clipkd.data.open import open_feed, open_pairs
from clipkd.views import Batch, Views
from tests.data import samples
from tests.data.samples import as_process, encode, train_config, view_spec, write_tar
from tests.processes import joined, run_two

# Three loader processes are the point, also on a machine of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")

BATCH_SIZE = 8
VIEWS = Views([view_spec(4)])
Rows = list[list[Any]]
"""Of one batch: key, id, tokens and a hash of the pixels of each sample."""


def picture(number: int) -> bytes:
    """8 × 8 pixels of a colour of its own, brighter to the right and to the bottom: a crop shows where it was taken."""
    image = Image.new("RGB", (8, 8))
    image.putdata([(number % 256, 20 * x + number // 256, 25 * y) for y in range(8) for x in range(8)])
    return encode(image, "PNG")


def write_shards(folder: Path, sizes: list[int]) -> list[str]:
    """Shards of so many samples; returns their keys."""
    numbers = itertools.count()
    return [
        f"{path}/s{next(numbers):04}"
        for path, size in zip(samples.write_shards(folder, sizes, picture), sizes, strict=True)
        for _ in range(size)
    ]


def take(feed: Feed[Batch], steps: int) -> list[Batch]:
    with feed:
        batches = [next(feed) for _ in range(steps)]
        with pytest.raises(StopIteration):
            next(feed)
    return batches


def read(
    path: Path | str, steps: int, *, world_size: int = 1, start: int = 0, workers: int = 0, **options: Any
) -> list[Rows]:
    """Global batches as so many processes see them, each joined in rank order."""
    data = DataConfig(**{"path": str(path), "num_workers": workers, **options})
    config, shares = train_config(data, batch_size=BATCH_SIZE, steps=steps, seed=3), []
    pairs = open_pairs(data)  # indexed as by one process: two real ones are below
    for rank in range(world_size):
        with as_process(rank, world_size):
            feed = open_feed(pairs, config, VIEWS, start=start)
        shares.append(describe(take(feed, steps - start)))
    return [[*itertools.chain(*parts)] for parts in zip(*shares, strict=True)]


def describe(batches: list[Batch]) -> list[Rows]:
    return [
        [
            [key, id, tokens, hashlib.sha256(image.numpy().tobytes()).hexdigest()]
            for key, id, tokens, image in zip(
                batch.keys, batch.ids.tolist(), batch.texts[0].tolist(), batch.pixels[0], strict=True
            )
        ]
        for batch in batches
    ]


def assert_every_epoch_holds(batches: list[Rows], expected: list[str]) -> None:
    """Each stretch of an epoch's length holds exactly these keys; an epoch begun at the end holds each at most once."""
    seen, epoch = [key for batch in batches for key, *_ in batch], Counter(expected)
    assert len(seen) == BATCH_SIZE * len(batches) >= 2 * len(expected)
    for start in range(0, len(seen) - len(expected) + 1, len(expected)):
        assert Counter(seen[start : start + len(expected)]) == epoch, f"epoch that starts at place {start}"
    assert not Counter(seen[len(seen) - len(seen) % len(expected) :]) - epoch


SETTINGS = [(world_size, workers) for world_size in (1, 2) for workers in (0, 1, 3)]


@pytest.mark.parametrize(
    "sizes", [[37], [1, 7, 2, 30], [1 + number % 3 for number in range(20)]], ids=["one", "uneven", "many tiny"]
)
def test_every_sample_of_an_epoch_of_shards_comes_once_on_any_number_of_processes(
    tmp_path: Path, sizes: list[int]
) -> None:
    expected = write_shards(tmp_path, sizes)
    steps = -(-2 * len(expected) // BATCH_SIZE)
    reference = read(tmp_path, steps)
    assert_every_epoch_holds(reference, expected)
    for world_size, workers in SETTINGS[1:]:
        assert read(tmp_path, steps, workers=workers, world_size=world_size) == reference
    assert read(tmp_path, steps, workers=3, world_size=2, start=4) == reference[4:]


# Two real processes.

RANKS = 2
STEPS = 7
SIZES = [1, 7, 2, 18]


def main(rank: int, folder: Path) -> None:
    """Open the data as a run does, and write the findings to FOLDER/RANK.json."""
    scanned: list[str] = []
    scan_tar = tar_index.scan_tar

    def noted(path: Path) -> tar_index.TarIndex:
        scanned.append(path.name)
        return scan_tar(path)

    tar_index.scan_tar = noted
    config = train_config(DataConfig(path=f"{folder}/whole", num_workers=1), batch_size=BATCH_SIZE, steps=STEPS, seed=3)
    pairs = open_pairs(config.data)
    found = {"scanned": list(scanned), "identity": repr(pairs.identity())}
    found["batches"] = describe(take(open_feed(pairs, config, VIEWS), STEPS))
    errors = {}
    for name, options in {"damaged": {"max_skipped": 0.0}, "uncaptioned": {}, "nothing": {}}.items():
        try:
            open_pairs(DataConfig(path=str(folder / name), **options))
        except (ValueError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    pairs = open_pairs(DataConfig(path=f"{folder}/damaged", max_skipped=0.9))
    found |= {"errors": errors, "described": pairs.describe()}
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gloo")
    write_shards(folder / "whole", SIZES)
    write_shards(folder / "damaged", [4, 5, 6])
    shard = folder / "damaged" / "00001.tar"  # of the second process's share
    shard.write_bytes(shard.read_bytes()[: 3 * 2048 + 1024 + 100])
    for number in range(2):
        write_tar(folder / "uncaptioned" / f"{number}.tar", [(f"{number}.png", picture(number))])
    (folder / "nothing").mkdir()
    return folder


@pytest.fixture(scope="module")
def processes(folder: Path) -> list[dict[str, Any]]:
    """The findings of two processes."""
    run_two(__file__, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_two_real_processes_share_the_batches_of_one(processes: list[dict[str, Any]], folder: Path) -> None:
    first, second = (found["batches"] for found in processes)
    assert {len(share) for share in [*first, *second]} == {BATCH_SIZE // RANKS}
    alone = read(folder / "whole", STEPS)
    assert [[*ours, *its] for ours, its in zip(first, second, strict=True)] == alone
    shards = [f"{folder}/whole/{shard:05}.tar" for shard, size in enumerate(SIZES) for _ in range(size)]
    assert_every_epoch_holds(alone, [f"{shard}/s{number:04}" for number, shard in enumerate(shards)])


def test_each_process_indexes_its_share_of_the_shards_and_knows_all(processes: list[dict[str, Any]]) -> None:
    assert [found["scanned"] for found in processes] == [["00000.tar", "00002.tar"], ["00001.tar", "00003.tar"]]
    assert processes[0]["identity"] == processes[1]["identity"]
    assert "'pairs': 28" in processes[0]["identity"]
    # Of the second shard three samples stand before the cut; the fourth lost its caption.
    described = f"{4 + 3 + 6} pairs; left out: 1 × damaged shard, 1 × no caption"
    assert {found["described"] for found in processes} == {described}


def test_a_problem_of_one_share_is_raised_on_every_process(processes: list[dict[str, Any]], folder: Path) -> None:
    errors = processes[0]["errors"]
    assert processes[1]["errors"] == errors
    assert errors["damaged"].startswith(f"ValueError: {folder}/damaged/00001.tar is not a complete")
    assert "1 of 3 shards are damaged" in errors["damaged"]
    assert "none of 2 samples has both an image" in errors["uncaptioned"]
    assert errors["nothing"] == f"FileNotFoundError: no .tar in the folder {folder / 'nothing'} (data.path)"


if __name__ == "__main__":
    with joined(int(sys.argv[1]), Path(sys.argv[2])):
        main(int(sys.argv[1]), Path(sys.argv[2]))
