"""Parts of attacks, for your own attacks and defenses: balls, checks, keys, gradients, loops.

* the ball: `ball`, `linf_ball`, `LinfBall`, `L2Ball` (`project`, `steepest`, `sample`, `contains`), `project_and_cast`,
  `cast_inside`;
* argument checks: `checks.threat_model`, `checks.images`, `checks.budget`, `checks.number`, `checks.classes`;
* image by image: `input_gradient`, `losses_and_gradient`, `nearest_boundary`, `per_image_keys`, `threefry`, `broadcast`,
  `select`;
* several candidates: `Candidate.keep_worst`, `score`;
* loops: `repeat` and its kin, `ascend`;
* whose pass it is: `as_attack`, `told_apart`, `within_attack`;
* types: `LossFn`, `LogitsFn`, `Bounds`.
"""

from e2sad_jax.attacks import _checks as checks
from e2sad_jax.attacks._ascent import ascend
from e2sad_jax.attacks._ball import NORMS, Ball, L2Ball, LinfBall, ball, cast_inside, linf_ball, project_and_cast
from e2sad_jax.attacks._best import Candidate, score
from e2sad_jax.attacks._checks import is_number
from e2sad_jax.attacks._loops import each, repeat, repeat_long, repeat_while
from e2sad_jax.attacks._numerics import (
    as_float32,
    broadcast,
    finite,
    input_gradient,
    length,
    like_sharded,
    linearise,
    losses_and_gradient,
    nearest_boundary,
    norms,
    per_image,
    per_image_keys,
    select,
    threefry,
    unit,
)
from e2sad_jax.attacks._types import Bounds, LogitsFn, LossFn
from e2sad_jax.attacks._within import as_attack, told_apart, within_attack

__all__ = [
    "NORMS",
    "Ball",
    "Bounds",
    "Candidate",
    "L2Ball",
    "LinfBall",
    "LogitsFn",
    "LossFn",
    "as_attack",
    "as_float32",
    "ascend",
    "ball",
    "broadcast",
    "cast_inside",
    "checks",
    "each",
    "finite",
    "input_gradient",
    "is_number",
    "length",
    "like_sharded",
    "linearise",
    "linf_ball",
    "losses_and_gradient",
    "nearest_boundary",
    "norms",
    "per_image",
    "per_image_keys",
    "project_and_cast",
    "repeat",
    "repeat_long",
    "repeat_while",
    "score",
    "select",
    "threefry",
    "told_apart",
    "unit",
    "within_attack",
]
