"""What a user of the wheel does first, in an environment with nothing but the wheel: `benchmarks/smoke.sh` runs it."""

import importlib.metadata
import importlib.util
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
    """A command of the wheel, run as a user runs it."""
    line = [sys.executable, "-m", f"e2sad_jax.experiments.{name}", f"--workdir={WORKDIR}", *flags]
    return subprocess.run(line, capture_output=True, text=True, check=False)


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

    done = command("digits", "--steps=30", "--eval_examples=20", "--baseline=")
    assert done.returncode == 0, done.stderr
    classifier, digits = e2sad_jax.load(WORKDIR), data.load("digits")
    right = np.asarray(classifier(digits.x_test)).argmax(1) == digits.y_test
    assert right.mean() > 0.5, right.mean()

    done = command("export")  # without the packages of its extra
    assert (done.returncode, "pip install 'e2sad_jax[export]'" in done.stderr) == (2, True), done.stderr
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jaxlib", "flax", "optax"))
    print(f"e2sad_jax {e2sad_jax.__version__} works (Python {platform.python_version()}, {versions})")


if __name__ == "__main__":
    main()
