"""FLOPs of a training step of each defense, by XLA's own count, in natural steps.

python -m benchmarks.flops

Table 4's network at batch 256. Nothing is run, so it takes a minute on any machine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from e2sad_jax import training
from e2sad_jax.reporting import provenance
from e2sad_jax.training.config import Config, preset

SETTINGS: Sequence[tuple[str, Mapping[str, Any]]] = [
    ("natural", {}),
    ("fgsm", {}),
    ("hamm", {}),
    ("e2sad", {}),
    ("e2sad", {"preset": "robust"}),
    *(("ifgsm", {"attack_steps": k}) for k in (2, 3, 30)),
    ("rs_fgsm", {}),
    ("n_fgsm", {}),
    ("free", {}),
    ("pgd", {"attack_steps": 2}),
    ("trades", {"attack_steps": 10}),
    ("grad_align", {}),
    ("input_gradient", {}),
]


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # where attacks are unrolled: XLA counts a loop's body once
    print("# FLOPs of a training step, Table 4's network, batch 256\n")
    print("| defense | GFLOP | natural steps |\n| --- | ---: | ---: |")
    natural = 0.0
    for defense, settings in SETTINGS:
        own = dict(settings)
        own = preset(own.pop("preset", "paper"), Config.eps1) | own
        flops = training.step_flops(Config(defense=defense, **own), (28, 28, 1), 10)
        natural = natural or flops
        name = ", ".join([defense, *(f"{key} {value}" for key, value in settings.items())])
        print(f"| {name} | {flops / 1e9:.1f} | {flops / natural:.3f} |", flush=True)
    e = provenance.environment()
    print(f"\n`{provenance.command()}`, {e['date']}, {e['hardware']}; JAX {e['jax']}; commit {e['commit']}.")


if __name__ == "__main__":
    main()
