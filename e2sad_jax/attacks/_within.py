"""Which passes of a model are an attack's, so that a training step can give them another model than the loss."""

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

P = ParamSpec("P")
R = TypeVar("R")
# A part of what JAX's caches go by: a function that is jitted once is traced for the attack and for the loss. None: alike.
_passes = jax.make_user_context(None)


def told_apart() -> contextlib.AbstractContextManager[None]:
    """Inside, passes of an attack are known as such."""
    return _passes("loss")  # type: ignore[no-any-return]


def within_attack() -> bool:
    """Whether what is traced is part of an attack: of `fgsm`, `ifgsm`, `pgd`, `second_step`, `core.ascend`, or `as_attack`."""
    return bool(_passes.value == "attack")


def as_attack(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function as an attack, such as one of your own for a defense of your own.

    Training with `--awp` or `--attack_statistics=average` gives it another model than the loss.
    """

    @functools.wraps(function)
    def attack(*args: P.args, **kwargs: P.kwargs) -> R:
        if _passes.value is None:
            return function(*args, **kwargs)
        with _passes("attack"):
            return function(*args, **kwargs)

    return attack
