"""Adversarial training at the price of two gradient steps (e2SAD), as pure JAX functions.

>>> import e2sad_jax
>>> from e2sad_jax import attacks, defenses, losses, networks
"""

from typing import TYPE_CHECKING, Any

from e2sad_jax import attacks, defenses, errors, losses, networks
from e2sad_jax._version import __version__

if TYPE_CHECKING:
    from e2sad_jax.runs.checkpoint import load


__all__ = ["__version__", "attacks", "defenses", "errors", "load", "losses", "networks"]


def __getattr__(name: str) -> Any:
    if name == "load":  # brings Orbax along, so only when it is asked for
        from e2sad_jax.runs.checkpoint import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
