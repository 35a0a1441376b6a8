"""Optimisers against the formulas of PyTorch's documentation, in NumPy; clipping, accumulation and the average beside them."""

import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from e2sad_jax import attacks, losses, training
from e2sad_jax.errors import ConfigError
from e2sad_jax.training import configure
from tests.helpers import tiny_config

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(0)
START = {"kernel": RNG.normal(size=(3, 2)).astype(np.float32), "bias": RNG.normal(size=2).astype(np.float32)}
GRADIENTS = [{k: RNG.normal(size=v.shape).astype(np.float32) for k, v in START.items()} for _ in range(6)]


def run(config, gradients=GRADIENTS):
    tx = training.optimizer(config, len(gradients))
    params = jax.tree.map(jnp.asarray, START)
    state, step = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


def sgd(rate, momentum, nesterov, decay, only_kernels):
    """https://docs.pytorch.org/docs/stable/generated/torch.optim.SGD.html, dampening 0."""
    params, buffers = {k: v.astype(np.float64) for k, v in START.items()}, {}
    for gradient in GRADIENTS:
        for name, value in params.items():
            g = gradient[name] + (0 if only_kernels and name == "bias" else decay) * value
            buffers[name] = momentum * buffers.get(name, 0) + g
            params[name] = value - rate * (g + momentum * buffers[name] if nesterov else buffers[name])
    return params


def adamw(rate, decay, decoupled, only_kernels):
    """https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html, and Adam with its `weight_decay`."""
    params = {k: v.astype(np.float64) for k, v in START.items()}
    means, squares = ({k: np.zeros_like(v) for k, v in params.items()} for _ in range(2))
    for t, gradient in enumerate(GRADIENTS, 1):
        for name, value in params.items():
            own = 0 if only_kernels and name == "bias" else decay
            g = gradient[name] + (0 if decoupled else own * value)
            means[name] = 0.9 * means[name] + 0.1 * g
            squares[name] = 0.999 * squares[name] + 0.001 * g**2
            step = means[name] / (1 - 0.9**t) / (np.sqrt(squares[name] / (1 - 0.999**t)) + 1e-8)
            params[name] = value * (1 - rate * own if decoupled else 1) - rate * step
    return params


@pytest.mark.parametrize("only_kernels", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_sgd_is_pytorchs(momentum, nesterov, only_kernels):
    config = configure(
        optimizer="sgd",
        learning_rate=0.1,
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.05,
        decay_kernels_only=only_kernels,
    )
    got = run(config)
    for name, want in sgd(0.1, momentum, nesterov, 0.05, only_kernels).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)
    if importlib.util.find_spec("torch") and not only_kernels:
        import torch

        params = {k: torch.nn.Parameter(torch.tensor(v)) for k, v in START.items()}
        theirs = torch.optim.SGD(params.values(), lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.05)
        for gradient in GRADIENTS:
            for name, value in params.items():
                value.grad = torch.tensor(gradient[name])
            theirs.step()
        for name, value in params.items():
            np.testing.assert_allclose(got[name], value.detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("only_kernels", [False, True])
@pytest.mark.parametrize("optimizer", ["adam", "adamw"])
def test_adam_is_pytorchs_with_either_weight_decay(optimizer, only_kernels):
    config = configure(optimizer=optimizer, learning_rate=0.1, weight_decay=0.05, decay_kernels_only=only_kernels)
    got = run(config)
    for name, want in adamw(0.1, 0.05, optimizer == "adamw", only_kernels).items():
        np.testing.assert_allclose(got[name], want, rtol=1e-4, atol=1e-5)


def test_a_long_gradient_is_scaled_down_and_a_short_one_stays():
    config = configure(optimizer="sgd", learning_rate=1.0, momentum=0.0, clip_norm=0.5)
    for factor in (1.0, 1e-3):
        gradient = jax.tree.map(lambda leaf, f=factor: f * leaf, GRADIENTS[0])
        norm = np.sqrt(sum((leaf**2).sum() for leaf in gradient.values()))
        got = run(config, [gradient])
        for name, leaf in gradient.items():
            np.testing.assert_allclose(START[name] - got[name], leaf * min(1, 0.5 / norm), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_batches_make_the_update_of_their_mean_gradient(optimizer):
    """With a schedule over the updates; what is clipped is the mean."""
    settings = {
        "optimizer": optimizer,
        "learning_rate": 0.1,
        "schedule": "cosine",
        "weight_decay": 0.01,
        "clip_norm": 1.0,
    }
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *GRADIENTS[i : i + 2]) for i in (0, 2, 4)]
    got, want = run(configure(**settings, accumulate=2)), run(configure(**settings), means)
    for name, value in got.items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-6)
        assert np.abs(value - START[name]).max() > 0.01


