"""Reproductions of a few steps, on small images, with short attacks; and such whose outcomes are made up."""

import csv
import dataclasses
import pathlib
import shutil
import types
from collections.abc import Callable

import jax
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.evaluation import SUITES, Outcome
from e2sad_jax.runs import trainer
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.runs.folder import describe_dataset
from experiments.paper import cost, plan, runner
from experiments.paper.cache import Known

SHORT = {"ifgsm": 2, "pgd": 2}
TINY = {"model": "digits_cnn", "steps": 2, "batch_size": 8, "checkpoint_every": 2}
SCALE = plan.Scale("tiny", {**TINY, "eval_examples": 15}, TINY, restarts=2, grid=3, surface_images=10)
LAM = plan.Item("study", "lam")  # the models that are really trained: two, of one population
PLACE = {"date": "today", "hardware": "a machine", "jax": "0", "commit": "c" * 40}


@pytest.fixture(scope="module", autouse=True)
def quick(little):
    """Attacks of two steps under the names of the long ones, two lambdas, no validation, costs that are made up."""

    def short(attack):
        return dataclasses.replace(attack, steps=min(attack.steps, SHORT.get(attack.kind, attack.steps)))

    step = {"flops_natural": 2.0, "time_natural": 3.0, "milliseconds": 4.0, "fastest": 4.0, "slowest": 5.0}

    def measure(configs, *args):
        return {"steps": {cost.key(c): step for c in configs}, "rounds": 7, "command": "c", "environment": PLACE}

    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):  # Adam mixes float and int32
        patch.setattr(plan, "SUITES", {name: tuple(map(short, suite)) for name, suite in SUITES.items()})
        patch.setattr(plan, "TRANSFER", short(plan.TRANSFER))
        patch.setattr(runner, "POLL", 0.0)
        patch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})
        patch.setattr(runner, "cost", types.SimpleNamespace(key=cost.key, measure=measure))
        patch.setattr(plan, "LAMBDAS", (0.1, 3.0))
        yield


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


def asked(files, folder, *items, **what):
    """A reproduction at a scale of a few steps, in a folder."""
    request = {"data": files, "scale": SCALE, "workdir": str(folder / "runs"), "results": str(folder / "results")}
    return runner.Reproduction(runner.Request(items, **{**request, **what}))


@pytest.fixture
def ask(files, tmp_path):
    """A reproduction at a scale of a few steps, of the files above, in a folder of the test's own unless one is given."""
    return lambda *items, folder=tmp_path, **what: asked(files, folder, *items, **what)


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory, quick):
    """The study of two lambdas and Figure 3, from start to report in one go: the folder, and the files written."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, asked(files, folder, LAM, plan.FIGURE_3, seeds=1).run()


@pytest.fixture
def finished(whole, tmp_path):
    """The folder of a test's own holds what `whole` does."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    return tmp_path


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


@pytest.fixture
def made_up(monkeypatch):
    """Every run is finished: its network is a fresh one, and what attacks did to it is drawn at random."""
    drawn = {}

    def known(self, config, attack, targets=()):
        key = config, attack.name, tuple(targets)
        if key not in drawn:
            labels, rng = self.test_set(config)[1], np.random.default_rng(len(drawn))
            rows = [np.where(rng.random(len(labels)) < 0.7, labels, -1).astype(np.int32) for _ in targets or [0]]
            if targets:  # by the substitute itself: what the white-box attack does
                rows[targets.index(config)] = known(self, config, attack).outcomes[0].prediction
            drawn[key] = Known([Outcome(row == labels, row) for row in rows], PLACE)
        return drawn[key]

    def classifier(self, config):
        dataset = self.dataset_of(config)
        model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
        params = training.init_state(config, model, dataset.image_shape).params
        return Classifier(config, describe_dataset(dataset), 2, model, params, TRANSFORMS[config.transform])

    monkeypatch.setattr(runner.Reproduction, "known", known)
    monkeypatch.setattr(runner.Reproduction, "weights", lambda self, config: config.digest())
    monkeypatch.setattr(runner.Reproduction, "classifier", classifier)


@pytest.fixture(scope="session")
def lines_of() -> Callable[[pathlib.Path], list[dict[str, str]]]:
    """Reads a CSV file."""

    def read(path):
        with path.open() as file:
            return list(csv.DictReader(file))

    return read


@pytest.fixture(scope="session")
def image_file() -> Callable[[pathlib.Path, int, int], str]:
    """Writes an npz of images of a size and a number of channels."""
    return save_images


@pytest.fixture
def lam() -> plan.Item:
    """The study of lambda: two models here."""
    return LAM
