"""Metrics of a run: the speed that is shown, the files, damaged lines, a full disk, and values that are not finite."""

import errno
import json
import os
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


def test_a_resumed_run_drops_the_lines_beyond_its_checkpoint_and_torn_ones(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": 2.0}\n{"step": 3')
    record = metrics.Recorder([tmp_path], Silent(), start=15, log_every=1, batch_size=1)
    record(16, {"loss": jnp.float32(3.0)})
    record.flush()
    record.close()
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(10, 1.0), (16, 3.0)]
    assert capsys.readouterr().err == "", "a kill tears the last line"


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b"\xff", b"[" * 100_000, b'{"step": "1"}'])
def test_damaged_lines_between_whole_ones_are_dropped_with_a_warning(content, tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + content + b'\n{"step": 2}\n{"step": 9}\n{"step": 1')
    metrics.Recorder([tmp_path], Silent(), start=5, log_every=1, batch_size=1).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    assert f"warning: {path}: damaged lines are dropped (2" in capsys.readouterr().err


def test_tensorboard_events_hold_the_curves(tmp_path):
    from tensorboardX.proto import event_pb2

    record = metrics.Recorder([tmp_path], Silent(), start=0, log_every=1, batch_size=1)
    record(1, {"loss": jnp.float32(3.0)})
    record.flush()
    record.write(1, {"validation_robust": 0.5})
    record.close()
    values = {}
    for path in tmp_path.glob("events.out.tfevents*"):
        content, at = path.read_bytes(), 0
        while at < len(content):  # TFRecord framing: length, crc, payload, crc
            length = int.from_bytes(content[at : at + 8], "little")
            event = event_pb2.Event.FromString(content[at + 12 : at + 12 + length])
            at += 16 + length
            values.update({(event.step, v.tag): v.simple_value for v in event.summary.value})
    assert values == {(1, "train/loss"): 3.0, (1, "validation/robust"): 0.5}


class Full:
    """A file on a disk that is full after a while."""

    left = 50

    def write(self, data):
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self):
        pass

    close = flush


def test_a_full_disk_ends_the_files_for_tensorboard_with_an_error_and_no_hang(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: Full())
    record, ended = metrics.Recorder([tmp_path], Silent(), start=0, log_every=1, batch_size=1), []

    def write():
        try:
            for step in range(200):
                record.write(step, {"loss": 1.0})
        except OSError as error:
            ended.append(error.errno)

    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    thread.join(60)
    assert ended == [errno.ENOSPC]
    record.close()


def test_without_tensorboardx_metrics_are_lines_and_one_warning_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    metrics.has_tensorboard.cache_clear()
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
    metrics.has_tensorboard.cache_clear()
    monkeypatch.undo()
    metrics.Recorder([tmp_path / "a"], Silent(), start=1, log_every=1, batch_size=1).close()
    assert [path for path in (tmp_path / "a").iterdir() if path.name.startswith("events.out.tfevents")]


class Waiting(float):
    """A metric that the device has not computed yet."""

    def is_ready(self):
        return False


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_is_not_finite_names_itself_and_its_step(value, tmp_path):
    record = metrics.Recorder([tmp_path], Silent(), start=0, log_every=1, batch_size=1)
    waiting = {"loss": Waiting(0.0), "grad_norm": jnp.float32(value)}
    record(1, waiting)
    with pytest.raises(NonFiniteError, match=rf"step 1: grad_norm={value}"):
        record.flush()
    record.close()
    assert lines(tmp_path) == []
