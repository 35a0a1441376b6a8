"""A network of two layers on twelve pixels, and every registered defense as a function of it, compiled once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks, losses
from e2sad_jax.defenses import DEFENSES

N, SHAPE, HIDDEN, K = 8, (3, 4, 1), 16, 3
D = int(np.prod(SHAPE))
KEY = jax.random.key(7)
EPS, EPS2, STEPS = 0.2, 0.1, 3
DELTA = jnp.asarray(np.random.RandomState(5).uniform(-EPS, EPS, (N, *SHAPE)), jnp.float32)
UNIVERSAL = DELTA[:2]  # for all images: a perturbation, and the momentum of its gradients
Weights = dict[str, jax.Array]
LogitsFn = Callable[[jax.Array], jax.Array]


def draw(seed: int = 0, dtype: Any = jnp.float32) -> Weights:
    rs = np.random.RandomState(seed)
    shapes = {"w1": (D, HIDDEN), "b1": (1, HIDDEN), "w2": (HIDDEN, K)}
    return {name: jnp.asarray(0.5 * rs.randn(*shape), dtype) for name, shape in shapes.items()}


def net(weights: Weights) -> LogitsFn:
    return lambda z: jnp.tanh(z.reshape(z.shape[0], -1) @ weights["w1"] + weights["b1"]) @ weights["w2"]


def batch(delta: float = 0.25, dtype: Any = jnp.float32) -> tuple[jax.Array, jax.Array]:
    x = np.random.RandomState(1).rand(N, *SHAPE)
    return jnp.asarray(x, dtype), losses.soft_labels(jnp.arange(N) % K, K, delta).astype(dtype)


def registered(name: str) -> Callable[..., Any]:
    """The defense's loss with all that it takes, short attacks and other weights than the defaults."""
    defense = DEFENSES[name]
    carried = UNIVERSAL if defense.carried else DELTA
    offered = {"eps": EPS, "eps1": EPS, "eps2": EPS2, "key": KEY, "delta": carried, "steps": STEPS, "lam": 0.7}
    offered |= {"temperature": 2.0, "teacher_fn": net(draw(9)), "norm": "linf"}
    return functools.partial(defense.loss, **{k: v for k, v in offered.items() if defense.takes(k)})


# Every defense as a function of logits_fn, x, y, whose arguments may be overridden; e2SAD in all its kinds.
VARIANTS: dict[str, Callable[..., Any]] = {name: registered(name) for name in DEFENSES}
VARIANTS |= {
    f"e2sad {objective}": functools.partial(registered("e2sad"), second_step=objective)
    for objective in attacks.OBJECTIVES
    if objective not in ("total", "literal")  # the first is the default, the other the sign of rounding noise
}
VARIANTS["n_fgsm qub"] = functools.partial(registered("n_fgsm"), training_loss="qub")
VARIANTS["strong_adversary alpha"] = functools.partial(registered("strong_adversary"), adversary="alpha")
VARIANTS["e2sad ball"] = functools.partial(registered("e2sad"), random_start=True, ball_second=True)


@functools.cache
def defended(name: str) -> Callable[..., Any]:
    """A variant's loss with its parts, and its gradient, of weights, images and labels: compiled once for all tests."""
    return jax.jit(jax.value_and_grad(lambda w, x, y: VARIANTS[name](net(w), x, y), has_aux=True))


def close(got: Any, want: Any, rtol: float = 1e-4) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, want)
