"""Distillation on the digits: what looks like robustness, and the attacks that see through it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from e2sad_jax import attacks, data, defenses, evaluation, losses
from e2sad_jax.evaluation import masking

T, EPS, STEPS = 100.0, 0.15, 3000


def logits_of(params, x):
    h = jnp.tanh(x.reshape(x.shape[0], -1) @ params["w1"] + params["b1"])
    return h @ params["w2"]


def train(loss, x, y):
    """3,000 steps of Adam on batches of 128; the loss takes logits_fn, images and labels."""
    keys = jax.random.split(jax.random.key(0))
    params = {
        "w1": 0.1 * jax.random.normal(keys[0], (x[0].size, 64)),
        "b1": jnp.zeros((1, 64)),
        "w2": 0.2 * jax.random.normal(keys[1], (64, 10)),
    }
    tx = optax.adam(optax.cosine_decay_schedule(1e-2, STEPS))

    def step(carry, key):
        params, state = carry
        rows = jax.random.randint(key, (128,), 0, len(x))
        gradient = jax.grad(lambda p: loss(functools.partial(logits_of, p), x[rows], y[rows])[0])(params)
        updates, state = tx.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(1), STEPS)
    return jax.jit(lambda p: jax.lax.scan(step, (p, tx.init(p)), keys)[0][0])(params)


@pytest.fixture(scope="module")
def models():
    """A natural network and a student, both functions of images; and test images with labels."""
    with jax.numpy_dtype_promotion("standard"):
        digits = data.load("digits")
        x, y = jnp.asarray(digits.x_train / 255.0, jnp.float32), losses.soft_labels(jnp.asarray(digits.y_train), 10, 0)
        natural = train(defenses.natural, x, y)
        teacher = train(functools.partial(defenses.tempered, temperature=T), x, y)
        learn = functools.partial(
            defenses.distillation, temperature=T, teacher_fn=functools.partial(logits_of, teacher)
        )
        student = train(learn, x, y)
    return {"natural": natural, "student": student}, np.float32(digits.x_test / 255), digits.y_test


def test_masked_gradients_are_found_and_every_attack_that_avoids_them_breaks_the_student(models):
    params, x, y = models
    labels = jnp.asarray(y)

    def accuracy(name, attack):
        f = functools.partial(logits_of, params[name])
        return float((f(attack(f)).argmax(1) == labels).mean())

    def along(loss):
        pgd = functools.partial(attacks.pgd, eps=EPS, steps=20)
        return lambda f: jax.jit(lambda z: pgd(jax.random.key(2), lambda z: loss(f(z)), z))(jnp.asarray(x))

    hard = losses.soft_labels(labels, 10, 0)
    cross_entropy = along(lambda z: losses.cross_entropy(z, hard))
    clean = {name: accuracy(name, lambda f: jnp.asarray(x)) for name in params}
    assert min(clean.values()) > 0.9
    # What its authors saw: nothing that follows the gradient of the cross-entropy does harm.
    assert accuracy("student", cross_entropy) > 0.8
    assert accuracy("natural", cross_entropy) < 0.05
    found = {
        name: masking.gradients(evaluation.Model(name, logits_of, own, x, y), EPS).zero for name, own in params.items()
    }
    assert found["student"] > 0.5
    assert found["natural"] < 0.02
    # What breaks it.
    for loss in (
        lambda z: losses.margin(z, labels),
        lambda z: losses.dlr(z, labels),
        lambda z: losses.cross_entropy(z / T, hard),
    ):
        assert accuracy("student", along(loss)) < 0.15


def test_the_diagnosis_names_zero_gradients(models):
    params, x, y = models
    model = evaluation.Model("student", logits_of, params["student"], x[:100], y[:100])
    effort = evaluation.Effort(budgets=(1.0,), steps=(1,), restarts=1, pgd_steps=5, fmn=0, worst_case=False)
    checks = evaluation.diagnose(model, eps=EPS, effort=effort)["checks"]
    (zero,) = [check for check in checks if check["name"] == "zero gradients"]
    assert zero["suspicious"]
