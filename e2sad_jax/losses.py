"""Per-example losses: soft labels, cross-entropy, dissimilarity; margins, for attacks alone.

Every function here returns one value per example, `[N]`; who wants the batch mean of Eq. 3 and 8 takes it. Losses are
computed in float32 at least, whatever the network computes in.
"""

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax import _arguments


def soft_labels(labels: jax.Array, num_classes: int, delta: float = 0.25) -> jax.Array:
    """Target distributions for integer labels (Section 3.3 of the paper).

    The true class gets `1 - delta`, each other class `delta / (num_classes - 1)`; `delta=0` gives hard (one-hot)
    labels. This is the paper's form of label smoothing: unlike `optax.smooth_labels`, none of `delta` returns to the
    true class.

    Args:
      labels: integer classes in `[0, num_classes)`, `[N]`. Where they are traced, one out of range gives NaN.
      num_classes: number of classes K, at least 2.
      delta: probability mass of all wrong classes together, in `[0, 1)`. The paper takes 0.25.

    Returns:
      Probabilities `[N, K]`, float32 (float64 where JAX is set to 64 bits).

    Raises:
      TypeError: if `labels` are not integers.
      ValueError: if `labels` are not `[N]` or not classes, or `num_classes` or `delta` is out of range.

    >>> import jax.numpy as jnp
    >>> print(soft_labels(jnp.array([2]), 3, delta=0.25))
    [[0.125 0.125 0.75 ]]
    """
    if num_classes < 2:
        raise ValueError(f"soft_labels: num_classes={num_classes}; it must be at least 2")
    if not 0 <= delta < 1:
        raise ValueError(f"soft_labels: delta={delta}; it must lie in [0, 1)")
    n = (*np.shape(labels), 1)[0]
    labels = _arguments.classes("soft_labels", "labels", labels, n, num_classes)
    one_hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.result_type(float))
    rows = one_hot * (1 - delta) + (1 - one_hot) * (delta / (num_classes - 1))
    return _arguments.nan_without_class(rows, labels, num_classes)


def binary_logits(logits: jax.Array) -> jax.Array:
    """Two logits `[0, z]` of a model with one, z the log-odds of class 1.

    Their cross-entropy is the binary cross-entropy of sigmoid(z), and all losses, attacks and defenses take them:
    `lambda x: binary_logits(model(x))` is the model.

    Args:
      logits: z, `[N]` or `[N, 1]`.

    Returns:
      `[N, 2]`, of the dtype of `logits`.

    Raises:
      ValueError: if the shape is another one.

    >>> import jax.numpy as jnp
    >>> print(binary_logits(jnp.array([3.0, -1.0])))
    [[ 0.  3.]
     [ 0. -1.]]
    """
    logits = jnp.asarray(logits)
    if logits.ndim not in (1, 2) or logits.shape[1:] not in ((), (1,)):
        raise ValueError(
            f"binary_logits: logits have shape {logits.shape}; it must be [N] or [N, 1], one for each image"
        )
    z = logits.reshape(-1)
    return jnp.stack([jnp.zeros_like(z), z], axis=-1)


