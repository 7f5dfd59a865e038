"""Signals wait for the current step; repeated after some seconds they do not."""

import os
import signal

import pytest

from clipkd import errors as stops
from clipkd.errors import END_SIGNALS, Interrupted, deferred_signals, short


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_is_noted_and_a_repetition_by_the_launcher_is_the_same_one(number: signal.Signals) -> None:
    with deferred_signals() as interruption:
        assert interruption.asked() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.asked() == number


@pytest.mark.parametrize("launched", [False, True])
def test_nohup_keeps_a_closed_terminal_from_a_run_but_not_from_its_launcher(
    monkeypatch: pytest.MonkeyPatch, launched: bool
) -> None:
    monkeypatch.setattr(stops, "IS_LAUNCHED", launched)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with deferred_signals() as interruption:
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.asked() == (signal.SIGHUP if launched else 0)
            monkeypatch.setattr(stops, "PARENT", 0)  # as if it had ended
            assert interruption.asked() == (signal.SIGHUP if launched else 0)
    finally:
        signal.signal(signal.SIGHUP, before)


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
    before = [signal.getsignal(number) for number in END_SIGNALS]
    with pytest.raises(KeyError), deferred_signals():
        raise KeyError
    assert [signal.getsignal(number) for number in END_SIGNALS] == before


def test_a_long_message_of_another_library_is_cut_between_words() -> None:
    assert short(ValueError("one\n  line")) == "one line"
    cut = short(ValueError("word " * 200))
    assert len(cut) <= 400
    assert set(cut.split()) == {"word", "…"}
