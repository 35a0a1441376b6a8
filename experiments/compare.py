"""Every defense at the same number of updates: robust accuracy in the worst case against what training cost.

python -m experiments.compare --data=mnist
"""

import dataclasses
from typing import Any

from absl import flags

from e2sad_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    from e2sad_jax.comparison.request import Request

    for field in dataclasses.fields(Request):
        cli.define_flag(field)


def _run() -> None:
    from e2sad_jax.comparison.request import Request
    from e2sad_jax.comparison.run import run

    values: dict[str, Any] = {f.name: FLAGS[f.name].value for f in dataclasses.fields(Request)}
    run(Request(**{**values, "entry": tuple(values["entry"] or ())}))


if __name__ == "__main__":
    define_flags()
    cli.launch(_run, "finished models and the others' last checkpoints are safe")
