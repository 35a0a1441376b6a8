"""experiments.step_cost with steps that are really compiled and timed, though briefly, and its command as a process."""

import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from e2sad_jax.training import Config, configure
from experiments.paper import cost, plan
from experiments.step_cost import counts, measure, peers
from experiments.step_cost.request import Request
from experiments.step_cost.step import Step, data

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Of a process: one device, and little work for the compiler.
QUICK = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
QUICK |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}

pytestmark = pytest.mark.usefixtures("standard_promotion")


@pytest.fixture(scope="module")
def measured():
    """Natural training and IFGSM, really compiled and timed, though briefly."""
    request = Request(
        defense=("ifgsm",),
        attack_steps=(2, 3, 4),
        model="digits_cnn",
        image_size=8,
        batch_size=8,
        rounds=3,
        seconds=0.0,
    )
    with jax.numpy_dtype_promotion("standard"):
        return measure.measure(request, lambda result: None)


def test_numbers_of_a_row_fit_together(measured):
    assert [row["name"] for row in measured["rows"]] == ["natural", "ifgsm-2", "ifgsm-3", "ifgsm-4"]
    most = measured["ceiling"]["float32"]
    assert most["flops_per_second"] == most["flops"] / min(most["seconds"])
    natural = measured["rows"][0]
    assert natural["time_natural"] == natural["flops_natural"] == natural["time_float32"] == 1
    for row in measured["rows"]:
        assert row["error"] is None
        assert len(row["seconds"]) == measured["rounds_done"] == 3
        fastest, low, middle, high, slowest = (
            row[name] for name in ("fastest", "lower_quartile", "milliseconds", "upper_quartile", "slowest")
        )
        assert 0 < fastest <= low <= middle <= high <= slowest
        assert middle == pytest.approx(1e3 * statistics.median(row["seconds"]))
        assert row["images_per_second"] == pytest.approx(8 / (middle / 1e3))
        assert row["flops_per_second"] == pytest.approx(row["flops"] / (middle / 1e3))
        assert row["share_of_ceiling"] == pytest.approx(row["flops_per_second"] / most["flops_per_second"])
        assert row["compile_seconds"] > 0
        assert row["peak_bytes"] > 3 * 4 * 15_000, "parameters and Adam's moments"
        assert row["time_ifgsm_30"] is None, "not asked for"
        assert row["time_natural"] == pytest.approx(
            statistics.median(np.divide(row["seconds"], natural["seconds"])), rel=1e-9
        )
    json.dumps(measured, allow_nan=False)


def test_work_grows_by_the_same_for_each_step_of_the_attack(measured):
    for name in ("flops", "bytes_accessed"):
        one, two, three = (row[name] for row in measured["rows"][1:])
        assert two - one > 0.1 * one
        assert three - two == pytest.approx(two - one, rel=0.05)
    for row in measured["rows"][1:]:
        assert row["flops_natural"] <= 1.4 + 0.7 * row["attack_steps"]


def test_forty_steps_of_attack_need_no_more_memory_than_one():
    shape, size = (8, 8, 1), {"model": "digits_cnn", "batch_size": 64}
    fgsm = counts.peak_bytes(Step(Config(defense="fgsm", **size), shape, 10).compiled)
    ifgsm = counts.peak_bytes(Step(configure(defense="ifgsm", attack_steps=40, **size), shape, 10).compiled)
    assert ifgsm <= 1.10 * fgsm


