"""One run on eight devices and on two hosts: the same numbers as on one device; what is refused; what is sent."""

import dataclasses
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
import jax.numpy as jnp
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax import jobs, models, run, sharding, train
from e2sad_jax.config import DEFENSES, Config
from e2sad_jax.errors import ConfigError
from e2sad_jax.transforms import TRANSFORMS
from tests.test_train import (  # noqa: F401
    load_state,
    losses,
    no_evaluation,
    no_last_evaluation,
    standard_promotion,
    tiny_config,
)

STEPS = 20


def trained(config: Config, dataset, devices: int, dtype=jnp.float64, **kwargs):
    """Losses and state after `config.steps`, on so many devices."""
    mesh = sharding.mesh(devices, config.batch_size)
    model = models.create(config.model, dataset.num_classes, dataset.image_shape)
    state = train.init_state(config, model, dataset.image_shape)
    params = jax.tree.map(lambda a: a.astype(dtype), state.params)
    state = state.replace(params=params, opt_state=train.optimizer(config).init(params))
    state = sharding.replicate(mesh, state)
    seen = []
    state = train.fit(
        config,
        model,
        dataset,
        state,
        steps=config.steps,
        record=lambda step, metrics, count: seen.extend(np.ravel(metrics["loss"])[:count].tolist()),
        checkpoint=lambda *a: None,
        mesh=mesh,
        **kwargs,
    )
    return seen, state


@pytest.mark.parametrize("defense", DEFENSES)
def test_eight_devices_train_as_one_does(defense, tiny):
    """Losses and parameters within 1e-5 after 20 steps, over an epoch's end.

    In float64: in float32 another order of a sum turns the sign of a gradient that is nearly zero now and then, and both
    the attack and Adam make a whole step of it.
    """
    config = tiny_config(defense=defense, second_step="noise", steps=STEPS, soft_label=False)
    with jax.enable_x64(True):
        one, eight = trained(config, tiny, 1), trained(config, tiny, 8)
    assert len(one[0]) == STEPS
    assert one[0][-1] < one[0][0]
    np.testing.assert_allclose(one[0], eight[0], atol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1].params), jax.tree.leaves(eight[1].params), strict=True):
        assert b.sharding.is_fully_replicated
        assert len(b.sharding.device_set) == 8
        assert a.dtype == jnp.float64
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_several_steps_a_dispatch_and_float32_on_eight_devices(tiny):
    config = tiny_config(defense="natural", steps=9)
    one, eight = trained(config, tiny, 1, jnp.float32), trained(config, tiny, 8, jnp.float32, steps_per_dispatch=4)
    np.testing.assert_allclose(one[0], eight[0], atol=1e-5)


def compiled_step(config: Config, dataset, devices: int):
    """The compiled step of a run, and what it is called with."""
    mesh = sharding.mesh(devices, config.batch_size)
    model = models.create(config.model, dataset.num_classes, dataset.image_shape)
    step = train.make_train_step(config, model, dataset.num_classes, TRANSFORMS["unit"], mesh=mesh)
    order = train.epoch_order(jax.random.key(0), jnp.uint32(0), len(dataset.x_train))
    state = train.init_state(config, model, dataset.image_shape)
    arguments = sharding.replicate(mesh, (state, dataset.x_train, dataset.y_train, order))
    return step.lower(*arguments).compile(), arguments


