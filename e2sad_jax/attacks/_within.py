"""Which passes of a model are an attack's, so that a training step can give them another model than the loss."""

import functools
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
_state = threading.local()


def within_attack() -> bool:
    """Whether what runs or is traced is part of `fgsm`, `ifgsm`, `pgd`, `second_step`, `core.ascend` or what is `as_attack`."""
    return getattr(_state, "within", False)


def as_attack(function: Callable[P, R]) -> Callable[P, R]:
    """Marks a function as an attack, such as one of your own for a defense of your own: `within_attack` holds while it runs.

    Training with `--awp` or `--attack_statistics=average` asks another model there.
    """

    @functools.wraps(function)
    def attack(*args: P.args, **kwargs: P.kwargs) -> R:
        before = within_attack()
        _state.within = True
        try:
            return function(*args, **kwargs)
        finally:
            _state.within = before

    return attack
