"""What the robustness of a trained model is worth: curves, the worst case over strong attacks, checks for gradient masking.

python -m experiments.evaluate --workdir=runs/mnist-e2sad-0123abcd
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from experiments import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    own: dict[str, Any] = {"module_name": sys.argv[0]}
    flags.DEFINE_string("workdir", "", "folder of the run to judge", **own)
    flags.DEFINE_string("which", "last", "its checkpoint; one of last, best", **own)
    text = "instead of a run: MODULE:FUNCTION, from images in [0, 1] to logits, in JAX; needs --data and --eps"
    flags.DEFINE_string("predict", "", text, **own)
    flags.DEFINE_string("data", "", "data set whose test images are taken; empty: the run's own", **own)
    flags.DEFINE_string("data_dir", "", "where data sets lie; empty: as the run had it", **own)
    flags.DEFINE_float("eps", 0.0, "l-infinity budget in the network's units; 0: the run's eps1", **own)
    flags.DEFINE_integer("examples", 500, "test images, the first ones; 0: all", **own)
    flags.DEFINE_integer("batch_size", 250, "images at once; at least 1", **own)
    flags.DEFINE_integer("seed", 0, "seed of the attacks; at least 0", **own)
    text = "folder of a run, naturally trained say, whose adversarial images are tried on the judged; empty: none"
    flags.DEFINE_string("transfer_from", "", text, **own)
    flags.DEFINE_bool("auto", True, "the worst case over APGD-CE, targeted APGD-DLR and Square", **own)
    flags.DEFINE_integer("queries", 5000, "queries of Square; 0: leave it out", **own)
    flags.DEFINE_integer("targets", 9, "wrong classes that the targeted APGD tries; at least 1", **own)
    flags.DEFINE_integer("fab", 0, "wrong classes that FAB tries on what stands before Square; 0: leave it out", **own)
    flags.DEFINE_integer("restarts", 5, "random starts of PGD; at least 1", **own)
    flags.DEFINE_string("results", "", "folder for evaluation.md, .json and .png; empty: WORKDIR/evaluation", **own)


def _run() -> None:
    from e2sad_jax.diagnosis import run

    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(run.Request)}
    run.run(run.Request(**values))


if __name__ == "__main__":
    define_flags()
    common.launch(_run, "the same command measures anew", resumes=False)
