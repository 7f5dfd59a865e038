"""An epoch sees every sample once, by key, whatever the shards, processes and loader processes.

Run as a program, this file is one of two real processes: test_exactly_once.py RANK FOLDER.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
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
from clipkd.data.loader import Feed
from clipkd.data.open import open_feed, open_pairs
from clipkd.views import Batch, Views
from tests.data.samples import encode, view_spec, write_tar

# Three loader processes are the point, also on a machine of two cores.
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")

BATCH_SIZE = 8
VIEWS = Views([view_spec(4)])
LAYOUTS = {
    "one shard": [37],
    "uneven shards": [1, 7, 2, 30],
    "many tiny shards": [1 + number % 3 for number in range(20)],
}
SETTINGS = [(world_size, workers) for world_size in (1, 2) for workers in (0, 1, 3)]


def picture(number: int) -> bytes:
    """8 × 8 pixels of a colour of its own, brighter to the right and to the bottom: a crop shows where it was taken."""
    image = Image.new("RGB", (8, 8))
    image.putdata([(number % 256, 20 * x + number // 256, 25 * y) for y in range(8) for x in range(8)])
    return encode(image, "PNG")


def write_shards(folder: Path, sizes: list[int]) -> list[str]:
    """Shards of so many samples; returns their keys."""
    keys, number = [], 0
    for shard, size in enumerate(sizes):
        path, members = folder / f"{shard:05}.tar", []
        for _ in range(size):
            members += [(f"s{number:04}.png", picture(number)), (f"s{number:04}.txt", f"thing {number}".encode())]
            keys.append(f"{path}/s{number:04}")
            number += 1
        write_tar(path, members)
    return keys


def write_table(folder: Path, size: int) -> list[str]:
    """A CSV of so many pictures; returns the keys of its rows."""
    folder.mkdir(parents=True)
    for number in range(size):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = "".join(f"{number}.png,row {number}\n" for number in range(size))
    (folder / "pairs.csv").write_text(f"file,text\n{rows}")
    return [f"{folder / 'pairs.csv'} row {number}: {number}.png" for number in range(size)]


def table(folder: Path, **options: Any) -> dict[str, Any]:
    return {"path": f"{folder}/pairs.csv", "format": "csv", "image_column": "file", "caption_key": "text", **options}


def configure(data: DataConfig, steps: int) -> TrainConfig:
    objective = ObjectiveConfig(info_nce=InfoNCETerm(weight=1.0))
    return TrainConfig(data=data, batch_size=BATCH_SIZE, steps=steps, seed=3, objective=objective)


def take(feed: Feed, steps: int) -> list[Batch]:
    batches = [next(feed) for _ in range(steps)]
    with pytest.raises(StopIteration):
        next(feed)
    feed.close()
    return batches


Globals = list[Batch]
"""Batches of which each holds the shares of all processes, in rank order."""
Read = Callable[..., Globals]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Read:
    """(data options, steps, world size) → global batches as so many processes see them."""

    def read(data: DataConfig, steps: int, *, world_size: int = 1, start: int = 0) -> Globals:
        # Indexed as by one process: that two do so together is shown by two real ones below.
        shares, config = [], configure(data, steps)
        pairs = open_pairs(data)
        for rank in range(world_size):
            with monkeypatch.context() as patch:
                patch.setattr(distributed, "rank", lambda rank=rank: rank)
                patch.setattr(distributed, "world_size", lambda: world_size)
                shares.append(take(open_feed(pairs, config, VIEWS, start=start), steps - start))
        return [join(parts) for parts in zip(*shares, strict=True)]

    return read


def join(parts: tuple[Batch, ...]) -> Batch:
    return Batch(
        pixels=(torch.cat([part.pixels[0] for part in parts]),),
        texts=(torch.cat([part.texts[0] for part in parts]),),
        ids=torch.cat([part.ids for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        skipped=tuple(skip for part in parts for skip in part.skipped),
    )


def keys_of(batches: Globals) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def assert_same(batches: Globals, expected: Globals) -> None:
    assert [batch.ids.tolist() for batch in batches] == [batch.ids.tolist() for batch in expected]
    assert keys_of(batches) == keys_of(expected)
    assert all(torch.equal(ours.pixels[0], its.pixels[0]) for ours, its in zip(batches, expected, strict=True))
    assert all(torch.equal(ours.texts[0], its.texts[0]) for ours, its in zip(batches, expected, strict=True))


def assert_every_epoch_holds(batches: Globals, expected: list[str]) -> None:
    """Each stretch of an epoch's length holds exactly these keys; what an epoch begun at the end holds comes once."""
    seen, whole = keys_of(batches), Counter(expected)
    assert len(seen) == BATCH_SIZE * len(batches) >= 2 * len(expected)
    for start in range(0, len(seen) - len(expected) + 1, len(expected)):
        assert Counter(seen[start : start + len(expected)]) == whole, f"epoch that starts at place {start}"
    rest = seen[len(seen) - len(seen) % len(expected) :]
    assert not Counter(rest) - whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_of_an_epoch_of_shards_comes_once_on_any_number_of_processes(
    tmp_path: Path, read: Read, layout: str
) -> None:
    expected = write_shards(tmp_path, LAYOUTS[layout])
    assert len(expected) == {"one shard": 37, "uneven shards": 40, "many tiny shards": 39}[layout]
    steps = -(-2 * len(expected) // BATCH_SIZE)
    reference = read(DataConfig(path=str(tmp_path), num_workers=0), steps)
    assert_every_epoch_holds(reference, expected)
    for world_size, workers in SETTINGS:
        batches = read(DataConfig(path=str(tmp_path), num_workers=workers), steps, world_size=world_size)
        assert_every_epoch_holds(batches, expected)
        assert_same(batches, reference)


def test_an_epoch_that_batches_do_not_divide_ends_within_one(tmp_path: Path, read: Read) -> None:
    expected = write_shards(tmp_path, [9])
    first, second, *_ = read(DataConfig(path=str(tmp_path), num_workers=0), 4)
    # 9 samples in batches of 8: the second batch holds the one that is left, and seven of the next epoch.
    assert len(set(first.keys)) == 8
    assert {second.keys[0]} == set(expected) - set(first.keys)
    assert len(set(second.keys[1:])) == 7


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 0), (2, 3)])
def test_every_row_of_a_table_comes_once(tmp_path: Path, read: Read, world_size: int, workers: int) -> None:
    expected = write_table(tmp_path / "table", 21)
    reference = read(DataConfig(**table(tmp_path / "table"), num_workers=0), 6)
    batches = read(DataConfig(**table(tmp_path / "table"), num_workers=workers), 6, world_size=world_size)
    assert_every_epoch_holds(batches, expected)
    assert_same(batches, reference)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (1, 3), (2, 1)])
