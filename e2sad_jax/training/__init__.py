"""Training: settings, state, the jitted step of every defense, and the loop around it."""

from e2sad_jax.training.loop import *  # noqa: F403
