"""Defensive distillation: losses and gradients at nine temperatures, and what it is made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import defenses, losses
from tests import cited
from tests.unit.defenses.toy import N, batch, close, draw, net

TEMPERATURES = (1, 2, 5, 10, 20, 30, 40, 50, 100)
pytestmark = pytest.mark.usefixtures("all_unoptimized")


def taught(student, teacher, y, **kwargs):
    """The loss of logits `[N, K]` as the student's and the teacher's, per image; images are their rows."""
    x = jnp.arange(len(student), dtype=jnp.float32)[:, None]
    pick = lambda logits: lambda z: logits[z[:, 0].astype(jnp.int32)]  # noqa: E731
    return defenses.distillation(pick(student), x, y, teacher_fn=pick(teacher), **kwargs)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_reference_values(temperature, shared):
    """The linear network learns from the convolutional one: float64 losses, and gradients in the student's logits."""
    want, logits = cited.values(shared, "distillation"), cited.values(shared, "networks")
    student, teacher = (jnp.asarray(logits[f"{name}_logits"]) for name in ("linear", "cnn"))
    y = losses.soft_labels(jnp.asarray(logits["labels"].astype(np.int32)), 10, 0)
    loss, gradient = jax.value_and_grad(lambda s: taught(s, teacher, y, temperature=temperature)[0])(student)
    np.testing.assert_allclose(loss, want[f"loss_T{temperature}"].mean(), rtol=1e-5)
    np.testing.assert_allclose(gradient, want[f"gradient_T{temperature}"], atol=3e-6, rtol=1e-4)
    for i in (0, 17):  # of each image alone
        own, _ = taught(student, teacher, y, temperature=temperature, weights=np.arange(32) == i)
        np.testing.assert_allclose(own, want[f"loss_T{temperature}"][i], rtol=2e-5)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_the_teacher_trains_on_scaled_logits(temperature):
    (x, y), weights = batch(), draw()
    got = jax.grad(lambda w: defenses.tempered(net(w), x, y, temperature=temperature)[0])(weights)
    want = jax.grad(lambda w: defenses.natural(lambda z: net(w)(z) / temperature, x, y)[0])(weights)
    close(got, want)
    _, parts = defenses.tempered(net(weights), x, y, temperature=temperature)
    np.testing.assert_allclose(parts["clean"], defenses.natural(net(weights), x, y)[0], rtol=1e-6)


def test_at_temperature_one_a_teacher_that_is_sure_is_the_labels():
    (x, y), weights = batch(0), draw()
    sure = lambda z: 200 * y  # noqa: E731
    got = jax.grad(lambda w: defenses.distillation(net(w), x, y, teacher_fn=sure, temperature=1)[0])(weights)
    close(got, jax.grad(lambda w: defenses.natural(net(w), x, y)[0])(weights))


def test_the_best_student_is_its_teacher():
    """There the gradient vanishes, whatever the labels are; parts say how far it has come."""
    (x, y), weights = batch(), draw()
    f = net(weights)
    loss = lambda w, labels: defenses.distillation(net(w), x, labels, teacher_fn=f, temperature=3.0)  # noqa: E731
    for labels in (y, y[::-1]):
        gradient, parts = jax.grad(loss, has_aux=True)(weights, labels)
        assert max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(gradient)) < 1e-6
        assert parts["agreement"] == 1
        np.testing.assert_allclose(parts["clean"], losses.cross_entropy(f(x), labels).mean(), rtol=1e-6)
    _, parts = loss({**weights, "w2": -weights["w2"]}, y)
    assert parts["agreement"] == np.mean(np.asarray(-f(x)).argmax(1) == np.asarray(f(x)).argmax(1)) < 1


def test_no_gradient_flows_through_the_teacher():
    (x, y), weights = batch(), draw()
    loss = lambda w: defenses.distillation(net(draw(1)), x, y, teacher_fn=net(w))[0]  # noqa: E731
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.grad(loss)(weights)))


def test_refuses():
    (x, y), f = batch(), net(draw())
    with pytest.raises(ValueError, match=r"distillation: temperature=0; .*above 0"):
        defenses.distillation(f, x, y, teacher_fn=f, temperature=0)
    with pytest.raises(ValueError, match=r"tempered: temperature=nan; .*above 0"):
        defenses.tempered(f, x, y, temperature=float("nan"))
    with pytest.raises(ValueError, match=rf"teacher's logits have shape \({N}, 2\) and the student's \({N}, 3\)"):
        defenses.distillation(f, x, y, teacher_fn=lambda z: f(z)[:, :2])
    entry = defenses.DEFENSES["distillation"]
    with pytest.raises(ValueError, match="distillation: needs the logits of a teacher"):
        entry(f, x, y, settings=entry.defaults(), eps=0.1, bounds=None, key=jax.random.key(0))
