"""The functions that attacks and defenses take, and the image range, as types."""

from collections.abc import Callable

import jax

LossFn = Callable[[jax.Array], jax.Array]
"""Images `[N, ...]` to one value per image, `[N]`."""

LogitsFn = Callable[[jax.Array], jax.Array]
"""Images `[N, ...]` to logits `[N, K]`."""

Bounds = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None
"""Lowest and highest value of a valid image, numbers or arrays that broadcast against one; None where there is no range."""