def test_an_epoch_of_a_mix_takes_every_source_as_often_as_its_weight_says(
    tmp_path: Path, read: Read, world_size: int, workers: int
) -> None:
    shards, rows = write_shards(tmp_path / "shards", [3, 1, 7]), write_table(tmp_path / "table", 9)

    def data(num_workers: int) -> DataConfig:
        mix = (SourceConfig(**table(tmp_path / "table", weight=2.0)),)
        return DataConfig(path=str(tmp_path / "shards"), mix=mix, num_workers=num_workers)

    batches = read(data(workers), 8, world_size=world_size)
    # 11 of the shards and 9 rows twice: 29 pairs; two epochs and six more pairs are 64.
    assert_every_epoch_holds(batches, [*shards, *rows, *rows])
    assert_same(batches, read(data(0), 8))


def test_half_a_source_per_epoch_is_the_whole_of_it_in_two(tmp_path: Path, read: Read) -> None:
    shards, rows = write_shards(tmp_path / "shards", [5, 7]), write_table(tmp_path / "table", 8)
    mix = (SourceConfig(**table(tmp_path / "table", weight=0.5)),)
    batches = read(DataConfig(path=str(tmp_path / "shards"), mix=mix, num_workers=0), 4, world_size=2)
    seen = keys_of(batches)  # 12 and 4 per epoch: two epochs are 32 pairs
    assert Counter(seen[:16]).keys() > set(shards)
    assert Counter(seen) == Counter([*shards, *shards, *rows])
    assert len(set(seen[:16]) & set(rows)) == 4


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 0), (2, 3)])
def test_a_sample_that_cannot_be_read_has_the_same_one_in_its_place_everywhere(
    tmp_path: Path, read: Read, world_size: int, workers: int
) -> None:
    members = []
    for number in range(16):
        image = b"no image" if number == 11 else picture(number)
        members += [(f"s{number}.png", image), (f"s{number}.txt", b"thing")]
    path = write_tar(tmp_path / "0.tar", members)
    reference = read(DataConfig(path=str(path), num_workers=0), 4)
    batches = read(DataConfig(path=str(path), num_workers=workers), 4, world_size=world_size)
    assert_same(batches, reference)
    skipped = [skip for batch in batches for skip in batch.skipped]
    assert [skip[:2] for skip in skipped] == [(f"{path}/s11", "undecodable image")] * 2  # once in each of two epochs
    assert skipped == [skip for batch in reference for skip in batch.skipped]
    assert f"{path}/s11" not in keys_of(batches)


