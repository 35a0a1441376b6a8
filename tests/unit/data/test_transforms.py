"""Input transforms against numpy, image by image."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax.data import transforms

SHAPE = (6, 5, 3)


def uint8_images(n: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (n, *SHAPE), np.uint8)


def numpy_standardize(images: np.ndarray) -> np.ndarray:
    """One image at a time, in float64."""
    out = []
    for image in np.float64(images) / 255:
        std = max(image.std(), 1 / np.sqrt(image.size))
        out.append(((image - image.mean()) / (3 * std)).clip(-1, 1))
    return np.stack(out)


CLOSED_FORM = {"unit": lambda images: np.float64(images) / 255, "standardize": numpy_standardize}
every_transform = pytest.mark.parametrize("name", transforms.TRANSFORMS)


@every_transform
@pytest.mark.parametrize("seed", range(3))
def test_closed_form(name, seed):
    images = uint8_images(seed=seed)
    got = transforms.TRANSFORMS[name].apply(jnp.asarray(images))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, CLOSED_FORM[name](images), rtol=1e-5, atol=1e-6)


@every_transform
def test_entry_names_itself(name):
    assert transforms.TRANSFORMS[name].name == name
    assert transforms.TRANSFORMS[name].bounds == {"unit": (0.0, 1.0), "standardize": (-1.0, 1.0)}[name]


@every_transform
def test_results_fill_the_bounds_and_stay_inside(name):
    """Among them an image with one bright pixel, which lies far beyond three standard deviations."""
    images = uint8_images(8)
    images[0], images[1] = 0, 255
    images[0, 2, 2], images[1, 2, 2] = 255, 0
    transform = transforms.TRANSFORMS[name]
    got = np.asarray(transform.apply(jnp.asarray(images)))
    assert (got.min(), got.max()) == transform.bounds


@every_transform
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_uint8_equals_float_over_255(name, dtype):
    images = uint8_images()
    apply = transforms.TRANSFORMS[name].apply
    got = apply(jnp.asarray(images / 255, dtype))
    assert got.dtype == jnp.float32
    tolerance = {"float32": 1e-5, "float16": 2e-3}[dtype]
    np.testing.assert_allclose(got, apply(jnp.asarray(images)), rtol=0, atol=tolerance)


@every_transform
@pytest.mark.parametrize("value", [0, 7, 255])
def test_flat_images_stay_finite(name, value):
    """A flat image has no standard deviation; standardized it is (nearly) zero."""
    got = np.asarray(transforms.TRANSFORMS[name].apply(jnp.full((2, *SHAPE), value, jnp.uint8)))
    want = {"unit": value / 255, "standardize": 0}[name]
    np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-5)


def test_floor_under_the_standard_deviation():
    """An almost flat image is not blown up: below 1 / sqrt(H W C) the floor divides."""
    image = np.full((1, *SHAPE), 100, np.uint8)
    image[0, 0, 0, 0] = 101
    got = np.asarray(transforms.standardize(jnp.asarray(image)))
    size = image.size
    want = (1 / 255) * (1 - 1 / size) * np.sqrt(size) / 3
    np.testing.assert_allclose(got.max(), want, rtol=1e-4)


def test_standardized_moments():
    """Zero mean, standard deviation 1/3 where nothing is clipped; brightness and contrast do not matter."""
    image = np.random.RandomState(0).uniform(0.25, 0.75, (1, *SHAPE))
    got = np.asarray(transforms.standardize(jnp.asarray(image, jnp.float32)))
    assert np.abs(got).max() < 1
    np.testing.assert_allclose(got.mean(), 0, atol=1e-6)
    np.testing.assert_allclose(got.std(), 1 / 3, rtol=1e-5)
    other = transforms.standardize(jnp.asarray(0.2 + 1.5 * (image - 0.25), jnp.float32))
    np.testing.assert_allclose(other, got, rtol=0, atol=1e-5)


@every_transform
def test_an_image_does_not_see_its_neighbours(name):
    """Among them an almost flat one, under the floor of the standard deviation."""
    pixels, apply = uint8_images(5), transforms.TRANSFORMS[name].apply
    pixels[2] = 100 + pixels[2] % 2
    images = jnp.asarray(pixels)
    whole = apply(images)
    for i in range(5):
        np.testing.assert_allclose(apply(images[i : i + 1]), whole[i : i + 1], rtol=0, atol=1e-6)
    order = np.array([3, 1, 4, 0, 2])
    np.testing.assert_allclose(apply(images[order]), whole[order], rtol=0, atol=1e-6)


@every_transform
def test_jit_equals_eager(name):
    images, apply = jnp.asarray(uint8_images()), transforms.TRANSFORMS[name].apply
    np.testing.assert_allclose(jax.jit(apply)(images), apply(images), rtol=0, atol=1e-6)
