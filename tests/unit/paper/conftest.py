"""Reproductions of a few steps, on small images, with short attacks."""

import csv
import dataclasses
import pathlib
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest

from e2sad_jax.evaluation import SUITES
from e2sad_jax.runs import trainer
from experiments.paper import cost, plan, runner

SHORT = {"ifgsm": 2, "pgd": 2}
TINY = {"model": "digits_cnn", "steps": 2, "batch_size": 8, "checkpoint_every": 2, "attack_steps": 2}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam mixes float and int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch, little):
    """Attacks of two steps under the names of the long ones, no validation, costs that are made up."""

    def short(attack):
        return dataclasses.replace(attack, steps=min(attack.steps, SHORT.get(attack.kind, attack.steps)))

    monkeypatch.setattr(plan, "SUITES", {name: tuple(map(short, suite)) for name, suite in SUITES.items()})
    monkeypatch.setattr(plan, "TRANSFER", short(plan.TRANSFER))
    monkeypatch.setattr(runner, "POLL", 0.0)
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})
    step = {"flops_natural": 2.0, "time_natural": 3.0, "milliseconds": 4.0, "fastest": 4.0, "slowest": 5.0}

    def measure(configs, *args):
        steps = {cost.key(config): step for config in configs}
        about = {"date": "today", "hardware": "none", "jax": "0", "commit": None}
        return {"steps": steps, "rounds": 7, "command": "c", "environment": about}

    monkeypatch.setattr(runner, "cost", types.SimpleNamespace(key=cost.key, measure=measure))


def save_images(path: pathlib.Path, size: int, channels: int) -> str:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 10
    images = rng.integers(0, 200, (60, size, size, channels)).astype(np.uint8)
    images[np.arange(60), labels % size] = 255
    np.savez(path, x_train=images[:40], y_train=labels[:40], x_test=images[40:], y_test=labels[40:])
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return save_images(folder / "grey.npz", 8, 1), save_images(folder / "part_of_svhn.npz", 8, 3)


@pytest.fixture
def ask(files, tmp_path):
    """A reproduction at a scale of a few steps, of the files above, in a folder of the test's own."""
    scale = plan.Scale("tiny", {**TINY, "eval_examples": 15}, TINY, restarts=2, grid=3, surface_images=10)

    def ask(*items, **what):
        request = {"data": files, "scale": scale, "workdir": str(tmp_path / "runs"), **what}
        return runner.Reproduction(runner.Request(items, results=str(tmp_path / "results"), **request))

    return ask


@pytest.fixture
def trained(monkeypatch):
    """The configurations that were trained, in order, with the step they began at."""
    seen, fit = [], trainer.fit

    def counting(config, model, dataset, state, **kwargs):
        configs = [config] if not isinstance(config, list) else config
        seen.extend((c, int(np.ravel(state.step)[0])) for c in configs)
        return fit(config, model, dataset, state, **kwargs)

    monkeypatch.setattr(trainer, "fit", counting)
    return seen


@pytest.fixture(scope="session")
def lines_of() -> Callable[[pathlib.Path], list[dict[str, str]]]:
    """Reads a CSV file."""

    def read(path):
        with path.open() as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture
def labels() -> plan.Item:
    """The study of labels: two models."""
    return plan.Item("study", "labels")


@pytest.fixture
def lam() -> plan.Item:
    """The study of lambda: five models that may train together."""
    return plan.Item("study", "lam")


@pytest.fixture(scope="session")
def image_file() -> Callable[[pathlib.Path, int, int], str]:
    """Writes an npz of images of a size and a number of channels."""
    return save_images
