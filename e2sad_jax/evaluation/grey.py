"""Adversarial images as 8-bit files hold them."""

from typing import Any

import numpy as np

from e2sad_jax.attacks import core
from e2sad_jax.evaluation import _entrance

_LEVELS = np.arange(256, dtype=np.float32) / 255  # as they are read back


def quantize(images: Any, clean: Any, *, eps: float, norm: str = "linf") -> np.ndarray:
    """Rounds adversarial images to 8-bit grey levels inside the ball around the clean images, and inside [0, 1].

    In the l-infinity ball each pixel takes the grey level nearest to it that lies inside. In the l2 ball each takes the
    nearest one, and an image that leaves the ball so is first moved towards the clean one, by a hundredth of the way at a
    time.

    Args:
      images: adversarial images, `[N, ...]`, in [0, 1].
      clean: the clean ones, `[N, ...]`, in [0, 1].
      eps: budget in `norm`, at least 0.
      norm: "linf" or "l2".

    Returns:
      uint8 `[N, ...]`; divided by 255 in float32 they lie inside the ball.

    Raises:
      ValueError: if images are not floating point in [0, 1], shapes differ, `eps` is out of range, `norm` is unknown, or no
        8-bit image lies in the ball of an image; of 8-bit clean images one always does.
    """
    eps = _entrance.as_budget("quantize", eps)
    images, clean = (_in_range(name, values) for name, values in (("images", images), ("clean", clean)))
    if images.shape != clean.shape:
        raise ValueError(f"quantize: images have shape {images.shape}; it must be that of clean, {clean.shape}")
    if norm not in core.NORMS:
        raise ValueError(f"quantize: norm={norm!r}; it must be one of {', '.join(core.NORMS)}")
    grey, inside = (_in_linf if norm == "linf" else _in_l2)(images, clean, eps)
    if not inside.all():
        raise ValueError(
            f"quantize: within eps={eps:g} ({norm}) of {int((~inside).sum())} of {len(inside)} images there is no 8-bit image; "
            "take clean images of 8 bits, or a larger eps"
        )
    return grey


def _in_range(name: str, values: Any) -> np.ndarray:
    array = np.asarray(values)
    if not np.issubdtype(array.dtype, np.floating) or not (array.size and np.min(array) >= 0 and np.max(array) <= 1):
        raise ValueError(
            f"quantize: {name} are {array.dtype} {array.shape}; they must be some, floating point in [0, 1] (uint8: x / 255)"
        )
    return array.astype(np.float32)


def _nearest(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values * 255), 0, 255).astype(np.uint8)


def _in_linf(images: np.ndarray, clean: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    radius = np.float32(eps)

    def holds(grey: np.ndarray) -> Any:
        level = _LEVELS[grey]
        return (level >= clean - radius) & (level <= clean + radius) & (np.abs(level - clean) <= radius)

    grey = _nearest(images)
    step = np.sign(clean - _LEVELS[grey]).astype(np.int16)  # towards the clean pixel
    inner = np.clip(grey + step, 0, 255).astype(np.uint8)
    grey = np.where(holds(grey), grey, inner)
    return grey, holds(grey).reshape(len(grey), -1).all(1)


def _in_l2(images: np.ndarray, clean: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    grey, inside = np.zeros(images.shape, np.uint8), np.zeros(len(images), bool)
    for hundredths in range(100, -1, -1):
        left = np.flatnonzero(~inside)
        if not len(left):
            break
        tried = _nearest(clean[left] + np.float32(hundredths / 100) * (images[left] - clean[left]))
        change = np.float64(_LEVELS[tried]) - clean[left]
        size = np.sqrt(np.square(change).reshape(len(left), -1).sum(1))
        good = size <= eps * (1 - 1e-6)  # which the rounding of a float32 norm does not undo
        grey[left[good]], inside[left[good]] = tried[good], True
    return grey, inside