@pytest.mark.parametrize("parts", ["0.29,0.57", "0.5,0.75"])
def test_the_learning_rate_falls_after_the_milestones(parts):
    """Also where the product of fraction and steps is rounded down: 0.29 * 100 is 28.999..."""
    config = configure(schedule="piecewise", milestones=parts, learning_rate=1.0, steps=100)
    rates = [float(training.learning_rate(config, 100)(t)) for t in range(100)]
    assert [t for t in range(1, 100) if rates[t] < rates[t - 1] / 2] == [
        round(100 * float(p)) for p in parts.split(",")
    ]


def perturbed(params, gradients, size):
    """Eq. 12 of https://arxiv.org/abs/2004.05884, layer by layer."""
    moved = {}
    for name, w in params.items():
        long = np.sqrt((gradients[name].astype(np.float64) ** 2).sum())
        step = size * np.sqrt((w.astype(np.float64) ** 2).sum()) * gradients[name] / long if w.ndim > 1 else 0
        moved[name] = w + step
    return moved


def test_adversarial_weights_are_a_fraction_of_each_kernel_s_norm_away():
    params = {"first": START, "second": {"kernel": 3 * START["kernel"]}}
    gradients = {"first": GRADIENTS[0], "second": {"kernel": np.zeros_like(START["kernel"])}}
    found = training.adversarial_weights(params, gradients, 0.1)
    for name, value in perturbed(START, GRADIENTS[0], 0.1).items():
        np.testing.assert_allclose(found["first"][name], value, rtol=1e-6)
    moved = np.asarray(found["first"]["kernel"]) - START["kernel"]
    assert np.linalg.norm(moved) == pytest.approx(0.1 * np.linalg.norm(START["kernel"]), rel=1e-5)
    np.testing.assert_array_equal(found["second"]["kernel"], params["second"]["kernel"])


