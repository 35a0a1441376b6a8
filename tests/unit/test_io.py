"""Files: JSON that programs read differently, bounds, atomic writing, seals, locks, digests."""

import errno
import fcntl
import json
import os
import socket
import stat
import subprocess
import sys
import threading

import ml_dtypes
import numpy as np
import pytest

from e2sad_jax import _io
from e2sad_jax.errors import BusyError, ConfigError

# JSON ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "too deeply"),
        ('{"a":' * 100_000, "too deeply"),
        ('{"a": 1, "b": 2, "a": 3}', "'a' twice"),
        ("[NaN]", "NaN"),
        ("-Infinity", "Infinity"),
        ("[1e999]", "1e999"),
        ("9" * 19, "64 bits"),
        ("9" * 100_000, "64 bits"),
        (b"\xff\xfe", "utf-8"),
        ('"\\ud800"', "surrogates"),
        ('{"\\udfff": 1}', "surrogates"),
        ("", "Expecting value"),
        ("{} {}", "Extra data"),
    ],
)
def test_json_that_programs_may_read_differently_is_refused(text, words):
    with pytest.raises(ValueError, match=words) as caught:
        _io.parse_json(text)
    assert len(str(caught.value)) < 300


def test_json_that_means_one_thing_is_read():
    value = {"é": [1, -(2**63), 2**63 - 1, 1.5, True, None, "\U0001f600", {}], "a": {"a": {"a": []}}}
    for text in (json.dumps(value), json.dumps(value, ensure_ascii=False).encode()):
        assert _io.parse_json(text) == value


def test_files_beyond_their_bound_are_not_read(tmp_path, monkeypatch):
    with open(tmp_path / "a.json", "wb") as file:
        file.truncate(2**33)  # takes no room
    with pytest.raises(ValueError, match=r"has 8,589,934,592 bytes, more than the 5 "):
        _io.read_bytes(tmp_path / "a.json", 5)
    with pytest.raises(IsADirectoryError):
        _io.read_bytes(tmp_path, 5)
    monkeypatch.setattr(os, "fstat", lambda descriptor: os.stat_result([stat.S_IFREG, *[0] * 9]))  # it grew since
    with pytest.raises(ValueError, match="more than the 5 bytes"):
        _io.read_bytes(tmp_path / "a.json", 5)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(ValueError, match="not a regular file"):
        _io.read_json(tmp_path / "a.json")


def test_a_seal_shows_any_change(tmp_path):
    values = {"a": 1, "b": {"c": [1.5, None, "é"]}}
    _io.write_json(tmp_path / "a.json", _io.sealed(values))
    assert _io.read_sealed(tmp_path / "a.json") == values
    for damaged in (values, {**_io.sealed(values), "a": 2}, {**_io.sealed(values), "d": 0}, {}):
        with pytest.raises(ValueError, match="damaged, or edited"):
            _io.unsealed(damaged)
    with pytest.raises(ValueError, match="holds a list"):
        _io.unsealed([values])


