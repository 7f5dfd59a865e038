"""Signals wait for the current step; repeated after some seconds they do not."""

import os
import signal

import pytest

from clipkd import errors as stops
from clipkd.errors import Interrupted, deferred_signals, short


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_noted_and_a_repetition_by_the_launcher_is_the_same_one(number: signal.Signals) -> None:
    with deferred_signals() as interruption:
        assert interruption.number == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.number == number


def test_a_signal_after_the_patience_ends_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.0 + stops.PATIENCE + 0.1])
    monkeypatch.setattr(stops.time, "monotonic", lambda: next(clock))
    with deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted) as stopped:
            os.kill(os.getpid(), signal.SIGINT)
        assert stopped.value.number == signal.SIGINT
        assert not isinstance(stopped.value, Exception)  # nothing that catches errors may swallow it


def test_a_signal_during_work_that_a_resumed_run_repeats_ends_it_at_once() -> None:
    with deferred_signals() as interruption:
        with pytest.raises(Interrupted, match="SIGTERM during an evaluation"), interruption.at_once():
            os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # outside it waits again
        assert interruption.number == signal.SIGTERM


def test_handlers_are_as_before_afterwards() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyError), deferred_signals():
        raise KeyError
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_long_message_of_another_library_is_cut_between_words() -> None:
    assert short(ValueError("one\n  line")) == "one line"
    cut = short(ValueError("word " * 200))
    assert len(cut) <= 400
    assert set(cut.split()) == {"word", "…"}
