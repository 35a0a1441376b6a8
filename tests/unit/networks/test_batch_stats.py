"""Batch normalisation against Flax's, and which passes update the running averages in adversarial training."""

import contextlib
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, distributed, losses, networks, training
from e2sad_jax.attacks import core
from e2sad_jax.defenses import DEFENSES
from e2sad_jax.networks import batch_stats
from e2sad_jax.runs import opening, trainer
from e2sad_jax.training import step
from tests.helpers import fit, mostly_slow, tiny_config

pytestmark = pytest.mark.usefixtures("all_unoptimized", "standard_promotion")

# How many passes a loss is made of, outside of inner gradients: of these the running averages are told.
PASSES = {
    **dict.fromkeys(DEFENSES, 1),
    "fgsm": 2,
    "ifgsm": 2,
    "e2sad": 3,
    "trades": 2,
    "gat": 2,
    "nuat": 2,
    "pgi": 2,
    "uap": 2,
}


class Normed(nn.Module):
    """The smallest network with batch normalisation, of the images themselves: what it saw can be read off."""

    num_classes: int = 3
    min_size = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = batch_stats.BatchNorm()(x, train)
        return nn.Dense(self.num_classes)(jnp.tanh(x.reshape(x.shape[0], -1)))


@pytest.fixture
def small(monkeypatch):
    """`preact_resnet18` by name is the smallest network."""
    monkeypatch.setitem(networks.NETWORKS, "preact_resnet18", lambda num_classes, **_: Normed(num_classes))


def draw(model: nn.Module, shape: tuple[int, ...] = (8, 8, 1)) -> Any:
    """Variables with running averages that are not those of the start."""
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *shape)))
    rs = np.random.RandomState(0)
    stats = jax.tree.map(lambda a: jnp.asarray(rs.uniform(0.2, 0.8, a.shape), a.dtype), variables["batch_stats"])
    return {**variables, "batch_stats": stats}


def images(n: int, shape: tuple[int, ...] = (8, 8, 1)) -> jax.Array:
    return jnp.asarray(np.random.RandomState(1).rand(n, *shape), jnp.float32)


# --- batch normalisation


def test_batch_norm_is_that_of_flax():
    """Values and gradients, by running averages and by the batch; and the averages after one pass."""
    ours, theirs = batch_stats.BatchNorm(), nn.BatchNorm(momentum=0.9, epsilon=1e-5)
    x, variables = 3 * images(5, (4, 4, 2)) - 1, draw(ours, (4, 4, 2))
    variables["params"] = {"scale": jnp.asarray([0.5, -2.0]), "bias": jnp.asarray([0.1, 0.7])}
    weights = images(5, (4, 4, 2))
    slots = batch_stats.slots(variables)

    def values(apply: Any) -> Any:
        return jax.value_and_grad(lambda z: (weights * apply(z)).sum())(x)

    chex.assert_trees_all_close(
        values(lambda z: ours.apply(variables, z)),
        values(lambda z: theirs.apply(variables, z, use_running_average=True)),
        rtol=1e-4,
        atol=1e-5,
    )
    chex.assert_trees_all_close(
        values(batch_stats.training_logits_fn(ours, variables, slots)),
        values(lambda z: theirs.apply(variables, z, use_running_average=False, mutable="batch_stats")[0]),
        rtol=1e-4,
        atol=1e-4,
    )
    noted = jax.grad(lambda s: batch_stats.training_logits_fn(ours, variables, s)(x).sum())(slots)
    _, updated = theirs.apply(variables, x, use_running_average=False, mutable="batch_stats")
    got = batch_stats.updated(variables["batch_stats"], noted)
    chex.assert_trees_all_close(got, updated["batch_stats"], atol=1e-5)
    chex.assert_trees_all_close(
        batch_stats.updated(variables["batch_stats"], jax.tree.map(jnp.zeros_like, noted)), variables["batch_stats"]
    )


