"""What attacks refuse: each message has the attack's name, the argument, its value and its bound."""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks

pytestmark = pytest.mark.usefixtures("all_unoptimized")

KEY, NAN = jax.random.key(7), float("nan")
IMAGES, LABELS = jnp.full((2, 3), 0.5), jnp.zeros(2, int)


def summed(z: jax.Array) -> jax.Array:
    return z.reshape(z.shape[0], -1).sum(1)


def itself(z: jax.Array) -> jax.Array:
    return z


# Every attack with arguments that it accepts; a test replaces one of them.
ACCEPTED: dict[str, tuple[Callable[..., jax.Array], dict[str, Any]]] = {
    "fgsm": (attacks.fgsm, {"loss_fn": summed, "eps": 0.1}),
    "second_step": (
        lambda x, **kw: attacks.second_step(x_adv=x, **kw),
        {"logits_fn": itself, "objective": "loss", "loss_fn": summed, "eps": 0.1},
    ),
    "ifgsm": (attacks.ifgsm, {"loss_fn": summed, "eps": 0.1, "steps": 2}),
    "mi_fgsm": (attacks.mi_fgsm, {"loss_fn": summed, "eps": 0.1, "steps": 2}),
    "pgd": (attacks.pgd, {"key": KEY, "loss_fn": summed, "eps": 0.1, "steps": 2}),
    "apgd": (attacks.apgd, {"key": KEY, "loss_fn": summed, "eps": 0.1, "steps": 2}),
    "orthogonal_pgd": (
        attacks.orthogonal_pgd,
        {
            **{"key": KEY, "loss_fn": summed, "score_fn": summed, "misclassified_fn": lambda x: summed(x) > 0},
            **{"threshold": 0.0, "eps": 0.1, "steps": 2},
        },
    ),
    "square": (
        attacks.square,
        {"key": KEY, "margin_fn": summed, "x": jnp.full((2, 4, 4, 1), 0.5), "eps": 0.1, "queries": 2},
    ),
    "deepfool": (attacks.deepfool, {"logits_fn": itself, "labels": LABELS}),
    "carlini_wagner": (attacks.carlini_wagner, {"logits_fn": itself, "labels": LABELS}),
    "fab": (attacks.fab, {"logits_fn": itself, "labels": LABELS}),
    "fmn": (attacks.fmn, {"logits_fn": itself, "labels": LABELS}),
    "ddn": (attacks.ddn, {"logits_fn": itself, "labels": LABELS}),
    "few_pixels": (attacks.few_pixels, {"key": KEY, "loss_fn": summed, "population": 4}),
    "greedy_l0": (attacks.greedy_l0, {"logits_fn": itself, "labels": LABELS}),
    "jsma": (attacks.jsma, {"logits_fn": itself, "labels": LABELS}),
    "lbfgs": (attacks.lbfgs, {"logits_fn": itself, "labels": LABELS}),
}
Case = tuple[dict[str, Any], type[Exception], str]


def whole(argument: str) -> list[Case]:
    return [({argument: v}, ValueError, rf"{argument}={v}; .*at least 1") for v in (0, -1, 2.0, None)]


def above_zero(argument: str) -> list[Case]:
    return [({argument: v}, ValueError, rf"{argument}={v}; .*above 0") for v in (0, -0.1, NAN)]


def from_zero(argument: str) -> list[Case]:
    values = (-0.1, -1, NAN, float("inf"), np.float64(-1))
    return [({argument: v}, ValueError, rf"{argument}=.*finite and at least 0") for v in values]


