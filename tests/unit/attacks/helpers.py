"""The network, the images and the attacks that all tests of this folder share."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import attacks, losses
from e2sad_jax.attacks import Method

N, SHAPE, K = 8, (4, 3, 1), 3  # an image for each of the test's devices
D = int(np.prod(SHAPE))
KEY = jax.random.key(7)
KEYS = jax.random.split(KEY, N)
Logits = Callable[[jax.Array], jax.Array]


def logits_of(network: Any, z: jax.Array) -> jax.Array:
    """Linear but for a kink in each pixel, so that rounding turns no sign of a gradient."""
    flat = z.reshape(z.shape[0], -1).astype(jnp.float32)
    return network["scale"] * (flat @ network["linear"] + jnp.abs(flat - network["kink"]) @ network["bent"])


def draw(seed: int = 0, scale: float = 1.0) -> dict[str, np.ndarray]:
    rs = np.random.RandomState(seed)
    return {
        "linear": rs.randn(D, K).astype(np.float32),
        "bent": rs.randn(D, K).astype(np.float32),
        "kink": (rs.randint(0, 255, (1, D)) / 255 + 0.5 / 255).astype(np.float32),
        "scale": np.float32(scale),
    }


@jax.jit
def logits(network: Any, x: jax.Array) -> jax.Array:
    return logits_of(network, x)


def images(dtype: Any = jnp.float32, seed: int = 1) -> jax.Array:
    """Uniform in [0, 1], the first pixels at the ends of the range."""
    x = np.random.RandomState(seed).rand(N, *SHAPE)
    x[:, 0, 0], x[:, 0, 1] = 0, 1
    return jnp.asarray(x, dtype)


def predicted(network: Any, x: jax.Array) -> np.ndarray:
    return np.nan_to_num(np.asarray(logits(network, x))).argmax(1).astype(np.int32)


def size(change: Any, norm: str) -> np.ndarray:
    """The norm of each image's change, `[N]`, in float64."""
    flat = np.float64(change).reshape(len(change), -1)
    if norm == "l0":
        return (flat != 0).sum(1)
    return np.abs(flat).max(1) if norm == "linf" else np.sqrt((flat**2).sum(1))