def test_the_gradient_of_a_normalised_batch_is_that_of_its_formula():
    """And its derivative, which penalties of gradients take; with a loss of the moments, too."""

    def formula(x, scale, bias, near):
        mean, var = x.mean((0, 1, 2), keepdims=True), x.var((0, 1, 2), keepdims=True)
        y = scale.reshape(1, 1, 1, 2) * (x - mean) / jnp.sqrt(var + 1e-5) + bias.reshape(1, 1, 1, 2)
        return y, mean.ravel(), var.ravel()

    weights, scale, bias = images(6, (4, 4, 2)) - 0.3, jnp.asarray([0.5, -2.0]), jnp.asarray([0.1, 0.7])

    def loss(function, *inputs):
        y, mean, var = function(*inputs, jnp.asarray([0.2, -0.4]))
        return (weights * y**2).sum() + (mean * jnp.asarray([3.0, 1.0])).sum() + (var**2).sum()

    def penalty(function, *inputs):
        return (jax.grad(loss, argnums=1)(function, *inputs) ** 2).sum()

    for value in (loss, penalty):
        ours, theirs = (
            jax.grad(value, argnums=(1, 2, 3))(function, 2 * images(6, (4, 4, 2)), scale, bias)
            for function in (batch_stats._normalized, formula)
        )
        chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_moments_are_right_where_the_mean_is_far_from_zero():
    """E[x^2] - E[x]^2 of float32 is wrong by a tenth here."""
    x = images(64, (4, 4, 2)) + 300
    _, mean, var = batch_stats._normalized(x, jnp.ones(2), jnp.zeros(2), jnp.full(2, 300.0))
    wide = np.asarray(x, np.float64)
    np.testing.assert_allclose(mean, wide.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(var, wide.var((0, 1, 2)), rtol=1e-3)
    y, _, var = batch_stats._normalized(jnp.full((64, 2), 300.1), jnp.ones(2), jnp.zeros(2), jnp.zeros(2))
    assert np.isfinite(y).all(), "a feature that is the same everywhere, far from its running average"
    assert (var == 0).all()


def test_gradients_have_the_types_of_what_they_are_of():
    x, scale = images(4, (4, 4, 2)).astype(jnp.bfloat16), jnp.ones(2, jnp.bfloat16)

    def loss(x, scale, bias):
        return (batch_stats._normalized(x, scale, bias, jnp.zeros(2))[0] ** 2).sum()

    gradients = jax.grad(loss, argnums=(0, 1, 2))(x, scale, scale)
    assert [g.dtype for g in gradients] == [jnp.bfloat16] * 3


def test_in_evaluation_an_image_does_not_depend_on_its_neighbours():
    model = Normed()
    variables, x = draw(model), images(6)
    slots = batch_stats.slots(variables)
    evaluate, learn = networks.logits_fn(model, variables), batch_stats.training_logits_fn(model, variables, slots)
    np.testing.assert_allclose(evaluate(x)[:2], evaluate(x[:2]), atol=1e-5)
    assert np.abs(learn(x)[:2] - learn(x[:2])).max() > 1e-3


@pytest.mark.parametrize("defense", mostly_slow(DEFENSES, ("natural", "e2sad", "trades", "grad_align")))
def test_running_averages_hear_of_the_losss_passes_and_of_no_attack(defense):
    """How many, by their count; and of which images, by the mean over them."""
    model = Normed()
    variables, x = draw(model), images(6)
    y = losses.soft_labels(jnp.arange(6) % 3, 3, 0)
    config = tiny_config(defense=defense, eps1=0.2, eps2=0.1, attack_steps=3, alpha=0.4)
    own = dict(settings=config.settings, eps=config.eps1, bounds=(0.0, 1.0), key=jax.random.key(2))

    def loss(slots: Any) -> jax.Array:
        f = batch_stats.training_logits_fn(model, variables, slots)
        delta = jnp.full((config.entry.carried or 6, *x.shape[1:]), 0.1)
        return DEFENSES[defense](f, x, y, **own, delta=delta, taught=5 * y)[0]

    noted = jax.jit(jax.grad(loss))(batch_stats.slots(variables))
    assert noted["passes"] == PASSES[defense]
    f = batch_stats.training_logits_fn(model, variables, batch_stats.slots(variables))

    def J(z: jax.Array) -> jax.Array:
        return losses.cross_entropy(f(z), y)

    def first(x: jax.Array) -> jax.Array:
        return attacks.fgsm(J, x, eps=0.2)

    points = {
        "fgsm": lambda x: [x, first(x)],
        "e2sad": lambda x: [x, first(x), attacks.second_step(f, first(x), eps=0.1)],
        "pgd": lambda x: [attacks.pgd(jax.random.key(2), J, x, eps=0.2, steps=3)],
        "free": lambda x: [jnp.clip(x + 0.1, 0, 1)],
        "grad_align": lambda x: [first(x)],
        **{name: lambda x: [x] for name in ("natural", "hamm", "input_gradient")},
    }
    if defense in points:
        seen, passes = noted["batch_stats"]["BatchNorm_0"], jax.device_get(jax.jit(points[defense])(x))
        np.testing.assert_allclose(seen["mean"][0], sum(float(z.mean()) for z in passes), rtol=1e-4)
        np.testing.assert_allclose(seen["var"][0], sum(float(z.var()) for z in passes), rtol=1e-4)


ATTACKING = [*((name, {}) for name in DEFENSES), ("strong_adversary", {"adversary": "alpha"})]


@pytest.mark.parametrize(("defense", "changed"), ATTACKING)
def test_an_attack_asks_a_model_of_its_own_and_the_loss_is_at_the_same_images(defense, changed):
    """All that an attack asks, of the clean images, too."""
    model, x = Normed(), images(6)
    y, delta = losses.soft_labels(jnp.arange(6) % 3, 3, 0), jnp.full((3, *x.shape[1:]), 0.1)
    variables = draw(model)
    other = {**variables, "params": jax.tree.map(lambda a: a[::-1] - 0.1, variables["params"])}
    config = tiny_config(defense=defense, eps1=0.2, eps2=0.1, attack_steps=3, alpha=0.4, **changed)
    own = dict(settings=config.settings, eps=config.eps1, bounds=(0.0, 1.0), key=jax.random.key(2))
    f, g = (batch_stats.training_logits_fn(model, each, batch_stats.slots(variables)) for each in (variables, other))

    def asked(of_loss: Any) -> tuple[list[Any], bool]:
        """The images at which the loss asks its model, but for those inside a gradient of its own."""
        seen: list[Any] = []
        attacked: list[bool] = []

        def watched(z: jax.Array) -> jax.Array:
            attacked.append(core.within_attack())
            if not (attacked[-1] or isinstance(z, jax.core.Tracer)):
                seen.append(np.asarray(z))
            return of_loss(z)

        own_delta = delta[:1].repeat(config.entry.carried or 6, 0)
        with core.told_apart():
            DEFENSES[defense](step._apart(watched, f), x, y, **own, delta=own_delta, taught=5 * y)
        assert not any(attacked)
        return seen, bool(attacked)

    (first, once), (second, _) = asked(f), asked(g)
    assert once
    assert len(first) == len(second)
    for one, two in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not core.within_attack()


def test_a_model_that_is_jitted_once_is_traced_for_the_attack_and_for_the_loss():
    def loss(told: Any) -> float:
        f = jax.jit(step._apart(lambda z: z.sum(-1, keepdims=True), lambda z: -z))
        with told():
            x = attacks.fgsm(lambda z: f(z).sum(-1), jnp.full((1, 2), 0.5), eps=0.25)
            return float(f(x)[0, 0])

    assert loss(core.told_apart) == 0.5, "the attack goes down, the sum of the loss's model is 0.25 + 0.25"
    assert loss(contextlib.nullcontext) == 1.5


# --- training


@pytest.mark.parametrize("taken", ["batch", "average"])
def test_attacks_take_the_statistics_that_they_are_told_to(taken, small, tiny):
    """The first loss of IFGSM training, against the same made by hand."""
    n = len(tiny.x_train)
    settings = {"defense": "ifgsm", "attack_steps": 3, "alpha": 0.4, "eps1": 0.2, "soft_label": False}
    config = tiny_config(model="preact_resnet18", batch_size=n, steps=1, attack_statistics=taken, **settings)
    model = networks.create(config.model, 3, tiny.image_shape)
    state = training.init_state(config, model, tiny.image_shape, n)
    learn = batch_stats.training_logits_fn(model, state.params, batch_stats.slots(state.params))
    x, y = jnp.asarray(tiny.x_train / 255, jnp.float32), jax.nn.one_hot(tiny.y_train, 3)
    expected = {}
    for name, f in (("batch", learn), ("average", networks.logits_fn(model, state.params))):
        x_adv = attacks.ifgsm(lambda z, f=f: losses.cross_entropy(f(z), y), x, eps=0.2, steps=3)
        parts = (0.4, x), (0.6, x_adv)
        expected[name] = sum(share * float(losses.cross_entropy(learn(z), y).mean()) for share, z in parts)
    assert abs(expected["batch"] - expected["average"]) > 1e-4
    seen: list[Any] = []
    done = training.fit(
        *(config, model, tiny, state),
        steps=1,
        record=lambda step, metrics, count: seen.append(metrics["loss"]),
        checkpoint=lambda *a: None,
    )
    assert float(np.ravel(seen[0])[0]) == pytest.approx(expected[taken], rel=1e-5)
    moved = done.params["batch_stats"]["BatchNorm_0"]["mean"]
    assert float(moved[0]) > 0.01, "the loss's passes are noted all the same"


def test_a_step_updates_parameters_by_adam_and_averages_by_the_batch(small, tiny):
    """Natural training: 0.9 of the old averages and 0.1 of the images'; Adam knows of parameters alone."""
    config = tiny_config(model="preact_resnet18", defense="natural", batch_size=50, steps=1)
    model = networks.create(config.model, 3, tiny.image_shape)
    state = training.init_state(config, model, tiny.image_shape, len(tiny.x_train))
    assert jax.tree.structure(state.opt_state[0].mu) == jax.tree.structure({"params": state.params["params"]})
    before = jax.device_get(state.params["params"])
    state = fit(config, tiny, state)
    x = tiny.x_train / 255
    averages = state.params["batch_stats"]["BatchNorm_0"]
    np.testing.assert_allclose(averages["mean"], [0.1 * x.mean()], rtol=1e-5)
    np.testing.assert_allclose(averages["var"], [0.9 + 0.1 * x.var()], rtol=1e-5)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, state.params["params"])
    assert max(jax.tree.leaves(moved)) == pytest.approx(config.learning_rate, rel=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize("defense", ["e2sad", "free"])
def test_resumed_run_equals_uninterrupted_one_bit_for_bit(defense, small, tiny, tmp_path, monkeypatch):
    """Averages come back with the parameters; with free training's perturbation, within its replays, too."""
    monkeypatch.setattr(trainer, "validate", lambda run, state, stop: {"score": 0.0})  # checkpoints are not attacked

    def train(name, steps):
        own = dict(defense=defense, replays=3, workdir=str(tmp_path / name), steps=steps)
        config = tiny_config(model="preact_resnet18", **own)
        with opening.open_run(config, tiny) as run:
            return trainer.train(run, lambda: 0)[0]

    whole = train("whole", 12)
    train("parts", 5)
    resumed = train("parts", 12)
    chex.assert_trees_all_equal(whole.replace(key=None), resumed.replace(key=None))
    assert float(whole.params["batch_stats"]["BatchNorm_0"]["mean"][0]) > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("taken", ["batch", "average"])
def test_a_population_equals_separate_runs(taken, small, tiny):
    own = {"model": "preact_resnet18", "attack_statistics": taken, "steps": 4, "eps1": 0.1}
    members = [tiny_config(seed=seed, **own) for seed in (0, 1)]
    model = networks.create("preact_resnet18", 3, tiny.image_shape)
    singles = [fit(config, tiny) for config in members]
    state = training.stack(
        [training.init_state(config, model, tiny.image_shape, len(tiny.x_train)) for config in members]
    )
    state = training.fit(
        members, model, tiny, state, steps=4, record=lambda *a: None, checkpoint=lambda *a: None, steps_per_dispatch=2
    )
    for single, member in zip(singles, training.unstack(state), strict=True):
        chex.assert_trees_all_close(single.params, member.params, atol=2e-5)


@pytest.mark.parametrize("own", [{"defense": "natural"}, {"defense": "fgsm", "attack_statistics": "average"}], ids=str)
def test_eight_devices_normalise_by_the_whole_batch(own, small, tiny):
    states = []
    for devices in (1, 8):
        config = tiny_config(model="preact_resnet18", steps=4, **own)
        mesh = distributed.mesh(devices, config.batch_size)
        model = networks.create(config.model, 3, tiny.image_shape)
        state = distributed.replicate(mesh, training.init_state(config, model, tiny.image_shape, len(tiny.x_train)))
        states.append(fit(config, tiny, state, mesh=mesh))
    chex.assert_trees_all_close(jax.device_get(states[0].params), jax.device_get(states[1].params), atol=1e-5)
