"""A trained classifier, loaded from its run's folder: what `e2sad_jax.load` returns."""

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax import networks
from e2sad_jax._compile import jit
from e2sad_jax.data.transforms import TRANSFORMS, Transform
from e2sad_jax.errors import ConfigError, DataError, WorkdirError
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.folder import read_config, steps_in
from e2sad_jax.training import init_state
from e2sad_jax.training.config import Config

CHOICES = ("last", "best", "average")  # of the weights of a run


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network as a function from images to probabilities.

    Attributes:
      config: settings of its run.
      dataset: description of the data it was trained on (name, version, sizes).
      step: training steps done.
      model: the Flax module.
      params: its variables.
      transform: from images to the network's input; attacks work behind it, inside `transform.bounds`.
      averaged: whether the variables are averaged weights (`--ema`).
    """

    config: Config
    dataset: Mapping[str, Any]
    step: int
    model: nn.Module
    params: Any = dataclasses.field(repr=False)  # hundreds of lines
    transform: Transform
    averaged: bool = False

    def __post_init__(self) -> None:
        probabilities = jax.jit(lambda p, x: jax.nn.softmax(networks.logits_fn(self.model, p)(self.transform.apply(x))))
        object.__setattr__(self, "_within_a_program", probabilities)
        object.__setattr__(self, "_as_a_program", jit(probabilities))

    @property
    def apply(self) -> Callable[[Any, jax.Array], jax.Array]:
        """The function `(params, inputs [N, H, W, C]) -> logits [N, K]` behind the transform, as `evaluation` takes it."""
        return networks.apply_fn(self.model)

    def logits(self, x: jax.Array) -> jax.Array:
        """Logits `[N, K]` of network inputs `[N, H, W, C]`, behind the transform: what an attack differentiates."""
        return networks.logits_fn(self.model, self.params)(x)

    def __call__(self, images: Any) -> jax.Array:
        """Class probabilities.

        Args:
          images: `[N, H, W, C]` or, with one channel, `[N, H, W]`; uint8, or floating point in [0, 1].

        Returns:
          `[N, K]`, float32, rows summing to 1.

        Raises:
          DataError: if the shape or dtype is not that of the training images, or a pixel lies outside [0, 1].
        """
        images = jnp.asarray(images)
        height, width, channels = self.dataset["image_shape"]
        if images.ndim == 3 and channels == 1:
            images = images[..., None]
        if images.shape[1:] != (height, width, channels):
            raise DataError(
                f"images have shape {images.shape}; this classifier takes [N, {height}, {width}, {channels}]"
            )
        if images.dtype != jnp.uint8 and not jnp.issubdtype(images.dtype, jnp.floating):
            raise DataError(f"images are {images.dtype}; this classifier takes uint8, or floating point in [0, 1]")
        traced = isinstance(images, jax.core.Tracer)
        if images.dtype != jnp.uint8 and images.size and not traced:
            low, high = float(images.min()), float(images.max())
            if not (low >= 0 and high <= 1):  # NaN is neither
                raise DataError(
                    f"images hold pixels from {low:.6g} to {high:.6g}; this classifier takes floating point in [0, 1], or "
                    "uint8 in 0..255"
                )
        probabilities = self._within_a_program if traced else self._as_a_program  # type: ignore[attr-defined]
        return probabilities(self.params, images)  # type: ignore[no-any-return]


def load(workdir: str | os.PathLike[str], which: str = "last") -> Classifier:
    """Loads the classifier that a run has trained.

    Open only folders of runs that you trust; `export` writes a file that is safe to share.

    Args:
      workdir: folder of the run.
      which: "last" for the newest checkpoint; "average" for its averaged weights; "best" for the weights, raw or averaged,
        of the highest robust accuracy in validation.

    Returns:
      A function from images to probabilities, see `Classifier`.

    Raises:
      WorkdirError: if `workdir` holds no run, or no readable checkpoint.
      ValueError: if `which` is none of them.
      ConfigError: if the run has no averaged weights.
    """
    if which not in CHOICES:
        raise ValueError(f"load: which={which!r}; it must be one of {', '.join(CHOICES)}")
    workdir = pathlib.Path(workdir).expanduser()
    config, dataset = read_config(workdir)
    if which == "average" and not config.ema:
        raise ConfigError(
            f"--which=average: {workdir} was trained without averaged weights; choose last or best, or train with --ema=0.999"
        )
    shape = tuple(dataset["image_shape"])
    model = networks.create(num_classes=dataset["num_classes"], image_shape=shape, **config.network())
    if not (workdir / "checkpoints").is_dir():
        raise WorkdirError(f"{workdir} holds no checkpoint yet")
    trained_on = dataset["train_examples"] - config.validation_examples
    like = jax.eval_shape(lambda: init_state(config, model, shape, trained_on))
    for attempt in range(3):
        steps = steps_in(workdir)
        try:
            with Checkpoints(workdir, read_only=True) as checkpoints:
                step = checkpoints.best_step if which == "best" else checkpoints.last_step
                state = checkpoints.restore(like, step)
                averaged = which == "average" or (which == "best" and checkpoints.averaged(int(state.step)))
            break
        except WorkdirError:
            time.sleep(0.5 if steps else 0)  # a run under way may be about to replace the checkpoint
            if attempt == 2 or steps == steps_in(workdir):
                raise
    params = state.average if averaged else state.params
    return Classifier(config, dataset, int(state.step), model, params, TRANSFORMS[config.transform], averaged)
