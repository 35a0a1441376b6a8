"""Validation of a run while it trains: the score that orders checkpoints, and signs of catastrophic overfitting."""

import contextlib
from collections.abc import Callable
from typing import Any

from e2sad_jax import distributed
from e2sad_jax.evaluation import Attack, masking, of_classifier
from e2sad_jax.runs.checkpoint import UNJUDGED
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.runs.opening import Run
from e2sad_jax.runs.signals import Interrupted
from e2sad_jax.training import TrainState

ALIGNED = 500  # validation images at which gradients are compared


def validate(run: Run, state: TrainState, stop: Callable[[], int]) -> dict[str, float]:
    """Clean accuracy and robust accuracy under PGD-10 on the validation set, and the score that orders checkpoints.

    Args:
      run: the run.
      state: what to validate.
      stop: whether the run is asked to stop: then nobody waits for an attack.

    Returns:
      `clean` and `robust`, in [0, 1], and `score`: images that are classified right under attack, equal numbers ordered
      by clean accuracy. With averaged weights also theirs, `average_clean` and `average_robust`; `averaged`, 1 where they
      are better than the raw ones, else 0; and the score of the better. If the run is stopped meanwhile only `score`,
      `UNJUDGED`.
    """
    raw = _validated(run, state.params, stop)
    if state.average is None or raw["score"] == UNJUDGED:
        return raw
    average = _validated(run, state.average, stop)
    if average["score"] == UNJUDGED:
        return average
    return {
        **raw,
        **{f"average_{name}": average[name] for name in ("clean", "robust")},
        "averaged": float(average["score"] > raw["score"]),
        "score": max(average["score"], raw["score"]),
    }


def _validated(run: Run, params: Any, stop: Callable[[], int]) -> dict[str, float]:
    if distributed.max_over_processes(stop()):
        return {"score": UNJUDGED}
    eps, n = run.config.eps1, len(run.validation_set.x_test)
    suite = [Attack("clean", "clean"), Attack("robust", "pgd", eps, 10, eps / 4 or None, norm=run.config.norm)]
    values = {"clean": 0.0, "robust": 0.0, "score": UNJUDGED}

    def progress(name: str, gradients: int) -> None:
        if number := stop():
            raise Interrupted(number)

    if distributed.is_main():
        with contextlib.suppress(Interrupted):
            outcomes = run.attack(params, run.validation_set, suite, progress=progress)
            clean, robust = (int(outcomes[name].correct.sum()) for name in ("clean", "robust"))
            values = {"clean": clean / n, "robust": robust / n, "score": robust + clean / (n + 1)}
    values = distributed.broadcast_from_main(values)
    return values if values["score"] != UNJUDGED else {"score": UNJUDGED}


def overfitting(run: Run, params: Any, robust: float) -> dict[str, float]:
    """Signs on the validation set that training has overfitted to attacks of one step (catastrophic overfitting).

    Args:
      run: the run.
      params: the network's variables.
      robust: accuracy under PGD-10.

    Returns:
      `fgsm`, the accuracy under FGSM; `alignment`, that of `masking.alignment` on up to `ALIGNED` images; `collapsed`, 1 where
      three things hold: PGD's accuracy is below half of FGSM's; it is more than `masking.MAX_GAP` below FGSM's; the alignment
      is below `masking.MIN_ALIGNMENT`. Else 0.
    """
    config, images = run.config, run.validation_set
    attack = Attack("fgsm", "fgsm", config.eps1, 1, norm=config.norm)
    fgsm = run.attack(params, images, [attack])["fgsm"].accuracy
    shown = Classifier(config, {}, 0, run.model, distributed.local(params), run.transform)
    model = of_classifier(
        shown, images.x_test[:ALIGNED], images.y_test[:ALIGNED], batch_size=config.eval_batch_size, seed=config.seed
    )
    alignment = masking.alignment(model, config.eps1, config.norm)
    return {
        "fgsm": fgsm,
        "alignment": alignment,
        "collapsed": float(
            fgsm - robust > masking.MAX_GAP
            and 2 * robust < fgsm
            and alignment < masking.MIN_ALIGNMENT  # a network that has only begun to learn is aligned
        ),
    }
