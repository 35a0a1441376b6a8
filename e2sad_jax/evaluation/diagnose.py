"""The measurements: accuracy against budget, steps and restarts, under transfer, and in the worst case."""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from e2sad_jax.evaluation import masking as checks_lib
from e2sad_jax.evaluation.auto import FAB, STAGES, auto
from e2sad_jax.evaluation.evaluator import TARGETED, Attack
from e2sad_jax.evaluation.model import Subject

FORMAT = 1  # of evaluation.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """How much is spent; the defaults take minutes for 500 images of MNIST on two cores.

    Attributes:
      budgets: fractions of eps in the curve over budgets.
      steps: numbers of PGD's steps in the curve over steps.
      restarts: random starts of the curve over restarts.
      pgd_steps: steps of PGD elsewhere.
      apgd_steps: steps of both APGD in the worst case.
      queries: of Square in the worst case; 0 leaves it out.
      targets: wrong classes that the targeted APGD tries.
      fab: wrong classes that FAB tries on what stands before Square; 0 leaves it out.
      worst_case: whether to measure that.
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

    def stages(self, classes: int) -> list[Attack]:
        """Those of the worst case: `auto.STAGES` with this effort, without the targeted one below four classes, and FAB.

        FAB comes before Square: what fell to Square alone is held against all attacks that follow gradients.
        """
        ce, targeted, square = STAGES
        stages = [dataclasses.replace(ce, steps=self.apgd_steps)]
        if classes >= 4:
            stages.append(dataclasses.replace(targeted, steps=self.apgd_steps, targets=self.targets))
        if self.fab:
            stages.append(dataclasses.replace(FAB, targets=self.fab))
        if self.queries:
            stages.append(dataclasses.replace(square, steps=self.queries))
        return stages


def diagnose(
    subject: Subject,
    *,
    eps: float,
    effort: Effort = Effort(),
    substitute: Subject | None = None,
    progress: Callable[[str, int], None] = lambda what, gradients: None,
) -> dict[str, Any]:
    """Judges a model under l-infinity attacks.

    Args:
      subject: the model and its images.
      eps: the budget, above 0, in the images' own units.
      effort: how much to spend.
      substitute: a model, naturally trained say, on the same images, whose adversarial images are tried on `subject`.
      progress: told what is measured, and how many gradients were taken, of the `work`, since it was told last.

    Returns:
      What evaluation.json holds: curves, the worst case, checks and verdict. Every accuracy stands beside attack, steps,
      restarts and number of images.

    Raises:
      ValueError: if `eps` is not above 0.
    """
    if not eps > 0:
        raise ValueError(f"diagnose: eps={eps}; it must be above 0")
    fgsm, pgd = Attack("FGSM", "fgsm", steps=1), Attack(f"PGD-{effort.pgd_steps}", "pgd", steps=effort.pgd_steps)
    margin = dataclasses.replace(pgd, name=f"PGD-{effort.pgd_steps}, margin", loss="margin")
    n, meter = len(subject.x), _Meter(progress)
    meter("clean accuracy and gradients", n * _CLEAN)
    clean = subject.clean()
    gradients = checks_lib.gradients(subject, eps)

    right: dict[tuple[str, float], np.ndarray] = {}
    over_eps: dict[str, list[float]] = {attack.name: [] for attack in (fgsm, pgd, margin)}
    attacked = subject.x
    for fraction in effort.budgets:
        for attack in (fgsm, pgd, margin):
            meter(f"{attack.name}, eps {fraction * eps:.4g}", n * attack.gradients())
            standing, made = subject.under(dataclasses.replace(attack, eps=fraction * eps))
            right[attack.name, fraction] = standing
            over_eps[attack.name].append(float(standing.mean()))
            if attack is pgd and fraction == 1:
                attacked = made
    for attack in (fgsm, pgd, margin):
        if (attack.name, 1.0) not in right:
            right[attack.name, 1.0], made = subject.under(dataclasses.replace(attack, eps=eps))
            attacked = made if attack is pgd else attacked
    fell = float((checks_lib.losses(subject, attacked) < checks_lib.losses(subject, subject.x)).mean())

    longer: list[np.ndarray] = []
    for steps in effort.steps:
        meter(f"PGD-{steps}", n * steps)
        longer.append(subject.under(Attack(f"PGD-{steps}", "pgd", eps, steps))[0])

    meter("restarts", n * pgd.gradients() * (effort.restarts - 1))
    worst = right[pgd.name, 1.0].copy()
    over_restarts = [float(worst.mean())]
    for restart in range(1, effort.restarts):
        worst &= subject.under(dataclasses.replace(pgd, eps=eps), restart=restart)[0]
        over_restarts.append(float(worst.mean()))

    meter("the whole range", n * pgd.gradients())
    width = subject.bounds[1] - subject.bounds[0]
    whole_range = subject.under(dataclasses.replace(pgd, eps=width))[0]

    white_box = np.all([worst, right[fgsm.name, 1.0], right[margin.name, 1.0], *longer], axis=0)
    black_box: dict[str, np.ndarray] = {}
    transfer = None
    if substitute is not None:
        meter(f"transfer from {substitute.name}", n * pgd.gradients())
        left, made = substitute.under(dataclasses.replace(pgd, eps=eps))
        black_box[f"transfer from {substitute.name}"] = subject.right_on(made)
        transfer = {
            "from": substitute.name,
            "attack": pgd.name,
            "accuracy": float(black_box[f"transfer from {substitute.name}"].mean()),
            "accuracy_of_substitute": float(left.mean()),
        }
    worst_case = None
    if effort.worst_case:
        stages = effort.stages(subject.classes)
        result = auto(
            subject.apply,
            subject.params,
            subject.x,
            subject.labels,
            eps=eps,
            bounds=subject.bounds,
            stages=stages,
            batch_size=subject.batch_size,
            seed=subject.seed,
            progress=meter.through(stages, n, subject.batch_size, subject.classes),
        )
        before = np.ones_like(clean)
        for stage in stages:
            after = result.standing[stage.name] | ~before  # what it was not shown says nothing
            if stage.kind == "square":
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
    found = checks_lib.checks(
        clean=clean,
        fgsm=right[fgsm.name, 1.0],
        pgd=right[pgd.name, 1.0],
        white_box=white_box,
        black_box=black_box,
        whole_range=whole_range,
        gradients=gradients,
        loss_fell=fell,
    )
    return {
        "format": FORMAT,
        "name": subject.name,
        "images": len(subject.x),
        "eps": eps,
        "norm": "linf",
        "bounds": list(subject.bounds),
        "seed": subject.seed,
        "clean": float(clean.mean()),
        "over_eps": {"eps": [fraction * eps for fraction in effort.budgets], "restarts": 1, "accuracy": over_eps},
        "over_steps": {
            "attack": "PGD",
            "restarts": 1,
            "steps": list(effort.steps),
            "accuracy": [float(r.mean()) for r in longer],
        },
        "over_restarts": {"attack": pgd.name, "accuracy": over_restarts},
        "transfer": transfer,
        "worst_case": worst_case,
        "checks": [{**dataclasses.asdict(check), "suspicious": check.suspicious} for check in found],
        "verdict": checks_lib.verdict(subject.name, found, len(subject.x)),
    }


