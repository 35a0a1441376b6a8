"""One run on two hosts: the numbers of one; all stop together; a lost process and other trouble end all with a word."""

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

import numpy as np
import pytest

import e2sad_jax
from tests.unit.training.test_train import losses


def start(
    processes: int,
    data: pathlib.Path,
    workdir: pathlib.Path,
    *flags: str,
    second: tuple[str, ...] = (),
    heartbeat: int = 0,
    slurm: bool = False,
) -> list[subprocess.Popen]:
    port = free_port(range(61440, 65536) if slurm else range(1))  # JAX makes Slurm's port of the job's number
    module = ["-m", "experiments.mnist"]
    if heartbeat:  # seconds, instead of the usual
        run_it = "from e2sad_jax import cli; cli.train('mnist')"
        module = ["-c", f"from e2sad_jax import distributed; distributed.HEARTBEAT = {heartbeat}; {run_it}"]
    command = [
        sys.executable,
        *module,
        f"--data={data}",
        f"--workdir={workdir}",
        "--model=digits_cnn",
    ]
    command += ["--batch_size=16", "--defense=natural", "--devices=0", "--eps1=0.05", "--eval_batch_size=50", *flags]
    environment = {**os.environ, "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")}
    own: list[tuple[list[str], dict[str, str]]] = [([], {})]  # flags and environment of each process
    if slurm:
        job = {"SLURM_JOB_ID": str(port - 61440), "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": str(processes)}
        numbers = [{"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)} for i in range(processes)]
        own = [(["--coordinator=auto"], {**job, **number}) for number in numbers]
    elif processes > 1:
        together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"]
        own = [([*together, f"--process_id={i}"], {}) for i in range(processes)]
    return [
        subprocess.Popen(
            [*command, *flags_of_one, *(second if i else ())],
            cwd=pathlib.Path(__file__).resolve().parents[2],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**environment, **variables},
        )
        for i, (flags_of_one, variables) in enumerate(own)
    ]


def free_port(ports: range) -> int:
    for port in ports:
        with socket.socket() as tried, contextlib.suppress(OSError):
            tried.bind(("127.0.0.1", port))
            return tried.getsockname()[1]
    raise OSError(f"no free port in {ports}")


def finish(processes: list[subprocess.Popen], timeout: float = 240) -> list[tuple[int, str]]:
    try:
        outputs = [p.communicate(timeout=timeout)[0] for p in processes]
        return [(p.returncode, output) for p, output in zip(processes, outputs, strict=True)]
    finally:
        for p in processes:
            p.kill()
            p.wait()
            p.stdout.close()


@pytest.fixture(scope="module")
def npz(tiny, tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    np.savez(path, x_train=tiny.x_train, y_train=tiny.y_train, x_test=tiny.x_test, y_test=tiny.y_test)
    return path


def test_two_processes_train_as_one_and_stop_together(npz, tmp_path):
    """Ctrl-C in the second stops both; the same command goes on, and ends where one process alone ends."""
    flags = ("--steps=600", "--checkpoint_every=300", "--log_every=1")
    processes = start(2, npz, tmp_path / "two", *flags)
    metrics, deadline = tmp_path / "two" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert all(p.poll() is None for p in processes), finish(processes)
        assert time.monotonic() < deadline, finish(processes, 0)
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGINT)
    stopped = finish(processes)
    assert [code for code, _ in stopped] == [130, 130], stopped
    assert "Stopped at step" in stopped[0][1]
    at = int(re.search(r"Stopped at step ([\d,]+)", stopped[0][1])[1].replace(",", ""))
    assert 3 < at < 600
    goes_on = (*flags[1:], f"--steps={at + 30}")
    done = finish(start(2, npz, tmp_path / "two", *goes_on))
    assert [code for code, _ in done] == [0, 0], done
    assert "results:" in done[0][1]
    assert "results:" not in done[1][1], "one reports"
    alone = finish(start(1, npz, tmp_path / "one", *goes_on, "--devices=1"))
    assert alone[0][0] == 0, alone
    two, one = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert [step for step, _ in two] == [step for step, _ in one]
    np.testing.assert_allclose([v for _, v in two[:20]], [v for _, v in one[:20]], atol=1e-4)
    segments = json.loads((tmp_path / "two" / "training.json").read_text())
    assert [(s["devices"], s["processes"]) for s in segments] == [(4, 2), (4, 2)]
    assert e2sad_jax.load(tmp_path / "two").step == at + 30


def test_on_a_cluster_they_find_each_other_by_themselves(npz, tmp_path):
    """Slurm's variables say who is there and where."""
    done = finish(start(2, npz, tmp_path / "w", "--steps=3", slurm=True))
    assert [code for code, _ in done] == [0, 0], done
    assert ["results:" in output for _, output in done] == [True, False], "one reports"
    (segment,) = json.loads((tmp_path / "w" / "training.json").read_text())
    assert (segment["devices"], segment["processes"], e2sad_jax.load(tmp_path / "w").step) == (4, 2, 3)


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_ends_the_others_with_a_word_and_a_checkpoint(lost, npz, tmp_path):
    processes = start(2, npz, tmp_path / "w", "--steps=100000", "--checkpoint_every=20", "--log_every=1", heartbeat=5)
    folder, deadline = tmp_path / "w" / "checkpoints", time.monotonic() + 200
    while not any(path.name.isdigit() for path in folder.glob("*")):
        assert time.monotonic() < deadline, finish(processes, 0)
        time.sleep(0.2)
    processes[lost].kill()
    code, output = finish([processes[1 - lost]], 60)[0]
    finish([processes[lost]])
    assert code == 5, output
    last = output.splitlines()[-1]
    assert re.search(r"another .* lost .*the checkpoint of step [\d,]+ is whole in", last), output
    assert e2sad_jax.load(tmp_path / "w").step >= 20


@pytest.mark.parametrize("trouble", ["settings", "workdir", "loss"])
def test_trouble_in_one_or_both_processes_ends_both(trouble, npz, tmp_path):
    """And none waits for another that will not come."""
    flags, second = ("--steps=60",), ()
    if trouble == "settings":
        second = ("--seed=1",)
    elif trouble == "workdir":
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / "thesis.txt").write_text("precious")
    else:
        flags = (*flags, "--learning_rate=1e30")
    (first, said), (other, _) = finish(start(2, npz, tmp_path / "w", *flags, second=second), 100)
    expected = {
        "settings": (2, "--process_id=1: other settings or other data than --process_id=0"),
        "workdir": (2, "is not empty and holds no config.json"),
        "loss": (3, "is not finite"),
    }
    code, words = expected[trouble]
    assert first == code, said
    assert words in said or (trouble == "loss" and "loss=nan" in said), said
    assert other in (code, 5)
