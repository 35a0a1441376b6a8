"""What the robustness of a trained model is worth: curves, the worst case over strong attacks, checks for gradient masking.

python -m experiments.evaluate --workdir=runs/mnist-e2sad-0123abcd
"""

import dataclasses
from typing import Any

from absl import flags

from e2sad_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    from e2sad_jax.runs.evaluate import Request

    for field in dataclasses.fields(Request):
        cli.define_flag(field)


def _run() -> None:
    from e2sad_jax.runs import evaluate

    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(evaluate.Request)}
    evaluate.run(evaluate.Request(**values))


if __name__ == "__main__":
    define_flags()
    cli.launch(_run, "the same command measures anew", resumes=False)
