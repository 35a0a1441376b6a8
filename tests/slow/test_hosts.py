"""One run on two hosts: the numbers of one; all stop together; a lost process and other trouble end all with a message.

Two processes live through all scenarios in turn (`hosts_child.py`); two more lose one of them.
"""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import e2sad_jax
from tests.slow import hosts_child

ROOT = pathlib.Path(__file__).resolve().parents[2]
LOSE = "import runpy; from e2sad_jax import distributed; distributed.HEARTBEAT = 10"
LOSE += "; runpy.run_module('experiments.mnist', run_name='__main__')"


def start(*arguments: str, **variables: str) -> subprocess.Popen:
    """Starts a process that has two devices."""
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags, **variables},
    )


def free_port(ports: range) -> int:
    for port in ports:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return tried.getsockname()[1]
    raise OSError(f"no free port in {ports}")


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[str]:
    """Returns what the processes printed; kills them, and fails, if they do not end by themselves."""
    late = False
    try:
        for process in processes:
            process.wait(timeout)
    except subprocess.TimeoutExpired:
        late = True
    for process in processes:
        process.kill()
    printed = [process.communicate()[0] for process in processes]
    assert not late, printed
    return printed


def wait_until(reached, processes: list[subprocess.Popen]) -> None:
    deadline = time.monotonic() + 200
    while not reached():
        assert all(process.poll() is None for process in processes), finish(processes)
        if time.monotonic() > deadline:
            finish(processes, 0)
        time.sleep(0.2)


def losses(workdir: pathlib.Path) -> list[tuple[int, float]]:
    """Step and loss of each line of a run's metrics that has a loss."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.fixture(scope="module")
def npz(tiny, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=tiny.x_train, y_train=tiny.y_train, x_test=tiny.x_test, y_test=tiny.y_test)
    return path


@pytest.fixture(scope="module")
def pair(npz, tmp_path_factory):
    """The folder of two processes that lived through all scenarios, their exit codes, and what they printed."""
    folder = tmp_path_factory.mktemp("pair")
    (folder / "foreign").mkdir()
    (folder / "foreign" / "thesis.txt").write_text("precious")
    port = free_port(range(61440, 65536))  # JAX makes Slurm's port of the job's number
    job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2"}
    arguments = ("-m", "tests.slow.hosts_child", str(folder), str(npz))
    processes = [start(*arguments, **job, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    metrics = folder / "stopped" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 3, processes)
    processes[1].send_signal(signal.SIGINT)
    printed = finish(processes)
    return folder, [process.returncode for process in processes], printed


def outcomes(pair, name: str) -> list[dict]:
    """What a scenario came to, in both processes."""
    folder, _, printed = pair
    paths = [folder / f"{name}-{i}.json" for i in range(2)]
    assert all(path.exists() for path in paths), printed
    return [json.loads(path.read_text()) for path in paths]


def test_other_settings_in_one_process_are_refused_by_both(pair):
    for outcome in outcomes(pair, "settings"):
        assert outcome["code"] == 2
        assert "--process_id=1: other settings or other data than --process_id=0" in outcome["message"]


def test_a_loss_that_is_not_finite_ends_both(pair):
    for outcome in outcomes(pair, "loss"):
        assert outcome["code"] == 3
        assert "loss=nan" in outcome["message"] or "not finite" in outcome["message"]


def test_ctrl_c_in_one_process_stops_both_and_both_resume(pair):
    folder = pair[0]
    first, second = outcomes(pair, "stopped")
    assert (first["code"], second["code"]) == (130, 130)
    assert "Stopped at step" in second["message"]
    step = int(re.search(r"Stopped at step ([\d,]+)", first["message"])[1].replace(",", ""))
    assert 3 < step < 600
    first, second = outcomes(pair, "resumed")
    assert (first, second) == ({"code": 0, "reports": True}, {"code": 0, "reports": False}), "one reports"
    assert e2sad_jax.load(folder / "stopped").step == step + 30
    segments = json.loads((folder / "stopped" / "training.json").read_text())
    assert [(s["from_step"], s["to_step"]) for s in segments] == [(0, step), (step, step + 30)]
    assert [(s["devices"], s["processes"]) for s in segments] == [(4, 2), (4, 2)]


def test_two_processes_train_as_one_does(pair, npz, tmp_path):
    """Interrupted and resumed, they have the losses of one process that went through."""
    two = losses(pair[0] / "stopped")
    with jax.numpy_dtype_promotion("standard"):
        alone = hosts_child.train(npz, tmp_path / "one", devices=1, steps=len(two))
    assert alone == {"code": 0, "reports": True}
    one = losses(tmp_path / "one")
    assert [step for step, _ in two] == [step for step, _ in one]
    np.testing.assert_allclose([v for _, v in two[:20]], [v for _, v in one[:20]], atol=1e-4)


def test_a_first_process_that_ends_takes_the_second_along(pair):
    """The second waits for the first, which refused its workdir; it ends by itself, not as the first did."""
    folder, codes, printed = pair
    assert codes[0] == 2, printed
    assert "is not empty and holds no config.json" in printed[0]
    assert [path.name for path in (folder / "foreign").iterdir()] == ["thesis.txt"]
    assert codes[1] not in (0, -signal.SIGKILL), printed
    assert printed[1]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_other_with_a_message_and_a_checkpoint(lost, npz, tmp_path):
    port, workdir = free_port(range(1)), tmp_path / "w"
    flags = [f"--{name}={value}" for name, value in hosts_child.SETTINGS.items()]
    flags += [f"--data={npz}", f"--workdir={workdir}", "--devices=0", "--steps=100000", "--checkpoint_every=20"]
    flags += [f"--coordinator=127.0.0.1:{port}", "--num_processes=2"]
    processes = [start("-c", LOSE, *flags, f"--process_id={i}") for i in range(2)]
    wait_until(lambda: any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*")), processes)
    processes[lost].kill()
    left = processes[1 - lost]
    (printed,) = finish([left], 60)
    finish([processes[lost]])
    if left.returncode == 5:  # the next sum over the processes failed
        last = printed.splitlines()[-1]
        assert re.search(r"another .* lost .*the checkpoint of step [\d,]+ is intact in", last), printed
    else:  # JAX missed the signs of life first, and aborts
        assert left.returncode == -signal.SIGABRT, printed
        assert "another task died" in printed
    assert e2sad_jax.load(workdir).step >= 20
