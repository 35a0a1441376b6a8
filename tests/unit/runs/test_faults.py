"""Damaged files, locks, a full disk, a device that fails: a clear word or an earlier good state, never a wrong result.

The short version of `make torture`, which does such things to many real runs.
"""

import dataclasses
import errno
import fcntl
import logging
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks.faults import __main__ as torture
from benchmarks.faults import phases, runs
from benchmarks.faults.damage import flip, truncate
from e2sad_jax import cli, errors
from e2sad_jax._io import LOCK, locked, sealed, write_json
from e2sad_jax.comparison import judge
from e2sad_jax.errors import (
    BusyError,
    CheckpointError,
    DamagedError,
    DeviceError,
    Error,
    GoneError,
    OutOfMemoryError,
    Stopped,
    WorkdirError,
)
from e2sad_jax.evaluation import Outcome
from e2sad_jax.runs import jobs, metrics, run
from e2sad_jax.runs.checkpoint import Checkpoints, load
from e2sad_jax.runs.folder import TRAINING, read_config, read_training
from e2sad_jax.training.config import Config
from tests.helpers import tiny_config
from tests.unit.training.test_train import no_last_evaluation, standard_promotion  # noqa: F401

pytestmark = pytest.mark.usefixtures("little")


@pytest.fixture(scope="module")
def trained(tiny, little, tmp_path_factory) -> pathlib.Path:
    """A run of 12 steps whose best checkpoint is that of step 10."""
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        return prepare(patch, tiny, tmp_path_factory.mktemp("trained"), train=True)


def prepare(patch: pytest.MonkeyPatch, tiny, folder: pathlib.Path, train: bool = False) -> pathlib.Path:
    patch.setattr(run.data, "load", lambda name, data_dir: tiny)
    outcome = Outcome(np.ones(50, bool), np.zeros(50, np.int32))
    patch.setattr(run, "_evaluate", lambda *args: {attack.name: outcome for attack in run.SUITES["mnist"]})
    patch.setattr("e2sad_jax.reporting.plots.examples", lambda *args, **kwargs: None)
    patch.setattr(jobs, "_watch", lambda job, state: {"score": {5: 1.0, 10: 2.0, 12: 1.5}[int(state.step)]})
    if train:
        run.run(settings(folder), "mnist")
    return folder / "w"


def settings(folder: pathlib.Path, **changes) -> Config:
    return tiny_config(**{"defense": "natural", "workdir": str(folder / "w"), **changes})


@pytest.fixture
def config(trained, tiny, tmp_path, monkeypatch) -> Config:
    """Of a run that is trained: in a copy of its workdir."""
    shutil.copytree(trained, tmp_path / "w")
    prepare(monkeypatch, tiny, tmp_path)
    return settings(tmp_path)


@pytest.fixture
def fresh(tiny, tmp_path, monkeypatch) -> Config:
    """Of a run that has not begun."""
    prepare(monkeypatch, tiny, tmp_path)
    return settings(tmp_path)


