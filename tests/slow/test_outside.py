"""Commands where there is no checkout, as the wheel installs them, and where JAX has no device."""

import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = "import sys\nfrom e2sad_jax.cli import console\nsys.exit(console())\n"  # what installers write for `e2sad`


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """A folder with a user's own model, data, and package `experiments`; beside it what the wheel installs, and its script."""
    top = tmp_path_factory.mktemp("outside")
    shutil.copytree(ROOT / "e2sad_jax", top / "site" / "e2sad_jax", ignore=shutil.ignore_patterns("__pycache__"))
    (top / "bin").mkdir()
    (top / "bin" / "e2sad").write_text(SCRIPT)
    (top / "here" / "experiments").mkdir(parents=True)
    (top / "here" / "experiments" / "__init__.py").write_text("raise RuntimeError('this one is the user\\'s')\n")
    (top / "here" / "mymodel.py").write_text(
        "import jax.numpy as jnp\ndef f(x):\n    m = x.mean((1, 2, 3))\n    return jnp.stack([m, 1 - m, 0 * m], -1)\n"
    )
    images = np.random.default_rng(0).integers(0, 256, (30, 8, 8, 1), np.uint8)
    labels = np.sort(np.arange(30) % 3)
    np.savez(top / "here" / "t.npz", x_train=images, y_train=labels, x_test=images, y_test=labels)
    return top / "here"


def call(folder, *words, cwd=None, **environment):
    """Runs `python -m ...` or a script in the folder, without the checkout on the path."""
    own = {"PYTHONPATH": str(folder.parent / "site"), "JAX_PLATFORMS": "cpu", **environment}
    return subprocess.run(
        [sys.executable, *words],
        cwd=cwd or folder,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=280,
    )


def test_every_command_that_is_listed_runs_in_any_folder(folder):
    listed = call(folder, "-m", "e2sad_jax")
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = [line.split() for line in listed.stdout.splitlines() if line.startswith("python -m e2sad_jax ")]
    names = [" ".join(word for word in words[3:] if word.islower() and "=" not in word) for words in lines]
    assert names == [
        "train mnist",
        "train svhn",
        "train cifar10",
        "train digits",
        "evaluate",
        "compare",
        "export",
        "data mnist",
    ]
    for name in names:
        done = call(folder, "-m", "e2sad_jax", *name.split(), "--help")
        assert (done.returncode, done.stderr) == (0, ""), name
        assert f"python -m e2sad_jax {name.removesuffix(' mnist')}" in done.stdout
    wrote = call(folder, "-m", "e2sad_jax", "data", "digits", "--to=d.npz")
    assert wrote.returncode == 0, wrote.stderr
    assert (folder / "d.npz").exists()


@pytest.mark.parametrize("how", [("-m", "e2sad_jax"), ("../bin/e2sad",)], ids=("python -m", "e2sad"))
def test_a_model_of_the_current_folder_is_found(how, folder):
    flags = ("--predict=mymodel:f", "--data=t.npz", "--eps=0.1", "--noauto", "--restarts=1", "--examples=10")
    done = call(folder, *how, "evaluate", *flags, "--results=out", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
    assert done.returncode == 0, done.stderr
    assert "Measured on 10 of 30 test images, 3 of 3 classes." in done.stdout
    assert (folder / "out" / "evaluation.json").exists()


@pytest.mark.parametrize("platforms", ["cuda", "nonsense"])
@pytest.mark.parametrize("name", ["digits", "evaluate", "compare", "export", "step_cost", "paper"])
def test_without_the_device_that_is_asked_for_a_command_ends_before_anything(name, platforms, folder, tmp_path):
    if platforms == "cuda" and pathlib.Path("/dev/nvidia0").exists():
        platforms = "tpu"
    flags = ["--workdir=w", "--results=r"] if name not in ("digits", "step_cost", "export") else []
    done = call(
        folder,
        *("-m", f"experiments.{name}"),
        *(flags or [f"--{'results' if name == 'step_cost' else 'workdir'}=w"]),
        cwd=tmp_path,
        PYTHONPATH=str(ROOT),
        JAX_PLATFORMS=platforms,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"{name}: JAX_PLATFORMS={platforms}: ")
    assert "or take the CPU with JAX_PLATFORMS=cpu\n" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