def _at_least_float32(logits: jax.Array) -> jax.Array:
    return logits.astype(_arguments.wide(logits.dtype))


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross-entropy J between target distributions and predictions, per example.

    Args:
      logits: unnormalised log-probabilities `[N, K]`, K at least 2.
      targets: distributions `[N, K]`, as `soft_labels` makes them. Integer labels are refused, not read as one-hot.

    Returns:
      `-sum_k targets_k log softmax(logits)_k`, `[N]`; classes of target 0 may have a logit of -inf.

    Raises:
      TypeError: if `targets` are integers, or `logits` are no array.
      ValueError: if there are fewer than 2 classes, or the shapes differ.
    """
    logits, targets = _arguments.logits("cross_entropy", logits), jnp.asarray(targets)
    if not jnp.issubdtype(targets.dtype, jnp.floating):
        raise TypeError(
            f"cross_entropy: targets are {targets.dtype}; they must be distributions [N, K]: soft_labels(labels, K, delta)"
        )
    if logits.shape != targets.shape:
        raise ValueError(f"cross_entropy: logits {logits.shape} and targets {targets.shape} must have one shape [N, K]")
    logits = _at_least_float32(logits)
    return -expectation(targets.astype(logits.dtype), jax.nn.log_softmax(logits))


def expectation(p: jax.Array, values: jax.Array) -> jax.Array:
    """sum_k p_k values_k, `[N]`; a class of probability 0 adds 0, and 0 to the gradient, even where its value is infinite.

    So a class that a model masks by a logit of -inf is no class to the losses.

    Args:
      p: probabilities, `[N, K]`.
      values: one for each class, `[N, K]`.

    Returns:
      `[N]`.
    """
    there = p > 0
    return jnp.where(there, p * jnp.where(there, values, 0), 0).sum(-1)


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
    logits = _arguments.logits("dissimilarity", logits)
    return cross_entropy(other_logits, jax.nn.softmax(_at_least_float32(logits)))


def quadratic_upper_bound(logits: jax.Array, adversarial_logits: jax.Array, targets: jax.Array) -> jax.Array:
    """An upper bound on the cross-entropy J of adversarial logits z', quadratic in them and exact at the clean ones, z.

    J(z, y) + (z' - z) . (softmax(z) - y) + 1/4 ||z' - z||_2^2  >=  J(z', y)

    The first two terms are J's expansion at z; no Hessian of J in the logits has a norm above 1/2. The gradient flows
    through both logits. A class that both mask by a logit of -inf is no class; one that a single one masks makes the bound
    infinite.

    Args:
      logits: z, those of the clean images, `[N, K]`, K at least 2.
      adversarial_logits: z', `[N, K]`.
      targets: distributions y, `[N, K]`, as `soft_labels` makes them.

    Returns:
      `[N]`.

    Raises:
      TypeError: if `targets` are integers, or logits are no array.
      ValueError: if there are fewer than 2 classes, or the shapes differ.

    >>> import jax.numpy as jnp
    >>> z, y = jnp.array([[0.0, 0.0]]), jnp.array([[1.0, 0.0]])
    >>> print(quadratic_upper_bound(z, z + jnp.array([[-1.0, 1.0]]), y) - cross_entropy(z, y))
    [1.5]

    Reference: You and Lee, 2025, https://arxiv.org/abs/2601.13645
    """
    adversarial_logits = _arguments.logits("quadratic_upper_bound", adversarial_logits)
    clean = cross_entropy(logits, targets)
    if adversarial_logits.shape != targets.shape:
        raise ValueError(
            f"quadratic_upper_bound: adversarial_logits {adversarial_logits.shape} and targets {targets.shape} must have "
            "one shape [N, K]"
        )
    logits = _at_least_float32(logits)
    away = difference(_at_least_float32(adversarial_logits), logits)
    slope = jax.nn.softmax(logits) - targets.astype(logits.dtype)
    return clean + (away * slope).sum(-1) + jnp.square(away).sum(-1) / 4


def difference(logits: jax.Array, other_logits: jax.Array) -> jax.Array:
    """`logits - other_logits`, and 0 with a gradient of 0 for a class that both mask by -inf, `[N, K]`."""
    masked = jnp.isneginf(logits) & jnp.isneginf(other_logits)
    return jnp.where(masked, 0, logits) - jnp.where(masked, 0, other_logits)


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """By how much the best wrong class leads: max_{k != y} z_k - z_y; above 0 where the image is misclassified.

    An attack maximises it. Unlike the cross-entropy it keeps its gradient where the softmax saturates.

    Args:
      logits: z, `[N, K]`, K at least 2.
      labels: integer classes y in `[0, K)`, `[N]`.

    Returns:
      `[N]`; NaN where a class is traced and out of range.

    Raises:
      TypeError: if `labels` are not integers.
      ValueError: if there are fewer than 2 classes, or `labels` are not `[N]` or not classes.

    >>> import jax.numpy as jnp
    >>> print(margin(jnp.array([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]]), jnp.array([1, 0])))
    [-1.  2.]

    Reference: Carlini and Wagner, 2017, https://arxiv.org/abs/1608.04644 (f_6)
    """
    logits, labels = _checked("margin", logits, 2, _arguments.ONE_LOGIT, labels=labels)
    logits = _at_least_float32(logits)
    true = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    return jnp.where(true, -jnp.inf, logits).max(-1) - _pick(logits, labels)


def dlr(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Difference of logits ratio, to be maximised: -(z_y - max_{k != y} z_k) / (z_1st - z_3rd).

    z_1st, z_3rd are the highest and third-highest logits. Neither adding to nor scaling the logits changes it, so a
    network cannot hide its gradient by large logits. Above 0 where the image is misclassified. Where the denominator is
    no more than rounding (the three highest logits tie) 1 stands in for it, so that the gradient stays finite.

    Args:
      logits: z, `[N, K]`, K at least 3.
      labels: integer classes y in `[0, K)`, `[N]`.

    Returns:
      `[N]`; NaN where a class is traced and out of range.

    Raises:
      TypeError: if `labels` are not integers.
      ValueError: if there are fewer than 3 classes, or `labels` are not `[N]` or not classes.

    Reference: Croce and Hein, 2020, https://arxiv.org/abs/2003.01690 (Eq. 6)
    """
    logits, labels = _checked("dlr", logits, 3, "take margin for two", labels=labels)
    top = jax.lax.top_k(_at_least_float32(logits), 3)[0]
    return _ratio(margin(logits, labels), top[:, 0] - top[:, 2], logits)


def targeted_dlr(logits: jax.Array, labels: jax.Array, targets: jax.Array) -> jax.Array:
    """As `dlr`, towards a class: -(z_y - z_t) / (z_1st - (z_3rd + z_4th) / 2).

    Args:
      logits: z, `[N, K]`, K at least 4.
      labels: integer classes y in `[0, K)`, `[N]`.
      targets: integer classes t in `[0, K)`, `[N]`.

    Returns:
      `[N]`; NaN where a class is traced and out of range.

    Raises:
      TypeError: if `labels` or `targets` are not integers.
      ValueError: if there are fewer than 4 classes, or `labels` or `targets` are not `[N]` or not classes.

    Reference: Croce and Hein, 2020, https://arxiv.org/abs/2003.01690 (Eq. 7)
    """
    remedy = "take z_t - z_y itself for fewer"
    logits, labels, targets = _checked("targeted_dlr", logits, 4, remedy, labels=labels, targets=targets)
    wide = _at_least_float32(logits)
    top = jax.lax.top_k(wide, 4)[0]
    lead = _pick(wide, targets) - _pick(wide, labels)
    return _ratio(lead, top[:, 0] - (top[:, 2] + top[:, 3]) / 2, logits)


def _checked(name: str, logits: jax.Array, least: int, remedy: str, **integers: jax.Array) -> tuple[jax.Array, ...]:
    logits = _arguments.logits(name, logits, least=least, remedy=remedy)
    n, num_classes = logits.shape
    return logits, *(
        _arguments.classes(name, argument, values, n, num_classes) for argument, values in integers.items()
    )


def _pick(logits: jax.Array, classes: jax.Array) -> jax.Array:
    """The logit of each row's class; NaN for what is no class, where JAX would count from the end."""
    picked = jnp.take_along_axis(logits, classes[:, None], axis=1, mode="clip")[:, 0]
    return _arguments.nan_without_class(picked, classes, logits.shape[1])


def _ratio(lead: jax.Array, spread: jax.Array, logits: jax.Array) -> jax.Array:
    """`lead / spread`, and `lead` itself where the spread of the logits is nothing but rounding."""
    rounding = jnp.finfo(spread.dtype).eps * jnp.abs(jax.lax.stop_gradient(_at_least_float32(logits))).max(-1)
    return lead / jnp.where(spread > jnp.maximum(rounding, 1e-12), spread, 1)
