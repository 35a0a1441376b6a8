"""MagNet on the digits: it stops attacks that do not know it, and none that does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from e2sad_jax import attacks, data, inference, losses

EPS, KEY = 0.25, jax.random.key(0)


def test_it_stops_only_attacks_that_do_not_know_it(standard_promotion):
    """An image counts for the attack where the reformed one is misclassified and no detector rejects it."""
    digits = data.load("digits")
    x, held_out = jnp.asarray(np.float32(digits.x_train[:-200] / 255)), np.float32(digits.x_train[-200:] / 255)
    rows = np.arange(100)
    test, labels = jnp.asarray(np.float32(digits.x_test[rows] / 255)), jnp.asarray(digits.y_test[rows])

    def apply(params, z):
        return jnp.tanh(z.reshape(len(z), -1) @ params["w1"]) @ params["w2"]

    keys = jax.random.split(KEY)
    first = {"w1": 0.05 * jax.random.normal(keys[0], (784, 64)), "w2": 0.1 * jax.random.normal(keys[1], (64, 10))}
    answers = digits.y_train[:-200]
    params = attacks.substitute(
        KEY, lambda z: answers, apply, first, x, rounds=1, epochs=20, optimizer=optax.adam(3e-3)
    ).params
    f = functools.partial(apply, params)
    restore, start = inference.autoencoder(KEY, (28, 28, 1), blocks=(3,))
    own = inference.train_autoencoder(KEY, restore, start, x, epochs=15, batch_size=128, learning_rate=2e-2)
    reform = functools.partial(restore, own)
    scores = [lambda z, p=p: inference.error_score(reform, z, p=p) for p in (1, 2)]
    defense = inference.magnet(reform, scores, jnp.asarray(held_out), false_positive_rate=0.01)
    defended = defense.defended(f)

    def let_through(images):
        fooled = (defended(images).argmax(1) != labels) & ~defense.rejected(images)
        return float(fooled.mean())

    attack = jax.jit(
        lambda z, loss_of: attacks.pgd(KEY, loss_of, z, eps=EPS, steps=40, step_size=0.02), static_argnums=1
    )
    assert let_through(test) < 0.1
    blind = attack(test, lambda z: losses.margin(f(z), labels))
    assert float((f(blind).argmax(1) != labels).mean()) > 0.95
    assert let_through(blind) < 0.3
    weight = 20.0
    knowing = attack(
        test, lambda z: losses.margin(defended(z), labels) - weight * jnp.maximum(defense.score(z) - 0.95, 0)
    )
    assert let_through(knowing) > 0.6