def damages(rng: random.Random, content: bytes, times: int) -> list[bytes]:
    """Flipped bits and truncations of a file."""
    damaged = []
    for _ in range(times):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        damaged.append(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
    return [*damaged, content[: rng.randrange(len(content))], b""]


def test_no_damage_to_a_checkpoint_gives_another_network(config, tiny):
    workdir, rng = pathlib.Path(config.workdir), random.Random(0)
    with jobs.open_job(config, tiny) as job:
        like = jax.eval_shape(job.init_state)
        whole = jobs.digest(job.restore(10).params)
    shutil.rmtree(workdir / "checkpoints" / "12")
    refused = 0
    files = [path for path in (workdir / "checkpoints").rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        content = path.read_bytes()
        for damaged in damages(rng, content, 1 if path.stat().st_size < 1000 else 4)[:-1]:
            path.write_bytes(damaged)
            try:
                with Checkpoints(workdir, read_only=True) as checkpoints:
                    assert jobs.digest(checkpoints.restore(like).params) == whole, path
            except DamagedError:
                refused += 1
        path.write_bytes(content)
    assert refused > len(files) / 2
    assert jobs.digest(load(workdir).params) == whole


@pytest.mark.parametrize("devices", [1, 2])
def test_who_goes_on_reads_each_checkpoint_once(config, tiny, devices, monkeypatch):
    """The state found to be whole is the one that is gone on from; whoever asks again gets another, read anew."""
    read, real = [], ocp.CheckpointManager.restore

    def restore(self, step, **kwargs):
        read.append(step)
        return real(self, step, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore)
    with jobs.open_job(dataclasses.replace(config, devices=devices), tiny) as job:
        first, second, best = job.restore(), job.restore(), job.restore(10)
    assert read == [10, 12, 12, 10]
    assert (int(first.step), int(best.step)) == (12, 10)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        assert a.sharding == b.sharding
        assert a is not b
        assert (a == b).all()


def test_orbax_does_not_see_a_number_that_was_changed_but_we_do(config):
    """Another state in the place of the one that was saved, each of its files whole."""
    kept = pathlib.Path(config.workdir) / "checkpoints"
    shutil.rmtree(kept / "12" / "default")
    shutil.copytree(kept / "10" / "default", kept / "12" / "default")
    with pytest.raises(DamagedError, match=r"checkpoints/12: its numbers are not those that were saved; .*delete that"):
        load(config.workdir)


@pytest.mark.parametrize("what", ["metrics/metrics", "default/manifest.ocdbt"])
@pytest.mark.parametrize("damage", [flip, truncate])
def test_a_damaged_last_checkpoint_is_put_aside_with_a_word_and_the_one_before_goes_on(what, damage, config, capsys):
    workdir = pathlib.Path(config.workdir)
    whole, metrics = jobs.digest(load(workdir).params), (workdir / "metrics.jsonl").read_text()
    damage(workdir / "checkpoints" / "12" / what, random.Random(1))
    run.run(config, "mnist")
    said = capsys.readouterr().err
    assert "WARNING: the checkpoint of step 12 is damaged (" in said
    assert "goes on from the one of step 10\n" in said
    assert "Going on from step 10 in" in said
    assert jobs.digest(load(workdir).params) == whole
    assert [line.split(",")[0] for line in (workdir / "metrics.jsonl").read_text().splitlines()] == [
        line.split(",")[0] for line in metrics.splitlines()
    ]
    assert (workdir / "checkpoints" / "12.damaged").is_dir(), "for who wants to look at it"
    assert jobs.steps_in(workdir) == [10, 12]


def test_without_an_earlier_one_or_if_it_is_the_best_a_damaged_checkpoint_is_refused(config):
    """The best of what is left would be another result."""
    workdir = pathlib.Path(config.workdir)
    truncate(workdir / "checkpoints" / "10" / "metrics" / "metrics", random.Random(0))
    with pytest.raises(
        DamagedError, match=r"cannot read the checkpoint .*checkpoints/10: .*delete that folder to go on"
    ):
        run.run(config, "mnist")
    for which in ("last", "best"):
        with pytest.raises(DamagedError, match="checkpoints/10"):
            load(workdir, which)
    shutil.rmtree(workdir / "checkpoints" / "10")
    (workdir / "checkpoints" / "12" / "metrics" / "metrics").unlink()
    with pytest.raises(DamagedError, match=r"checkpoints/12: metrics: .*No such file"):
        run.run(config, "mnist")
    shutil.rmtree(workdir / "checkpoints" / "12")
    assert run.run(config, "mnist")["steps"] == 12


def test_a_checkpoint_of_before_there_were_digests_is_taken_as_it_is(config):
    path = pathlib.Path(config.workdir) / "checkpoints" / "12" / "metrics" / "metrics"
    write_json(path, {"score": 1.5, "seconds": 7.0})
    with Checkpoints(config.workdir, read_only=True) as checkpoints:
        assert (checkpoints.seconds(12), checkpoints.best_step) == (7.0, 10)
    assert load(config.workdir).step == 12


def test_every_flipped_bit_and_every_cut_of_config_json_is_seen(config):
    workdir, rng = pathlib.Path(config.workdir), random.Random(0)
    content, right = (workdir / "config.json").read_bytes(), read_config(workdir)
    seen = 0
    for damaged in damages(rng, content, 500):
        (workdir / "config.json").write_bytes(damaged)
        try:
            assert read_config(workdir) == right, damaged
        except WorkdirError:
            seen += 1
    assert seen > 300, "the others are spaces, and letters of what nobody reads"


def test_damaged_notes_of_training_and_lines_of_metrics_are_dropped_with_a_word(config, capsys):
    workdir, rng = pathlib.Path(config.workdir), random.Random(0)
    content, right = (workdir / TRAINING).read_bytes(), read_training(workdir)
    assert right[-1]["to_step"] == 12
    for damaged in damages(rng, content, 100):
        (workdir / TRAINING).write_bytes(damaged)
        found = [{k: s[k] for k in right[0]} for s in read_training(workdir)]
        assert found in ([], right), damaged
    lines = (workdir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:5] + b"\xff" + lines[1][6:]
    (workdir / "metrics.jsonl").write_bytes(b"".join(lines))
    shutil.rmtree(workdir / "checkpoints" / "12")
    run.run(config, "mnist")
    said = capsys.readouterr().err
    assert f"warning: {workdir / 'metrics.jsonl'}: damaged lines are dropped (2 of {len(lines)})" in said
    assert f"warning: {workdir / TRAINING} was damaged" in said
    assert (workdir / "metrics.jsonl").read_bytes().splitlines()[0] == lines[0].rstrip()


def test_what_attacks_left_is_never_read_wrong(tmp_path, capsys):
    path, asked = tmp_path / "auto.json", {"examples": 5}
    right = {"asked": asked, "last": {"step": 3, "clean": 1.0, "robust": 0.25}}
    assert judge.known_of(path, asked, 3) == {}
    assert capsys.readouterr().err == ""
    write_json(path, sealed(right))
    assert judge.known_of(path, asked, 3) == right
    for damaged in damages(random.Random(0), path.read_bytes(), 200):
        path.write_bytes(damaged)
        found = {k: v for k, v in judge.known_of(path, asked, 3).items() if k in right}
        assert found in ({}, right), damaged
    assert "auto.json is of no use" in capsys.readouterr().err


def test_a_lock_names_its_process_and_nobody_when_it_is_free(tmp_path):
    with locked(tmp_path):
        with pytest.raises(BusyError, match=rf"at work in .* \(process {os.getpid()} on {socket.gethostname()}\)"):
            locked(tmp_path).__enter__()
        assert (tmp_path / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert (tmp_path / LOCK).read_text() == ""
    (tmp_path / LOCK).write_bytes(b"process 1 on \xff")  # of one that was killed; the system has no lock of it
    with locked(tmp_path):
        pass


def test_without_locks_of_the_system_the_file_alone_counts(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = socket.gethostname()
    for owner in (f"process {os.getppid()} on {here}", f"process {ended.pid} on elsewhere", "process 12 of mine"):
        (tmp_path / LOCK).write_text(owner)
        with pytest.raises(BusyError, match=rf"\({owner}\).*; if it is gone, delete {tmp_path / LOCK}"):
            locked(tmp_path).__enter__()
    (tmp_path / LOCK).write_text(f"process {ended.pid} on {here}")
    with locked(tmp_path), pytest.raises(BusyError):
        locked(tmp_path).__enter__()
    with locked(tmp_path):
        pass


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
    record, ended = metrics.Recorder([tmp_path], None, start=0, log_every=1, batch_size=1), []

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


def between_checkpoints(config: Config, monkeypatch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Does something at step 8 of 12, when the checkpoint of step 5 is whole."""
    take = jobs.Recorder.__call__

    def doing(self, step, *rest):
        if step == 8:
            while not jobs.steps_in(config.workdir):
                time.sleep(0.01)
            do()
        return take(self, step, *rest)

    monkeypatch.setattr(jobs.Recorder, "__call__", doing)


def test_a_workdir_that_is_gone_is_named_and_not_made_anew(fresh, monkeypatch):
    between_checkpoints(fresh, monkeypatch, lambda: shutil.rmtree(fresh.workdir))
    with pytest.raises(GoneError, match="was deleted or moved while the run was at work in it"):
        run.run(fresh, "mnist")
    assert not pathlib.Path(fresh.workdir).exists()


def test_a_lock_file_deleted_under_a_run_does_not_end_it(fresh, monkeypatch):
    between_checkpoints(fresh, monkeypatch, (pathlib.Path(fresh.workdir) / LOCK).unlink)
    assert run.run(fresh, "mnist")["steps"] == 12
    assert jobs.steps_in(fresh.workdir) == [10, 12]


@pytest.mark.parametrize(
    ("raised", "kind", "words"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), OutOfMemoryError, r"--batch_size \(now 16\)"),
        (MemoryError(), OutOfMemoryError, r"--eval_batch_size \(now 250\)"),
        (jax.errors.JaxRuntimeError("UNAVAILABLE: lost"), DeviceError, "look at the device .* JAX_PLATFORMS=cpu"),
        (jax.errors.JaxRuntimeError("INVALID_ARGUMENT: a bug"), jax.errors.JaxRuntimeError, "INVALID_ARGUMENT: a bug"),
    ],
)
def test_memory_and_devices_are_named_with_step_checkpoint_and_remedy(raised, kind, words, fresh, monkeypatch):
    take = jobs.Recorder.__call__

    def failing(self, step, *rest):
        if step == 8:
            raise raised
        return take(self, step, *rest)

    monkeypatch.setattr(jobs.Recorder, "__call__", failing)
    with pytest.raises(kind, match=words) as caught:
        run.run(fresh, "mnist")
    monkeypatch.setattr(jobs.Recorder, "__call__", take)
    if isinstance(caught.value, Error):
        assert caught.value.exit_code == {OutOfMemoryError: 6, DeviceError: 7}[kind]
        assert caught.match(r"in training, after step [567] \(.*\); the checkpoint of step 5 is whole in")
    assert load(fresh.workdir).step == 5
    assert run.run(fresh, "mnist")["steps"] == 12


def test_in_attacks_they_are_named_too(tiny, tmp_path, monkeypatch):
    config = settings(tmp_path)
    with jobs.open_job(config, tiny) as job:
        for raised, kind, words in [
            (
                "RESOURCE_EXHAUSTED: out",
                OutOfMemoryError,
                r"in the attacks on step 0 .*a lower --eval_batch_size \(now 250",
            ),
            (
                "INTERNAL: illegal",
                DeviceError,
                r"in the attacks on step 0 \(INTERNAL: illegal\); the checkpoints are whole",
            ),
        ]:
            monkeypatch.setattr(jobs, "evaluate", Raising(jax.errors.JaxRuntimeError(raised)))
            with pytest.raises(kind, match=words):
                run._evaluate(job, job.init_state(), run.SUITES["mnist"])


class Raising:
    def __init__(self, error):
        self.error = error

    def __call__(self, *args, **kwargs):
        raise self.error


def test_who_stops_a_run_does_not_wait_for_the_attack_on_a_checkpoint(no_last_evaluation, tmp_path, monkeypatch):  # noqa: F811
    config = settings(tmp_path, eval_batch_size=10)
    made, real = [], jobs.evaluate

    def telling(*args, progress, **kwargs):
        def told(name, gradients):
            made.append(name)
            os.kill(os.getpid(), signal.SIGTERM)
            progress(name, gradients)

        return real(*args, progress=told, **kwargs)

    monkeypatch.setattr(jobs, "evaluate", telling)
    with pytest.raises(run.Stopped, match="Stopped at step 6 of 12") as stopped:
        run.run(config, "mnist")
    assert stopped.value.exit_code == 143
    assert made == ["clean"], "one batch of one attack"
    with Checkpoints(config.workdir, read_only=True) as checkpoints:
        assert {checkpoints.score(step) for step in jobs.steps_in(config.workdir)} == {jobs.UNJUDGED}
    assert "score" not in (tmp_path / "w" / "metrics.jsonl").read_text()
    assert jobs._signals.caught == 0, "the next run is not stopped by it"


def test_killed_while_it_writes_a_checkpoint_a_run_ends_as_if_nothing_had_been(tmp_path):
    """Real processes: kill -9, then the same command again."""
    started = runs.Runs(tmp_path)
    flags = ("--steps=20", "--checkpoint_every=10", "--defense=fgsm", "--eval_examples=5", "--validation_examples=5")
    whole = started.call(*runs.TRAIN, *flags, f"--workdir={tmp_path / 'whole'}")
    assert whole.code == 0, whole.err
    process = started.start(*runs.TRAIN, *flags, f"--workdir={tmp_path / 'killed'}")
    process.reach(phases.CHECKPOINT)
    process.kill()
    ended = process.end()
    assert ended.code == runs.KILLED, ended.err
    again = started.call(*runs.TRAIN, *flags, f"--workdir={tmp_path / 'killed'}")
    assert again.code == 0, again.err
    assert runs.differing(runs.left(tmp_path / "killed"), runs.left(tmp_path / "whole")) == ""


def test_faults_that_prove_too_little_fail():
    about = {"date": "2026-11-25", "hardware": "CPU", "python": "3.11", "jax": "0.10", "commit": "abc"}
    kind = {"rows": [], "kills": {}, "landed": 0, "missed": 0, "wrong": 0, "environment": about}
    kind |= {"seconds": 60.0, "command": "python -m benchmarks.faults"}
    kinds = {name: kind for name in torture.ALL}

    def with_kills(landed: int, missed: int):
        killed = {"kills": {"checkpoint write": landed}, "landed": landed, "missed": missed}
        return {**kinds, "kill_training": kind | killed | {"rows": [{"fault": "f", "outcome": "o", "times": landed}]}}

    assert torture.wrong(with_kills(30, 10), 1.0) == []
    assert torture.wrong(with_kills(29, 0), 0.5) == []
    for few in (with_kills(29, 0), with_kills(60, 21)):
        (told,) = torture.wrong(few, 1.0)
        assert "they prove too little" in told
    assert torture.wrong({**kinds, "broken": kind | {"wrong": 1}}, 0.1) == ["broken: 1 wrong"]
    page = torture.markdown(with_kills(30, 2))
    assert "| kill_training | f | o | 30 |" in page
    assert "30 kills while it lived, 2 after its end" in page
    assert "| checkpoint write | 30 |" in page
    assert torture.markdown({"broken": kind}).count("Not done: kill_training, ") == 1


def test_a_full_disk_is_not_taken_for_memory_and_orbaxs_threads_tell_nothing_twice(capsys):
    """TensorStore counts a disk among the resources that are exhausted, and tells which after long names."""
    error = ValueError(
        f'RESOURCE_EXHAUSTED: Error writing "{"x" * 400}": [OS error 28: ENOSPC No space left on device]'
    )
    assert errors.of_device(error, "in training", "all is kept", "--batch_size") is None
    assert errors.reason(error) == "No space left on device"
    assert isinstance(errors.of_device(ValueError("RESOURCE_EXHAUSTED: Out of memory"), "", "", ""), OutOfMemoryError)

    def record(path: str, raised: bool) -> logging.LogRecord:
        return logging.LogRecord(
            "absl", logging.ERROR, path, 1, "failed", (), (ValueError, error, None) if raised else None
        )

    told = [
        cli._not_told_elsewhere(record(f"/lib/{package}/checkpoint/future.py", raised))
        for package in ("orbax", "orbaxes")
        for raised in (True, False)
    ]
    assert told == [False, True, True, True]


LATE = f"""
import asyncio, gc
import tensorstore
from e2sad_jax.errors import CheckpointError
from e2sad_jax import cli

writes = [tensorstore.Promise.new() for _ in range(3)]

async def fails(turns):
    for _ in range(turns):
        await asyncio.sleep(0)
    raise ValueError("{errors.FULL}")

async def save():
    await asyncio.gather(*(future for _, future in writes), *map(fails, range(9)))

class Other:
    def __del__(self):
        raise ValueError("another")

async def wrong():
    raise TypeError("a bug")

def run():
    loop = asyncio.new_event_loop()
    loop.create_task(wrong())
    try:
        loop.run_until_complete(save())
    except ValueError as error:
        told = CheckpointError(str(error))
    loop.close()
    for promise, _ in writes:
        promise.set_exception(ValueError("{errors.FULL}"))
    loop.call_exception_handler({{"message": "one more", "exception": ValueError()}})
    Other()
    gc.collect()
    raise told

cli.launch(run, "all is kept")
"""


def test_writes_that_come_back_late_are_not_told_and_all_else_is():
    """As Orbax does it: the first of several writes fails, the loop is closed, and TensorStore has the others yet."""
    ended = subprocess.run([sys.executable, "-c", LATE], capture_output=True, text=True, timeout=200)
    assert (ended.returncode, ended.stderr.splitlines()[-1]) == (1, f"-c: {errors.FULL}")
    assert "Event loop is closed" not in ended.stderr
    assert ended.stderr.count("never retrieved") == 1, "what is no full disk"
    assert ended.stderr.count("Traceback") == 2, "those of the others"
    assert "TypeError: a bug" in ended.stderr
    assert "ValueError: another" in ended.stderr
    assert "one more" in ended.stderr


def test_a_full_disk_that_is_found_at_the_end_is_told_in_the_same_words(tmp_path, monkeypatch, capsys):
    close = ocp.CheckpointManager.close

    def full(self) -> None:
        close(self)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ocp.CheckpointManager, "close", full)
    with pytest.raises(CheckpointError, match=f"cannot write .* {errors.FULL}; what was saved"), Checkpoints(tmp_path):
        pass
    with pytest.raises(Stopped, match="by a signal"), Checkpoints(tmp_path):
        raise Stopped("by a signal", 15)
    assert re.fullmatch(f"warning: cannot write .* {errors.FULL}; what was saved.*\n", capsys.readouterr().err)
