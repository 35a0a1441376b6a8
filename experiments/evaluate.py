"""What the robustness of a trained model is worth: curves, the worst case over strong attacks, checks for gradient masking.

python -m experiments.evaluate --workdir=runs/mnist-e2sad-0123abcd
"""

import dataclasses
from typing import Any

from absl import flags

from . import common

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    from e2sad_jax.diagnosis.run import Request

    for field in dataclasses.fields(Request):
        common.define_flag(field)


def _run() -> None:
    from e2sad_jax.diagnosis import run

    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(run.Request)}
    run.run(run.Request(**values))


if __name__ == "__main__":
    define_flags()
    common.launch(_run, "the same command measures anew", resumes=False)
