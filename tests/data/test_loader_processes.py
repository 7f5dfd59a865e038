"""Loader processes die, hang and are signalled; the training process hears of it, and none is left behind.

Each case runs in a process of its own: where one goes wrong, an exception out of a signal handler or a child that is
left would otherwise strike whatever test comes next.
"""

import contextlib
import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from clipkd.config.data import DataConfig
from clipkd.data.loader import Feed, indexed_batches
from clipkd.data.order import BatchOrder, Mixture
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import Pair, PairSet
from clipkd.errors import RunStopped
from clipkd.views import Views, ViewSpec
from tests.data.samples import plain_png, tokenize, view_spec

NUM_PAIRS = 64
FORK = multiprocessing.get_context("fork")


class Outcome(NamedTuple):
    raised: str
    """Name of the exception's class; empty if there was none."""
    value: Any
    """What was returned, or the message."""
    seconds: float


def apart(case: Callable[..., Any], *arguments: Any) -> Outcome:
    """What a case gives in a process of its own, which has to end too."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=report, args=(sender, case, arguments))
    process.start()
    sender.close()
    try:
        assert receiver.poll(60), "hangs"
        outcome = receiver.recv()
        process.join(30)
        assert not process.is_alive(), f"does not end after {outcome}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return outcome


def report(sender: Any, case: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    begin = time.monotonic()
    try:
        name, value = "", case(*arguments)
    except Exception as error:
        name, value = type(error).__name__, str(error)
    sender.send(Outcome(name, value, time.monotonic() - begin))


class Made:
    """Pairs made on the spot, before which something happens to the process that reads."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.before = before
        self.shard_sizes = np.array([NUM_PAIRS])
        self.left_out, self.damaged = Skips(), list[Skip]()

    def fingerprint(self) -> str:
        return ""

    def read(self, index: int) -> Pair:
        self.before(index)
        return Pair(f"pair {index}", plain_png(index), ("thing",))


def feed_of(before: Callable[[int], None], workers: int = 1, *, steps: int = 16, spec: ViewSpec | None = None) -> Feed:
    """Batches of 4."""
    config = DataConfig(path="made", num_workers=workers)
    order = BatchOrder(Mixture([np.array([NUM_PAIRS])], weights=[1.0], seed=0), batch_size=4, start=0, stop=steps)
    pairs = PairSet([Made(before)], [config])
    return indexed_batches(pairs, config, Views([spec or view_spec(4)]), order, pin_memory=False)


def train(feed: Feed) -> int:
    """Take all batches as clipkd.training.loop does."""
    with contextlib.closing(feed):
        for step in itertools.count():
            try:
                next(feed)
            except StopIteration:
                return step
    return -1


def children() -> list[Any]:
    return multiprocessing.active_children()


def nothing(_: int) -> None:
    pass


def die(_: int) -> None:
    if (info := get_worker_info()) and info.id == 0:
        os.kill(os.getpid(), signal.SIGKILL)


def unusable(index: int) -> None:
    raise BadSample(f"pair {index}", "empty image", "the image has no bytes")


def fail(_: list[str]) -> Tensor:
    raise RuntimeError("the vocabulary is missing")


FAILING = ViewSpec((4, 4), (0.0,) * 3, (1.0,) * 3, "bilinear", fail, "fails")


def test_all_batches_come_from_any_number_of_loader_processes() -> None:
    for workers in (0, 1, 2):
        outcome = apart(lambda workers=workers: (train(feed_of(nothing, workers)), children()))
        assert outcome[:2] == ("", (16, []))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_loader_process_that_is_killed_ends_the_run_with_advice(workers: int) -> None:
    # Of two, the other one works on, and ending it must not hide what happened.
    raised, message, seconds = apart(lambda: train(feed_of(die, workers)))
    assert raised == "RunStopped"
    assert message.startswith("a loader process died or hangs (DataLoader worker (pid")
    assert "lower data.num_workers" in message
    assert message.endswith("--resume latest")
    assert "\n" not in message
    assert seconds < 20


def killed_in_a_step() -> None:
    with feed_of(nothing, steps=1000) as feed:
        next(feed)
        (child,) = children()
        os.kill(child.pid, signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.005)  # the training step, into which the signal of the child's death comes
        for _ in range(999):
            next(feed)


def test_a_loader_process_that_is_killed_during_a_step_ends_the_run_with_advice() -> None:
    raised, message, _ = apart(killed_in_a_step)
    assert "a loader process died" in message, message
    assert raised == "RunStopped"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_error_in_a_loader_process_is_not_taken_for_its_death(workers: int) -> None:
    raised, message, _ = apart(lambda: train(feed_of(nothing, workers, spec=FAILING)))
    assert "the vocabulary is missing" in message, message
    assert "died" not in message
    assert raised == "RuntimeError"


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_hundred_unusable_samples_in_a_row_stop_the_run(workers: int) -> None:
    raised, message, _ = apart(lambda: train(feed_of(unusable, workers)))
    assert "100 samples in a row cannot be used, the last of them pair" in message, message
    assert message.strip().endswith(": the image has no bytes")
    assert raised == "RunStopped"


