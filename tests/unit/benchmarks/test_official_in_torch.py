"""benchmarks.official: weights carried to PyTorch, and the official code on them where it is installed."""

import importlib.util

import jax
import numpy as np
import pytest

from benchmarks import official, official_sides
from e2sad_jax import networks
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import Model
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.training import configure, init_state

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def trained():
    config = configure(defense="natural", model="digits_cnn", eps1=0.3, batch_size=8)
    model = networks.create(config.model, 10, SHAPE)
    about = {"image_shape": list(SHAPE), "num_classes": 10}
    return Classifier(config, about, 0, model, init_state(config, model, SHAPE).params, TRANSFORMS["unit"])


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).uniform(size=(12, *SHAPE)).astype(np.float32)


def changed(trained, **fields):
    return Classifier(**{name: getattr(trained, name) for name in Classifier.__dataclass_fields__} | fields)


def test_weights_are_carried_and_logits_agree(trained, images):
    net, difference = official_sides.carried(trained, images, batch_size=8)
    assert difference < 1e-5
    predicted = np.asarray(trained.apply(trained.params, images)).argmax(1)
    assert official_sides.right_in_torch(net, official_sides.tensor(images, net), predicted, 5).all()


def test_logits_that_disagree_are_refused_with_their_difference(trained, images, monkeypatch):
    network = official_sides.pytorch.network

    def wrong(config, shape, classes, params):
        return network(config, shape, classes, jax.tree.map(lambda leaf: leaf * 1.01, params))

    monkeypatch.setattr(official_sides.pytorch, "network", wrong)
    with pytest.raises(
        ConfigError, match=r"logits in PyTorch and JAX differ by 0\.0\d+, and must by less than 0\.0001"
    ):
        official_sides.carried(trained, images)


def test_a_network_or_a_range_that_the_official_code_does_not_know_is_refused(trained, images):
    with pytest.raises(ConfigError, match=r"its inputs lie in \[-1\.0, 1\.0\] .* choose a run with --transform=unit"):
        official_sides.carried(changed(trained, transform=TRANSFORMS["standardize"]), images)
    resnet = networks.create("preact_resnet18", 10, (32, 32, 3))
    with pytest.raises(ConfigError, match="has no twin in PyTorch"):
        official_sides.carried(changed(trained, model=resnet), images)


if importlib.util.find_spec("pyautoattack"):

    def test_attacks_one_by_one_are_the_official_call(trained, images, tmp_path):
        net, _ = official_sides.carried(trained, images)
        labels = np.asarray(trained.apply(trained.params, images)).argmax(1)
        labels[0] = (labels[0] + 1) % 10  # one that is wrong from the start
        model = Model("digits", trained.apply, trained.params, images, labels, batch_size=8)
        asked = official.Request(workdir=("run",), apgd_steps=4, targets=2, fab_steps=3, queries=20)
        eps, names = 0.03, ["apgd-ce", "apgd-t", "fab-t", "square"]  # the order of the official call

        def code():
            return official.adversary(official_sides.counted(net), "linf", eps, 10, asked)

        groups = [[name] for name in names]
        side, _ = official_sides.official(code(), model, groups, 8)
        kept = tmp_path / "kept.npz"
        official_sides.official(code(), model, groups[:2], 8, kept)
        again, _ = official_sides.official(code(), model, groups, 8, kept)
        np.testing.assert_array_equal(again.images, side.images)
        np.testing.assert_array_equal(again.standing, side.standing)
        x = official_sides.tensor(images, net)
        whole, _ = code().run_standard_evaluation(x, official_sides.like(labels.astype(np.int64), x), batch_size=8)
        np.testing.assert_array_equal(side.images, whole.numpy().transpose(0, 2, 3, 1))
        assert not side.standing[0][0]
        assert 0 < side.found.sum() < 11
        assert (
            official.distances(images, side.images, np.ones(len(images), bool), norm="linf") <= eps + official.SLACK
        ).all()

    def test_both_sides_attack_a_network_that_draws(trained, images):
        net, _ = official_sides.carried(trained, images)
        asked = official.Request(workdir=("run",), noise=0.05, apgd_steps=3)
        drawing = official_sides.noisy(net, asked.noise, 0)
        x = official_sides.tensor(images, net)
        first, second = drawing(x), drawing(x)
        assert not (first == second).all()
        labels = np.asarray(trained.apply(trained.params, images)).argmax(1)
        apply = official._drawing(trained, asked.noise)
        model = Model("digits", apply, trained.params, images, labels, batch_size=8, draws=official.DRAWS)
        code = official.adversary(official_sides.counted(drawing), "linf", 0.05, 10, asked)
        assert (code.apgd.eot_iter, code.apgd.n_iter) == (official.DRAWS, 3)
        theirs, _ = official_sides.official(code, model, [asked.names], 8)
        own = official_sides.ours(model, asked.stages(10), eps=0.05, norm="linf")
        assert theirs.gradients[0] >= official.DRAWS * 3 * theirs.standing[0].sum()
        assert own.gradients[0] == official.DRAWS * (3 + 1) * own.standing[0].sum()
        assert own.at_once().gradients == [sum(own.gradients)]
        judged = official._judged(model, {"official": theirs, "ours": own})
        assert judged["official"] < judged["clean"] - 0.2
        assert judged["ours"] < judged["clean"] - 0.2

    def test_the_standard_effort_is_left_as_the_official_code_sets_it(trained, images):
        from pyautoattack import AutoAttack

        net, _ = official_sides.carried(trained, images)
        plain = AutoAttack(net, norm="Linf", eps=0.3, seed=0, version="standard")
        own = official.adversary(net, "linf", 0.3, 10, official.Request(workdir=("run",)))
        for name in ("apgd", "apgd_targeted", "fab", "square"):
            mine, theirs = (dict(vars(getattr(code, name))) for code in (own, plain))
            assert str(mine.pop("device")) == str(theirs.pop("device"))
            assert mine == theirs
