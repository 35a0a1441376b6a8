"""What a training step sends between devices, by the compiled program, and what follows from it for many chips.

python -m benchmarks.scaling [> benchmarks/scaling.md]

Table 4's network on 1, 2, 4 and 8 virtual CPU devices. Nothing is run and nothing is timed.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp

from benchmarks.collectives import collective_bytes
from e2sad_jax import networks, training
from e2sad_jax.reporting import provenance
from e2sad_jax.training.config import Config
from experiments.step_cost.step import Step

SHAPE, CLASSES = (28, 28, 1), 10
DEFENSES = ("natural", "fgsm", "hamm", "e2sad")
CHIPS = 256
# A chip of the plan, TPU v5e (https://cloud.google.com/tpu/docs/v5e): peak in bfloat16, one way over all its links.
PEAK, LINKS = 197e12, 200e9
SHARE = 0.3  # of the peak: an assumption, to be replaced by a measurement
HOP = 1e-6  # seconds from a chip to the next, on top of what its bytes take: an assumption too
HOPS = 2 * (CHIPS - 1)  # of a sum in a ring


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    batch = Config().batch_size
    shapes = jax.eval_shape(
        networks.create("mnist_cnn", CLASSES, SHAPE).init, jax.random.key(0), jnp.zeros((1, *SHAPE))
    )
    parameters, largest = networks.count_parameters(shapes), max(leaf.size for leaf in jax.tree.leaves(shapes))
    print("# Scaling\n")
    print(INTRODUCTION)
    print("## Measured: bytes of collectives in a step\n")
    print(f"Batch {batch}. Each entry is the sum of the results of a device's collective operations.\n")
    print("| defense | devices | images a device | all-reduce, MB | in parameters' bytes | other collectives, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    sent = {}
    for defense in DEFENSES:
        for devices in (1, 2, 4, 8):
            program = Step(Config(defense=defense, devices=devices), SHAPE, CLASSES).compiled
            kinds = collective_bytes(program)
            reduced = kinds.pop("all-reduce", 0)
            sent[defense] = reduced
            print(
                f"| {defense} | {devices} | {batch // devices} | {reduced / 1e6:.2f} | {reduced / (4 * parameters):.2f} | "
                f"{sum(kinds.values()) / 1e6:.2f} |",
                flush=True,
            )
    print(READING)
    print(f"## A plan for {CHIPS} chips\n")
    print(PLAN)
    columns = ("sums", "MB a chip", "ms for bytes", "ms for hops", "images a chip: bytes alone", "with hops")
    print(f"| defense | GFLOP an image | {' | '.join(columns)} |")
    print(f"| --- | ---: {'| ---: ' * len(columns)}|")
    crossings: list[float] = []
    for defense in DEFENSES:
        counted = training.step_counts(Config(defense=defense), SHAPE, CLASSES)
        assert counted is not None
        per_image = counted["flops"] / batch / (SHARE * PEAK)  # seconds
        # Needed, and as compiled here.
        for sums in dict.fromkeys((1, round(sent[defense] / (4 * parameters)))):
            moved = HOPS / CHIPS * 4 * parameters * sums
            for_bytes, for_hops = moved / LINKS, HOPS * HOP * sums
            alone, both = for_bytes / per_image, (for_bytes + for_hops) / per_image
            crossings.append(both)
            print(
                f"| {defense} | {counted['flops'] / batch / 1e9:.3f} | {sums} | {moved / 1e6:.1f} | {1e3 * for_bytes:.2f} | "
                f"{1e3 * for_hops:.2f} | {alone:,.0f} | {both:,.0f} |"
            )
    low, high = (CHIPS * images for images in (min(crossings), max(crossings)))
    print(
        CONCLUSION.format(
            low=low, high=high, hops=HOPS, share=largest / parameters, checkpoint=3 * 4 * parameters / 1e6
        )
    )
    e = provenance.environment()
    print(f"`{provenance.command()}`, {e['date']}, {e['hardware']}; JAX {e['jax']}; commit {e['commit']}.")


INTRODUCTION = """\
`--devices=N` splits each batch over N devices; parameters, optimiser and data set lie whole on each. What a step has to
send is the sum of the gradients over the devices, whatever the batch.
"""

READING = """
Nothing but sums is sent: no activation, no image. One sum of the gradients is needed. XLA's CPU backend makes one for each
point of the loss (clean, first, second adversarial; for Hamm's penalty also its derivative) and adds them up afterwards.
XLA's passes for accelerators include one that adds first and sends once; whether it does so here has not been seen yet.
"""

PLAN = f"""\
For a chip of {PEAK / 1e12:.0f} TFLOP/s (bfloat16) with {LINKS / 1e9:.0f} GB/s to its neighbours
([TPU v5e](https://cloud.google.com/tpu/docs/v5e)), of which these small convolutions reach {SHARE:.0%}, and
{1e6 * HOP:g} microsecond from a chip to the next (both assumptions). A sum in a ring of n moves 2 (n - 1) / n times its bytes
through each chip, one after another in 2 (n - 1) = {HOPS} hops. Compute grows with the images of a chip, bytes and hops do
not; below the batch in the last column the links decide, above it the chip. FLOPs are XLA's count. The first row of a
defense has the one sum that it needs, the second as many as were compiled here.
"""

CONCLUSION = """
So with so many chips the links decide up to a global batch of {low:,.0f} to {high:,.0f} images, far beyond what Table 4's
network needs: MNIST has 60,000. Most of that is hops. A torus of 16 by 16 that sums along rows and then along columns takes
60 of them instead of {hops}, which leaves little more than the bytes. The chips are better spent on as many runs side by
side, one a chip, which send nothing.
For a larger network the same arithmetic holds with its own two numbers: bytes of the parameters, and FLOPs an image;
convolutions do more FLOPs a parameter, so the crossing comes earlier. {share:.0%} of Table 4's
parameters stand in one dense layer.

Every host reads the whole data set and cuts the same batch, so nothing has to be fed over the network; hosts agree once a
dispatch on whether one was asked to stop, and the first writes the checkpoint ({checkpoint:.0f} MB with Adam's moments).
"""


if __name__ == "__main__":
    main()