# Writing ---------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path, synced = tmp_path / "a.txt", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (synced.append(path.exists()), fsync(descriptor)))
    _io.write_text(path, "old")
    assert synced == [False], "on the disk before it has its name"

    def refuse(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_half(error):
        with _io.atomic_file(path) as stream:
            stream.write(b"half")
            raise error

    for error in (OSError, KeyboardInterrupt):
        with pytest.raises(error):
            write_half(error)
    for name in ("replace", "fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, refuse)
            with pytest.raises(OSError, match="No space left"):
                _io.write_text(path, "new")
    with pytest.raises(ValueError, match="JSON compliant"):
        _io.write_json(path, float("nan"))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
    _io.write_text(path, "new")
    assert path.read_text() == "new"


# Locks -----------------------------------------------------------------------------------------------------------------


def test_a_lock_names_its_process_and_is_taken_over_when_it_ended(tmp_path):
    with _io.locked(tmp_path):
        with pytest.raises(
            BusyError, match=rf"at work in .* \(process {os.getpid()} on {socket.gethostname()}\); wait"
        ):
            _io.locked(tmp_path).__enter__()
        with _io.locked(tmp_path, ".other"):  # another lock of the same folder
            pass
    (tmp_path / _io.LOCK).write_bytes(b"process 1 on \xff")  # of one that was killed; the system has no lock of it
    with _io.locked(tmp_path):
        assert str(os.getpid()) in (tmp_path / _io.LOCK).read_text()


def test_a_lock_of_another_process_ends_with_it(tmp_path):
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.flock(file, fcntl.LOCK_EX); print(1, flush=True)"
    argv = [sys.executable, "-S", "-c", f"{code}; sys.stdin.read()", str(tmp_path / _io.LOCK)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(BusyError, match=f"at work in {tmp_path}; wait for it to end"):
            _io.locked(tmp_path).__enter__()
        other.kill()
    with _io.locked(tmp_path):
        pass


def test_who_waits_for_a_lock_is_told_and_gets_it(tmp_path):
    told, order = threading.Event(), []

    def second():
        with _io.locked(tmp_path, waiting=lambda who: (order.append(who), told.set())):
            order.append("second")

    thread = threading.Thread(target=second)
    with _io.locked(tmp_path):
        thread.start()
        assert told.wait(30)
        order.append("first")
    thread.join()
    assert f"process {os.getpid()}" in order[0]
    assert order[1:] == ["first", "second"]


@pytest.mark.filterwarnings("ignore:flock not supported")
def test_without_locks_of_the_system_the_file_alone_counts(tmp_path, monkeypatch):
    def unsupported(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, path = socket.gethostname(), tmp_path / _io.LOCK
    for number, host in ((os.getppid(), here), (ended.pid, "elsewhere")):
        path.write_text(f"{number}\n{host}\n")
        with pytest.raises(BusyError, match=rf"\(process {number} on {host}; if it is gone, delete {path}\)"):
            _io.locked(tmp_path).__enter__()
    path.write_text(f"{ended.pid}\n{here}\n")
    with _io.locked(tmp_path), pytest.raises(BusyError, match=f"process {os.getpid()} on {here}"):
        _io.locked(tmp_path).__enter__()
    with _io.locked(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_an_oserror(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        _io.locked(tmp_path / "file").__enter__()


# Digests ---------------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_names_dtypes_shapes_and_bytes():
    x = np.arange(6, dtype=np.float32)
    different = [
        {"x": x},
        {"y": x},
        {"x": x.view(np.int32)},
        {"x": x.reshape(2, 3)},
        {"x": x.reshape(3, 2)},
        {"x": x + 1},
        {"x": x, "y": x},
        {"x": np.float32(0)},
        {"x": np.zeros((0, 3), np.float32)},
        {"x": np.zeros(3, ml_dtypes.bfloat16)},
        {"x": np.zeros(6, ml_dtypes.float8_e4m3fn)},
        {"x": np.zeros(6, ml_dtypes.float8_e5m2)},
    ]
    digests = [_io.digest(arrays) for arrays in different]
    assert len(set(digests)) == len(different)
    assert all(len(digest) == 64 for digest in digests)
    assert _io.digest({"x": x.reshape(2, 3).T}) == _io.digest({"x": np.ascontiguousarray(x.reshape(2, 3).T)})
    assert _io.digest({"x": x}, "header") != digests[0]


def test_a_folder_for_results_is_made_or_refused(tmp_path, monkeypatch):
    _io.check_folder(tmp_path / "a" / "b", "--results=a/b")
    assert list(tmp_path.iterdir()) == []
    _io.check_folder(tmp_path / "a" / "b", "--results=a/b", make=True)
    assert list((tmp_path / "a" / "b").iterdir()) == [], "nothing is left of what was tried"
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--to=x: cannot be written \(Not a directory\); choose another folder"):
        _io.check_folder(tmp_path / "file" / "c", "--to=x")

    def read_only(dir):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(dir))

    monkeypatch.setattr(_io.tempfile, "TemporaryFile", read_only)
    with pytest.raises(ConfigError, match=r"--results=a: cannot be written \(Read-only file system\)"):
        _io.check_folder(tmp_path / "a", "--results=a")
