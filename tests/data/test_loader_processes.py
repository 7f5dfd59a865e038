"""Loader processes die, hang and are signalled: the training process reports it, and none is left behind.

Each case runs in a process of its own: where one goes wrong, an exception out of a signal handler or a child that is
left would otherwise strike the next test.
"""

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from torch import Tensor
from torch.utils.data import get_worker_info

from clipkd.config.data import DataConfig
from clipkd.data.loader import Feed
from clipkd.data.open import open_feed
from clipkd.data.skips import BadSample, Skip, Skips
from clipkd.data.sources import Pair, PairSet
from clipkd.views import Views, ViewSpec
from tests.data.samples import plain_png, train_config, view_spec

NUM_PAIRS = 64
FORK = multiprocessing.get_context("fork")
HANGS = 300
"""Seconds after which a case hangs: a hundred times what it takes, since other tests may hold the cores."""


class Outcome(NamedTuple):
    raised: str
    """Name of the exception's class; empty if there was none."""
    value: Any
    """What was returned, or the message."""


def isolated(case: Callable[..., Any], *arguments: Any) -> Outcome:
    """The outcome of a case in a process of its own, which has to end too."""
    receiver, sender = FORK.Pipe(duplex=False)
    process = FORK.Process(target=report, args=(sender, case, arguments))
    process.start()
    sender.close()
    try:
        assert receiver.poll(HANGS), "hangs"
        outcome = receiver.recv()
        process.join(HANGS)
        assert not process.is_alive(), f"does not end after {outcome}"
    finally:
        process.kill()
        process.join()
        receiver.close()
    return outcome


def report(sender: Any, case: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    try:
        name, value = "", case(*arguments)
    except Exception as error:
        name, value = type(error).__name__, str(error)
    sender.send(Outcome(name, value))


class Made:
    """Pairs made on the spot, before which something happens to the process that reads."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self.before = before
        self.shard_sizes = np.array([NUM_PAIRS])
        self.left_out, self.damaged = Skips(), list[Skip]()

    def read(self, index: int, *, image: bool = True) -> Pair:
        self.before(index)
        return Pair(f"pair {index}", plain_png(index), ("thing",))


def feed_of(before: Callable[[int], None], workers: int = 1, *, steps: int = 16, spec: ViewSpec | None = None) -> Feed:
    """Batches of 4."""
    data = DataConfig(path="made", num_workers=workers)
    pairs = PairSet([Made(before)], [data])  # type: ignore[list-item]
    return open_feed(pairs, train_config(data, steps=steps), Views([spec or view_spec(4)]))


def train(feed: Feed) -> int:
    """Take all batches as clipkd.training.loop does."""
    with feed:
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


def spec_with(tokens: Callable[[list[str]], Tensor]) -> ViewSpec:
    return ViewSpec((4, 4), (0.0,) * 3, (1.0,) * 3, "bilinear", tokens, "tokens")


def killed_in_a_step() -> None:
    with feed_of(nothing, steps=1000) as feed:
        next(feed)
        (child,) = children()
        os.kill(child.pid, signal.SIGKILL)
        for _ in range(100):
            time.sleep(0.005)  # the training step, into which the signal of the child's death comes
        for _ in range(999):
            next(feed)


class Unsendable:
    """Fails on its way to the training process, as a tensor does when the shared memory is full."""

    def __reduce__(self) -> Any:
        raise RuntimeError("No space left on device")


@pytest.mark.parametrize(
    "case",
    [
        *(lambda: train(feed_of(die, 1)), lambda: train(feed_of(die, 2)), killed_in_a_step),
        lambda: train(feed_of(nothing, 2, spec=spec_with(lambda _: Unsendable()))),  # type: ignore[arg-type, return-value]
    ],
    ids=["one", "one of two", "during a step", "with a batch that cannot be sent"],
)
def test_a_loader_process_that_is_killed_ends_the_run_with_advice(case: Callable[[], Any]) -> None:
    # Of two, the other one works on, and ending it must not hide what happened.
    raised, message = isolated(case)
    assert raised == "RunStopped", message
    assert message.startswith("a loader process died or hangs (DataLoader worker (pid")
    assert "lower num_workers and run the same command again" in message
    assert "\n" not in message


def fail(_: list[str]) -> Tensor:
    raise RuntimeError("the vocabulary is missing")


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_errors_in_a_loader_process_are_not_taken_for_its_death(workers: int) -> None:
    raised, message = isolated(lambda: train(feed_of(nothing, workers, spec=spec_with(fail))))
    assert raised == "RuntimeError", message
    assert "the vocabulary is missing" in message
    assert "died" not in message
    raised, message = isolated(lambda: train(feed_of(unusable, workers)))
    assert raised == "RunStopped", message
    assert "100 samples in a row cannot be used, the last of them pair" in message
    assert message.strip().endswith(": the image has no bytes")


def handled_after_the_end(workers: int) -> str:
    try:
        train(feed_of(unusable, workers))
    except Exception as stop:
        for _ in range(50):
            time.sleep(0.01)  # the program reports it
        return str(stop)
    return ""


@pytest.mark.parametrize("workers", [1, 2])
def test_ending_the_other_loader_processes_raises_nothing_more(workers: int) -> None:
    # While an exception is being handled its traceback holds the loader, which still takes their end for a failure.
    raised, message = isolated(handled_after_the_end, workers)
    assert (raised, "100 samples in a row" in message) == ("", True), message


def ids(batch: Any) -> list[int]:
    return batch.ids.tolist()


def signalled(number: int) -> tuple[list[Any], list[Any], list[bool]]:
    alone = feed_of(nothing, 0)
    expected = [ids(next(alone)) for _ in range(16)]
    with feed_of(nothing, 2) as feed:
        seen = [ids(next(feed)), ids(next(feed))]  # both have come as far as to read
        for child in children():
            os.kill(child.pid, number)
        time.sleep(0.2)
        alive = [child.is_alive() for child in children()]
        seen += [ids(next(feed)) for _ in range(14)]
    return seen, expected, alive


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_everyone_do_not_end_loader_processes(number: signal.Signals) -> None:
    raised, value = isolated(signalled, number)
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
    assert isolated(closed_early, taken) == ("", (started, [], True))


def fails_in_a_step() -> None:
    with feed_of(nothing, 2, steps=1000) as feed:
        next(feed)
        raise ValueError("training fails")


def test_a_run_that_fails_ends_its_loader_processes_and_says_why() -> None:
    # They ignore the SIGTERM by which Python ends its children, and would be waited for for ever.
    assert isolated(fails_in_a_step) == ("ValueError", "training fails")
