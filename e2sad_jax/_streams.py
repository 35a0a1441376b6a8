"""The random numbers of a seed: its streams, numbered here alone so that no two parts draw the same numbers."""

import jax

INITIALIZATION = 0  # parameters, and the keys of training steps
ORDER = 1  # of the images in each epoch
EVALUATION = 2  # random starts and proposals of attacks
MASKING = 3  # points of the checks for gradient masking
PICTURE = 4  # points of a run's picture
MEMORY = 5  # first perturbations of the training images
DRAWS = 6  # of a random model, as attacks see it
VERDICT = 7  # of a random model, as it is judged
GENERATOR = "threefry2x32"  # whatever `jax_default_prng_impl` says: a seed gives the same numbers in every program


def key(seed: jax.typing.ArrayLike, stream: int) -> jax.Array:
    """Returns the random key of a stream of a seed; it does not depend on JAX's default generator."""
    return jax.random.fold_in(jax.random.key(seed, impl=GENERATOR), stream)
