"""Defenses at inference: functions around a trained model that clean, score or reject its images.

A defended model is a function of images as any other: `lambda x: logits_fn(attacks.bpda(squeeze)(x))` goes into every attack
and into `evaluation`. A detector is a function of images `[N, ...]` to scores `[N]`, higher for stranger images, with a
threshold (`evaluation.Detector`). Published attacks break every defense of this module but mutation testing, of which no
break by name is known. Measure with adaptive attacks.

* `bit_depth` and `median` squeeze images, `squeezing_score` detects by what that changes (feature squeezing).
* `label_change` and `sprt` detect by how often a prediction changes under mutations, of the image (`noise`) or of the model
  (`mutate`, `mutants`).
* `magnet` rejects and reforms images by autoencoders, which `train_autoencoder` trains.
* `project` replaces an image by the nearest one of a generator, which `train_gan` trains (Defense-GAN).
* `threshold` fixes a detector's threshold on held-out images.
"""

from e2sad_jax.inference.defense_gan import (
    Critic,
    Gan,
    Generator,
    Projection,
    gan,
    gradient_penalty,
    project,
    train_gan,
    wgan_generator,
    wgan_gp_critic,
)
from e2sad_jax.inference.detection import squeezing_score, threshold
from e2sad_jax.inference.magnet import (
    Autoencoder,
    MagNet,
    autoencoder,
    divergence_score,
    diverse_loss,
    error_score,
    magnet,
    reconstruction_loss,
    train_autoencoder,
)
from e2sad_jax.inference.mutation import (
    OPERATORS,
    changed_by_mutants,
    changed_by_noise,
    label_change,
    mutants,
    mutate,
    noise,
    sprt,
)
from e2sad_jax.inference.squeezing import bit_depth, median

__all__ = [
    "OPERATORS",
    "Autoencoder",
    "Critic",
    "Gan",
    "Generator",
    "MagNet",
    "Projection",
    "autoencoder",
    "bit_depth",
    "changed_by_mutants",
    "changed_by_noise",
    "divergence_score",
    "diverse_loss",
    "error_score",
    "gan",
    "gradient_penalty",
    "label_change",
    "magnet",
    "median",
    "mutants",
    "mutate",
    "noise",
    "project",
    "reconstruction_loss",
    "sprt",
    "squeezing_score",
    "threshold",
    "train_autoencoder",
    "train_gan",
    "wgan_generator",
    "wgan_gp_critic",
]