def wide(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def promotion(dtype: Any) -> contextlib.AbstractContextManager[None]:
    """Strict, except for bfloat16, where `jnp.promote_types` refuses to be asked."""
    return jax.numpy_dtype_promotion("strict" if dtype == "float32" else "standard")


@contextlib.contextmanager
def compiled_for(dtype: str, *, optimized: bool = False) -> Iterator[None]:
    """Promotion of types as `dtype` needs it, and programs that compile in half the time unless `optimized`."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not optimized)
    with promotion(dtype):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@dataclasses.dataclass(frozen=True)
class Case:
    """An attack as a function of logits, keys, images, labels, eps and bounds, and what it is.

    Attributes:
      attack: the function.
      norm: of its ball.
      family: as of `attacks.Method`, or "second step".
      random: whether it draws random numbers.
      one_key: whether it takes one key for the whole batch.
      close: by how much two programs of it may differ: more for one that divides by lengths, or descends.
    """

    attack: Callable[..., jax.Array]
    norm: str
    family: str
    random: bool
    one_key: bool = False
    close: float = 2e-6


# Few steps, and settings with which the minimum-norm attacks find something in these.
FAST: dict[str, dict[str, Any]] = {
    "ifgsm": {"steps": 3},
    "mi_fgsm": {"steps": 3},
    "pgd": {"steps": 2},
    "apgd": {"steps": 4},
    "orthogonal_pgd": {"steps": 3},
    "square": {"steps": 12},
    "fab": {"steps": 5},
    "fmn": {"steps": 10},
    "ddn": {"steps": 10},
    "deepfool": {"steps": 5},
    "carlini_wagner": {"steps": 15},
    "few_pixels": {"steps": 3},
    "lbfgs": {"steps": 10},
}
FASTER = {
    "carlini_wagner": functools.partial(attacks.carlini_wagner, learning_rate=0.1, initial_c=1.0, binary_steps=3),
    "ddn": functools.partial(attacks.ddn, radius=0.3, gamma=0.2),
    "few_pixels": functools.partial(attacks.few_pixels, population=12),
    "jsma": functools.partial(attacks.jsma, gamma=1.0),
    "lbfgs": functools.partial(attacks.lbfgs, binary_steps=4, history=2),
}
CLOSE = {"carlini_wagner": 2e-4, "fab": 1e-4, "lbfgs": 1e-3}


def of_method(name: str, norm: str, **settings: Any) -> Case:
    """A case of the registry, run as a suite runs it."""
    method: Method = attacks.ATTACKS[name]
    method = dataclasses.replace(method, function=FASTER.get(name, method.function))
    towards = settings.pop("towards", False)
    settings = {**FAST.get(name, {}), **settings}

    def attack(f: Logits, keys: jax.Array, x: jax.Array, y: jax.Array, eps: Any, bounds: Any) -> jax.Array:
        z = x.reshape(*x.shape[:1], *SHAPE)
        targets = (y + 1) % K if towards else None
        return method.run(f, z, y, key=keys, eps=eps, norm=norm, bounds=bounds, targets=targets, **settings)

    close = CLOSE.get(name, 1e-5 if norm == "l2" or name == "apgd" else 2e-6)
    return Case(attack, norm, method.family, method.random, close=close)


def of_second_step(objective: str) -> Case:
    def attack(f: Logits, keys: jax.Array, x: jax.Array, y: jax.Array, eps: Any, bounds: Any) -> jax.Array:
        def loss(z: jax.Array) -> jax.Array:
            return losses.margin(f(z), y)

        return attacks.second_step(f, x, eps=eps, objective=objective, loss_fn=loss, key=keys[0], bounds=bounds)

    drawn = objective in ("noise", "random")
    return Case(attack, "linf", "second step", drawn, one_key=drawn)


def of_pgd(**settings: Any) -> Case:
    """PGD by its own arguments."""

    def attack(f: Logits, keys: jax.Array, x: jax.Array, y: jax.Array, eps: Any, bounds: Any) -> jax.Array:
        return attacks.pgd(keys, lambda z: losses.margin(f(z), y), x, eps=eps, bounds=bounds, **settings)

    return Case(attack, "linf", "gradient", settings.get("random_start", True))


# All that `ATTACKS` has, in every norm; then what differs in its program.
RESTARTS = {("pgd", "linf"): 3, ("apgd", "l2"): 2}
REGISTERED = {
    f"{name}_{norm}": of_method(name, norm, restarts=RESTARTS.get((name, norm), 1))
    for name in attacks.ATTACKS
    for norm in attacks.ATTACKS[name].norms
}
VARIANTS = {
    "ifgsm_long_steps": of_method("ifgsm", "linf", step_size=0.5),
    "pgd_from_x": of_pgd(steps=3, random_start=False),
    "fab_targeted_linf": of_method("fab", "linf", towards=True),
    **{f"second_{objective}": of_second_step(objective) for objective in attacks.OBJECTIVES},
}
CASES = {**REGISTERED, **VARIANTS}
COUNTED = ("few_pixels_l0",)  # the budget is a shape of the program
MINIMAL = [name for name, case in CASES.items() if case.family == "minimum-norm"]
BALL = [name for name in CASES if name not in MINIMAL]


# In bfloat16 those that round in all ways there are compile as users' programs do: the rounding must survive that.
OPTIMIZED = ("fgsm_linf", "fgsm_l2", "pgd_linf", "pgd_l2", "deepfool_linf")


def jitted(name: str, dtype: str = "float32", bounds: Any = (0.0, 1.0)) -> Callable[..., jax.Array]:
    """The one program of a case that all of its properties are asked of: `(network, keys, x, y, eps) -> images`."""
    return _jitted(name, dtype, bounds)


@functools.cache
def _jitted(name: str, dtype: str, bounds: Any) -> Callable[..., jax.Array]:
    attack = CASES[name].attack
    program = jax.jit(
        lambda network, k, x, y, e: attack(functools.partial(logits_of, network), k, x, y, e, bounds),
        static_argnums=(4,) if name in COUNTED else (),
    )

    def run(network: Any, keys: jax.Array, x: jax.Array, y: Any, eps: float) -> jax.Array:
        assert x.dtype == dtype
        with compiled_for(dtype, optimized=dtype == "bfloat16" and name in OPTIMIZED):
            return program(network, keys, x, y, float(int(eps)) if name in COUNTED else np.float32(eps))

    return run
