"""FLOPs of a training step of each defense, by XLA's own count, in natural steps.

python -m benchmarks.flops

Table 4's network at batch 256. Nothing is run, so it takes a minute on any machine.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from e2sad_jax import training
from e2sad_jax.defenses import DEFENSES
from e2sad_jax.reporting import provenance

STEPS: Mapping[str, Sequence[int]] = {
    "ifgsm": (2, 3, 30),
    "pgd": (2,),
    "atta": (1, 2),
    "trades": (1, 10),
}  # of the attack
BESIDE: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "e2sad": ({"preset": "robust"}, {"preset": "robust", "first_point": "step"}),
    "n_fgsm": ({"training_loss": "qub"},),
    "strong_adversary": ({"adversary": "alpha"},),
}  # of the defaults


def rows() -> list[tuple[str, Mapping[str, Any]]]:
    """Each defense with what is set in it."""
    found: list[tuple[str, Mapping[str, Any]]] = []
    for name, defense in DEFENSES.items():
        iterated = "attack_steps" in defense.defaults()
        found += [(name, {"attack_steps": k}) for k in STEPS.get(name, (10,))] if iterated else [(name, {})]
        found += [(name, settings) for settings in BESIDE.get(name, ())]
    return found


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # where attacks are unrolled: XLA counts a loop's body once
    print("# FLOPs of a training step, Table 4's network, batch 256\n")
    print("| defense | GFLOP | natural steps |\n| --- | ---: | ---: |")
    natural = 0.0
    for defense, settings in rows():
        own = dict(settings)
        own = training.preset(own.pop("preset", "paper"), training.Config.eps1) | own
        flops = training.step_flops(training.configure(defense=defense, **own), (28, 28, 1), 10)
        natural = natural or flops
        name = ", ".join([defense, *(f"{key} {value}" for key, value in settings.items())])
        print(f"| {name} | {flops / 1e9:.1f} | {flops / natural:.3f} |", flush=True)
    e = provenance.environment()
    print(f"\n`{provenance.command()}`, {e['date']}, {e['hardware']}; JAX {e['jax']}; commit {e['commit']}.")


if __name__ == "__main__":
    main()
