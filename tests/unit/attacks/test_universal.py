"""Universal perturbations: exact rates of linear models of two classes, and the rates of the authors' algorithm in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, losses
from tests import cited
from tests.helpers import mostly_slow
from tests.unit.attacks.helpers import size

KEY = jax.random.key(0)
RUNS = [(net, norm, eps) for net in ("linear", "cnn") for norm, eps in (("linf", 0.2), ("linf", 0.3), ("l2", 4.0))]


@pytest.mark.parametrize(("net", "norm", "eps"), mostly_slow(RUNS, []))
def test_fools_as_many_digits_as_the_reference(net, norm, eps, shared):
    """Of the hundred that it is made of, in as many passes; and by gradient steps more."""
    f, golden = cited.networks(shared).logits[net], cited.values(shared, "universal_own")
    x = jnp.asarray(np.float32(cited.values(shared, "universal")["craft_uint8"]) / 255)
    name = f"{net}_own_{norm}{eps:g}"
    want = float(golden[f"{name}_craft_rate"])
    assert abs(float(attacks.fooling_rate(f, x, jnp.float32(golden[f"{name}_v"][None]))) - want) < 0.011
    passes = 2 if net == "cnn" else 5
    run = jax.jit(lambda x: attacks.universal(KEY, f, x, eps=eps, passes=passes, fooling=want, norm=norm))
    y = losses.soft_labels(f(x).argmax(1), 10, 0)
    by_steps = jax.jit(
        lambda x: attacks.universal_pgd(
            lambda z: losses.cross_entropy(f(z), y), x, eps=eps, steps=30, cap=2.0, norm=norm
        )
    )
    for v in (run(x), by_steps(x)):
        assert v.shape == (1, 28, 28, 1)
        assert size(v, norm)[0] <= eps + 1e-6
        assert float(attacks.fooling_rate(f, x, v)) >= want - 0.05


W = np.random.RandomState(0).randn(12).astype(np.float32)
X = jnp.asarray(0.5 + np.abs(np.random.RandomState(1).randn(30, 1)) * W[None] / 12, jnp.float32)  # all of class 1


def two(z: jax.Array) -> jax.Array:
    return losses.binary_logits((z - 0.5) @ W + 0.02)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("how", ["universal", "universal_pgd"])
@pytest.mark.usefixtures("unoptimized")
def test_of_two_classes_it_is_the_normal_and_its_rate_exact(how, norm):
    """Without a range: along -w or its signs, and what is nearer than the budget falls."""
    f = np.asarray(two(X))[:, 1]
    assert (f > 0).all()
    dual = np.abs(W).sum() if norm == "linf" else np.linalg.norm(W)
    distance = np.sort(f / dual)
    eps = float(distance[14:16].mean())

    def attack(x: jax.Array) -> jax.Array:
        if how == "universal":
            return attacks.universal(KEY, two, x, eps=eps, fooling=1.0, norm=norm, bounds=None)
        return attacks.universal_pgd(lambda z: -two(z)[:, 1], x, eps=eps, steps=40, norm=norm, bounds=None)

    v = np.asarray(jax.jit(attack)(X))
    along = -np.sign(W) if norm == "linf" else -W / np.linalg.norm(W)
    np.testing.assert_allclose(v[0], eps * along, rtol=0, atol=1e-5)
    assert float(attacks.fooling_rate(two, X, jnp.asarray(v), bounds=None)) == pytest.approx(0.5)


@pytest.mark.usefixtures("unoptimized")
def test_stops_when_enough_images_are_fooled():
    whole, none = (
        attacks.universal(KEY, two, X, eps=1.0, fooling=share, bounds=None, passes=1) for share in (1.0, 0.0)
    )
    assert np.abs(whole).max() > 0
    np.testing.assert_array_equal(none, 0)


def test_the_fooling_rate_is_of_clipped_images():
    def f(z: jax.Array) -> jax.Array:
        return losses.binary_logits(z[:, 0] - 0.5)

    x = jnp.array([[0.1], [0.4], [0.9], [1.0]])
    change = jnp.array([[0.3]])
    assert float(attacks.fooling_rate(f, x, change)) == 0.25
    assert float(attacks.fooling_rate(f, x, change, bounds=(0.0, 1.0))) == 0.25
    assert float(attacks.fooling_rate(lambda z: losses.binary_logits(1.1 - z[:, 0]), x, change)) == 0
    assert float(attacks.fooling_rate(lambda z: losses.binary_logits(1.1 - z[:, 0]), x, change, bounds=None)) == 0.5


def test_refuses():
    calls = {
        "universal": lambda **k: attacks.universal(**{"key": KEY, "logits_fn": two, "x": X, "eps": 0.1} | k),
        "universal_pgd": lambda **k: attacks.universal_pgd(**{"loss_fn": lambda z: z[:, 0], "x": X, "eps": 0.1} | k),
        "fooling_rate": lambda **k: attacks.fooling_rate(**{"logits_fn": two, "x": X, "change": X[:1]} | k),
    }
    wrong = [
        ("universal", {"eps": -1}, "eps=-1"),
        ("universal", {"passes": 0}, "passes=0; it must be at least 1"),
        ("universal", {"fooling": 1.1}, r"fooling=1.1; it must lie in \[0, 1\]"),
        ("universal", {"key": jax.random.split(KEY, 30)}, r"key has shape \(30,\); it must be one key"),
        ("universal", {"x": X[:0]}, r"images have shape \(0, 12\); there must be one at least"),
        ("universal", {"norm": "l0"}, "norm='l0'; it must be one of linf, l2"),
        ("universal_pgd", {"x": X[:0]}, r"images have shape \(0, 12\)"),
        ("universal_pgd", {"step_size": 0}, "step_size=0"),
        ("universal_pgd", {"eps": np.ones(30)}, r"eps has shape \(30,\)"),
        ("fooling_rate", {"change": X[0]}, r"change has shape \(12,\); it must be that of one image, \(1, 12\)"),
        ("fooling_rate", {"bounds": (1.0, 0.0)}, "bounds="),
    ]
    for name, arguments, message in wrong:
        with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
            calls[name](**{"bounds": None} | arguments)