@pytest.mark.usefixtures("unoptimized")
def test_several_steps_in_a_dispatch_are_the_same_steps():
    config = Config(defense="natural", model="digits_cnn", batch_size=8)
    one, several = (Step(config, (8, 8, 1), 10, steps_per_dispatch=n) for n in (1, 3))
    np.testing.assert_allclose(several.losses(5), one.losses(5), rtol=1e-6)
    several.run(1)
    assert several.at_once == 3


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize("devices", [1, 4])
def test_a_step_that_remembers_is_the_one_that_training_runs(devices):
    """It keeps the perturbations of its batch, on the devices that have these images."""
    request = Request(defense=("e2sad",), model="digits_cnn", image_size=8, batch_size=8, devices=devices)
    step = Step(request.config(request.kinds()[-1]), request.image_shape, 10, steps_per_dispatch=1)
    step.run(1)  # at a budget of 0
    before = np.asarray(step._state.memory["delta"])
    step.run(1)
    after = step._state.memory["delta"]
    assert len(after.sharding.device_set) == devices
    assert after.addressable_shards[0].data.shape[0] == 1024 // devices
    changed = np.flatnonzero((np.asarray(after) != before).any(1))
    assert sorted(changed) == sorted(data(request.image_shape, 10, 8).batch(1, 8))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_measurement_with_what_there_is(number, tmp_path):
    """Sent twice at once, as `timeout` and a terminal do to a process and to its group."""
    flags = [
        "--defense=natural",
        "--model=digits_cnn",
        "--image_size=8",
        "--batch_size=8",
        "--rounds=1000000",
        "--seconds=0.001",
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments.step_cost", *flags, f"--results={tmp_path}"],
        cwd=ROOT,
        env=QUICK,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for _ in range(6000):
            if (tmp_path / "step_cost.json").exists() or process.poll() is not None:
                break
            time.sleep(0.1)
        process.send_signal(number)
        process.send_signal(number)
        out, said = process.communicate(timeout=100)
    assert process.returncode == 128 + number, said
    result = json.loads((tmp_path / "step_cost.json").read_text())
    assert result["rounds_done"] == len(result["rows"][0]["seconds"]) >= 1
    assert not result["complete"]
    assert f"interrupted; the {result['rounds_done']} rounds that were done are in {tmp_path}" in said
    assert out.startswith("Cost of a training step")
    assert (tmp_path / "step_cost.png").stat().st_size > 10_000


def command(*flags):
    return subprocess.run(
        [sys.executable, "-m", "experiments.step_cost", *flags],
        cwd=ROOT,
        env=QUICK,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def test_from_the_command_to_its_files(tmp_path):
    flags = [
        "--defense=natural",
        "--model=digits_cnn",
        "--image_size=8",
        "--batch_size=8",
        "--rounds=2",
        "--seconds=0.001",
    ]
    done = command(*flags, f"--results={tmp_path}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "Cost of a training step: digits_cnn, batch 8 of 8x8x1"
    assert max(map(len, lines)) <= 120
    assert "step cost: " in done.stderr, "progress"
    table = (tmp_path / "step_cost.md").read_text()
    assert [line.split("|")[1].strip() for line in table.splitlines() if "|" in line] == ["step", "---", "natural"]
    for words in (
        "python -m experiments.step_cost --defense=natural",
        "Measured 20",
        "; commit ",
        "GFLOP/s in float32",
    ):
        assert words in table
    result = json.loads((tmp_path / "step_cost.json").read_text())
    assert result["settings"] == {
        **{"batch_size": 8, "model": "digits_cnn", "devices": 1, "rounds": 2, "seconds": 0.001},
        **{"image_shape": [8, 8, 1], "steps_per_dispatch": 1},
    }
    assert {"jax", "hardware", "date", "commit"} <= set(result["environment"])
    assert (tmp_path / "step_cost.png").stat().st_size > 10_000


@pytest.mark.usefixtures("unoptimized")
def test_the_step_by_xla_is_ours_without_loops_and_computes_the_same():
    config = configure(
        defense="ifgsm", attack_steps=3, model="digits_cnn", batch_size=4
    )  # the first step is in no loop
    with jax.numpy_dtype_promotion("standard"):
        ours = Step(config, (8, 8, 1), 10)
        theirs = peers.build("xla", config, (8, 8, 1), 10, ours.parameters())
        assert " while(" in ours.compiled.as_text()
        assert " while(" not in theirs._step.compiled.as_text()
        assert " convolution(" in theirs._step.compiled.as_text()
        np.testing.assert_allclose(ours.losses(2), theirs.losses(2), rtol=1e-3)


def test_a_cost_of_the_paper_is_measured_beside_a_natural_step_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr(cost, "SECONDS", 0.01)
    quick = {"model": "digits_cnn", "batch_size": 8}
    entries = plan.table_1(plan.Scale("t", quick, {}, 1, 3, 1), {})
    configs = [e.config for e in entries if e.name == "FGSM 0.3" and e.label == "hard"]
    steps = cost.measure(configs, (8, 8, 1), 10, tmp_path)["steps"]
    natural, fgsm = (steps[f"{name}, digits_cnn, batch 8, float32"] for name in ("natural", "fgsm"))
    assert natural["flops_natural"] == natural["time_natural"] == 1.0
    assert 1.5 < fgsm["flops_natural"] < 2.5
    assert all(0 < step["fastest"] <= step["milliseconds"] <= step["slowest"] for step in steps.values())
    assert cost.faster_together(configs[0], (8, 8, 1), 10, 2, tmp_path) in (True, False)
