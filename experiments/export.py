"""A trained model for programs without this library: StableHLO, and its parameters as safetensors.

python -m experiments.export --workdir=runs/mnist-e2sad-0123abcd
"""

import dataclasses
from typing import Any

from absl import flags

from e2sad_jax import cli

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    from e2sad_jax.export import Request

    for field in dataclasses.fields(Request):
        cli.define_flag(field)


def _run() -> None:
    from e2sad_jax import export

    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in dataclasses.fields(export.Request)}
    export.run(export.Request(**values))


if __name__ == "__main__":
    define_flags()
    cli.launch(_run, "the same command with --overwrite exports anew", resumes=False)
