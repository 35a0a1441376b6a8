"""Augmentations against NumPy, pixel by pixel; what they do to a perturbation; and inside of the training step."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.data import augmentation
from e2sad_jax.data.augmentation import Augmentation, Drawn
from e2sad_jax.defenses._registry import MEMORY
from e2sad_jax.errors import ConfigError
from e2sad_jax.training import configure
from e2sad_jax.training.memory import LEVELS
from tests.helpers import register_loss, tiny_config

KEY = jax.random.key(0)
X = np.random.default_rng(0).integers(1, 256, (200, 7, 6, 2)).astype(np.uint8)


def windows(x, padding):
    """What each image can become by cropping, `[N, 2 padding + 1, 2 padding + 1, H, W, C]`."""
    around = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded, places = np.pad(x, around), range(2 * padding + 1)
    height, width = x.shape[1:3]
    return np.stack([np.stack([padded[:, i : i + height, j : j + width] for j in places], 1) for i in places], 1)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_crops_are_windows_of_the_padded_image_and_all_of_them_occur(dtype):
    x = X.astype(dtype)
    got = np.asarray(jax.jit(lambda x: augmentation.pad_and_crop(KEY, x, padding=2))(x))
    assert got.dtype == x.dtype
    same = (windows(x, 2) == got[:, None, None]).all((3, 4, 5))
    assert (same.sum((1, 2)) == 1).all()
    assert same.any(0).all()
    assert same.sum(0).max() < 24, "about 8 of 200 each"


def test_about_half_of_the_images_are_mirrored():
    got = np.asarray(jax.jit(lambda x: augmentation.flip(KEY, x))(X))
    mirrored = (got == X[:, :, ::-1]).all((1, 2, 3))
    assert ((got == X).all((1, 2, 3)) ^ mirrored).all()
    assert 75 < mirrored.sum() < 125


@pytest.mark.parametrize("size", [1, 4])
def test_a_hole_is_a_square_around_any_pixel(size):
    x = np.tile(X, (3, 1, 1, 1))
    got = np.asarray(jax.jit(lambda x: augmentation.cutout(KEY, x, size=size))(x))
    np.testing.assert_array_equal(got[got != 0], x[got != 0])
    centres = set()
    for hole in (got == 0).any(-1):
        options = []
        for i, j in np.ndindex(7, 6):
            want = np.zeros((7, 6), bool)
            top, left = i - size // 2, j - size // 2
            want[max(top, 0) : top + size, max(left, 0) : left + size] = True
            if (want == hole).all():
                options.append((i, j))
        assert len(options) == 1
        centres.add(options[0])
    assert len(centres) == 42


def test_several_are_the_single_ones_in_their_order():
    whole = Augmentation(("crop", "flip", "cutout"), padding=2, size=3)
    drawn = whole.draw(KEY, X)
    got = np.asarray(whole.apply(drawn, jnp.asarray(X)))
    cropped = np.stack([w[i, j] for w, (i, j) in zip(windows(X, 2), np.asarray(drawn.offsets), strict=True)])
    want = np.where(np.asarray(drawn.mirrored)[:, None, None, None], cropped[:, :, ::-1], cropped)
    open_ = got != 0
    np.testing.assert_array_equal(got[open_], want[open_])
    assert (got[..., 0] == 0).sum() > (want[..., 0] == 0).sum()
    one = Augmentation(("flip",))
    assert one.draw(KEY, X).offsets is one.draw(KEY, X).centres is None
    assert Augmentation().draw(KEY, X) == Drawn(None, None, None)


def test_what_moves_with_an_image_comes_back_and_what_was_lost_is_kept():
    both = Augmentation(("crop", "flip", "cutout"), padding=3)
    drawn = both.draw(KEY, X)
    values, kept = jnp.asarray(X, jnp.float32), -jnp.asarray(X, jnp.float32)
    back = np.asarray(both.moved_back(drawn, both.moved(drawn, values), kept))
    seen = np.ones(X.shape[:3], bool)
    for image, (i, j) in zip(seen, np.asarray(drawn.offsets) - 3, strict=True):
        rows, columns = np.arange(7), np.arange(6)
        image[:] = ((rows >= i) & (rows < 7 + i))[:, None] & ((columns >= j) & (columns < 6 + j))[None]
    np.testing.assert_array_equal(back, np.where(seen[..., None], X, -X.astype(np.float32)))
    assert 0.2 < seen.mean() < 0.9


# --- in training

CODES = np.arange(1, 65, dtype=np.uint8).reshape(1, 8, 8, 1)


def in_training(monkeypatch, tiny, steps, **settings):
    """Images whose pixels name their place, under a defense that remembers them as its perturbation."""

    def remembers(logits_fn, x, y, *, eps, start=None):
        code = x * 255
        wrong = jnp.abs(start / eps * LEVELS - code) * (code > 0)
        return 0 * logits_fn(x).sum(), {"delta": code / LEVELS * eps, "wrong": wrong.max((1, 2, 3)), "code": code}

    register_loss(monkeypatch, "codes", remembers, settings=(dataclasses.replace(MEMORY, default="int8"),))
    dataset = dataclasses.replace(tiny, x_train=np.broadcast_to(CODES, tiny.x_train.shape).copy())
    return trained(tiny_config(defense="codes", steps=steps, crop_padding=1, **settings), dataset)


def trained(config, dataset):
    """The metrics of each step, and the state reached."""
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    seen = []
    state = training.fit(
        config,
        model,
        dataset,
        training.init_state(config, model, dataset.image_shape, len(dataset.x_train)),
        steps=config.steps,
        record=lambda step, metrics, count: seen.append(jax.tree.map(np.asarray, metrics)),
        checkpoint=lambda *a: None,
    )
    return seen, state


@pytest.mark.usefixtures("little", "standard_promotion")
def test_a_remembered_perturbation_moves_with_its_image(tiny, monkeypatch):
    seen, state = in_training(monkeypatch, tiny, 60, augment="crop,flip")
    np.testing.assert_array_equal(
        state.memory["delta"][: len(tiny.x_train)], np.repeat(CODES.reshape(1, -1), len(tiny.x_train), 0)
    )
    assert max(metrics["wrong"].max() for metrics in seen[:3]) > 10, "the first starts are random"
    assert max(metrics["wrong"].max() for metrics in seen[-3:]) < 1e-3
    codes = np.concatenate([metrics["code"] for metrics in seen])
    assert len(np.unique(np.rint(codes).reshape(len(codes), -1), axis=0)) == 18, "9 places, mirrored or not"


@pytest.mark.usefixtures("little", "standard_promotion")
def test_a_remembered_perturbation_stays_in_the_l2_ball(tiny):
    """Also where a crop has lost pixels, whose old perturbation joins the new one of the others."""
    config = tiny_config(defense="atta", norm="l2", memory="bf16", augment="crop", crop_padding=3, steps=40)
    _, state = trained(config, tiny)
    kept = np.asarray(state.memory["delta"][: len(tiny.x_train)], np.float32)
    norms = np.sqrt((kept**2).sum(1))
    assert norms.max() <= 1.005, "of bfloat16"
    assert np.median(norms) > 0.9


@pytest.mark.usefixtures("little", "standard_promotion")
def test_steps_that_replay_a_batch_see_it_as_it_was(tiny, monkeypatch):
    def free(logits_fn, x, y, *, delta, eps):
        return logits_fn(x + delta).sum() * 0, {"code": x}

    real = training.config.DEFENSES["free"]
    monkeypatch.setitem(training.config.DEFENSES, "free", dataclasses.replace(real, loss=free))
    seen, _ = trained(tiny_config(defense="free", replays=3, steps=6, augment="crop"), tiny)
    same = [np.array_equal(a["code"], b["code"]) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True, True]


def test_settings():
    assert configure().digest() == configure(crop_padding=2, cutout_size=3).digest()
    assert configure(augment="flip,crop").digest() == configure(augment="crop,flip").digest() != configure().digest()
    assert configure(augment="crop", crop_padding=2).digest() != configure(augment="crop").digest()
    with pytest.raises(ConfigError, match="--augment=crop,rotate: 'rotate' must be one of crop, flip, cutout; or none"):
        configure(augment="crop,rotate")
    with pytest.raises(ConfigError, match="--augment=flip: --defense=distillation learns what a teacher says"):
        configure(defense="distillation", augment="flip")


def test_wrong_arguments_are_refused():
    for call, message in {
        lambda: augmentation.pad_and_crop(
            KEY, X[0]
        ): r"pad_and_crop: images have shape \(7, 6, 2\); they must be \[N, H, W, C\]",
        lambda: augmentation.pad_and_crop(KEY, X, padding=0): "pad_and_crop: padding=0",
        lambda: augmentation.cutout(KEY, X, size=0): "cutout: size=0",
        lambda: augmentation.flip(KEY, X[0]): "flip: images have shape",
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
