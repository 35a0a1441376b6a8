"""Diagnosis of a model's robustness: accuracy against budget, steps and restarts, transfer, worst case, masking checks."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from e2sad_jax import attacks
from e2sad_jax.attacks import core
from e2sad_jax.evaluation import _entrance, masking
from e2sad_jax.evaluation.attack import Attack
from e2sad_jax.evaluation.autoattack import FAB, ORTHOGONAL, STAGES, joins_fab
from e2sad_jax.evaluation.curves import SLACK, accuracy_at, distances
from e2sad_jax.evaluation.evaluator import Outcome, Progress, nan_logits
from e2sad_jax.evaluation.model import Model
from e2sad_jax.evaluation.verification import verify

FORMAT = 2  # of evaluation.json
_GRADIENTS = 2  # that the checks take per image: at it and at a point of its ball


@dataclasses.dataclass(frozen=True, kw_only=True)
class Effort:
    """The effort of `diagnose`. The defaults take minutes for 500 images of MNIST on two cores.

    Attributes:
      budgets: fractions of eps in the curve over budgets.
      steps: numbers of PGD's steps in the curve over steps.
      restarts: random starts of the curve over restarts, at least 1.
      pgd_steps: steps of PGD elsewhere.
      apgd_steps: steps of both APGD, and of orthogonal PGD, in the worst case.
      queries: of Square in the worst case; 0 leaves it out.
      targets: wrong classes that the targeted APGD tries.
      fab: wrong classes that FAB tries, before Square; 0 leaves it out, None has `auto`'s: 9 in the l2 ball, none elsewhere.
      fmn: steps of FMN, which looks for the nearest adversarial image: its distances give the accuracy at every budget; 0
        leaves it out, and so does a model that rejects images.
      worst_case: whether to measure the worst case.
      near: of the worst case, as of `auto`: which images its later attacks leave out.
    """

    budgets: Sequence[float] = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
    steps: Sequence[int] = (1, 2, 5, 10, 20, 40, 100)
    restarts: int = 5
    pgd_steps: int = 40
    apgd_steps: int = 100
    queries: int = 5000
    targets: int = 9
    fab: int | None = None
    fmn: int = 100
    worst_case: bool = True
    near: float | None = None

    def stages(self, num_classes: int, ndim: int = 4, rejects: bool = False, norm: str = "linf") -> list[Attack]:
        """The stages of the worst case: `STAGES` with this effort, without those that cannot run.

        The targeted APGD needs four classes, Square images `[N, H, W, C]`, of `ndim` 4. A model that rejects images faces
        orthogonal PGD, too. FAB comes before Square: what falls to Square alone is held against all attacks that follow
        gradients.
        """
        ce, targeted, square = STAGES
        stages = [dataclasses.replace(ce, steps=self.apgd_steps)]
        if num_classes >= 4:
            stages.append(dataclasses.replace(targeted, steps=self.apgd_steps, targets=self.targets))
        if rejects:
            stages.append(dataclasses.replace(ORTHOGONAL, steps=self.apgd_steps))
        fab = self.fab
        if fab is None:
            fab = FAB.targets if joins_fab(norm, rejects) else 0
        if fab:
            stages.append(dataclasses.replace(FAB, targets=fab))
        if self.queries and ndim == 4:
            stages.append(dataclasses.replace(square, steps=self.queries))
        return stages

    def work(
        self, images: int, num_classes: int, transfer: bool, ndim: int = 4, rejects: bool = False, norm: str = "linf"
    ) -> int:
        """The total number of gradients that `diagnose` reports as progress.

        Args:
          images: number of images.
          num_classes: of the model.
          transfer: whether there is a substitute.
          ndim: number of axes of a batch of images.
          rejects: whether the model rejects images.
          norm: of the ball.
        """
        pgd = self.pgd_steps
        budgets = 1 + 2 * pgd  # FGSM, PGD on two losses
        curves = len({*self.budgets, 1.0}) * budgets + sum(self.steps) + (self.restarts - 1) * pgd
        worst = [Attack("clean", "clean"), *self.stages(num_classes, ndim, rejects, norm)] if self.worst_case else []
        rest = 1 + _GRADIENTS + pgd + (pgd if transfer else 0)  # clean, checks, the whole range
        rest += 0 if rejects else self.fmn
        return images * (curves + rest + sum(attack.gradients(num_classes) for attack in worst))


def diagnose(
    model: Model,
    *,
    eps: float,
    norm: str = "linf",
    effort: Effort = Effort(),
    substitute: Model | None = None,
    keep: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measures a model's robust accuracy in the balls of a norm and checks for gradient masking.

    Args:
      model: the model and its images. One that rejects images (`detector`) is judged as by `auto`.
      eps: the budget, above 0, in the images' own units.
      norm: "linf" or "l2", of every attack and check.
      effort: how much to compute.
      substitute: a model of the same images, trained without attacks for example. Its adversarial images are shown to
        `model`.
      keep: whether to return the worst images too.
      progress: called with what is measured and the number of gradients taken since the last call, `effort.work` in all.

    Returns:
      What evaluation.json holds: curves, worst case, checks and verdict. Every accuracy has its attack, steps, restarts and
      number of images with it. `robust` is the accuracy on the worst image of each, of all that were found within `eps`, by
      the forward pass of the clean accuracy and by one in batches of another size; `verified` is what `verify` says of those
      images. With `keep`, `worst_images` has them, `[N, ...]`: one that fools the model, or that of the highest margin.

    Raises:
      ValueError: if `eps` is no number above 0, `norm` is unknown, the model's `bounds` are not finite, or `substitute` has
        other images.
    """
    eps = _entrance.as_budget("diagnose", eps, positive=True)
    if norm not in core.NORMS:
        raise ValueError(f"diagnose: norm={norm!r}; it must be one of {', '.join(core.NORMS)}")
    reach = reach_of(model, norm)
    if substitute is not None and not (
        np.array_equal(substitute.images, model.images) and np.array_equal(substitute.labels, model.labels)
    ):
        raise ValueError("diagnose: substitute has other images or labels; it must have those of model")
    model, n = model.compiled(), len(model.images)
    num_classes = model.num_classes
    report: Progress = progress or (lambda what, gradients: None)
    fgsm = Attack("FGSM", "fgsm", eps, 1, norm=norm)
    pgd = Attack(f"PGD-{effort.pgd_steps}", "pgd", eps, effort.pgd_steps, norm=norm)
    margin = dataclasses.replace(pgd, name=f"PGD-{effort.pgd_steps}, margin", loss="margin")

    outcome = model.evaluate([Attack("clean", "clean")], progress=report)["clean"]
    clean, nan, worst = outcome.withstood, {"clean": outcome.nan}, _Worst(model)
    gradients = masking.gradients(model, eps, norm)
    report("gradients", _GRADIENTS * n)

    def attacked(attack: Attack, restart: int = 0) -> tuple[Outcome, np.ndarray]:
        outcome, images = model.attacked(attack, restart, report)
        nan[attack.name] = max(outcome.nan, nan.get(attack.name, 0))
        if attack.eps == eps:
            worst.offer(images)
        return outcome, images

    def within(attack: Attack, fraction: float) -> Attack:
        return dataclasses.replace(attack, name=f"{attack.name}, eps {fraction * eps:.4g}", eps=fraction * eps)

    fractions = dict.fromkeys([*effort.budgets, 1.0])  # in their order, each once
    outcomes = {
        (attack.name, fraction): attacked(within(attack, fraction))
        for fraction in fractions
        for attack in (fgsm, pgd, margin)
    }
    right = {key: outcome.correct for key, (outcome, _) in outcomes.items()}
    attacked_images = outcomes[pgd.name, 1.0][1]
    loss_decreased = float((masking.losses(model, attacked_images) < masking.losses(model, model.images)).mean())

    over_steps = [
        attacked(dataclasses.replace(pgd, name=f"PGD-{steps}", steps=steps))[0].correct for steps in effort.steps
    ]

    worst_of_restarts = [right[pgd.name, 1.0]]
    for restart in range(1, effort.restarts):
        again = attacked(dataclasses.replace(pgd, name="restarts"), restart)[0].correct
        worst_of_restarts.append(worst_of_restarts[-1] & again)

    whole_range = attacked(dataclasses.replace(pgd, name="the whole range", eps=reach))[0].correct

    white_box = np.all([worst_of_restarts[-1], right[fgsm.name, 1.0], right[margin.name, 1.0], *over_steps], axis=0)
    nearest = None
    if effort.fmn and model.detector is None:
        fmn = Attack(f"FMN-{effort.fmn}", "fmn", reach, effort.fmn, norm=norm)
        found, images = attacked(fmn)
        far = distances(model.images, images, ~found.correct, norm=norm)
        near = far * (1 + SLACK) <= eps
        worst.offer(np.where(near.reshape(-1, *[1] * (images.ndim - 1)), images, model.images))
        white_box = white_box & ~near
        nearest = {"attack": fmn.name, "distances": [float(d) if np.isfinite(d) else None for d in far]}
    black_box: dict[str, np.ndarray] = {}
    transfer = None
    if substitute is not None:
        source = f"transfer from {substitute.name}"
        left, made = substitute.under(dataclasses.replace(pgd, name=source), progress=report)
        shown = model.judge(made)
        worst.offer(made)
        black_box[source], nan[source] = shown.withstood, shown.nan
        transfer = {
            "from": substitute.name,
            "attack": pgd.name,
            "accuracy": float(black_box[source].mean()),
            "accuracy_of_substitute": float(left.mean()),
        }
    worst_case, fallen = None, ~clean
    if effort.worst_case:
        stages = [
            dataclasses.replace(stage, eps=eps, norm=norm)
            for stage in effort.stages(num_classes, model.images.ndim, model.detector is not None, norm)
        ]
        result = model.auto(stages, eps=eps, norm=norm, keep=True, progress=report, near=effort.near)
        assert result.adversarial is not None
        worst.offer(result.adversarial)
        nan |= {name: count for name, count in result.nan.items() if name != "clean"}
        before, fallen = np.ones_like(clean), ~result.robust
        for stage in stages:
            after = result.standing[stage.name] | ~before  # of an image that it was not run on it says nothing
            if attacks.ATTACKS[stage.kind].family == "score-based":
                black_box["Square"] = after
            else:
                white_box = white_box & after
            before = result.standing[stage.name]
    verified = verify(model, worst.images, eps=eps, norm=norm)
    robust = ~verified.fooled
    fallen = fallen | ~np.all([white_box, *black_box.values()], axis=0)
    if effort.worst_case:
        worst_case = {
            "accuracy": result.accuracy,
            "stages": [dataclasses.asdict(stage) for stage in stages],
            "fooled": dict(result.alone),
            "robust": float(robust.mean()),
        }
        if result.left_out is not None:
            worst_case |= {"near": effort.near, "left_out": int(result.left_out.sum())}
    checks = masking.run_checks(
        clean=clean,
        fgsm=right[fgsm.name, 1.0],
        pgd=right[pgd.name, 1.0],
        white_box=white_box,
        black_box=black_box,
        whole_range=whole_range,
        gradients=gradients,
        outputs=masking.outputs(model),
        loss_decreased=loss_decreased,
    )
    return {
        "format": FORMAT,
        "name": model.name,
        "images": n,
        "eps": eps,
        "norm": norm,
        "bounds": [np.asarray(bound).tolist() for bound in model.bounds],
        "seed": model.seed,
        "clean": outcome.accuracy,
        **({} if outcome.rejected is None else {"rejected": float(outcome.rejected.mean())}),
        "robust": float(robust.mean()),
        "verified": verified.as_dict(),
        "overturned": int((fallen & robust).sum()),  # fooled within an attack's program, not by the clean forward pass
        "nan": {name: count for name, count in nan.items() if count or name == "clean"},
        "over_eps": {
            "eps": [fraction * eps for fraction in effort.budgets],
            "restarts": 1,
            "accuracy": {
                attack.name: [float(right[attack.name, fraction].mean()) for fraction in effort.budgets]
                for attack in (fgsm, pgd, margin)
            }
            | ({} if nearest is None else {nearest["attack"]: _at(far, eps, effort.budgets)}),
        },
        "nearest": nearest,
        "per_class": _per_class(model.labels, outcome.correct, robust),
        "over_steps": {
            "attack": "PGD",
            "restarts": 1,
            "steps": list(effort.steps),
            "accuracy": [float(correct.mean()) for correct in over_steps],
        },
        "over_restarts": {"attack": pgd.name, "accuracy": [float(correct.mean()) for correct in worst_of_restarts]},
        "transfer": transfer,
        "worst_case": worst_case,
        "checks": [{**dataclasses.asdict(check), "suspicious": check.suspicious} for check in checks],
        "verdict": masking.verdict(
            model.name, checks, n, nan_logits(nan, n), clean=outcome.accuracy, chance=1 / num_classes
        ),
        **({"worst_images": worst.images} if keep else {}),
    }


