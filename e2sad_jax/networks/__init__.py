"""Networks in Flax: the paper's CNNs, a narrow one, and PreActResNet-18."""

from e2sad_jax.networks.cnn import *  # noqa: F403
