"""The bar at a real terminal, the speed that is shown, and metrics that are not finite."""

import json
import os
import pty
import re
import sys
import threading

import jax.numpy as jnp
import pytest

from e2sad_jax.errors import NonFiniteError
from e2sad_jax.runs import metrics


class Silent:
    def __init__(self):
        self.notes = []

    def update(self, amount, note=""):
        self.notes.append(note)


@pytest.fixture
def clock(monkeypatch):
    """Time as the test says."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    return now


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_images_per_second_is_a_mean_without_compilation_and_checkpoints(clock, tmp_path):
    bar = Silent()
    record = metrics.Recorder([tmp_path], bar, start=0, log_every=10, batch_size=100)
    for step in range(1, 31):
        if step == 1:
            clock[0] += 60  # the first step compiles
        elif step in (10, 20, 30):
            clock[0] += 10 * 0.5  # the device's steps of 0.5 s are seen in bursts of ten
        record(step, {"loss": jnp.float32(1.0).block_until_ready()})
        if step == 15:
            clock[0] += 1000  # a checkpoint
            record.restart_clock()
    record.flush()
    record.close()
    rates = [line["images_per_second"] for line in lines(tmp_path)]
    assert rates[0] == pytest.approx(100 * 9 / 5)
    assert rates[2] == pytest.approx(100 * 10 / 5)
    assert max(rates) < 300, "never the speed of a burst, never the pause of a checkpoint"
    assert min(rates) > 50
    assert bar.notes[0] == "loss 1.0000", "nothing is known yet"
    assert bar.notes[-1] == "loss 1.0000, 200 images/s"


def test_a_resumed_run_drops_the_lines_beyond_its_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 2.0}\n{"step": 3')
    record = metrics.Recorder([tmp_path], Silent(), start=15, log_every=1, batch_size=1)
    record(16, {"loss": jnp.float32(3.0)})
    record.flush()
    record.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 1.0), (16, 3.0)]


def test_without_tensorboardx_metrics_are_lines_and_one_warning_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    metrics._tensorboard.cache_clear()
    for name in "ab":
        (tmp_path / name).mkdir()
        record = metrics.Recorder([tmp_path / name], Silent(), start=0, log_every=1, batch_size=1)
        record(1, {"loss": jnp.float32(3.0)})
        record.write(1, {"validation_clean": 0.5})
        record.flush()
        record.close()
        assert [path.name for path in (tmp_path / name).iterdir()] == ["metrics.jsonl"]
        assert lines(tmp_path / name) == [{"step": 1, "loss": 3.0}, {"step": 1, "validation_clean": 0.5}]
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "pip install tensorboardX" in said
    metrics._tensorboard.cache_clear()
    monkeypatch.undo()
    metrics.Recorder([tmp_path / "a"], Silent(), start=1, log_every=1, batch_size=1).close()
    assert [path for path in (tmp_path / "a").iterdir() if path.name.startswith("events.out.tfevents")]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_names_itself_and_its_step(value, tmp_path):
    record = metrics.Recorder([tmp_path], Silent(), start=0, log_every=1, batch_size=1)
    record._pending.append((1, {"loss": jnp.float32(0), "grad_norm": jnp.float32(value)}, 1))
    with pytest.raises(NonFiniteError, match=rf"step 1: grad_norm={value}"):
        record.flush()
    record.close()
    assert lines(tmp_path) == []


@pytest.mark.parametrize("columns", [100, 80, 0])
def test_at_a_terminal_there_is_a_bar_with_step_loss_speed_and_time_left(columns, monkeypatch):
    """A terminal of 100 columns, the usual one of 80, and one that does not tell its width."""
    controller, terminal = pty.openpty()
    if columns:
        import fcntl
        import struct
        import termios

        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
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
        with metrics.Bar("train e2sad on digits", 40, "steps", initial=10) as bar:
            for _ in range(30):
                bar.update(1, "loss 1.2345, 678 images/s")
    reader.join(10)
    os.close(controller)
    text = b"".join(shown).decode()
    last = text.replace("\n", "\r").strip().split("\r")[-1]
    assert "train e2sad on digits: 100%" in last
    assert "40/40" in last
    assert "loss 1.2345, 678 images/s" in last
    assert re.search(r"\d\d:\d\d<\d\d:\d\d", last), "time spent and left"
    assert text.count("\n") <= 2, "one line, redrawn"
