"""Exported models in a process without this library: logits and gradients of each kind of network."""

import os
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import export
from tests.unit.test_export import (
    CASES,
    CLOSE,
    LABELS,
    check_safetensors,
    classifier,
    close,
    gradient_of_jaxs_own,
    images,
    logits,
    narrow,  # noqa: F401
)

# All that another process knows: the file, and JAX.
ELSEWHERE = """
import sys
import numpy as np
import jax, jax.export, jax.numpy as jnp

folder, names = sys.argv[1], sys.argv[2:]
results = {}
for name in names:
    with open(f"{folder}/{name}.stablehlo", "rb") as file:
        model = jax.export.deserialize(bytearray(file.read()))
    given = np.load(f"{folder}/{name}.npz")

    def loss(x):
        logits = model.call(x)
        return -jax.nn.log_softmax(logits)[jnp.arange(len(x)), given["labels"]].sum(), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(given["images"])
    results |= {f"{name}.logits": logits, f"{name}.gradient": gradient}
results["one"] = model.call(given["images"][:1])
assert not {"e2sad_jax", "flax", "experiments"} & set(sys.modules)
np.savez(f"{folder}/results.npz", **results)
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What a process without this library makes of each of `CASES`."""
    folder = tmp_path_factory.mktemp("elsewhere")
    for case in CASES:
        (folder / f"{case}.stablehlo").write_bytes(export.to_stablehlo(classifier(case)))
        np.savez(folder / f"{case}.npz", images=images(case), labels=LABELS)
    command = [sys.executable, "-c", ELSEWHERE, str(folder), *CASES, "cnn"]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with np.load(folder / "results.npz") as results:
        return dict(results)


@pytest.mark.parametrize("case", CASES)
def test_stablehlo_is_the_network_and_its_gradient_for_any_number_of_images(case, elsewhere, monkeypatch):
    """The gradient is JAX's own, of the network made of JAX's own operations."""
    of, x = classifier(case), jnp.asarray(images(case))
    want = logits(of, images(case))
    assert np.ptp(want, axis=0).min() > 0, "images must matter"
    close(elsewhere[f"{case}.logits"], want, CLOSE[case])
    close(elsewhere["one"], logits(classifier("cnn"), images("cnn")[:1]), CLOSE["cnn"])
    close(elsewhere[f"{case}.gradient"], gradient_of_jaxs_own(of, x, monkeypatch), 3 * CLOSE[case])


@pytest.mark.parametrize("case", sorted(CASES.keys() - {"cnn"}))
def test_safetensors_hold_the_parameters_of_other_networks_too(case, tmp_path):
    check_safetensors(case, tmp_path)
