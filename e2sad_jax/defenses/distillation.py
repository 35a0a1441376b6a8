"""Defensive distillation, which is broken: the student learns a teacher's probabilities at a high temperature."""

import jax
import jax.numpy as jnp

from e2sad_jax.attacks import core
from e2sad_jax.defenses._registry import Defense, Setting, register
from e2sad_jax.defenses._types import BatchMean, LogitsFn, Parts, batch_mean
from e2sad_jax.losses import cross_entropy


def tempered(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    temperature: jax.typing.ArrayLike = 100.0,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """The teacher of `distillation`: natural training of softmax(z / T), the mean cross-entropy on clean images.

    Args:
      logits_fn: images `[N, ...]` to logits z `[N, K]`.
      x: clean images `[N, ...]`.
      y: target distributions `[N, K]`; the paper's are hard.
      temperature: T, above 0.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name: `clean`, the cross-entropy of softmax(z).

    Raises:
      ValueError: if `temperature` or `weights` are out of range.

    Reference: Papernot et al., 2016, https://arxiv.org/abs/1511.04508
    """
    x = core.checks.images("tempered", x)
    core.checks.number("tempered", "temperature", temperature, positive=True)
    mean, y = batch_mean("tempered", x, y, weights)
    logits = core.as_float32(core.checks.logits("tempered", logits_fn(x), len(x)))
    return mean(cross_entropy(logits / temperature, y)), {"clean": _clean(mean, logits, y)}


def distillation(
    logits_fn: LogitsFn,
    x: jax.Array,
    y: jax.Array,
    *,
    teacher_fn: LogitsFn,
    temperature: jax.typing.ArrayLike = 100.0,
    weights: jax.typing.ArrayLike | None = None,
) -> tuple[jax.Array, Parts]:
    """Defensive distillation: the mean cross-entropy of softmax(z / T) against the teacher's softmax(t / T).

    The student has the teacher's architecture. It is deployed at temperature 1, where its logits, about T times larger, make
    the softmax saturate: in float32 the gradient of the cross-entropy is then exactly zero for most images, and an attack
    that follows it stays where it is. **This is no robustness.** An attack on `losses.margin` or `losses.dlr`, on z / T, or
    `attacks.carlini_wagner` finds adversarial images as near as of an undefended network.

    The loss has no factor T^2 and no term of the labels, as it would have to compress a model (Hinton et al., 2015).

    Args:
      logits_fn: images `[N, ...]` to logits z `[N, K]`.
      x: clean images `[N, ...]`.
      y: target distributions `[N, K]`; only `parts["clean"]` sees them.
      teacher_fn: images `[N, ...]` to the teacher's logits t `[N, K]`; trained by `tempered`. No gradient flows through it.
      temperature: T, above 0, also the teacher's.
      weights: of the images, `[N]`, at least 0; 0 leaves an image out, whatever its row of `y`. Its pixels must be finite,
        as zeros are. None: all alike.

    Returns:
      The loss, a scalar, and its parts by name: `clean`, the cross-entropy of softmax(z) against `y`; `agreement`, the share of
      images that teacher and student put in one class.

    Raises:
      ValueError: if `temperature` or `weights` are out of range, or the teacher has another number of classes.

    Reference: Papernot et al., 2016, https://arxiv.org/abs/1511.04508;
    broken by Carlini and Wagner, 2016, https://arxiv.org/abs/1607.04311 and 2017, https://arxiv.org/abs/1608.04644
    """
    x = core.checks.images("distillation", x)
    core.checks.number("distillation", "temperature", temperature, positive=True)
    mean, y = batch_mean("distillation", x, y, weights)
    logits = core.as_float32(core.checks.logits("distillation", logits_fn(x), len(x)))
    taught = core.as_float32(core.checks.logits("distillation", jax.lax.stop_gradient(teacher_fn(x)), len(x)))
    if taught.shape != logits.shape:
        raise ValueError(
            f"distillation: the teacher's logits have shape {taught.shape} and the student's {logits.shape}; both must be of "
            "the same classes"
        )
    loss = mean(cross_entropy(logits / temperature, jax.nn.softmax(taught / temperature)))
    alike = jnp.equal(logits.argmax(-1), taught.argmax(-1)).astype(logits.dtype)
    return loss, {"clean": _clean(mean, logits, y), "agreement": mean(alike)}


def _clean(mean: BatchMean, logits: jax.Array, y: jax.Array) -> jax.Array:
    """The cross-entropy at temperature 1, only to be seen."""
    return mean(cross_entropy(jax.lax.stop_gradient(logits), y))


TEMPERATURE = Setting("temperature", 100.0, "temperature of the softmax in training; 1 in use", above=0)
TEACHER = Setting(
    "teacher",
    "",
    "folder of the run whose last checkpoint is the teacher; empty: train one first, by --defense=tempered with hard labels, "
    "in WORKDIR/teacher",
    argument=None,
)
BROKEN = "Carlini and Wagner, 2016, https://arxiv.org/abs/1607.04311"
register("tempered", Defense(tempered, "teacher at temperature T", (TEMPERATURE,), broken=BROKEN))
register("distillation", Defense(distillation, "distillation", (TEMPERATURE, TEACHER), broken=BROKEN))
