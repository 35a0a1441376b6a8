"""Adversarial attacks, adversarial training and robustness evaluation in JAX.

>>> from e2sad_jax import attacks, defenses, losses, networks, data, training, evaluation

Each is imported when it is first used, so that `import e2sad_jax` and the attacks cost no more than JAX and Optax.
`e2sad_jax.load` reads a trained classifier from the folder of its run.
"""

import importlib
from typing import TYPE_CHECKING, Any

from e2sad_jax._version import __version__

if TYPE_CHECKING:
    from e2sad_jax import attacks, data, defenses, distributed, errors, evaluation, export, losses, networks, training
    from e2sad_jax.runs.classifier import load

__all__ = [
    "__version__",
    "attacks",
    "data",
    "defenses",
    "distributed",
    "errors",
    "evaluation",
    "export",
    "load",
    "losses",
    "networks",
    "training",
]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("e2sad_jax.runs.classifier").load
    if name in __all__:
        return importlib.import_module(f"e2sad_jax.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