def _at(far: np.ndarray, eps: float, budgets: Sequence[float]) -> list[float]:
    return [float(value) for value in accuracy_at(far, [fraction * eps for fraction in budgets])]


def _per_class(labels: np.ndarray, clean: np.ndarray, robust: np.ndarray) -> list[dict[str, Any]]:
    """Number of images, clean and robust accuracy of each class that has images."""
    rows = []
    for label in np.unique(labels):
        own = labels == label
        means = {"clean": float(clean[own].mean()), "robust": float(robust[own].mean())}
        rows.append({"class": int(label), "images": int(own.sum()), **means})
    return rows


class _Worst:
    """The worst image of each, of all that were offered: one that fools the model, then the highest margin."""

    def __init__(self, model: Model):
        self.model, self.images = model, np.array(model.images)
        self.wrong, self.margin = masking.danger(model, self.images)

    def offer(self, images: np.ndarray) -> None:
        """Takes those of the images `[N, ...]` that are worse."""
        wrong, margin = masking.danger(self.model, images)
        worse = (wrong & ~self.wrong) | ((wrong == self.wrong) & (margin > self.margin))
        self.images[worse], self.wrong[worse], self.margin[worse] = images[worse], wrong[worse], margin[worse]


def reach_of(model: Model, norm: str) -> float:
    """The radius of a ball around any image of the range that holds all others.

    Raises:
      ValueError: if there is none.
    """
    low, high = (np.asarray(bound, np.float64) for bound in model.bounds)
    width = np.broadcast_to(high - low, model.images.shape[1:])
    if not np.isfinite(width).all():
        raise ValueError("diagnose: bounds are infinite; they must be finite, for one check attacks in the whole range")
    return float(width.max() if norm == "linf" else np.sqrt(np.square(width).sum()))
