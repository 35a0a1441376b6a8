"""Progress with a fake clock: the compiler is no step; and the bar at a real terminal."""

import fcntl
import os
import pty
import struct
import sys
import termios
import threading

import pytest

from e2sad_jax.reporting import progress
from e2sad_jax.reporting.progress import Bar, duration


@pytest.fixture
def clock(monkeypatch):
    """Seconds, set by the test."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_the_time_left_does_not_count_the_compiler(clock, capsys):
    """54 s of compiler, then steps of 0.25 s: at step 121, 20 s are left, not two hours."""
    with Bar("train", 200, "steps", interval=30) as bar:
        clock[0] += 54
        bar.update(1, "loss 2.3")
        for _ in range(199):
            clock[0] += 0.25
            bar.update(1, "loss 1.0")
    assert capsys.readouterr().err.splitlines() == [
        "train: 1/200 steps, loss 2.3",
        "train: 121/200 steps, loss 1.0, 20s left",
        "train: 200/200 steps, loss 1.0, took 1m44s",
    ]


def test_an_update_that_names_what_is_to_be_compiled_starts_no_clock(clock, capsys):
    with Bar("attack", 200, "gradients", interval=0) as bar:
        clock[0] += 2
        bar.update(0, "PGD-40")
        clock[0] += 60
        bar.update(100)
        clock[0] += 1
        bar.update(50)
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == ["attack: 100/200 gradients", "attack: 150/200 gradients, 1s left"]


def test_a_resumed_run_counts_its_own_steps(clock, capsys):
    with Bar("train", 200, "steps", initial=100, interval=0) as bar:
        clock[0] += 10
        for _ in range(2):
            clock[0] += 1
            bar.update(10)
    assert capsys.readouterr().err.splitlines() == ["train: 110/200 steps", "train: 120/200 steps, 8s left"]


def test_a_silent_bar_says_nothing(clock, capsys):
    with Bar("train", 2, "steps", silent=True) as bar:
        clock[0] += 100
        bar.update(2)
    assert bar.done == 2
    assert capsys.readouterr() == ("", "")


def test_at_a_terminal_there_is_a_bar_with_the_time_left(clock, capsys, monkeypatch):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(progress.os, "get_terminal_size", lambda fd: progress.os.terminal_size((0, 0)))
    monkeypatch.setattr(progress.sys.stderr, "fileno", lambda: 2, raising=False)
    with Bar("train", 10, "steps") as bar:
        clock[0] += 60
        bar.update(1, "loss 2.3")
        clock[0] += 1
        bar.update(1, "loss 2.2")
    shown = capsys.readouterr().err
    assert "2/10 [" in shown
    assert ", 8s left, loss 2.2]" in shown
    assert shown.count("\n") == 1, "one line, drawn again"


@pytest.mark.parametrize("columns", [100, 80, 0])
def test_a_real_terminal_shows_step_loss_and_speed_in_one_line(columns, monkeypatch):
    """A terminal of 100 columns, the usual one of 80, and one that does not tell its width."""
    controller, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30 if columns else 0, columns, 0, 0))
    shown = []

    def read():
        try:
            while chunk := os.read(controller, 4096):
                shown.append(chunk)
        except OSError:  # closed at the other end
            pass

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(terminal, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        with Bar("train e2sad on digits", 40, "steps", initial=10) as bar:
            for _ in range(30):
                bar.update(1, "loss 1.2345, 678 images/s")
    reader.join(10)
    os.close(controller)
    text = b"".join(shown).decode()
    last = text.replace("\n", "\r").strip().split("\r")[-1]
    assert "train e2sad on digits: 100%" in last
    assert "40/40 [" in last
    assert "loss 1.2345, 678 images/s]" in last
    assert len(last) <= (columns or 100)
    assert text.count("\n") <= 2, "one line, redrawn"


@pytest.mark.parametrize(("seconds", "text"), [(41.6, "42s"), (185, "3m05s"), (7620, "2h07m")])
def test_durations(seconds, text):
    assert duration(seconds) == text
