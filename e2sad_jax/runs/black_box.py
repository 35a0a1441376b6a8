"""The evaluation of a model that has no gradient: attacks that ask for logits, and images made for another model."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from e2sad_jax.errors import DataError
from e2sad_jax.evaluation import Attack, Model, distances, verify
from e2sad_jax.evaluation.curves import SLACK
from e2sad_jax.evaluation.evaluator import Progress
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.table import Table


def has_gradient(model: Model) -> bool:
    """Whether a model can be differentiated: a file that `jax.export` wrote without its gradient cannot."""

    def total(x: jax.Array) -> jax.Array:
        return model.apply(model.params, x).sum()

    try:
        jax.eval_shape(jax.grad(total), jnp.asarray(model.images[:1], jnp.float32))
    except DataError:
        return False
    return True


def evaluate(
    model: Model,
    stages: Sequence[Attack],
    *,
    eps: float,
    norm: str,
    substitute: Model | None,
    transfer: Attack,
    progress: Progress,
) -> dict[str, Any]:
    """Runs attacks without gradients, and shows the model the images of a substitute.

    Args:
      model: the model and its images.
      stages: the attacks, each on all images.
      eps: budget of the robust accuracy.
      norm: its norm.
      substitute: a model with a gradient and the same images; None for none.
      transfer: the attack on it.
      progress: as of `evaluation.evaluate`.

    Returns:
      `clean`, `robust` (no image of an attack within `eps` fools the model), `attacks` with name, norm, budget and accuracy,
      `verified` as of `evaluation.diagnose`, and `worst_images`.
    """
    worst, fooled, rows = np.array(model.images), ~model.clean(), []

    def offer(attack: Attack, name: str, withstood: np.ndarray, images: np.ndarray) -> None:
        rows.append({"attack": name, "norm": attack.norm, "eps": attack.eps, "accuracy": float(withstood.mean())})
        far = distances(model.images, images, np.ones(len(images), bool), norm=norm)
        take = ~withstood & ~fooled & (far <= eps * (1 + SLACK))
        worst[take], fooled[take] = images[take], True

    clean = float((~fooled).mean())
    for stage in stages:
        outcome, images = model.attacked(stage, progress=progress)
        offer(stage, stage.name, outcome.withstood, images)
    if substitute is not None:
        _, images = substitute.under(transfer, progress=progress)
        offer(transfer, f"{transfer.name} on {substitute.name}", model.right_on(images), images)
    verified = verify(model, worst, eps=eps, norm=norm)
    return {
        "name": model.name,
        "images": len(model.images),
        "eps": eps,
        "norm": norm,
        "seed": model.seed,
        "clean": clean,
        "robust": float((~verified.fooled).mean()),
        "attacks": rows,
        "verified": verified.as_dict(),
        "worst_images": worst,
    }


def table(result: dict[str, Any]) -> Table:
    """A row for each attack, and the accuracy under all within the budget."""
    attacks = [[r["attack"], f"{r['norm']} {r['eps']:.4g}", f"{r['accuracy']:.4f}"] for r in result["attacks"]]
    grey = result.get("quantized")
    of = f"{result['images']:,} of {result['test_images']:,} test images"
    return Table(
        title=f"{result['name']} without its gradient: accuracy on {of}",
        columns=["attack", "budget", "accuracy"],
        rows=[
            ["clean", "", f"{result['clean']:.4f}"],
            *attacks,
            ["all within the budget", f"{result['norm']} {result['eps']:.4g}", f"{result['robust']:.4f}"],
            *([] if grey is None else [["these in 8-bit grey levels", "", f"{grey:.4f}"]]),
        ],
        labels=2,
        footer=1 if grey is None else 2,
        notes=[
            "The model has no gradient. An attack that follows it would find more: export the function with "
            "`serialize(vjp_order=1)`. The robust accuracy is an upper bound.",
            f"Command: `{result['command']}`",
            provenance.sentence(result["environment"]),
        ],
    )
