"""The paper's tables and figures, and studies of what it leaves open, by one command that may be stopped at any time.

python -m experiments.paper --table=all --figure=all --scale=small
"""

import sys
from collections.abc import Mapping
from typing import Any

from absl import flags

from e2sad_jax.errors import ConfigError
from experiments import common

FLAGS = flags.FLAGS
CHOICES: Mapping[str, tuple[str, ...]] = {
    "table": ("1", "2", "3", "all"),
    "figure": ("2", "3", "4", "all"),
    "study": ("second_step", "lam", "alpha", "labels", "all"),
}


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    own: dict[str, Any] = {"module_name": sys.argv[0]}
    for name, choices in CHOICES.items():
        text = f"{name} to reproduce; of {', '.join(choices)}, several with commas; none of the three: everything"
        flags.DEFINE_list(name, [], text, **own)
    text = "full: the paper's settings to the letter; small: the same models with fewer steps, for a laptop"
    flags.DEFINE_string("scale", "small", f"{text}; one of full, small", **own)
    flags.DEFINE_integer(
        "seeds", 0, "seeds of each model; at least 1, or 0: 1 in tables and figures, 3 in studies", **own
    )
    text = (
        "files to use instead of the data sets: grey images stand for MNIST, RGB images for SVHN; several with commas"
    )
    flags.DEFINE_list("data", [], text, **own)
    flags.DEFINE_string("data_dir", "", "where data sets lie, empty: $E2SAD_DATA_DIR or ~/.cache/e2sad_jax", **own)
    flags.DEFINE_string("workdir", "runs/paper", "where the runs are kept, in a folder of the scale's name", **own)
    flags.DEFINE_string("results", "results", "where tables and figures go, in a folder of the scale's name", **own)
    text = "stop cleanly before so many minutes have passed; at least 0, 0: no limit"
    flags.DEFINE_float("time_budget_minutes", 0.0, text, **own)
    text = "runs that train in one step; at least 1, or 0: 1 on the CPU, 8 on accelerators"
    flags.DEFINE_integer("together", 0, text, **own)
    text = "what the layers compute in; one of float32, tf32, bf16"
    flags.DEFINE_string("precision", "float32", text, **own)


def _chosen(name: str) -> tuple[str, ...]:
    choices, chosen = CHOICES[name], tuple(FLAGS[name].value or ())
    for value in chosen:
        if value not in choices:
            raise ConfigError(f"--{name}={value}: must be of {', '.join(choices)}")
    return choices[:-1] if "all" in chosen else tuple(value for value in choices if value in chosen)


def _run() -> None:
    from e2sad_jax.reproduction import plan

    asked = {name: _chosen(name) for name in CHOICES}
    if not any(asked.values()):
        asked = {name: choices[:-1] for name, choices in CHOICES.items()}
    if FLAGS.scale not in plan.SCALES:
        raise ConfigError(f"--scale={FLAGS.scale}: must be one of {', '.join(plan.SCALES)}")
    for name in ("seeds", "time_budget_minutes", "together"):
        if not (FLAGS[name].value or 0.0) >= 0:
            raise ConfigError(f"--{name}={FLAGS[name].value}: must be at least 0")
    from e2sad_jax.reproduction import runner  # after the flags are known to be right: this brings Orbax along

    request = runner.Request(
        tables=asked["table"],
        figures=asked["figure"],
        studies=asked["study"],
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
    for path in runner.Reproduction(request).run():
        print(path)


if __name__ == "__main__":
    define_flags()
    common.launch(_run, "finished models and the others' last checkpoints are safe")
