"""The binaries as a user meets them: real processes, real files, what they print and how they end."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import chex
import numpy as np
import pytest

import e2sad_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = ["--model=digits_cnn", "--batch_size=8", "--eval_batch_size=8"]


def start(name, *flags, **kwargs):
    one_device = " ".join(flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag)
    environment = {
        **{**os.environ, "XLA_FLAGS": one_device, "JAX_PLATFORMS": "cpu"},
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the compiler's are most of so few steps
    }
    return subprocess.Popen(
        [sys.executable, "-m", f"experiments.{name}", *map(str, flags)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def call(name, *flags):
    process = start(name, *flags)
    out, err = process.communicate(timeout=280)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> pathlib.Path:
    """A user's own file: 40 images of three classes, 8x8, grey, as floats, and 8 to test."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 48)
    x = rng.random((48, 8, 8)).astype(np.float32) / 2
    x[labels == 1, 2:4] += 0.5
    x[labels == 2, :, 2:4] += 0.5
    path = tmp_path_factory.mktemp("data") / "shapes.npz"
    np.savez(path, x_train=x[:40], y_train=labels[:40], x_test=x[40:], y_test=labels[40:])
    return path


# Each as `python -m experiments.NAME FLAGS` would, forked from one process that has imported what they need.
FORKED = """
import json, os, runpy, sys
from e2sad_jax import export
from e2sad_jax.runs import run
from experiments.paper import runner
from experiments.step_cost import measure

folder, codes = sys.argv[1], []
for i, (name, *flags) in enumerate(json.loads(sys.argv[2])):
    if os.fork():
        codes.append(os.waitstatus_to_exitcode(os.wait()[1]))
        continue
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{folder}/{i}.{stream}", os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ["-m", *flags]
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
    break
else:
    print(json.dumps(codes))
"""
REFUSED = [
    ("mnist", ["--alpha=1.5"], "--alpha=1.5: must be in [0, 1]"),
    ("mnist", ["--eps1=24"], "--eps1=24.0: must be in [0, 1.0]"),
    ("mnist", ["--steps=many"], "flag --steps=many"),
    ("mnist", ["--lambda=0.1"], "Unknown command line flag 'lambda'"),
    ("mnist", ["--defense=mart"], "must be one of natural, fgsm"),
    ("mnist", ["--baseline=best"], "--baseline=best: must be empty or one of"),
    ("mnist", ["--preset=best"], "--preset=best: must be one of robust, robust2, paper"),
    ("mnist", ["e2sad"], "unexpected argument 'e2sad'"),
    ("mnist", ["--data=nowhere.npz"], "nowhere.npz"),
    ("mnist", ["--data=cifar"], "cifar"),
    ("paper", ["--table=4"], "--table=4: must be of 1, 2, 3, all"),
    ("paper", ["--figure=1"], "--figure=1: must be of 2, 3, 4, all"),
    ("paper", ["--study=eps"], "--study=eps: must be of second_step, lam, alpha, labels, all"),
    ("paper", ["--scale=huge"], "--scale=huge: must be one of full, small"),
    ("paper", ["--seeds=-1"], "--seeds=-1: must be at least 0"),
    ("paper", ["--time_budget_minutes=nan"], "--time_budget_minutes=nan: must be at least 0"),
    ("paper", ["--table=1", "--precision=fp8"], "--precision=fp8: must be one of float32, tf32, bf16"),
    ("paper", ["--table=1", "--data=nowhere.npz"], "nowhere.npz"),
    ("step_cost", ["--attack_steps=1,two"], "step_cost: --attack_steps=1,two: must be "),
    ("step_cost", ["--peer=keras"], "step_cost: --peer=keras: must be "),
    ("export", [], "export: WORKDIR/config.json does not exist: WORKDIR is not the workdir of a run"),
]
PATHS = {
    "mnist": ("data_dir", "workdir"),
    "paper": ("workdir", "results"),
    "step_cost": ("results",),
    "export": ("workdir",),
}


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> list[tuple[int, str, str, pathlib.Path]]:
    """Of each of `REFUSED`, and of four that train nothing: exit code, output and errors, and the folder for its files."""
    said, commands, folders = tmp_path_factory.mktemp("said"), [], []
    for name, flags, _ in REFUSED:
        folders.append(tmp_path_factory.mktemp("none"))
        commands.append([name, *(f"--{flag}={folders[-1] / flag}" for flag in PATHS[name]), *flags])
    commands += [["__main__"], ["__main__", "mnist"], ["svhn", "--help"], ["svhn", "--describe"]]
    done = subprocess.run(
        [sys.executable, "-c", FORKED, str(said), json.dumps(commands)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return [
        (code, (said / f"{i}.out").read_text(), (said / f"{i}.err").read_text(), folder)
        for i, (code, folder) in enumerate(zip(json.loads(done.stdout), [*folders, *[said] * 4], strict=True))
    ]


@pytest.mark.parametrize("case", range(len(REFUSED)), ids=lambda case: " ".join([REFUSED[case][0], *REFUSED[case][1]]))
def test_a_bad_value_is_one_line_and_exit_code_2(case, ended):
    (name, _, words), (code, out, err, folder) = REFUSED[case], ended[case]
    assert code == 2
    assert out == ""
    assert words.replace("WORKDIR", str(folder / "workdir")) in err
    assert len(err.strip().splitlines()) == 1
    assert err.startswith(f"{name}: ")
    assert list(folder.iterdir()) == [], "nothing was loaded, nothing written"


def test_help_explains_every_setting_with_its_range_and_default(ended):
    code, out, err, _ = ended[-2]
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    for words in [
        "--alpha: weight of the clean loss; in [0, 1]; read by fgsm, ifgsm, hamm, e2sad (default for e2sad "
        "with --preset=robust or robust2: 0) (default: '0.6')",
        "--lam: weight lambda of the dissimilarity; at least 0; read by e2sad (default for e2sad with --preset=robust or "
        "robust2: 0.3) "
        "(default: '0.3')",
        "--second_step: what the second step differentiates; one of total, noise, loss, literal, random; read by e2sad",
        "--epochs: passes over the training set instead of --steps, 0: use --steps; in [0, 1000000.0] (default: '20.0')",
        "1 - delta for the true class (default for e2sad: True; default with --preset=robust or robust2: True)",
    ]:
        assert words in text
    assert abs(float(re.search(r"--eps1: .*?\(default: '([\d.]+)'\)", text).group(1)) - 24 / 255) < 1e-12
    assert abs(float(re.search(r"--eps2: .*?\(default: '([\d.]+)'\)", text).group(1)) - 8 / 255) < 1e-12


def test_who_has_read_enough_of_the_help_sees_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "experiments.mnist", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True, timeout=280)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_package_of_the_commands_lists_them(ended):
    code, out, err, _ = ended[-4]
    assert (code, err) == (0, "")
    listed = dict(re.findall(r"^python -m experiments\.(\w+)\n    (.+)$", out, re.M))
    assert set(listed) == {"cifar10", "compare", "digits", "evaluate", "export", "mnist", "paper", "step_cost", "svhn"}
    assert listed["mnist"].startswith("Trains a classifier on MNIST")
    code, out, err, _ = ended[-3]
    assert (code, out) == (2, "")
    assert err == (
        "experiments: unexpected 'mnist'; a command is python -m experiments.NAME, and python -m experiments lists them\n"
    )


def test_describe_prints_the_layer_table(ended):
    code, out, _, _ = ended[-1]
    assert code == 0
    assert "1,771,594" in out
    assert "float32[1,28,28,32]" in out


def test_a_users_file_from_training_to_the_exported_model(images, tmp_path):
    """One story: two runs, stopped by Ctrl-C, resumed to the end bit for bit, evaluated, exported."""
    workdir = tmp_path / "w"
    flags = [
        f"--data={images}",
        f"--workdir={workdir}/",  # as a shell completes it
        "--preset=paper",  # without a schedule, so that --steps may change
        "--baseline=natural",
        "--checkpoint_every=3",
        "--log_every=2",
        *TINY,
    ]
    process = start("mnist", *flags, "--steps=1000000", "--baseline=")
    for line in process.stderr:  # the first line of progress: training is under way
        if "steps, loss" in line:
            break
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    step = int(re.search(r"Stopped at step ([\d,]+) of 1,000,000", err).group(1).replace(",", ""))
    assert step > 0
    assert re.search(r"^ *\S+ -m experiments\.mnist ", err, re.M), err
    assert "Traceback" not in err
    assert (workdir / "checkpoints" / str(step)).is_dir()

    steps = step + 2
    code, out, err = call("mnist", *flags, f"--steps={steps}")
    assert code == 0, err
    assert f"Resuming from step {step:,}" in err
    assert f"shapes: accuracy on all 8 test images, {steps:,} training steps" in out
    assert "mnist" not in out.replace(str(tmp_path), ""), "results are labelled with their data set"
    columns = ["attack"]
    for name, folder in (("natural", "w-natural"), ("e2sad", "w")):
        best = json.loads((tmp_path / folder / "results.json").read_text())["best"]["step"]
        assert e2sad_jax.load(tmp_path / folder, "best").step == best
        columns += [name] if best == steps else [name, f"{name}, best (step {best:,})"]
    table = [re.split(" {2,}", line) for line in out.splitlines()]
    assert columns in table
    (pgd,) = (line for line in table if line[0] == "PGD-40 (eps 0.3, step 0.02, random start)")
    assert [bool(re.fullmatch(r"\d\.\d{4}", cell)) for cell in pgd[1:]] == [True] * (len(columns) - 1)
    for name in ("checkpoints", "results.json", "results.md", "examples.png"):
        assert str(workdir / name) in out
        assert (workdir / name).exists()
    assert (workdir / "examples.png").read_bytes().startswith(b"\x89PNG")
    assert re.search(
        rf"train e2sad on shapes: {steps:,}/{steps:,} steps, loss \d+\.\d{{4}}(, [\d,]+ images/s)?, took", err
    )
    assert "Traceback" not in err
    assert "\r" not in err, "no progress bar in a log"
    results = json.loads((workdir / "results.json").read_text())
    assert results["command"].startswith("python -m experiments.mnist --data=")
    assert (results["examples"], results["steps"], results["config"]["lam"]) == (8, steps, 0.1)

    code, _, err = call("mnist", *flags, f"--steps={steps}", "--baseline=", f"--workdir={tmp_path / 'whole'}")
    assert code == 0, err
    stopped, whole = (e2sad_jax.load(tmp_path / name).params for name in ("w", "whole"))
    chex.assert_trees_all_equal(stopped, whole)

    code, _, err = call("mnist", *flags, "--lam=0.2")
    assert code == 2
    assert "--lam: 0.1 there, 0.2 here" in err

    code, out, err = console("evaluate", workdir, "--queries=20", "--targets=1", "--examples=4")
    assert code == 0, err
    assert str(workdir / "evaluation" / "evaluation.md") in out
    assert "`e2sad evaluate --workdir=" in (workdir / "evaluation" / "evaluation.md").read_text()
    code, out, err = console("export", workdir, "--format=safetensors")
    assert code == 0, err
    from e2sad_jax import export

    given = export.load_safetensors(workdir / "export" / "model.safetensors")
    chex.assert_trees_all_equal(given.params, stopped)


def console(*words):
    """The console script, as an installation has it."""
    program = "import sys; from e2sad_jax.cli import console; sys.argv[0] = 'e2sad'; console()"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stdout, done.stderr


def test_sigterm_ends_a_run_like_ctrl_c(images, tmp_path):
    flags = [
        f"--data={images}",
        f"--workdir={tmp_path / 'w'}",
        "--defense=fgsm",
        "--eval_examples=5",
        "--steps=1000000",
    ]
    process = start("mnist", *flags, "--model=digits_cnn", "--batch_size=8")
    for line in process.stderr:
        if "steps, loss" in line:
            break
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert "Stopped at step" in err


def test_divergence_ends_with_exit_code_3_and_what_to_do(images, tmp_path):
    flags = [f"--data={images}", f"--workdir={tmp_path / 'w'}", "--steps=50", "--learning_rate=1e35", *TINY]
    code, _out, err = call("mnist", *flags)
    assert code == 3
    assert re.search(r"mnist: step \d+: .*loss=(nan|inf).*Try a lower --learning_rate", err)
    assert "Traceback" not in err