def test_a_run_that_starts_at_a_step_sees_the_tail_on_another_number_of_processes(tmp_path: Path, read: Read) -> None:
    write_shards(tmp_path, LAYOUTS["uneven shards"])
    whole = read(DataConfig(path=str(tmp_path), num_workers=0), 11)
    tail = read(DataConfig(path=str(tmp_path), num_workers=3), 11, world_size=2, start=4)
    assert_same(tail, whole[4:])


@pytest.mark.parametrize(("lost", "max_skipped"), [(1, 0.25), (2, 0.5), (3, 0.75)])
def test_the_share_of_damaged_shards_is_one_of_all_shards(
    tmp_path: Path, read: Read, lost: int, max_skipped: float
) -> None:
    expected = write_shards(tmp_path, [8, 8, 8, 8])
    for number in range(lost):
        (tmp_path / f"{number:05}.tar").write_bytes(b"no tar")
    with pytest.raises(ValueError, match=f"{lost} of 4 shards are damaged"):
        open_pairs(DataConfig(path=str(tmp_path), max_skipped=max_skipped - 0.01))
    batches = read(DataConfig(path=str(tmp_path), max_skipped=max_skipped, num_workers=0), 4 - lost)
    assert sorted(keys_of(batches)) == expected[8 * lost :]


# Two real processes.

RANKS = 2
STEPS = 7
SIZES = [1, 7, 2, 18]


def data_of(folder: Path, name: str, **options: Any) -> DataConfig:
    return DataConfig(path=str(folder / name), num_workers=1, **options)


def main(rank: int, folder: Path) -> None:
    """Open the data as a run does, and write what came to FOLDER/RANK.json."""
    import torch.distributed as dist

    from clipkd.data import tar_index

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    scanned: list[str] = []
    scan_tar = tar_index.scan_tar

    def noted(path: Path) -> tar_index.TarIndex:
        scanned.append(path.name)
        return scan_tar(path)

    tar_index.scan_tar = noted
    config = configure(data_of(folder, "whole"), STEPS)
    pairs = open_pairs(config.data)
    found = {"scanned": list(scanned), "identity": repr(pairs.identity())}
    batches = take(open_feed(pairs, config, VIEWS), STEPS)
    found |= {"keys": [batch.keys for batch in batches], "ids": [batch.ids.tolist() for batch in batches]}
    found["pixels"] = [digest(batch) for batch in batches]
    errors = {}
    for name, options in {"damaged": {"max_skipped": 0.0}, "uncaptioned": {}, "nothing": {}}.items():
        try:
            open_pairs(data_of(folder, name, **options))
        except (ValueError, OSError) as error:
            errors[name] = f"{type(error).__name__}: {error}"
    pairs = open_pairs(data_of(folder, "damaged", max_skipped=0.9))
    found |= {"errors": errors, "unusable": str(pairs.unusable()), "num_left": len(pairs)}
    distributed.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


