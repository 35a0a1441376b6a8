"""The paper's tables and figures, and studies of what it leaves open, by one command that may be stopped at any time.

python -m experiments.paper --table=all --figure=all --scale=small
"""

import sys
from typing import Any

from absl import flags

from e2sad_jax import cli, distributed
from e2sad_jax.errors import ConfigError
from e2sad_jax.training.config import DATA_DIR
from experiments.paper import plan

FLAGS = flags.FLAGS
KINDS = ("table", "figure", "study")


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    own: dict[str, Any] = {"module_name": sys.argv[0]}
    for kind in KINDS:
        choices = ", ".join([*plan.NAMES[kind], "all"])
        text = f"{kind} to reproduce; of {choices}, several with commas; none of the three: everything"
        flags.DEFINE_list(kind, [], text, **own)
    text = (
        "full: the paper's settings to the letter; small: the same models, narrower and with fewer steps, for a laptop"
    )
    flags.DEFINE_string("scale", "small", f"{text}; one of full, small", **own)
    flags.DEFINE_integer("seeds", 0, "seeds of each model; at least 1, or 0: 1 in tables, 3 in studies", **own)
    text = "files to use instead of the data sets: grey images replace MNIST, RGB images SVHN; several with commas"
    flags.DEFINE_list("data", [], text, **own)
    flags.DEFINE_string("data_dir", "", DATA_DIR, **own)
    flags.DEFINE_string("workdir", "runs/paper", "where the runs are kept, in a folder of the scale's name", **own)
    flags.DEFINE_string("results", "results", "where tables and figures go, in a folder of the scale's name", **own)
    text = "stop cleanly before so many minutes have passed; at least 0, 0: no limit"
    flags.DEFINE_float("time_budget_minutes", 0.0, text, **own)
    text = "runs that train in one step; at least 1, or 0: 1 on the CPU, 8 on accelerators if that is faster there"
    flags.DEFINE_integer("together", 0, text, **own)
    text = "what the layers compute in; one of float32, tf32, bf16"
    flags.DEFINE_string("precision", "float32", text, **own)


def _chosen(kind: str) -> list[plan.Item]:
    """The items of a kind that its flag names, in the paper's order."""
    names, given = plan.NAMES[kind], FLAGS[kind].value or ()
    for name in given:
        if name not in (*names, "all"):
            raise ConfigError(f"--{kind}={name:.100}: must be of {', '.join(names)}, all")
    return [plan.Item(kind, name) for name in names if name in given or "all" in given]


def _run() -> None:
    items = [item for kind in ("table", "study", "figure") for item in _chosen(kind)]
    if not items:
        items = [plan.Item(kind, name) for kind in ("table", "study", "figure") for name in plan.NAMES[kind]]
    if FLAGS.scale not in plan.SCALES:
        raise ConfigError(f"--scale={FLAGS.scale:.100}: must be one of {', '.join(plan.SCALES)}")
    for name in ("seeds", "time_budget_minutes", "together"):
        if not (FLAGS[name].value or 0.0) >= 0:
            raise ConfigError(f"--{name}={FLAGS[name].value}: must be at least 0")
    from experiments.paper import runner  # after the flags are known to be right: this brings Orbax along

    request = runner.Request(
        items=items,
        scale=plan.SCALES[FLAGS.scale],
        seeds=FLAGS.seeds,
        data=tuple(FLAGS.data),
        data_dir=FLAGS.data_dir,
        workdir=FLAGS.workdir,
        results=FLAGS.results,
        time_budget_minutes=FLAGS.time_budget_minutes,
        together=FLAGS.together,
        precision=FLAGS.precision,
    )
    distributed.require_backend()
    for path in runner.Reproduction(request).run():
        print(path)


if __name__ == "__main__":
    define_flags()
    cli.launch(_run, "finished models and the others' last checkpoints are safe")