def told_after_the_end(workers: int) -> str:
    try:
        train(feed_of(unusable, workers))
    except RunStopped as stop:
        for _ in range(50):
            time.sleep(0.01)  # the program says what happened
        return str(stop)
    return ""


@pytest.mark.parametrize("workers", [1, 2])
def test_ending_the_other_loader_processes_raises_nothing_more(workers: int) -> None:
    # While an exception is being handled its traceback holds the loader, which still takes their end for a failure.
    raised, message, _ = apart(told_after_the_end, workers)
    assert "100 samples in a row" in message, message
    assert not raised


def signalled(number: int) -> tuple[list[Any], list[Any], list[bool]]:
    expected = [ids(batch) for batch in (lambda feed: [next(feed) for _ in range(16)])(feed_of(nothing, 0))]
    feed = feed_of(nothing, 2)
    seen = [ids(next(feed)), ids(next(feed))]  # both have come as far as to read
    for child in children():
        os.kill(child.pid, number)
    time.sleep(0.2)
    alive = [child.is_alive() for child in children()]
    seen += [ids(next(feed)) for _ in range(14)]
    feed.close()
    return seen, expected, alive


def ids(batch: Any) -> list[int]:
    return batch.ids.tolist()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_everyone_do_not_end_loader_processes(number: signal.Signals) -> None:
    raised, value, _ = apart(signalled, number)
    assert not raised, value
    seen, expected, alive = value
    assert seen == expected
    assert sorted(itertools.chain(*seen)) == list(range(NUM_PAIRS))
    assert alive == [True, True]


def closed_early(taken: int) -> tuple[int, list[Any], bool]:
    feed = feed_of(nothing, 2)
    for _ in range(taken):
        next(feed)
    processes = children()
    feed.close()
    left = [child.pid for child in children()]
    feed.close()
    return len(processes), left, next(feed, None) is None


@pytest.mark.parametrize(("taken", "started"), [(0, 0), (3, 2)])
def test_a_closed_feed_leaves_no_process(taken: int, started: int) -> None:
    raised, value, seconds = apart(closed_early, taken)
    assert (raised, value) == ("", (started, [], True))
    assert seconds < 5


def fails_in_a_step() -> None:
    with contextlib.closing(feed_of(nothing, 2, steps=1000)) as feed:
        next(feed)
        raise ValueError("training fails")


def test_a_run_that_fails_ends_its_loader_processes_and_says_why() -> None:
    # They ignore the SIGTERM by which Python ends its children, and would be waited for for ever.
    raised, message, seconds = apart(fails_in_a_step)
    assert (raised, message) == ("ValueError", "training fails")
    assert seconds < 10


def hanging() -> tuple[str, list[Any], int | None]:
    inside = FORK.Event()

    def hang(_: int) -> None:
        inside.set()
        time.sleep(1000)

    feed = feed_of(hang)
    message = ""
    try:
        next(feed)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    assert inside.wait(30)
    (child,) = children()
    feed.close()
    left = [process.pid for process in children()]
    child.join(5)
    return message, left, child.exitcode


def test_a_loader_process_that_hangs_is_reported_and_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("clipkd.data.loader.SECONDS_FOR_A_BATCH", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # seconds that torch waits for its end
    raised, value, seconds = apart(hanging)
    assert not raised, value
    message, left, exit_code = value
    assert message.startswith("RunStopped: a loader process died or hangs (DataLoader timed out after 1 seconds)")
    assert exit_code == -signal.SIGKILL
    assert seconds < 20
    assert left == []


def two_feeds() -> tuple[int, bool]:
    other = FORK.Process(target=time.sleep, args=(1000,), daemon=True)
    other.start()
    kept, closed = feed_of(nothing, 1, steps=100), feed_of(nothing, 1)
    next(kept)
    next(closed)
    closed.close()
    time.sleep(0.2)
    alive = other.is_alive()
    other.kill()
    return train(kept), alive


def test_closing_one_feed_leaves_other_processes_alone() -> None:
    # A program that calls clipkd.training.loop may have children of its own.
    raised, value, _ = apart(two_feeds)
    assert (raised, value) == ("", (99, True))


def test_loader_processes_use_one_thread_each() -> None:
    def threads(texts: list[str]) -> Tensor:
        return torch.full_like(tokenize(texts), torch.get_num_threads())

    def case() -> int:
        torch.set_num_threads(2)
        feed = feed_of(nothing, 1, spec=ViewSpec((4, 4), (0.0,) * 3, (1.0,) * 3, "bilinear", threads, "threads"))
        with contextlib.closing(feed):
            return int(next(feed).texts[0].max())

    assert apart(case)[:2] == ("", 1)
