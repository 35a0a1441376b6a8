"""Ctrl-C and SIGTERM: the first asks, the second ends, and nothing is left behind."""

import os
import signal
import threading

import pytest

from e2sad_jax.runs import signals

BOTH = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@pytest.fixture
def outside(monkeypatch):
    """Time as the test says, and signals sent to this process, which do not arrive."""
    now, sent = [5.0], []
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: sent.append((pid, number)))
    return now, sent


@BOTH
@pytest.mark.parametrize("at_once", [False, True])
def test_the_first_asks_to_stop_and_a_later_second_does_what_it_always_did(number, at_once, outside, capfd):
    now, sent = outside
    before = signal.getsignal(number)
    with signals.stopping(at_once=at_once) as stop:
        assert stop() == 0
        if at_once:
            with pytest.raises(signals.Interrupted) as caught:
                signal.raise_signal(number)
            assert caught.value.number == number
        else:
            signal.raise_signal(number)
            assert "once more to stop at once" in capfd.readouterr().err
        assert stop() == number
        signal.raise_signal(number)
        assert sent == [], "who signals a process and its group means it once"
        now[0] += signals.REPEAT
        signal.raise_signal(number)
        assert sent == [(os.getpid(), number)]
        assert signal.getsignal(number) == before
    assert signal.getsignal(number) == before


def test_an_error_gives_the_signals_back_too():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(OSError, match="full"), signals.stopping():
        raise OSError("full")
    assert signal.getsignal(signal.SIGTERM) == before


def test_in_another_thread_nothing_is_caught_and_nothing_fails():
    asked = []

    def work():
        with signals.stopping() as stop:
            asked.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [0]
