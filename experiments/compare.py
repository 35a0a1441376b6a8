"""Every defense at the same number of updates: robust accuracy in the worst case against what training cost.

python -m experiments.compare --data=mnist
"""

import dataclasses
import sys
from typing import Any

from absl import flags

from experiments import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    from e2sad_jax.comparison import ENTRIES, PARTS
    from e2sad_jax.config import SCHEDULES

    own: dict[str, Any] = {"module_name": sys.argv[0]}
    names = ", ".join(f'"{name}"' for name in {**ENTRIES, **PARTS})
    flags.DEFINE_multi_string("entry", [], f"one to compare, may be given several times; of {names}; none: all", **own)
    flags.DEFINE_string("data", "mnist", "mnist, digits, or a file PATH.npz of images in [0, 1]", **own)
    flags.DEFINE_string("data_dir", "", "where data sets lie, empty: $E2SAD_DATA_DIR or ~/.cache/e2sad_jax", **own)
    flags.DEFINE_string("model", "digits_cnn", "network; mnist_cnn is the paper's", **own)
    flags.DEFINE_integer("steps", 2000, "training steps of each; at least 1", **own)
    flags.DEFINE_integer("batch_size", 128, "images a step; at least 1", **own)
    text = "l-infinity budget of training and attack; above 0, at most 1"
    flags.DEFINE_float("eps", 0.3, text, **own)
    flags.DEFINE_float(
        "eps_warmup", 0.5, "steps over which eps rises, below 1: so much of all steps; at least 0", **own
    )
    text = f"learning rate over all steps; one of {', '.join(SCHEDULES)}"
    flags.DEFINE_string("schedule", "cyclic", text, **own)
    flags.DEFINE_float("learning_rate", 3e-3, "Adam's, at its highest; above 0", **own)
    text = "train each as many steps as cost what --steps of e2SAD do, instead of the same number"
    flags.DEFINE_bool("equal_flops", False, text, **own)
    text = "compare what each part of e2SAD's robust preset does, instead of every defense"
    flags.DEFINE_bool("parts", False, text, **own)
    flags.DEFINE_integer("seeds", 1, "seeds of each; at least 1", **own)
    text = "training images held out to choose the best checkpoint, 0: watch 500 of the training images; at least 0"
    flags.DEFINE_integer("validation_examples", 1000, text, **own)
    flags.DEFINE_integer("examples", 500, "test images to attack, the first ones; at least 1", **own)
    flags.DEFINE_integer("queries", 1000, "queries of Square; at least 0, 0: leave it out", **own)
    flags.DEFINE_integer("apgd_steps", 50, "steps of both APGD; at least 1", **own)
    flags.DEFINE_integer("targets", 9, "wrong classes that the targeted APGD tries; at least 1", **own)
    flags.DEFINE_string("workdir", "runs/compare", "where the runs are kept", **own)
    flags.DEFINE_string("results", "results/compare", "folder for compare.md, .json and .png", **own)


def _run() -> None:
    from e2sad_jax import comparison

    values: dict[str, Any] = {f.name: FLAGS[f.name].value for f in dataclasses.fields(comparison.Request)}
    comparison.run(comparison.Request(**{**values, "entry": tuple(values["entry"] or ())}))


if __name__ == "__main__":
    define_flags()
    common.launch(_run, "finished models and the others' last checkpoints are safe")