def digest(batch: Batch) -> list[str]:
    """A word for each sample's pixels."""
    return [hashlib.sha256(image.numpy().tobytes()).hexdigest() for image in batch.pixels[0]]


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
    """What each of two processes saw."""
    logs = [(folder / f"{rank}.log").open("w+") for rank in range(RANKS)]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), folder],
            stderr=log,
            env={**os.environ, "PYTHONHASHSEED": str(3 * rank), "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        for rank, log in enumerate(logs)
    ]
    try:
        codes = [process.wait(timeout=60) for process in running]
    finally:
        for process, log in zip(running, logs, strict=True):
            process.kill()
            process.wait()
            log.close()
    assert codes == [0, 0], "".join((folder / f"{rank}.log").read_text() for rank in range(RANKS))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def test_two_real_processes_share_every_step_and_an_epoch(processes: list[dict[str, Any]], folder: Path) -> None:
    shards = [f"{folder}/whole/{shard:05}.tar" for shard, size in enumerate(SIZES) for _ in range(size)]
    expected = [f"{shard}/s{number:04}" for number, shard in enumerate(shards)]
    first, second = (found["keys"] for found in processes)
    assert [len(keys) for keys in first] == [len(keys) for keys in second] == [BATCH_SIZE // RANKS] * STEPS
    assert all(not set(ours) & set(its) for ours, its in zip(first[:3], second[:3], strict=True))
    seen = [key for ours, its in zip(first, second, strict=True) for key in [*ours, *its]]
    # 56 places are two epochs of 28.
    assert sorted(seen[:28]) == sorted(seen[28:]) == sorted(expected)


def test_two_real_processes_see_what_one_sees(processes: list[dict[str, Any]], folder: Path, read: Read) -> None:
    batches = read(data_of(folder, "whole"), STEPS)
    alone = {
        "ids": [batch.ids.tolist() for batch in batches],
        "keys": [list(batch.keys) for batch in batches],
        "pixels": [digest(batch) for batch in batches],
    }
    for name, expected in alone.items():
        assert [[*ours, *its] for ours, its in zip(*(found[name] for found in processes), strict=True)] == expected


def test_each_process_indexes_its_share_of_the_shards_and_knows_all(processes: list[dict[str, Any]]) -> None:
    assert [found["scanned"] for found in processes] == [["00000.tar", "00002.tar"], ["00001.tar", "00003.tar"]]
    assert processes[0]["identity"] == processes[1]["identity"]
    assert "'pairs': 28" in processes[0]["identity"]


def test_what_is_wrong_with_one_share_is_raised_on_every_process(processes: list[dict[str, Any]], folder: Path) -> None:
    assert processes[0]["errors"] == processes[1]["errors"]
    errors = processes[0]["errors"]
    assert set(errors) == {"damaged", "uncaptioned", "nothing"}
    assert errors["damaged"].startswith(f"ValueError: {folder}/damaged/00001.tar is not a whole")
    assert "1 of 3 shards are damaged" in errors["damaged"]
    assert "none of 2 samples has both an image" in errors["uncaptioned"]
    assert errors["nothing"] == f"FileNotFoundError: no .tar in the folder {folder / 'nothing'} (data.path)"


def test_what_is_left_of_damaged_shards_is_the_same_on_every_process(processes: list[dict[str, Any]]) -> None:
    # Of the second shard three samples stand before the cut; the fourth lost its caption.
    assert {(found["unusable"], found["num_left"]) for found in processes} == {
        ("1 × damaged shard, 1 × no caption", 4 + 3 + 6)
    }


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
