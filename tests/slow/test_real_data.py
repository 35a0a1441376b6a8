"""Real runs on real images: the binaries, from original files to a classifier that stands attacks."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np

import e2sad_jax
from e2sad_jax import data

ROOT = pathlib.Path(__file__).resolve().parents[2]


def call(name, *flags):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    argv = [sys.executable, "-m", f"experiments.{name}", *map(str, flags)]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def results_of(workdir):
    results = json.loads((workdir / "results.json").read_text())
    return results, {row["name"]: row["accuracy"] for row in results["attacks"]}


def test_mnist_from_the_original_files_to_a_defended_classifier(shared, tmp_path):
    """A narrow network and few steps: enough to learn, and to stand FGSM as no naturally trained one does."""
    shutil.copytree(shared("data/mnist"), tmp_path / "data" / "downloads" / "manual")
    workdir = tmp_path / "run"
    out = call(
        "mnist",
        f"--data_dir={tmp_path / 'data'}",
        f"--workdir={workdir}",
        "--model=digits_cnn",
        "--preset=paper",
        "--steps=160",
        "--batch_size=64",
        "--learning_rate=3e-3",
        "--validation_examples=50",
        "--eval_examples=200",
        "--baseline=natural",
    )
    assert "mnist: accuracy on 200 of 10,000 test images, 10 of 10 classes, 160 training steps" in out
    results, accuracy = results_of(workdir)
    assert (results["dataset"]["name"], results["dataset"]["train_examples"]) == ("mnist", 60_000)
    assert accuracy["clean"] > 0.9
    assert accuracy["FGSM 0.3"] > 0.6
    _, natural = results_of(tmp_path / "run-natural")
    assert natural["clean"] > 0.9
    assert natural["FGSM 0.3"] < accuracy["FGSM 0.3"] - 0.3
    assert accuracy["PGD-40"] < accuracy["clean"] - 0.3, "the attack does something"
    # What the run says of these images, the loaded classifier says too.
    mnist = data.load("mnist", tmp_path / "data")
    places = data.sample(mnist.y_test, 200)
    probabilities = np.asarray(e2sad_jax.load(workdir)(mnist.x_test[places]))
    assert (probabilities.argmax(-1) == mnist.y_test[places]).mean() == accuracy["clean"]


def test_svhn_subset_learns(shared, tmp_path):
    """The paper's SVHN settings (normalisation, budgets, soft labels for e2SAD alone) on a subset under its own name."""
    workdir = tmp_path / "run"
    out = call(
        "svhn",
        f"--data={shared('data/svhn_10k.npz')}",
        f"--workdir={workdir}",
        "--model=digits_cnn",
        "--preset=paper",
        "--steps=150",
        "--batch_size=64",
        "--validation_examples=50",
        "--eval_examples=100",
        "--baseline=natural",
    )
    assert "svhn_10k: accuracy on 100 of 2,000 test images, 10 of 10 classes, 150 training steps" in out
    results, accuracy = results_of(workdir)
    natural_results, natural = results_of(tmp_path / "run-natural")
    assert (results["dataset"]["name"], results["dataset"]["num_classes"]) == ("svhn_10k", 10)
    assert (results["config"]["soft_label"], natural_results["config"]["soft_label"]) == (True, False)
    assert all(row["paper"] is None for row in results["attacks"]), "a subset is never held against the paper"
    assert accuracy["clean"] > 0.5, "about 0.2 for the most frequent digit"
    assert natural["clean"] > 0.5
    assert natural["FGSM 24/255"] < accuracy["FGSM 24/255"] - 0.05
    assert accuracy["IFGSM-30"] < accuracy["clean"] - 0.3, "the attack does something"
