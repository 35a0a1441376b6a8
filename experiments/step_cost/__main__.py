"""Measures a training step of each defense, here and in other libraries: time, FLOPs, memory.

python -m experiments.step_cost --defense=natural,fgsm,e2sad --peer=torch
"""

import sys
from typing import Any

from absl import flags

from e2sad_jax import cli
from e2sad_jax.errors import ConfigError

FLAGS = flags.FLAGS


def define_flags() -> None:
    """Defines the flags, as the main module's own: `--help` lists those."""
    cli.import_defenses()
    from e2sad_jax.defenses import DEFENSES
    from experiments.step_cost.request import DATA, iterated

    own: dict[str, Any] = {"module_name": sys.argv[0]}
    text = f"defenses; of {', '.join(DEFENSES)}, several with commas; natural is always measured"
    flags.DEFINE_list("defense", list(DEFENSES), text, **own)
    counted = iterated()
    usual = ", ".join(f"{','.join(map(str, steps))} of {defense}" for defense, steps in counted.items())
    text = f"gradient steps of {', '.join(counted)}, each a row; at least 1, several with commas; empty: {usual}"
    flags.DEFINE_list("attack_steps", [], text, **own)
    flags.DEFINE_integer("batch_size", 256, "images a step; at least 1", **own)
    flags.DEFINE_integer("devices", 1, "devices to split each batch over; at least 1, or 0: all", **own)
    flags.DEFINE_string("model", "mnist_cnn", f"network; one of {', '.join(DATA)}", **own)
    flags.DEFINE_integer("image_size", 0, "height and width of the images, 0: those of the model's data set", **own)
    text = "what the layers compute in; of float32, tf32, bf16, several with commas"
    flags.DEFINE_list("precision", ["float32"], text, **own)
    flags.DEFINE_integer("rounds", 7, "rounds in which all steps are timed in turn; at least 1", **own)
    flags.DEFINE_float("seconds", 0.1, "least time of one timing, in steps as many as that takes; at least 0", **own)
    text = "what to compare with, in float32; of xla, torch, art, several with commas; empty: none"
    flags.DEFINE_list("peer", [], text, **own)
    text = "the most that torch.compile may take for one step; above 0"
    flags.DEFINE_float("compile_seconds", 300.0, text, **own)
    text = "steps that the host starts at once; at least 1, or 0: what training takes here, 1 on the CPU, else 64"
    flags.DEFINE_integer("steps_per_dispatch", 0, text, **own)
    text = "compile for these chips, which need not be here, and time nothing; as v5e, v5e:4x4, h100x8, several with commas"
    flags.DEFINE_list("target", [], text, **own)
    flags.DEFINE_string("results", "runs/step_cost", "folder for step_cost.md, .json and .png", **own)


def _attack_steps() -> tuple[int, ...]:
    try:
        return tuple(map(int, FLAGS.attack_steps))
    except ValueError:
        given = ",".join(FLAGS.attack_steps)
        raise ConfigError(f"--attack_steps={given}: must be integers, several with commas, as 1,10,30") from None


def _run() -> None:
    import jax

    from experiments.step_cost import run
    from experiments.step_cost.request import Request

    if FLAGS.target:  # before JAX looks for devices
        jax.config.update("jax_platforms", "cpu")
    run.run(
        Request(
            defense=tuple(FLAGS.defense),
            attack_steps=_attack_steps(),
            batch_size=FLAGS.batch_size,
            devices=FLAGS.devices,
            model=FLAGS.model,
            image_size=FLAGS.image_size,
            precision=tuple(FLAGS.precision),
            rounds=FLAGS.rounds,
            seconds=FLAGS.seconds,
            peer=tuple(FLAGS.peer),
            compile_seconds=FLAGS.compile_seconds,
            steps_per_dispatch=FLAGS.steps_per_dispatch,
            target=tuple(FLAGS.target),
            results=FLAGS.results,
        )
    )


if __name__ == "__main__":
    define_flags()
    cli.launch(_run, "the same command measures again", resumes=False)
