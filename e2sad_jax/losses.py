"""Per-example losses: soft labels, cross-entropy, dissimilarity.

Every function here returns one value per example, `[N]`; who wants the batch mean of Eq. 3 and 8 takes it. Losses are
computed in float32 at least, whatever the network computes in.
"""

import jax
import jax.numpy as jnp
import optax


def soft_labels(labels: jax.Array, num_classes: int, delta: float = 0.25) -> jax.Array:
    """Target distributions for integer labels (Section 3.3 of the paper).

    The true class gets `1 - delta`, each other class `delta / (num_classes - 1)`; `delta=0` gives hard (one-hot)
    labels. This is the paper's form of label smoothing: unlike `optax.smooth_labels`, none of `delta` returns to the
    true class.

    Args:
      labels: integer classes in `[0, num_classes)`, `[N]`.
      num_classes: number of classes K, at least 2.
      delta: probability mass of all wrong classes together, in `[0, 1)`. The paper takes 0.25.

    Returns:
      Probabilities `[N, K]`, float32 (float64 where JAX is set to 64 bits).

    Raises:
      TypeError: if `labels` are not integers.
      ValueError: if `num_classes` or `delta` is out of range.

    >>> import jax.numpy as jnp
    >>> print(soft_labels(jnp.array([2]), 3, delta=0.25))
    [[0.125 0.125 0.75 ]]
    """
    if not jnp.issubdtype(jnp.asarray(labels).dtype, jnp.integer):
        raise TypeError(
            f"soft_labels: labels are {jnp.asarray(labels).dtype}; they must be integer classes of shape [N]"
        )
    if num_classes < 2:
        raise ValueError(f"soft_labels: num_classes={num_classes}; it must be at least 2")
    if not 0 <= delta < 1:
        raise ValueError(f"soft_labels: delta={delta}; it must lie in [0, 1)")
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.result_type(float))
    return one_hot * (1 - delta) + (1 - one_hot) * (delta / (num_classes - 1))


def _at_least_float32(logits: jax.Array) -> jax.Array:
    return logits.astype(jnp.promote_types(logits.dtype, jnp.float32))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy J between target distributions and predictions, per example.

    Args:
      logits: unnormalised log-probabilities `[N, K]`.
      targets: distributions `[N, K]`, as `soft_labels` makes them. Integer labels are refused, not read as one-hot.

    Returns:
      `-sum_k targets_k log softmax(logits)_k`, `[N]`.

    Raises:
      TypeError: if `targets` are integers.
      ValueError: if the shapes differ.
    """
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(
            f"cross_entropy: targets are {targets.dtype}; they must be distributions [N, K]: soft_labels(labels, K, delta)"
        )
    if logits.shape != targets.shape:
        raise ValueError(f"cross_entropy: logits {logits.shape} and targets {targets.shape} must have one shape [N, K]")
    logits = _at_least_float32(logits)
    return optax.softmax_cross_entropy(logits, targets.astype(logits.dtype))


def dissimilarity(logits: jax.Array, other_logits: jax.Array) -> jax.Array:
    """Dissimilarity D of two predictions (Eq. 7 and 8): the cross-entropy of the second against the first.

    D(f(x), f(x')) = -sum_k f(x)_k log f(x')_k. It is not a distance: for equal predictions it is their entropy, and its
    gradient in `other_logits` is then exactly zero (see `attacks.second_step`). The gradient flows through both
    arguments.

    Args:
      logits: logits of the reference prediction f(x), `[N, K]`.
      other_logits: logits of the compared prediction f(x'), `[N, K]`.

    Returns:
      `[N]`.
    """
    return cross_entropy(other_logits, jax.nn.softmax(_at_least_float32(logits)))
