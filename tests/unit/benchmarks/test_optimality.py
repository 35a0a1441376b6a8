"""benchmarks.optimality: our side on a linear model, whose distances are known; the page from made-up outcomes."""

import importlib.util

import numpy as np
import pytest

from benchmarks import official_sides, optimality
from benchmarks.results import provenance_of
from e2sad_jax import networks
from e2sad_jax._compile import pure
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import ConfigError, DataError
from e2sad_jax.evaluation import Model
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.training import configure, init_state

linear = pure(lambda params, z: z.reshape(len(z), -1) @ params)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workdir": ()}, "--workdir=: must name the folder of a run"),
        ({"workdir": ("",)}, "--workdir=: must name the folder of a run"),
        ({"workdir": ("a", "b")}, "--results=: must name a folder for the page of several runs"),
        ({"norm": ()}, "--norm=: must be one of linf, l2"),
        ({"norm": ("linf", "l1")}, "--norm=l1: must be one of linf, l2"),
        *(({name: 0}, f"--{name}=0: must be at least 1") for name in ("examples", "steps", "rounds", "batch_size")),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message):
        optimality.Request(**{"workdir": ("run",)} | given)


def test_packages_that_are_missing_are_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "adv_lib" else object())
    with pytest.raises(
        ConfigError, match=r"^needs adv-lib, not installed here: see the top of benchmarks/optimality\.py$"
    ):
        optimality.run(optimality.Request(workdir=("run",)))


@pytest.fixture(scope="module")
def model():
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(12, 2)).astype(np.float32), rng.uniform(0.4, 0.6, size=(8, 2, 6, 1)).astype(np.float32)
    labels = (x.reshape(8, -1) @ w).argmax(1)
    labels[0] = 1 - labels[0]
    return Model("linear", linear, w, x, labels, (-5.0, 5.0), batch_size=4).compiled()


@pytest.mark.usefixtures("unoptimized")
@pytest.mark.parametrize(("norm", "dual"), [("linf", 1), ("l2", 2)])
def test_on_a_linear_model_all_find_the_nearest(model, norm, dual):
    difference = model.params[:, 0] - model.params[:, 1]
    lead = np.abs(model.images.reshape(8, -1) @ difference)
    exact = lead / np.linalg.norm(difference, dual)
    exact[0] = 0  # misclassified as it is
    assert exact[1:].min() > 0.005
    asked = optimality.Request(workdir=("run",), steps=100, rounds=12)
    makers = optimality.ours(model, norm, asked)
    assert set(makers) == {"FMN", "FAB", optimality.APGD} | ({"DDN"} if norm == "l2" else set())
    for name, make in makers.items():
        apgd = name == optimality.APGD
        start = np.full(8, 4.0)
        far = (
            optimality.least(model, make, model.right_on, norm, start, 12)
            if apgd
            else optimality.reach(model, make, model.right_on, norm)
        )
        step = 4 / 2**12 if apgd else 0
        assert (far >= exact - 1e-6).all(), name
        assert (far <= 1.05 * exact + step + 1e-6).all(), name


def test_images_outside_the_range_are_refused_and_what_none_finds_has_no_optimality(model):
    with pytest.raises(
        DataError, match=r"an attack's images leave \[-5\.0, 5\.0\] by 1; its distances would not count"
    ):
        optimality.reach(model, lambda x, y, eps: x * 0 + 6, model.right_on, "l2")
    nothing = {("FMN", optimality.OURS): np.array([0.0, np.inf])}
    (row,) = optimality.summarise(nothing, dict.fromkeys(nothing, 1.0))
    assert (row["optimality"], row["median"], row["found"]) == (None, None, 1)


if importlib.util.find_spec("adv_lib"):

    @pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of what adv-lib imports
    @pytest.mark.parametrize("norm", ["linf", "l2"])
    def test_both_sides_find_images_of_a_network_as_near(norm):
        shape = (8, 8, 1)
        config = configure(defense="natural", model="digits_cnn", eps1=0.3, batch_size=8)
        net = networks.create(config.model, 10, shape)
        params = init_state(config, net, shape).params
        run = Classifier(config, {"image_shape": list(shape), "num_classes": 10}, 0, net, params, TRANSFORMS["unit"])
        images = np.random.default_rng(0).uniform(0.2, 0.8, size=(12, *shape)).astype(np.float32)
        labels = np.asarray(run.apply(params, images)).argmax(1)
        model = Model("digits", run.apply, params, images, labels, batch_size=12).compiled()
        carried, _ = official_sides.carried(run, images)
        asked = optimality.Request(workdir=("run",), steps=60, rounds=10)
        rows = optimality.measure(model, carried, norm, asked)
        assert {(row["attack"], row["side"]) for row in rows} >= {
            (optimality.APGD, side) for side in ("e2sad_jax", "adv-lib")
        }
        assert {row["found"] for row in rows} == {12}
        share = {(row["attack"], row["side"]): row["optimality"] for row in rows}
        for (attack, side), value in share.items():
            near = 0.1 if attack == optimality.APGD else 0.02  # whose start is random
            assert value == pytest.approx(share[attack, "adv-lib"], abs=near), (attack, side)
            assert value > 0.4, (attack, side)


def test_the_page_holds_both_sides_and_its_provenance():
    far = {"ours": np.array([0.0, 1.0, 2.0]), "theirs": np.array([0.0, 2.0, np.inf])}
    found = {
        ("FMN", side): values for side, values in zip((optimality.OURS, optimality.THEIRS), far.values(), strict=True)
    }
    rows = optimality.summarise(found, dict.fromkeys(found, 1.25))
    assert [(row["optimality"], row["median"], row["found"]) for row in rows] == [(1.0, 1.0, 3), (0.0, 2.0, 2)]
    about = {"hardware": "CPU, 2 cores, Some CPU", "date": "2026-11-29 09:00 UTC", "commit": "abc123"}
    result = {
        **{
            "command": "python -m benchmarks.optimality --workdir=run",
            "defense": "e2sad",
            "step": 1000,
            "trained": ["python -m experiments.digits", "python -m experiments.digits --steps=1000"],
            "data": "digits",
        },
        "environment": {**about, "adv-lib": "0.2.8", "torch": "2.13.0", "jax": "0.10.2"},
        **{"images": "3 of 355 test images", "norm": "linf", "steps": 100, "rounds": 8, "rows": rows},
    }
    result |= {"workdir": "runs/mine", "clean": 0.75}
    page = optimality.page([result])
    assert "## e2sad, 1,000 steps (mine), l-infinity" in page
    assert "clean accuracy 0.750. Steps of each attack: 100; budgets of APGD: 8." in page
    assert "| FMN | 100.0 | 0.0 | 1.0000 | 2.0000 | 3 | 2 | 1.2 | 1.2 |" in page
    assert "Trained by `python -m experiments.digits --steps=1000`." in page
    (found_about,) = provenance_of(page)
    assert (found_about["command"], found_about["commit"]) == (result["command"], "abc123")