def test_the_gradient_of_a_step_is_that_at_adversarial_weights(tiny):
    """Of a linear network without a defense, against its closed form."""
    n = len(tiny.x_train)
    config = tiny_config(
        **{"defense": "natural", "awp": 0.2, "optimizer": "sgd", "momentum": 0.0, "learning_rate": 0.5},
        **{"batch_size": n, "soft_label": False, "steps": 1},
    )
    state = training.init_state(config, Linear(), tiny.image_shape, n)
    start = jax.tree.map(np.array, state.params)["params"]["Dense_0"]
    x, y = tiny.x_train.reshape(n, -1) / 255.0, np.eye(tiny.num_classes)[tiny.y_train]

    def loss_and_gradients(w):
        logits = x @ w["kernel"] + w["bias"]
        p = np.exp(logits - logits.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return -np.log(p[np.arange(n), tiny.y_train]).mean(), {"kernel": x.T @ (p - y) / n, "bias": (p - y).mean(0)}

    at = perturbed(start, loss_and_gradients(start)[1], 0.2)
    loss, gradients = loss_and_gradients(at)
    assert loss > loss_and_gradients(start)[0] + 0.1
    metrics = []
    end = training.fit(
        *(config, Linear(), tiny, state),
        steps=1,
        record=lambda step, found, count: metrics.append(found),
        checkpoint=lambda *a: None,
    )
    assert float(np.ravel(metrics[0]["loss"])[0]) == pytest.approx(loss, rel=1e-4)
    for name, value in start.items():
        np.testing.assert_allclose(
            end.params["params"]["Dense_0"][name], value - 0.5 * gradients[name], rtol=1e-4, atol=1e-6
        )


def test_attacks_stay_at_the_weights_themselves(tiny):
    """The first loss of IFGSM training with perturbed weights, made by hand; and what a step of PGD training costs then."""
    n, y = len(tiny.x_train), jax.nn.one_hot(tiny.y_train, 3)
    settings = {"defense": "ifgsm", "attack_steps": 3, "alpha": 0.4, "eps1": 0.2, "soft_label": False}
    config = tiny_config(**settings, awp=0.2, batch_size=n, steps=1)
    state = training.init_state(config, Linear(), tiny.image_shape, n)
    x, params = jnp.asarray(tiny.x_train / 255, jnp.float32), jax.tree.map(jnp.array, state.params)

    def loss(w, z):
        return losses.cross_entropy(Linear().apply(w, z), y).mean()

    def attacked(w):
        return attacks.ifgsm(lambda z: losses.cross_entropy(Linear().apply(w, z), y), x, eps=0.2, steps=3)

    def total(w, x_adv):
        return 0.4 * loss(w, x) + 0.6 * loss(w, x_adv)

    x_adv = attacked(params)
    at = training.adversarial_weights(params, jax.grad(total)(params, x_adv), 0.2)
    seen = []
    training.fit(
        *(config, Linear(), tiny, state),
        steps=1,
        record=lambda step, metrics, count: seen.append(float(np.ravel(metrics["loss"])[0])),
        checkpoint=lambda *a: None,
    )
    assert seen[0] == pytest.approx(float(total(at, x_adv)), rel=1e-5)
    assert float(total(at, attacked(at))) > seen[0] * (1 + 1e-4), "an attack at the other weights finds more"
    natural, pgd, both = (
        training.step_flops(tiny_config(defense=name, attack_steps=4, awp=awp), (8, 8, 1), 3)
        for name, awp in (("natural", 0.0), ("pgd", 0.0), ("pgd", 0.01))
    )
    assert both - pgd < 1.1 * natural, "the attack runs once"


def test_the_perturbation_of_free_training_climbs_at_the_weights_themselves(tiny):
    ends = [
        training.fit(
            *(config, Linear(), tiny, training.init_state(config, Linear(), tiny.image_shape, len(tiny.x_train))),
            steps=1,
            record=lambda *a: None,
            checkpoint=lambda *a: None,
        )
        for awp in (0.0, 0.5)
        for config in [tiny_config(defense="free", awp=awp, steps=1)]
    ]
    np.testing.assert_array_equal(*(end.delta for end in ends))
    assert np.abs(ends[0].delta).max() > 0
    assert differ(*(jax.device_get(end.params) for end in ends))


def test_steps_are_whole_updates():
    assert configure(epochs=1.0, batch_size=8, accumulate=4).total_steps(100) == 16, "13 batches, rounded up"
    assert configure(epochs=1.0, batch_size=8).total_steps(100) == 13
    for steps, nearest in ((5, "8"), (10, "8 or 16"), (30_001, "30,000 or 30,008")):
        with pytest.raises(
            ConfigError, match=f"--steps={steps}: must be a multiple of --accumulate=8, as {nearest} is"
        ):
            configure(steps=steps, accumulate=8)


def test_two_half_batches_are_one_batch(tiny):
    """For parameters and average; images come in the same order."""
    ends = []
    for size, accumulate in ((16, 1), (8, 2)):
        config = tiny_config(
            defense="natural", ema=0.9, accumulate=accumulate, batch_size=size, optimizer="sgd", steps=6 * accumulate
        )
        model = Linear()
        state = training.init_state(config, model, tiny.image_shape, len(tiny.x_train))
        start = jax.tree.map(np.array, state.params)
        end = training.fit(
            config, model, tiny, state, steps=config.steps, record=lambda *a: None, checkpoint=lambda *a: None
        )
        ends.append(jax.device_get((end.params, end.average)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *ends)
    assert differ(start, ends[0][0])
    assert differ(start, ends[0][1])


def test_the_average_moves_once_an_update(tiny):
    config = tiny_config(defense="natural", ema=0.9, accumulate=2, optimizer="sgd", steps=8)
    model = Linear()
    state, averages = training.init_state(config, model, tiny.image_shape, len(tiny.x_train)), []
    training.fit(
        config.replace(checkpoint_every=1),
        model,
        tiny,
        state,
        steps=8,
        record=lambda *a: None,
        checkpoint=lambda step, state: averages.append(jax.tree.map(np.array, (state.params, state.average))),
    )
    moved = [0, *(i for i in range(1, 8) if differ(averages[i][1], averages[i - 1][1]))]
    assert moved == [0, 1, 3, 5, 7]
    params, average = averages[3]
    decay = min(0.9, (1 + 1) / (10 + 1))
    want = jax.tree.map(lambda new, old: (1 - decay) * new + decay * old, params, averages[2][1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), average, want)


class Linear(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(x.reshape(len(x), -1))


def differ(a, b):
    return any((x != y).any() for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_what_has_no_effect_makes_no_other_run_and_what_has_one_does():
    plain = configure()
    unread = {"attack_statistics": "average"}  # without batch normalisation
    for same in ({"momentum": 0.5}, {"nesterov": True}, {"decay_kernels_only": True}, {"milestones": "0.1"}, unread):
        assert configure(**same).digest() == plain.digest()
        assert next(iter(same)) in configure(**same).without_effect()
    piecewise = {"schedule": "piecewise", "optimizer": "sgd", "nesterov": True, "weight_decay": 1.0}
    assert not configure(**piecewise).without_effect().keys() & {
        "milestones",
        "momentum",
        "nesterov",
        "decay_kernels_only",
    }
    for pair in ({"milestones": ("0.5,0.9", "0.50,0.90")}, {"mean": ("0.5", "0.5,0.50,0.5")}, {"std": ("", "1,1,1")}):
        ((name, values),) = pair.items()
        first, second = (configure(schedule="piecewise", **{name: value}).digest() for value in values)
        assert first == second != configure(schedule="piecewise", **{name: "0.25"}).digest()
    others = [
        {"optimizer": "sgd"},
        {"optimizer": "sgd", "momentum": 0.5},
        {"weight_decay": 0.1},
        {"weight_decay": 0.1, "decay_kernels_only": True},
        {"clip_norm": 1.0},
        {"awp": 0.01},
        {"attack_statistics": "average", "model": "preact_resnet18"},
        {"accumulate": 2},
        {"lr_warmup": 0.1},
        {"schedule": "piecewise", "milestones": "0.1"},
    ]
    assert len({configure(**other).digest() for other in [{}, *others]}) == len(others) + 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"milestones": "0.75,0.5"}, "--milestones=0.75,0.5: must rise between 0 and 1"),
        ({"milestones": "half"}, "--milestones=half: must rise between 0 and 1"),
        ({"milestones": "1"}, "--milestones=1: must rise"),
        ({"optimizer": "sgd", "momentum": 0.0, "nesterov": True}, "--nesterov: needs --momentum above 0"),
        ({"tracker": "mlflow"}, "--tracker=mlflow: must be empty or one of wandb, trackio"),
        ({"mean": "125"}, r"--mean=125: must lie in \[0.0, 1.0\], the range of --transform=unit"),
        ({"optimizer": "adamw"}, "--optimizer=adamw: needs --weight_decay above 0"),
        ({"optimizer": "lion"}, "--optimizer=lion"),
        ({"accumulate": 0}, "--accumulate=0"),
        ({"awp": -0.01}, r"--awp=-0.01: must be in \[0, 1\]"),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        configure(**settings)
