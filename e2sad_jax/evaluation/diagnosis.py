"""Diagnosis of a model's robustness: accuracy against budget, steps and restarts, transfer, worst case, masking checks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from e2sad_jax import attacks
from e2sad_jax.evaluation import masking
from e2sad_jax.evaluation.attack import Attack
from e2sad_jax.evaluation.autoattack import FAB, STAGES
from e2sad_jax.evaluation.evaluator import Progress
from e2sad_jax.evaluation.model import Model

FORMAT = 1  # of evaluation.json
_GRADIENTS = 2  # that the checks take per image: at it and at a point of its ball


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """The effort of `diagnose`. The defaults take minutes for 500 images of MNIST on two cores.

    Attributes:
      budgets: fractions of eps in the curve over budgets.
      steps: numbers of PGD's steps in the curve over steps.
      restarts: random starts of the curve over restarts, at least 1.
      pgd_steps: steps of PGD elsewhere.
      apgd_steps: steps of both APGD in the worst case.
      queries: of Square in the worst case; 0 leaves it out.
      targets: wrong classes that the targeted APGD tries.
      fab: wrong classes that FAB tries, before Square; 0 leaves it out.
      worst_case: whether to measure the worst case.
    """

    budgets: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    steps: Sequence[int] = (1, 2, 5, 10, 20, 40, 100)
    restarts: int = 5
    pgd_steps: int = 40
    apgd_steps: int = 100
    queries: int = 5000
    targets: int = 9
    fab: int = 0
    worst_case: bool = True

    def stages(self, num_classes: int) -> list[Attack]:
        """The stages of the worst case: `STAGES` with this effort; the targeted one needs four classes.

        FAB comes before Square: what falls to Square alone is held against all attacks that follow gradients.
        """
        ce, targeted, square = STAGES
        stages = [dataclasses.replace(ce, steps=self.apgd_steps)]
        if num_classes >= 4:
            stages.append(dataclasses.replace(targeted, steps=self.apgd_steps, targets=self.targets))
        if self.fab:
            stages.append(dataclasses.replace(FAB, targets=self.fab))
        if self.queries:
            stages.append(dataclasses.replace(square, steps=self.queries))
        return stages

    def work(self, images: int, num_classes: int, transfer: bool) -> int:
        """The total number of gradients that `diagnose` reports as progress.

        Args:
          images: number of images.
          num_classes: of the model.
          transfer: whether there is a substitute.
        """
        pgd = self.pgd_steps
        budgets = 1 + 2 * pgd  # FGSM, PGD on two losses
        curves = len({*self.budgets, 1.0}) * budgets + sum(self.steps) + (self.restarts - 1) * pgd
        worst = [Attack("clean", "clean"), *self.stages(num_classes)] if self.worst_case else []
        rest = 1 + _GRADIENTS + pgd + (pgd if transfer else 0)  # clean, checks, the whole range
        return images * (curves + rest + sum(attack.gradients(num_classes) for attack in worst))


def diagnose(
    model: Model,
    *,
    eps: float,
    effort: Effort = Effort(),
    substitute: Model | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model's robust accuracy in the l-infinity ball and checks for gradient masking.

    Args:
      model: the model and its images.
      eps: the budget, above 0, in the images' own units.
      effort: how much to compute.
      substitute: a model of the same images, trained without attacks for example. Its adversarial images are shown to
        `model`.
      progress: called with what is measured and the number of gradients taken since the last call, `effort.work` in all.

    Returns:
      What evaluation.json holds: curves, worst case, checks and verdict. Every accuracy has its attack, steps, restarts and
      number of images with it.

    Raises:
      ValueError: if `eps` is not above 0.
    """
    if not eps > 0:
        raise ValueError(f"diagnose: eps={eps}; it must be above 0")
    model, n = model.compiled(), len(model.images)
    report: Progress = progress or (lambda what, gradients: None)
    fgsm, pgd = Attack("FGSM", "fgsm", steps=1), Attack(f"PGD-{effort.pgd_steps}", "pgd", steps=effort.pgd_steps)
    margin = dataclasses.replace(pgd, name=f"PGD-{effort.pgd_steps}, margin", loss="margin")

    clean = model.evaluate([Attack("clean", "clean")], progress=report)["clean"].correct
    gradients = masking.gradients(model, eps)
    report("gradients", _GRADIENTS * n)

    def within(attack: Attack, fraction: float) -> Attack:
        return dataclasses.replace(attack, name=f"{attack.name}, eps {fraction * eps:.4g}", eps=fraction * eps)

    fractions = dict.fromkeys([*effort.budgets, 1.0])  # in their order, each once
    outcomes = {
        (attack.name, fraction): model.under(within(attack, fraction), progress=report)
        for fraction in fractions
        for attack in (fgsm, pgd, margin)
    }
    right = {key: correct for key, (correct, _) in outcomes.items()}
    attacked = outcomes[pgd.name, 1.0][1]
    loss_decreased = float((masking.losses(model, attacked) < masking.losses(model, model.images)).mean())

    over_steps = model.evaluate([Attack(f"PGD-{steps}", "pgd", eps, steps) for steps in effort.steps], progress=report)

    worst_of_restarts = [right[pgd.name, 1.0]]
    for restart in range(1, effort.restarts):
        again = dataclasses.replace(pgd, name="restarts", eps=eps)
        correct = model.evaluate([again], restart=restart, progress=report)[again.name].correct
        worst_of_restarts.append(worst_of_restarts[-1] & correct)

    anything = dataclasses.replace(pgd, name="the whole range", eps=model.bounds[1] - model.bounds[0])
    whole_range = model.evaluate([anything], progress=report)[anything.name].correct

    white_box = np.all(
        [
            worst_of_restarts[-1],
            right[fgsm.name, 1.0],
            right[margin.name, 1.0],
            *(outcome.correct for outcome in over_steps.values()),
        ],
        axis=0,
    )
    black_box: dict[str, np.ndarray] = {}
    transfer = None
    if substitute is not None:
        source = f"transfer from {substitute.name}"
        left, made = substitute.under(dataclasses.replace(pgd, name=source, eps=eps), progress=report)
        black_box[source] = model.right_on(made)
        transfer = {
            "from": substitute.name,
            "attack": pgd.name,
            "accuracy": float(black_box[source].mean()),
            "accuracy_of_substitute": float(left.mean()),
        }
    worst_case = None
    if effort.worst_case:
        stages = effort.stages(model.num_classes)
        result = model.auto(stages, eps=eps, progress=report)
        before = np.ones_like(clean)
        for stage in stages:
            after = result.standing[stage.name] | ~before  # of an image that it was not run on it says nothing
            if attacks.ATTACKS[stage.kind].family == "score-based":
                black_box["Square"] = after
            else:
                white_box = white_box & after
            before = result.standing[stage.name]
        worst_case = {
            "accuracy": result.accuracy,
            "stages": [dataclasses.asdict(stage) for stage in stages],
            "fooled": dict(result.alone),
            "robust": float(np.all([result.robust, white_box, *black_box.values()], axis=0).mean()),
        }
    found = masking.run_checks(
        clean=clean,
        fgsm=right[fgsm.name, 1.0],
        pgd=right[pgd.name, 1.0],
        white_box=white_box,
        black_box=black_box,
        whole_range=whole_range,
        gradients=gradients,
        loss_decreased=loss_decreased,
    )
    return {
        "format": FORMAT,
        "name": model.name,
        "images": n,
        "eps": eps,
        "norm": "linf",
        "bounds": list(model.bounds),
        "seed": model.seed,
        "clean": float(clean.mean()),
        "over_eps": {
            "eps": [fraction * eps for fraction in effort.budgets],
            "restarts": 1,
            "accuracy": {
                attack.name: [float(right[attack.name, fraction].mean()) for fraction in effort.budgets]
                for attack in (fgsm, pgd, margin)
            },
        },
        "over_steps": {
            "attack": "PGD",
            "restarts": 1,
            "steps": list(effort.steps),
            "accuracy": [outcome.accuracy for outcome in over_steps.values()],
        },
        "over_restarts": {"attack": pgd.name, "accuracy": [float(correct.mean()) for correct in worst_of_restarts]},
        "transfer": transfer,
        "worst_case": worst_case,
        "checks": [{**dataclasses.asdict(check), "suspicious": check.suspicious} for check in found],
        "verdict": masking.verdict(model.name, found, n),
    }
