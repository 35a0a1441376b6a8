"""What a user of the wheel does first, in an environment with nothing but the wheel: `benchmarks/smoke.sh` runs it.

With the argument `export` the rest of it, once the packages of that extra are there too.
"""

import importlib.metadata
import importlib.util
import json
import os
import pathlib
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

import e2sad_jax
from e2sad_jax import attacks, data, defenses, losses

WORKDIR = pathlib.Path("run")


def command(name: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """A command of the wheel's console script, run as a user runs it: "train digits"."""
    script = pathlib.Path(sys.executable).with_name("e2sad")
    line = [str(script), *name.split(), f"--workdir={WORKDIR}", *flags]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def succeed(name: str, *flags: str) -> None:
    """A command that has to end well."""
    done = command(name, *flags)
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr


def export() -> None:
    """The trained model, for other programs."""
    from jax import export
    from safetensors.numpy import load_file

    succeed("export")
    classifier, images = e2sad_jax.load(WORKDIR), jnp.asarray(data.load("digits").x_test[:5] / np.float32(255))
    folder = WORKDIR / "export"
    logits = export.deserialize(bytearray((folder / "model.stablehlo").read_bytes())).call(images)
    np.testing.assert_allclose(jax.nn.softmax(logits), classifier(images), atol=1e-4)
    count = sum(array.size for array in load_file(folder / "model.safetensors").values())
    assert count == sum(array.size for array in jax.tree.leaves(classifier.params)), count


def main() -> None:
    """Stops at the first thing that is not as it should be."""
    package = pathlib.Path(e2sad_jax.__file__).parent
    assert package.is_relative_to(sys.prefix), package
    assert (package / "py.typed").exists()
    for name in ("experiments", "benchmarks", "tests"):
        assert importlib.util.find_spec(name) is None, f"the wheel brings a package named {name}"
    licences = {str(path) for path in importlib.metadata.files("e2sad_jax") or [] if "licenses" in path.parts}
    assert {pathlib.PurePath(path).name for path in licences} == {"LICENSE", "NOTICE"}, licences

    weights = 0.1 * jax.random.normal(jax.random.key(0), (64, 3))
    images, labels = jax.random.uniform(jax.random.key(1), (4, 8, 8, 1)), losses.soft_labels(jnp.arange(4) % 3, 3, 0.25)

    def logits_fn(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1) @ weights

    moved = attacks.fgsm(lambda x: losses.cross_entropy(logits_fn(x), labels), images, eps=0.1)
    assert (losses.cross_entropy(logits_fn(moved), labels) > losses.cross_entropy(logits_fn(images), labels)).all()
    loss, _ = defenses.e2sad(logits_fn, images, labels, alpha=0.6, lam=0.1, eps1=0.3, eps2=0.1)
    assert jnp.isfinite(loss)

    targets = logits_fn(images).argmax(1)
    near = attacks.fab(logits_fn, images, targets, steps=10)
    assert (logits_fn(near).argmax(1) != targets).all()
    asked = attacks.square(
        jax.random.key(2), lambda x: losses.margin(logits_fn(x), targets), images, eps=0.3, queries=50
    )
    gained = losses.margin(logits_fn(asked), targets) - losses.margin(logits_fn(images), targets)
    assert (gained >= 0).all(), gained
    assert (gained > 0).any(), gained
    assert float(jnp.abs(asked - images).max()) <= 0.3 + 1e-6

    succeed("train digits", "--steps=30", "--eval_examples=20", "--baseline=")
    classifier, digits = e2sad_jax.load(WORKDIR), data.load("digits")
    right = np.asarray(classifier(digits.x_test)).argmax(1) == digits.y_test
    assert right.mean() > 0.5, right.mean()

    script = pathlib.Path(sys.executable).with_name("e2sad")
    listed = subprocess.run([script], capture_output=True, text=True, check=True).stdout
    for name in ("e2sad train mnist\n", "e2sad evaluate RUN\n", "e2sad compare\n", "e2sad export RUN\n", "e2sad data "):
        assert name in listed, listed

    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=1"  # the rest is a compiler's work above all
    few = ("--examples=8", "--queries=20", "--targets=1")
    succeed("evaluate", *few, "--batch_size=8", "--restarts=1", "--fab=1")
    checked = json.loads((WORKDIR / "evaluation" / "evaluation.json").read_text())
    assert "FAB" in str(checked["worst_case"]), checked
    small = ("--data=digits", "--steps=4", "--batch_size=16", "--validation_examples=8", "--apgd_steps=2")
    succeed("compare", *few, *small, "--entry=natural", f"--workdir={WORKDIR / 'compare'}")
    assert len(json.loads((WORKDIR / "compare" / "compare.json").read_text())["rows"]) == 1

    done = command("export")  # without the packages of its extra
    assert (done.returncode, "pip install 'e2sad_jax[export]'" in done.stderr) == (2, True), done.stderr
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
    print(f"e2sad_jax {e2sad_jax.__version__} works (Python {platform.python_version()}, {versions})")


if __name__ == "__main__":
    export() if sys.argv[1:] == ["export"] else main()