class _Meter:
    """Tells what is measured next, and the gradients that were taken since it told last."""

    def __init__(self, tell: Callable[[str, int], None]):
        self._tell, self._told, self._taken = tell, 0, 0

    def __call__(self, what: str, gradients: int) -> None:
        """Says `what` is next, which takes so many."""
        self._tell(what, self._taken - self._told)
        self._told, self._taken = self._taken, self._taken + gradients

    def through(self, stages: Sequence[Attack], n: int, batch_size: int, classes: int) -> Callable[[str, int], None]:
        """The `progress` of `auto`: a batch is its share of a stage in which all images stand, and no more."""
        first, ends = self._taken, np.cumsum([n * _cost(stage, classes) for stage in stages])
        place = {stage.name: i for i, stage in enumerate(stages)}
        batches_of = {
            s.name: -(-n // batch_size) * (min(s.targets, classes - 1) if s.loss in TARGETED else 1) for s in stages
        }
        seen: collections.Counter[str] = collections.Counter()
        self(stages[0].name, 0)

        def after(name: str, images: int) -> None:
            seen[name] += 1
            i = place[name]
            begin = ends[i - 1] if i else 0
            self._taken = first + int(begin + (ends[i] - begin) * min(1, seen[name] / batches_of[name]))
            self(name, 0)

        return after


_CLEAN = 3  # gradients at the images and near them, and a pass


def _cost(stage: Attack, classes: int) -> int:
    """Gradients of an image; three queries count as one."""
    gradients = dataclasses.replace(stage, targets=min(stage.targets, classes - 1)).gradients()
    return gradients // 3 if stage.kind == "square" else gradients


def work(effort: Effort, images: int, classes: int, transfer: bool) -> int:
    """How many gradients `diagnose` takes at most of so many images and classes, for a progress bar."""
    curves = len(effort.budgets) * (1 + 2 * effort.pgd_steps) + sum(effort.steps)
    again = effort.pgd_steps * (effort.restarts + int(transfer))  # restarts but the first, and the whole range
    worst = sum(_cost(stage, classes) for stage in effort.stages(classes)) if effort.worst_case else 0
    return images * (_CLEAN + curves + again + worst)
