"""A run that begins with given weights: of a run's folder or a safetensors file; resumed; and what does not fit."""

import dataclasses
import shutil

import chex
import jax
import numpy as np
import pytest

import e2sad_jax
from e2sad_jax import export
from e2sad_jax.errors import ConfigError, WorkdirError
from e2sad_jax.runs import opening, trainer
from e2sad_jax.runs.weights import check_unseen
from tests.unit.runs.helpers import config_of, stop_after

pytestmark = pytest.mark.usefixtures("scores")


def params_of(folder):
    return jax.device_get(e2sad_jax.load(folder).params)


@pytest.mark.parametrize("source", ["folder", "file"])
def test_a_run_begins_with_them_and_so_does_its_average(source, trained, tiny, tmp_path):
    given = trained
    if source == "file":
        given = tmp_path / "weights.safetensors"
        given.write_bytes(export.to_safetensors(e2sad_jax.load(trained)))
    with opening.open_run(config_of(tmp_path / "w", init_from=str(given), ema=0.9), tiny) as run:
        state = run.init_state()
    chex.assert_trees_all_equal(jax.device_get(state.params), params_of(trained))
    chex.assert_trees_all_equal(jax.device_get(state.average), params_of(trained))
    assert state.step == 0
    assert all(np.abs(leaf).max() == 0 for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("source", ["folder", "file"])
def test_weights_that_have_seen_held_out_images_are_refused(source, trained, tmp_path):
    given, there = trained, e2sad_jax.load(trained).config
    if source == "file":
        given = tmp_path / "weights.safetensors"
        given.write_bytes(export.to_safetensors(e2sad_jax.load(trained)))
    check_unseen(str(given), there.data, there.validation_examples)
    check_unseen(str(given), "other.npz", there.validation_examples + 1)
    check_unseen("", there.data, 1)
    check_unseen(str(tmp_path / "gone"), there.data, 1)
    wrong = (
        rf"^--init_from={given}: trained with --validation_examples={there.validation_examples}, so it has seen images"
    )
    with pytest.raises(ConfigError, match=wrong):
        check_unseen(str(given), there.data, there.validation_examples + 1)


def test_resumed_it_needs_them_no_more_and_ends_as_uninterrupted(trained, tiny, tmp_path):
    given = tmp_path / "given"
    shutil.copytree(trained, given)
    ends = []
    for name, stop in (("whole", None), ("parts", 7)):
        config = config_of(tmp_path / name, init_from=str(given))
        if stop:
            with opening.open_run(config, tiny) as run:
                trainer.train(run, stop_after(stop))
            shutil.rmtree(given)
        with opening.open_run(config, tiny) as run:
            ends.append(jax.device_get(trainer.train(run, lambda: 0)[0].params))
    chex.assert_trees_all_equal(*ends)
    with opening.open_run(config_of(tmp_path / "random"), tiny) as run:
        other = jax.device_get(trainer.train(run, lambda: 0)[0].params)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, (other, ends[0])), strict=True))


def test_what_does_not_fit_is_refused_before_anything_is_written(trained, tiny, tmp_path):
    for changes, error, message in (
        (
            {"init_from": str(trained), "transform": "standardize"},
            ConfigError,
            "trained with --transform=unit and not --transform=standardize; give the same",
        ),
        (
            {"init_from": str(trained), "model": "mnist_cnn"},
            ConfigError,
            r"bias is absent in digits_cnn for images \[8, 8, 1\] of 3 classes, but \[32\] in this run's mnist_cnn for",
        ),
        (
            {"init_from": str(trained), "mean": "0.5"},
            ConfigError,
            "trained with no --mean and not --mean=0.5; give the same",
        ),
        (
            {"init_from": str(trained), "std": "0.5"},
            ConfigError,
            "trained with no --std and not --std=0.5; give the same",
        ),
        (
            {"init_from": str(tmp_path / "nothing.safetensors")},
            ConfigError,
            "nothing.safetensors: there is no such file or folder",
        ),
        ({"init_from": str(tmp_path)}, WorkdirError, str(tmp_path)),
    ):
        config = config_of(tmp_path / "w", **changes)
        with pytest.raises(error, match=message), opening.open_run(config, tiny):
            pass
        assert not (tmp_path / "w" / "config.json").exists()
    other = dataclasses.replace(tiny, num_classes=4)
    with (
        pytest.raises(ConfigError, match=r"bias is \[3\] in .* of 3 classes, but \[4\] in .* of 4 classes"),
        opening.open_run(config_of(tmp_path / "w", init_from=str(trained)), other),
    ):
        pass


def test_a_run_is_that_of_the_weights_that_it_began_with(trained, tiny, tmp_path):
    """Others at the same place are refused, not passed over."""
    given, workdir = tmp_path / "given", tmp_path / "w"
    shutil.copytree(trained, given)
    config = config_of(workdir, init_from=str(given))
    with opening.open_run(config, tiny) as run:
        trainer.train(run, stop_after(2))
    with opening.open_run(config, tiny) as run:
        trainer.train(run, lambda: 0)
    shutil.rmtree(given)
    with opening.open_run(config_of(given, seed=9), tiny) as run:
        trainer.train(run, lambda: 0)
    with (
        pytest.raises(WorkdirError, match=r"w began with other weights than .*given holds now \(there .*, here .*\)"),
        opening.open_run(config, tiny),
    ):
        pass
