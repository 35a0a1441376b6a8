"""The train step of every defense compiled for TPUs and GPUs that are not here (make test-ahead)."""

import functools
import json
import os
import subprocess
import sys

import pytest

from e2sad_jax import networks, training
from e2sad_jax.defenses import DEFENSES, readers
from e2sad_jax.training.config import configure
from experiments.step_cost import ahead
from experiments.step_cost.compiled import Program
from experiments.step_cost.step import no_compilation_cache
from experiments.step_cost.targets import CHIPS, Target, importable, less_optimising

pytestmark = [
    pytest.mark.usefixtures("standard_promotion"),
    pytest.mark.skipif(
        not all(importable(chip.package) for chip in CHIPS.values()), reason="needs the packages of make test-ahead"
    ),
]

SHAPE, CLASSES, IMAGES, BATCH = (8, 8, 1), 10, 64, 32


@functools.cache
def compiled(target, defense, steps=1, **settings):
    config = configure(**{"model": "digits_cnn", "defense": defense, "batch_size": BATCH, **settings})
    with less_optimising(), no_compilation_cache():  # a program for no device cannot be read back
        return ahead.lower(config, SHAPE, CLASSES, IMAGES, Target.named(target), steps).compile()


def read(*args, **settings):
    return Program.read(compiled(*args, **settings).as_text())


@functools.cache
def parameters():
    config = configure(model="digits_cnn", batch_size=BATCH)
    model = networks.create(config.model, CLASSES, SHAPE, config.precision)
    return networks.count_parameters(training.init_state(config, model, SHAPE).params)


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_step_for_a_gpu(defense):
    program = read("h100", defense)
    assert program.collectives() == {}
    assert program.transfers == 0
    assert program.kernels > 40


@pytest.mark.parametrize("defense", DEFENSES)
def test_many_steps_for_eight_gpus_send_one_sum_of_the_gradients(defense):
    program = read("h100x8", defense, 64)
    assert program.transfers == 0
    sent = program.collectives()
    number, total = sent.pop("all-reduce")
    assert 4 * parameters() <= total <= 4 * parameters() + 20 * BATCH * CLASSES, (
        "no more than the gradients and scalars"
    )
    assert number <= 4
    images = 4 * BATCH * SHAPE[0] * SHAPE[1]
    assert sum(size for _, size in sent.values()) <= 2 * images, "at most what a memory or free training keeps"


def test_batch_normalisation_sums_once_forward_and_once_backward():
    program = read("h100x8", "natural", model="preact_resnet18", width=8)
    number, _ = program.collectives()["all-reduce"]
    assert number <= 2 * 17 + 3, "17 layers of it; then gradients and scalars"


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_step_is_lowered_for_tpus(defense):
    config = configure(model="digits_cnn", defense=defense, batch_size=BATCH)
    lowered = ahead.lower(config, SHAPE, CLASSES, IMAGES, Target.named("v5e:2x2"))
    assert "select_and_scatter" in lowered.as_text(), "the TPU's own pooling"


@pytest.mark.parametrize("defense", ["natural", "e2sad"])
def test_a_step_for_four_tpus(defense):
    program = read("v5e:2x2", defense, precision="bf16")
    sent = program.collectives()
    assert set(sent) == {"all-reduce"}
    assert program.transfers == 0
    least, biases = 4 * parameters(), 2 * 3 * (16 + 32 + 256 + 10)
    assert least - 2 * biases <= sent["all-reduce"][1] <= least + biases + 64, "kernels once, in float32; then scalars"


def test_the_turns_of_a_tpus_loop_are_known():
    few, many = (read("v5e", "ifgsm", precision="bf16", attack_steps=k) for k in (10, 30))
    assert few.unknown_loops == many.unknown_loops == 0
    assert many.kernels - few.kernels >= 20 * 5
    assert many.loops


def test_the_program_is_that_of_the_platform_for_which_it_is_compiled():
    for defense in ("natural", "e2sad"):
        text = compiled("h100", defense).as_text()
        assert "reduce-window" not in text, "pooling keeps no indices"
        assert " scatter(" not in text


@pytest.mark.parametrize("target", ["h100", "h100x8"])
def test_memory_of_an_attack_does_not_grow_with_its_steps(target):
    few, many = (compiled(target, "ifgsm", attack_steps=k) for k in (3, 30))
    assert many.memory_analysis().temp_size_in_bytes <= 1.01 * few.memory_analysis().temp_size_in_bytes
    programs = [Program.read(one.as_text()) for one in (few, many)]
    turn, rest = divmod(programs[1].kernels - programs[0].kernels, 27)
    assert rest == 0, "a loop whose turns are known"
    assert turn > 5
    assert all(program.unknown_loops == 0 for program in programs)


def test_attacks_of_several_steps_are_loops():
    assert "ifgsm" in readers("attack_steps")
    assert len(compiled("h100", "pgd", attack_steps=30).as_text()) < 1.5 * len(
        compiled("h100", "pgd", attack_steps=3).as_text()
    )


def test_the_command(tmp_path):
    command = [sys.executable, "-m", "experiments.step_cost", "--target=h100,h100x8", "--model=digits_cnn"]
    command += ["--defense=natural,e2sad", f"--batch_size={BATCH}", "--image_size=8", f"--results={tmp_path}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    rows = json.loads((tmp_path / "ahead.json").read_text())["rows"]
    assert [(row["label"], row["target"], row["error"]) for row in rows] == [
        (label, target, None)
        for label in ("natural", "e2sad", "e2sad, robust", "e2sad, robust2")
        for target in ("h100", "h100x8")
    ]
    one, eight = (row for row in rows if row["label"] == "e2sad")
    assert eight["flops"] == one["flops"] / 8
    assert one["bounds"]["links"] == 0 < eight["bounds"]["links"]
    assert one["bytes"] > eight["bytes"]
    assert (tmp_path / "ahead.png").stat().st_size > 10_000
    assert "h100x8" in (tmp_path / "ahead.md").read_text()
