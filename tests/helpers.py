"""What tests of several rooms share: a small run, its loop, and defenses that note or break something."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import pytest

from e2sad_jax import networks, training
from e2sad_jax.data import Dataset
from e2sad_jax.defenses import DEFENSES, Defense
from e2sad_jax.training import Config, TrainState


def tiny_config(**changes: Any) -> Config:
    """A run of a few small steps on the data set `tiny`; settings that its defense does not read are left out."""
    usual = dict(defense="e2sad", data="tiny.npz", model="digits_cnn", steps=12, batch_size=16, checkpoint_every=5)
    values = {**usual, "log_every": 2, "attack_steps": 2, **changes}
    return training.configure(**readable(**values))


def mostly_slow(values: Iterable[Any], fast: Iterable[Any]) -> list[Any]:
    """Cases of a parametrized test: those of `fast` in every run of the tests, the others in the slow ones.

    A tuple is a case of several arguments.
    """
    values, fast = list(values), list(fast)
    assert all(value in values for value in fast), fast
    return [
        value
        if value in fast
        else pytest.param(*value if isinstance(value, tuple) else (value,), marks=pytest.mark.slow)
        for value in values
    ]


def readable(**values: Any) -> dict[str, Any]:
    """Settings without those that `values["defense"]` does not read but another one does."""
    own = DEFENSES[values.get("defense", "e2sad")].defaults()
    others = {name for defense in DEFENSES.values() for name in defense.defaults()} - own.keys()
    return {name: value for name, value in values.items() if name not in others}


def teacher_of(config: Config, dataset: Dataset) -> np.ndarray | None:
    """Logits of a teacher for the training images, where the defense learns from one: it is sure of the labels."""
    logits = 100 * np.eye(dataset.num_classes, dtype=np.float32)[dataset.y_train]
    return config.settings["temperature"] * logits if config.entry.learns else None


def fit(config: Config, dataset: Dataset, state: TrainState | None = None, **kwargs: Any) -> TrainState:
    """`training.fit` to the configured step, from a fresh state, with nothing recorded, unless given."""
    model = networks.create(config.model, dataset.num_classes, dataset.image_shape)
    state = training.init_state(config, model, dataset.image_shape, len(dataset.x_train)) if state is None else state
    kwargs = {"teacher": teacher_of(config, dataset), **kwargs}
    kwargs = {"record": lambda *a: None, "checkpoint": lambda *a: None, **kwargs}
    return training.fit(config, model, dataset, state, **kwargs)


def register_loss(monkeypatch: pytest.MonkeyPatch, name: str, loss: Callable[..., Any], **about: Any) -> None:
    """Registers a defense that trains on this loss, for one test."""
    monkeypatch.setitem(DEFENSES, name, Defense(loss, name, **about))


def change_loss(monkeypatch: pytest.MonkeyPatch, name: str, change: Callable[..., Any]) -> None:
    """Replaces a defense's loss for one test: `change(loss, parts, arguments)` gives the new loss and parts."""
    real = DEFENSES[name].loss

    @functools.wraps(real)
    def changed(logits_fn: Any, x: Any, y: Any, **arguments: Any) -> Any:
        return change(*real(logits_fn, x, y, **arguments), arguments)

    monkeypatch.setitem(DEFENSES, name, dataclasses.replace(DEFENSES[name], loss=changed))


def count_compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The steps that training makes from here on, each with its `_cache_size()`."""
    made, make = [], training.make_train_step
    monkeypatch.setattr(
        "e2sad_jax.training.loop.make_train_step",
        lambda *args, **kwargs: made.append(make(*args, **kwargs)) or made[-1],
    )
    return made
