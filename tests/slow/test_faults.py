"""Real processes on real disks: kill -9, a full disk, two runs in one folder."""

import shutil
import subprocess

import pytest

from benchmarks.faults import phases, runs
from e2sad_jax import errors

pytestmark = pytest.mark.usefixtures("little")  # the network of `benchmarks.faults.preload`

FLAGS = ("--steps=20", "--checkpoint_every=10", "--defense=fgsm", "--eval_examples=5", "--validation_examples=5")


@pytest.fixture(scope="module")
def started(tmp_path_factory) -> runs.Runs:
    return runs.Runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def whole(started, tmp_path_factory):
    """A run that nothing befell."""
    workdir = tmp_path_factory.mktemp("whole") / "w"
    done = started.call(*runs.TRAIN, *FLAGS, f"--workdir={workdir}")
    assert done.code == 0, done.err
    return workdir


def test_killed_while_it_writes_a_checkpoint_a_run_ends_as_if_nothing_had_been(started, whole, tmp_path):
    """And meanwhile no other process gets in."""
    command = (*runs.TRAIN, *FLAGS, f"--workdir={tmp_path / 'w'}")
    process = started.start(*command)
    process.reach(phases.CHECKPOINT)
    second = started.call(*command)
    if process.poll() is None:
        assert second.code == 2
        assert f"process {process.pid}" in second.last
    process.kill()
    ended = process.end()
    assert ended.code == runs.KILLED, ended.err
    again = started.call(*command)
    assert again.code == 0, again.err
    assert runs.differing(runs.left(tmp_path / "w"), runs.left(whole)) == ""


def test_on_a_full_disk_a_run_ends_with_one_line_and_resumes_with_room(started, whole, tmp_path):
    """On a disk of its own, which takes the right to mount one; else of a file size that is limited."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in whole.rglob("*") if path.is_file()) // 1024
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size // 3}k", "tmpfs", str(disk)], check=False)
    command = (*runs.TRAIN, *FLAGS, f"--workdir={disk / 'w'}")
    if mounted.returncode:
        limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
        limit += "; import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)"
        assert started.call(*command, patch=limit).code == 1
    else:
        try:
            ended = started.call(*command)
            # TensorStore may report a write that comes back late; the last line says what happened and what to do.
            assert ended.code == 1, ended.err
            assert errors.FULL in ended.last
            assert "the same command resumes" in ended.last
            subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
            again = started.call(*command)
            assert again.code == 0, again.err
            assert runs.differing(runs.left(disk / "w"), runs.left(whole)) == ""
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=True)


def test_on_a_read_only_disk_a_command_ends_with_one_line_and_changes_nothing(started, whole, tmp_path):
    """A mounted one, which takes the right to mount; else a folder that cannot be written."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = not subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(disk)], check=False).returncode
    try:
        shutil.copytree(whole, disk / "w")
        before = runs.left(disk / "w")
        if mounted:
            subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        else:
            disk.chmod(0o500)
            (disk / "w").chmod(0o500)
        why = "Read-only file system" if mounted else "Permission denied"
        for words in (
            (*runs.TRAIN, *FLAGS, f"--workdir={disk / 'w'}"),
            (*runs.TRAIN, *FLAGS, f"--workdir={disk / 'new'}"),
            (*runs.EVALUATE, f"--workdir={disk / 'w'}"),
            (*runs.EVALUATE, f"--workdir={disk / 'w'}", f"--results={disk}"),
            (*runs.COMPARE, f"--workdir={tmp_path / 'compare'}", f"--results={disk}"),
        ):
            ended = started.call(*words)
            assert ended.code == 2, ended.err
            assert why in ended.last
            assert len(ended.err.strip().splitlines()) == 1
        assert not (tmp_path / "compare").exists()
        assert runs.differing(runs.left(disk / "w"), before) == ""
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=True)
        else:
            disk.chmod(0o700)
            (disk / "w").chmod(0o700)
