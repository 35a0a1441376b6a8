"""Adversarial images in 8 bits: on grey levels, inside the ball and the range, and no farther away than they must be."""

import numpy as np
import pytest

from e2sad_jax.evaluation import quantize


def images(kind, seed=0):
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, 256, (6, 5, 4, 3)) if kind == "bytes" else rng.uniform(0, 255, (6, 5, 4, 3))
    return np.float32(clean) / np.float32(255), rng


@pytest.mark.parametrize("kind", ["bytes", "floats"])
@pytest.mark.parametrize("levels", [1, 8, 8.4, 300])
def test_each_pixel_takes_the_nearest_level_inside(kind, levels):
    clean, rng = images(kind)
    eps = np.float32(levels / 255)
    made = np.clip(clean + rng.choice([-1, 0.3, 1], clean.shape).astype(np.float32) * eps, clean - eps, clean + eps)
    made = np.clip(made, 0, 1)
    grey = quantize(made, clean, eps=float(eps))
    assert grey.dtype == np.uint8
    read = grey / np.float32(255)
    assert ((read >= clean - eps) & (read <= clean + eps)).all()
    every = (np.arange(256, dtype=np.float32) / 255).reshape(-1, 1, 1, 1, 1)
    inside = (every >= clean - eps) & (every <= clean + eps) & (np.abs(every - clean) <= eps)
    best = np.where(inside, np.abs(every - made), np.inf).min(0)
    np.testing.assert_allclose(np.abs(read - made), best, atol=1e-6)


def test_in_the_l2_ball():
    clean, rng = images("bytes")
    direction = rng.normal(size=clean.shape)
    direction /= np.linalg.norm(direction.reshape(6, -1), axis=1)[:, None, None, None]
    made = np.clip(clean + 0.4 * direction, 0, 1).astype(np.float32)
    grey = quantize(made, clean, eps=0.4, norm="l2")
    size = np.linalg.norm((grey / np.float32(255) - clean).reshape(6, -1), axis=1)
    assert (size <= 0.4).all()
    assert (size > 0.95 * np.linalg.norm((made - clean).reshape(6, -1), axis=1)).all()
    inner = quantize((clean + 0.2 * direction).clip(0, 1), clean, eps=0.4, norm="l2")
    np.testing.assert_array_equal(inner, np.rint((clean + 0.2 * direction).clip(0, 1) * 255))


def test_what_has_no_grey_level_is_refused():
    clean = np.full((2, 3), 100.5, np.float32) / 255
    for norm in ("linf", "l2"):
        with pytest.raises(ValueError, match=rf"within eps=0.001 \({norm}\) of 2 of 2 images there is no 8-bit image"):
            quantize(clean, clean, eps=0.001, norm=norm)
    with pytest.raises(ValueError, match="norm='l1'; it must be one of linf, l2"):
        quantize(clean, clean, eps=0.1, norm="l1")
    with pytest.raises(ValueError, match=r"shape \(2, 2\); it must be that of clean, \(2, 3\)"):
        quantize(clean[:, :2], clean, eps=0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"eps": float("nan")}, "eps=nan; it must be a number, finite and at least 0"),
        ({"eps": None}, "eps=None; it must be a number"),
        ({"images": np.zeros((1, 2), np.uint8)}, r"images are uint8 \(1, 2\); .*x / 255"),
        ({"images": np.full((1, 2), np.nan)}, r"images are float64 \(1, 2\); .*in \[0, 1\]"),
        ({"clean": np.full((1, 2), 1.5)}, r"clean are float64"),
    ],
)
def test_quantize_refuses(wrong, message):
    with pytest.raises(ValueError, match=f"quantize: {message}"):
        quantize(**{"images": np.zeros((1, 2)), "clean": np.zeros((1, 2)), "eps": 0.1, **wrong})
