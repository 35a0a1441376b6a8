"""AutoAttack's protocol: the worst case over strong attacks, each run on the images that are still correct."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from e2sad_jax.evaluation import _entrance
from e2sad_jax.evaluation._entrance import Apply, Bounds, Detector, Transform
from e2sad_jax.evaluation.attack import CLEAN, Attack
from e2sad_jax.evaluation.evaluator import Evaluation, Progress
from e2sad_jax.evaluation.finished import Finished
from e2sad_jax.evaluation.near import Near
from e2sad_jax.evaluation.programs import programs_of

# Croce & Hein's standard version but for FAB, which in the l-infinity ball hardly ever lowers what the other three leave.
STAGES = (
    Attack("APGD-CE", "apgd", steps=100),
    Attack("APGD-T", "apgd", steps=100, loss="targeted_dlr", targets=9),
    Attack("Square", "square", steps=5000),
)
# In the l2 ball it joins them: networks that are trained in the l-infinity ball fall to it alone there.
FAB = Attack("FAB-T", "fab", steps=100, loss="targeted_dlr", targets=9)
# For models that reject images: no weight of the detector's score suits every detector, and this attack has none.
ORTHOGONAL = Attack("Orthogonal PGD", "orthogonal_pgd", steps=100, loss="margin")


@dataclasses.dataclass(frozen=True, eq=False)
class AutoResult:
    """The result of `auto` for each image.

    Attributes:
      standing: by stage, "clean" first: bool `[N]`, whether the prediction is right after it and all before it. Of a model that
        rejects images: "clean", whether it is right and the image accepted; after a stage, whether no image was found that is
        misclassified and accepted.
      alone: by stage: how many of the images that it was run on it fooled.
      nan: by stage, "clean" first: how many of the images that it was run on have NaN logits then. They count as fooled.
      adversarial: `[N, ...]`, the input that fools the model; where none was found, the clean one. None unless kept.
      rejected: bool `[N]`, whether the model rejects the clean image; None for a model that rejects none.
      passes: by stage, "clean" first: steps or queries, summed over its images, targets, restarts and draws. An image that has
        fallen takes none in later stages, nor towards later targets; it takes all of the attack that it falls to.
      left_out: bool `[N]`, with `near` the images that stand though a stage was not run on them; None without.
    """

    standing: Mapping[str, np.ndarray]
    alone: Mapping[str, int]
    nan: Mapping[str, int]
    adversarial: np.ndarray | None
    rejected: np.ndarray | None = None
    passes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_out: np.ndarray | None = None

    @property
    def robust(self) -> np.ndarray:
        """Whether no attack fooled the model, bool `[N]`."""
        return list(self.standing.values())[-1]

    @property
    def accuracy(self) -> dict[str, float]:
        """Accuracy after each stage; the last is the robust accuracy."""
        return {name: float(correct.mean()) for name, correct in self.standing.items()}


def auto(
    apply: Apply,
    params: Any,
    images: np.ndarray | Iterable[tuple[np.ndarray, np.ndarray]],
    labels: np.ndarray | None,
    *,
    eps: float,
    norm: str = "linf",
    transform: Transform | None = None,
    bounds: Bounds = (0.0, 1.0),
    stages: Sequence[Attack] | None = None,
    batch_size: int = 250,
    seed: int = 0,
    mesh: Mesh | None = None,
    keep: bool = False,
    progress: Progress | None = None,
    detector: Detector | None = None,
    draws: int = 0,
    resume: str | os.PathLike[str] | None = None,
    near: float | None = None,
) -> AutoResult:
    """Measures robust accuracy in the worst case over several strong attacks (AutoAttack).

    APGD on the cross-entropy, APGD on the targeted DLR loss towards the nine likeliest wrong classes in turn, and Square,
    which sees no gradient. An image that has fallen is not attacked again: the others are gathered into full batches, so
    the cost of a stage falls with the images. In the l2 ball `FAB` joins them before Square.

    Args:
      apply: parameters and inputs `[N, ...]` to logits `[N, K]`.
      params: passed on to `apply`, as of `evaluate`.
      images: `[N, ...]`, before `transform`. Of a data set larger than memory an iterable of parts, `(images, labels)` each, of
        any length: the result is that of all parts in one array. Each is checked when it comes; the progress is that of a part.
      labels: `[N]`, integers in `[0, K)`; None if the parts have them.
      eps: budget in the units of the inputs, at least 0.
      norm: "linf" or "l2".
      transform: from images to what `apply` takes. None: uint8 is divided by 255, floating point stays as it is.
      bounds: range of valid inputs, as of `evaluate`.
      stages: attacks in their order; `eps` and `norm` take the place of their own. None: `STAGES`, and before the last of them
        `FAB` in the l2 ball, with `detector` `ORTHOGONAL`.
      batch_size: images at once.
      seed: seed of the random numbers, which belong to the image's place in `images`.
      mesh: devices to split batches over, if they divide them.
      keep: whether to return the adversarial inputs.
      progress: as of `evaluate`: called with what is done, a stage's name first, and the number of gradients taken since
        the last call.
      detector: of a model that rejects images, as of `evaluate`.
      draws: number of draws of a random model, as of `evaluate`.
      resume: folder in which finished batches are kept, as of `evaluate`: a call that was killed goes on from there.
      near: at least 1, for a fraction of the price: images far from the decision boundary are left out of later stages. The
        share s of the label's lead that attacks have taken tells how far: eps / s, were the logits linear. Stage k + 1 is run
        on the images within `1 + (near - 1) / k` times eps and on the control, a tenth of all images, 50 at least. If one of
        the control falls that lies beyond, every image takes all stages. 2 is a good value. None: every image takes them
        anyway.

    Returns:
      An `AutoResult`. Of a model that rejects images its `accuracy` has the pair to report: "clean", where rejections count as
      errors, and last the robust accuracy under rejection, where an image falls if an attack makes it both misclassified and
      accepted. The second may be the higher one.

    Raises:
      ValueError: if the arguments do not fit together, or a stage is not possible (its loss needs more classes, Square
        images `[N, H, W, C]`); before anything is attacked. If `near` is below 1, or given with a `detector`.

    Reference: Croce & Hein, 2020, https://arxiv.org/abs/2003.01690
    """
    eps = _entrance.as_budget("auto", eps)
    bound = _entrance.bind(apply, params)
    limits, random = _entrance.as_bounds(bounds), {"draws": draws, "seed": seed}
    programs = programs_of(bound.apply, transform, limits, params=params, detector=detector, **random)
    finished, of_all = None if resume is None else Finished(resume), 0
    parts: Iterable[tuple[Any, Any]] = images if labels is None else [(images, labels)]
    results: list[AutoResult] = []
    for number, part in enumerate(parts):
        if not isinstance(part, tuple | list) or len(part) != 2:
            raise ValueError(
                f"auto: part {number} of images is a {type(part).__name__}; it must be (images, labels), or give labels"
            )
        some, own = part
        if labels is None and not len(some):
            continue
        try:
            evaluation = Evaluation(
                programs, bound.arrays, some, own, batch_size, seed, mesh, progress, finished, first=of_all
            )
        except ValueError as error:
            raise ValueError(f"auto: part {number}: {error}") if labels is None else error from None
        if labels is None:
            evaluation.batch_size = batch_size  # of a short part too, for one program
        results.append(run_stages(evaluation, stages, eps=eps, norm=norm, keep=keep, near=near))
        of_all += len(evaluation.images)
    if not results:
        raise ValueError("auto: images has no parts; it must have at least one, (images, labels)")
    return results[0] if len(results) == 1 else _joined(results)


def joins_fab(norm: str, rejects: bool) -> bool:
    """Whether FAB is one of the default stages: in the l2 ball, unless the model rejects images, for FAB knows no detector."""
    return norm == "l2" and not rejects


def _joined(results: Sequence[AutoResult]) -> AutoResult:
    """The result of all parts of a data set."""

    def together(columns: Sequence[np.ndarray | None]) -> np.ndarray | None:
        return None if columns[0] is None else np.concatenate(columns)  # type: ignore[arg-type]

    return AutoResult(
        {name: np.concatenate([r.standing[name] for r in results]) for name in results[0].standing},
        {name: sum(r.alone[name] for r in results) for name in results[0].alone},
        {name: sum(r.nan[name] for r in results) for name in results[0].nan},
        together([r.adversarial for r in results]),
        together([r.rejected for r in results]),
        {name: sum(r.passes[name] for r in results) for name in results[0].passes},
        together([r.left_out for r in results]),
    )


def run_stages(
    evaluation: Evaluation,
    stages: Sequence[Attack] | None,
    *,
    eps: float,
    norm: str = "linf",
    keep: bool = False,
    near: float | None = None,
) -> AutoResult:
    """Runs the stages of `auto`, None for its default ones, on an `Evaluation`."""
    if stages is None:
        rejects = evaluation.programs.detector is not None
        more = (ORTHOGONAL,) if rejects else (FAB,) if joins_fab(norm, rejects) else ()
        stages = (*STAGES[:-1], *more, STAGES[-1])
    if not stages:
        raise ValueError("stages is empty; it must hold at least one evaluation.Attack, as evaluation.STAGES does")
    eps = _entrance.as_budget("auto", eps)
    attacks = [Attack("clean", CLEAN), *(dataclasses.replace(stage, eps=eps, norm=norm) for stage in stages)]
    n, watch = len(evaluation.images), None
    if near is not None:
        near = _entrance.as_budget("auto", near, argument="near")
        if near < 1:
            raise ValueError(f"auto: near={near:g}; it must be at least 1, a number of budgets")
        if evaluation.programs.detector is not None:
            raise ValueError("auto: near does not know what a detector rejects; leave it out")
        watch = Near(near, n, evaluation.seed)
    kept: list[np.ndarray] = []

    def visit(attack: Attack, places: np.ndarray, inputs: np.ndarray, withstood: np.ndarray) -> None:
        if not kept:
            kept.append(np.zeros((n, *inputs.shape[1:]), inputs.dtype))
        chosen = np.ones_like(withstood) if attack.kind == CLEAN else ~withstood
        kept[0][places[chosen]] = inputs[chosen]

    outcomes = evaluation.outcomes(attacks, cascade=True, visit=visit if keep else None, near=watch)
    standing = {name: outcome.correct for name, outcome in outcomes.items()}
    counts = [int(outcome.withstood.sum()) for outcome in outcomes.values()]
    alone = {stage.name: counts[i] - counts[i + 1] for i, stage in enumerate(stages)}
    nan, before = {}, np.ones(n, bool)
    for name, outcome in outcomes.items():
        nan[name] = int(((outcome.prediction == -1) & before).sum())
        before = outcome.withstood
    passes = {name: evaluation.passes.get(name, 0) for name in outcomes}
    left_out = None if watch is None else watch.left_out_of_any(before)
    return AutoResult(standing, alone, nan, kept[0] if keep else None, outcomes["clean"].rejected, passes, left_out)