BY_ALL: list[Case] = [
    *[({"x": jnp.ones((2, 3), t)}, TypeError, rf"images are {t}.*floating point") for t in ("uint8", "int32", "bool")],
    ({"x": jnp.float32(1)}, ValueError, r"images need a leading batch axis"),
    *[({"bounds": b}, ValueError, "bounds=.*below") for b in ((1.0, 0.0), (0.5, 0.5), (NAN, 1.0))],
]
UNKNOWN_NORM: Case = ({"norm": "l1"}, ValueError, "norm='l1'; it must be one of linf, l2")
WRONG_KEYS: list[Case] = [
    ({"key": jax.random.split(KEY, 3)}, ValueError, r"key has shape \(3,\); .*each of the 2 images"),
    ({"key": jax.random.split(KEY, (2, 2))}, ValueError, r"key has shape \(2, 2\)"),
    ({"key": jax.random.split(jax.random.PRNGKey(0), 3)}, ValueError, r"key has shape \(3,\)"),
]
WRONG_LABELS: list[Case] = [
    ({"labels": jnp.ones(2)}, TypeError, "labels are float32"),
    ({"labels": jnp.ones(3, int)}, ValueError, r"labels have shape \(3,\); it must be \(2,\)"),
    ({"labels": np.array([0, 3])}, ValueError, r"labels contain 3; each must be a class in \[0, 3\)"),
    ({"labels": np.array([-1, 0])}, ValueError, r"labels contain -1; .* in \[0, 3\)"),
    ({"logits_fn": lambda z: z[:, 0]}, ValueError, r"logits have shape \(2,\)"),
    ({"logits_fn": lambda z: z[:, :1]}, ValueError, r"logits have shape \(2, 1\); .*at least 2"),
]
WRONG_TARGETS: list[Case] = [
    ({"targets": jnp.ones(2)}, TypeError, "targets are float32"),
    ({"targets": jnp.array([-1, 1])}, ValueError, r"targets contain -1; each must be a class in \[0, 3\)"),
    ({"targets": jnp.ones(3, int)}, ValueError, r"targets have shape \(3,\); it must be \(2,\)"),
    ({"targets": jnp.array([1, 0])}, ValueError, r"targets\[1\] is that image's label"),
]
OWN: dict[str, list[Case]] = {
    "fgsm": [*from_zero("eps"), UNKNOWN_NORM],
    "second_step": [
        *from_zero("eps"),
        ({"objective": "entropy"}, ValueError, "objective='entropy'; .*total, noise, loss, literal, random"),
        ({"objective": "loss", "loss_fn": None}, ValueError, "objective='loss' needs loss_fn"),
        ({"objective": "noise"}, ValueError, "objective='noise' .*needs key"),
        ({"objective": "random"}, ValueError, "objective='random' .*needs key"),
    ],
    "ifgsm": [*from_zero("eps"), *whole("steps"), *above_zero("step_size")],
    "mi_fgsm": [*from_zero("eps"), *whole("steps"), *above_zero("step_size"), *from_zero("decay")],
    "pgd": [
        *from_zero("eps"),
        *whole("steps"),
        *whole("restarts"),
        *above_zero("step_size"),
        UNKNOWN_NORM,
        *WRONG_KEYS,
        ({"restarts": 2, "random_start": False}, ValueError, "restarts=2 without random_start .*restarts=1"),
    ],
    "apgd": [
        *from_zero("eps"),
        *whole("steps"),
        *whole("restarts"),
        UNKNOWN_NORM,
        *WRONG_KEYS,
        ({"rho": 1.5}, ValueError, r"rho=1.5; it must lie in \[0, 1\]"),
    ],
    "orthogonal_pgd": [
        *from_zero("eps"),
        *whole("steps"),
        *above_zero("step_size"),
        UNKNOWN_NORM,
        *WRONG_KEYS,
        ({"threshold": NAN}, ValueError, "threshold=nan"),
    ],
    "square": [
        *from_zero("eps"),
        *whole("queries"),
        UNKNOWN_NORM,
        *WRONG_KEYS,
        ({"x": jnp.ones((2, 16))}, ValueError, r"images have shape \(2, 16\); .*\[N, H, W, C\]"),
        ({"p_init": 0}, ValueError, r"p_init=0; it must lie in \(0, 1\]"),
        ({"p_init": 1.1}, ValueError, "p_init=1.1"),
    ],
    "deepfool": [*whole("steps"), *from_zero("overshoot"), UNKNOWN_NORM, *WRONG_LABELS],
    "carlini_wagner": [
        *whole("steps"),
        *whole("binary_steps"),
        *above_zero("learning_rate"),
        *above_zero("initial_c"),
        *from_zero("confidence"),
        ({"bounds": None}, ValueError, "bounds=None; .*needs the range"),
        *WRONG_LABELS,
    ],
    "fab": [
        *whole("steps"),
        *whole("restarts"),
        *from_zero("eps"),
        UNKNOWN_NORM,
        *WRONG_LABELS,
        ({"restarts": 2, "eps": 0.1}, ValueError, "restarts=2 .*need key and eps"),
        ({"restarts": 2, "key": KEY}, ValueError, "restarts=2 .*need key and eps"),
        ({"labels": None}, TypeError, "labels are object"),
        ({"alpha_max": 1.5}, ValueError, r"alpha_max=1.5; it must lie in \[0, 1\]"),
        ({"overshoot": 0.9}, ValueError, "overshoot=0.9; it must be at least 1"),
        ({"beta": 0}, ValueError, r"beta=0; it must lie in \(0, 1\]"),
        *WRONG_TARGETS,
    ],
    "fmn": [
        *whole("steps"),
        *above_zero("step_size"),
        ({"gamma": 1.0}, ValueError, r"gamma=1.0; it must lie in \[0, 1\)"),
        ({"last_gamma": -0.1}, ValueError, r"last_gamma=-0.1; it must lie in \[0, 1\)"),
        UNKNOWN_NORM,
        *WRONG_LABELS,
        *WRONG_TARGETS,
    ],
    "ddn": [
        *whole("steps"),
        *above_zero("step_size"),
        *above_zero("radius"),
        ({"gamma": 1.0}, ValueError, r"gamma=1.0; it must lie in \[0, 1\)"),
        *WRONG_LABELS,
        *WRONG_TARGETS,
    ],
    "few_pixels": [
        *whole("steps"),
        *[({"pixels": v}, ValueError, rf"pixels={v}; .*at least 0") for v in (-1, 1.0, None)],
        ({"population": 2}, ValueError, "population=2; it must be at least 3"),
        *from_zero("differential"),
        *WRONG_KEYS,
        ({"bounds": None}, ValueError, "bounds=None; .*needs the range"),
    ],
    "greedy_l0": [
        *[({"pixels": v}, ValueError, rf"pixels={v}; .*at least 0") for v in (-1, 1.0, None)],
        ({"bounds": None}, ValueError, "bounds=None; .*needs the range"),
        *WRONG_LABELS,
        *WRONG_TARGETS,
    ],
    "lbfgs": [
        *whole("steps"),
        *whole("binary_steps"),
        *whole("history"),
        *above_zero("initial_c"),
        *WRONG_LABELS,
        *WRONG_TARGETS,
    ],
    "jsma": [
        *[
            ({"theta": v}, ValueError, rf"theta={v}; it must be a number, finite and other than 0")
            for v in (0, NAN, None)
        ],
        *[({"gamma": v}, ValueError, rf"gamma={v}; it must lie in \(0, 1\]") for v in (0, 1.1, NAN)],
        *WRONG_LABELS,
        *WRONG_TARGETS,
    ],
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_refuses(name):
    """One argument after the other."""
    attack, accepted = ACCEPTED[name]
    for wrong, error, message in (*BY_ALL, *OWN[name]):
        with pytest.raises(error, match=f"^{name}: .*{message}"):
            attack(**{"x": IMAGES, **accepted, **wrong})


def test_every_attack_is_here():
    assert set(ACCEPTED) == {*attacks.ATTACKS, "second_step"} == set(OWN)


@pytest.mark.parametrize("name", ["fgsm", "second_step", "ifgsm", "mi_fgsm", "pgd", "apgd", "square", "few_pixels"])
def test_refuses_losses_that_are_not_per_image(name):
    attack, accepted = ACCEPTED[name]
    argument = "margin_fn" if name == "square" else "loss_fn"
    wanted = "per-example losses" if argument == "loss_fn" else "one value for each image"
    for loss in (jnp.sum, jnp.mean, itself, lambda z: summed(z)[:1]):
        with pytest.raises(ValueError, match=rf"{argument} returned shape .* for 2 images; .*{wanted}.*\(2,\)"):
            attack(**{"x": IMAGES, **accepted, argument: loss})


@pytest.mark.parametrize("name", ACCEPTED)
def test_refuses_outputs_that_are_no_array(name):
    """What models with several outputs return."""
    attack, accepted = ACCEPTED[name]
    argument = next(a for a in ("margin_fn", "loss_fn", "logits_fn") if a in accepted)
    for output in ((summed, None), {"loss": summed}):
        wrong = {argument: lambda z, output=output: jax.tree.map(lambda f: f and f(z), output)}
        with pytest.raises(TypeError, match=rf"returned a {type(output).__name__}; .*lambda x: f\(x\)\[0\]"):
            attack(**{"x": IMAGES, **accepted, **wrong})


class WithoutHash:
    """As an Equinox module that holds arrays."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, function):
        self.function = function

    def __call__(self, z):
        return self.function(z)


@pytest.mark.parametrize("name", ACCEPTED)
def test_takes_callables_without_hash_and_empty_batches(name):
    attack, accepted = ACCEPTED[name]
    given = {"x": IMAGES, **accepted}
    argument = next(a for a in ("margin_fn", "loss_fn", "logits_fn") if a in accepted)
    steps = {n: 2 for n in ("steps", "binary_steps") if n in inspect.signature(attack).parameters}
    given |= steps
    want = attack(**given)
    np.testing.assert_array_equal(attack(**{**given, argument: WithoutHash(given[argument])}), want)
    nothing = {n: v[:0] for n, v in given.items() if n in ("x", "labels")}
    got = attack(**{**given, **nothing})
    assert got.shape == (0, *want.shape[1:])
    assert got.dtype == want.dtype