@pytest.mark.parametrize(("defense", "points"), [("natural", 1), ("fgsm", 2), ("e2sad", 3)])
def test_each_device_works_on_its_part_of_the_batch_and_sends_gradients_only(defense, points, tiny):
    """By the compiled program: activations of a part of the batch; sums over the devices, of each point's gradients."""
    program, (state, *_) = compiled_step(tiny_config(defense=defense, eps1=0.1), tiny, 8)
    text = program.as_text()
    assert "f32[16,8,8,16]" not in text, "the first layer's output for the whole batch"
    assert "f32[2,8,8,16]" in text
    kinds = set(re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(", text))
    assert kinds == {"all-reduce"}
    sent = sharding.collective_bytes(program)
    parameters = 4 * models.count_parameters(state.params)
    assert points * 0.9 * parameters <= sent["all-reduce"] <= points * parameters + 64


def test_a_checkpoint_of_eight_devices_goes_on_on_one_and_the_reverse(no_evaluation, tmp_path):  # noqa: F811
    settings = dict(defense="natural", steps=10, checkpoint_every=5)
    reference = tiny_config(workdir=str(tmp_path / "one"), **settings)
    run.run(reference, "mnist")
    for name, devices in (("down", (8, 1)), ("up", (1, 8)), ("twos", (2, 4))):
        config = tiny_config(workdir=str(tmp_path / name), **settings)
        run.run(dataclasses.replace(config, steps=5, devices=devices[0]), "mnist")
        run.run(dataclasses.replace(config, devices=devices[1]), "mnist")
        segments = json.loads((tmp_path / name / "training.json").read_text())
        assert [s.get("devices", 1) for s in segments] == list(devices)
        np.testing.assert_allclose(
            [loss for _, loss in losses(tmp_path / name)], [loss for _, loss in losses(tmp_path / "one")], atol=1e-4
        )
        assert int(load_state(config, tmp_path / name).step) == 10
        assert np.isfinite(e2sad_jax.load(tmp_path / name)(np.zeros((2, 8, 8, 1), np.uint8))).all()


def test_an_evaluation_on_eight_devices_is_that_on_one(tiny):
    config = tiny_config(eval_batch_size=24)
    state = train.init_state(config, models.create(config.model, 3, (8, 8, 1)), (8, 8, 1))
    outcomes = []
    for devices in (1, 8):
        mesh = sharding.mesh(devices, config.batch_size)
        model = models.create(config.model, 3, (8, 8, 1))
        job = jobs.Job(config, tiny, tiny, tiny, model, 1, pathlib.Path(), None, mesh)
        params = sharding.replicate(mesh, state.params)
        suite = [run.Attack("clean", "clean"), run.Attack("pgd", "pgd", 0.05, 3)]
        outcomes.append(jobs.attack(job, params, tiny, suite))
    for name in outcomes[0]:
        np.testing.assert_array_equal(outcomes[0][name].prediction, outcomes[1][name].prediction)


@pytest.mark.parametrize(
    ("devices", "batch_size", "message"),
    [
        (8, 12, r"--batch_size=12: must be a multiple of the 8 devices; the next are 8 or 16"),
        (8, 3, r"--batch_size=3: must be a multiple of the 8 devices; the next are 8$"),
        (0, 12, r"multiple of the 8 devices"),
        (
            9,
            18,
            r"--devices=9: must be at most 8, the cpu devices that JAX sees; on the CPU, XLA_FLAGS=.*count=N makes N",
        ),
    ],
)
def test_what_does_not_fit_the_devices_is_refused(devices, batch_size, message, no_evaluation, tmp_path):  # noqa: F811
    with pytest.raises(ConfigError, match=message):
        run.run(tiny_config(workdir=str(tmp_path / "w"), devices=devices, batch_size=batch_size), "mnist")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("", 0, 0), r"--coordinator=: must be HOST:PORT"),
        (("here", 0, 2), r"--coordinator=here: must be HOST:PORT of process 0, or auto"),
        (("127.0.0.1:9", 0, 0), r"--num_processes=0: must be at least 1"),
        (("127.0.0.1:9", 2, 2), r"--process_id=2: must be in \[0, 1\]"),
    ],
)
def test_processes_that_cannot_find_each_other_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        sharding.connect(*arguments)
    sharding.connect()  # alone


# --- two processes


def start(
    processes: int,
    data: pathlib.Path,
    workdir: pathlib.Path,
    *flags: str,
    second: tuple[str, ...] = (),
    heartbeat: int = 0,
) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    module = ["-m", "experiments.mnist"]
    if heartbeat:  # seconds, instead of the usual
        run_it = "from experiments import common; common.main('mnist', {})"
        module = ["-c", f"from e2sad_jax import sharding; sharding.HEARTBEAT = {heartbeat}; {run_it}"]
    command = [
        sys.executable,
        *module,
        f"--data={data}",
        f"--workdir={workdir}",
        "--model=digits_cnn",
    ]
    command += ["--batch_size=16", "--defense=natural", "--devices=0", "--eps1=0.05", "--eval_batch_size=50", *flags]
    together = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={processes}"] if processes > 1 else []
    return [
        subprocess.Popen(
            [*command, *together, *([f"--process_id={i}"] if together else []), *(second if i else ())],
            cwd=pathlib.Path(__file__).parents[1],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        )
        for i in range(processes)
    ]


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


@pytest.mark.parametrize("end", [signal.SIGABRT, signal.SIGSEGV])
def test_however_jax_ends_a_process_there_is_a_word(end, tmp_path):
    """It aborts one whose peer was lost, and may crash when its peers end while it starts."""
    (tmp_path / "checkpoints" / "40").mkdir(parents=True)
    code = f"""
import os, signal, sys
from experiments import watched
from e2sad_jax.errors import LostProcessError
if watched.is_watched():
    signal.signal({end.value}, signal.SIG_DFL)
    os.kill(os.getpid(), {end.value})
try:
    watched.run_again({str(tmp_path)!r})
except LostProcessError as error:
    sys.exit(str(error))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=pathlib.Path(__file__).parents[1], capture_output=True, text=True, timeout=60
    )
    assert f"({end.name})" in done.stderr, done.stderr
    assert "the checkpoint of step 40 is whole in" in done.stderr
