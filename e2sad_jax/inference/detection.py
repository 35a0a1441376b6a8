"""Detectors: scores of images, higher for stranger ones, and the threshold above which an image is rejected."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _arguments
from e2sad_jax.attacks import core
from e2sad_jax.attacks.core import LogitsFn


def squeezing_score(
    logits_fn: LogitsFn, squeezers: Sequence[Callable[[jax.Array], jax.Array]], x: jax.Array
) -> jax.Array:
    """How much squeezing an image changes its prediction: the detector of feature squeezing.

        max over squeezers s of ||softmax(z(x)) - softmax(z(s(x)))||_1

    The paper's joint detector of MNIST has 1 bit and a 2 x 2 median. Attack it through `attacks.bpda` of the squeezers.

    Args:
      logits_fn: images `[N, ...]` to logits `[N, K]`.
      squeezers: functions of images to images, at least one.
      x: images `[N, ...]`.

    Returns:
      Scores `[N]` in [0, 2].

    Raises:
      TypeError: if `squeezers` is no list or tuple of functions.
      ValueError: if there is no squeezer, or the logits are not `[N, K]`.

    Reference: Xu et al., 2018, https://arxiv.org/abs/1704.01155
    """
    if not isinstance(squeezers, Sequence) or not all(map(callable, squeezers)):
        raise TypeError("squeezing_score: squeezers must be a list of functions of images, [inference.median] for one")
    if not squeezers:
        raise ValueError("squeezing_score: squeezers is empty; it must hold at least one function of images")

    def probabilities(z: jax.Array) -> jax.Array:
        return jax.nn.softmax(core.as_float32(_arguments.logits("squeezing_score", logits_fn(z), len(x))))

    plain = probabilities(x)
    apart = [jnp.abs(plain - probabilities(squeeze(x))).sum(-1) for squeeze in squeezers]
    return jnp.stack(apart).max(0)


def threshold(scores: Any, false_positive_rate: float) -> float:
    """The threshold that rejects at most a share of legitimate images: those whose score is above it.

    Args:
      scores: of legitimate images, `[N]`. Take held-out training images, never test images.
      false_positive_rate: share of them that may be rejected, in [0, 1).

    Returns:
      The ceil(N (1 - rate))-th smallest score.

    Raises:
      ValueError: if the scores are not `[N]`, N at least 1, or hold NaN, or the rate is out of range.

    >>> threshold([0.1, 0.4, 0.2, 0.3], 0.25)
    0.3

    Reference: Xu et al., 2018, https://arxiv.org/abs/1704.01155
    """
    values = np.asarray(jax.device_get(scores))
    if values.ndim != 1 or not len(values) or np.isnan(values).any():
        raise ValueError(f"threshold: scores have shape {values.shape}; it must be [N], N at least 1, without NaN")
    if not 0 <= false_positive_rate < 1:
        raise ValueError(f"threshold: false_positive_rate={false_positive_rate}; it must lie in [0, 1)")
    kept = math.ceil(round(len(values) * (1 - false_positive_rate), 9))  # 100 x 0.95 is a little more in binary
    return float(np.sort(values)[max(kept, 1) - 1])
