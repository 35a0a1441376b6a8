"""Models from files that jax.export wrote, with or without their gradient, of any batch or of one size."""

import functools

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax.attacks import ATTACKS
from e2sad_jax.errors import DataError
from e2sad_jax.evaluation import Attack
from e2sad_jax.evaluation.exported import stablehlo
from tests.unit.evaluation.conftest import SHAPE, N

STAGES = (
    Attack("APGD-CE", "apgd", steps=5),
    Attack("FAB-T", "fab", steps=3, loss="targeted_dlr", targets=2),
    Attack("Square", "square", steps=30),
)


def write(path, w, *, size=None, gradient=True):
    n = (size,) if size else jax.export.symbolic_shape("N")

    def function(x):
        return jnp.tanh(x.reshape(x.shape[0], -1) - 0.5) @ w

    exported = jax.export.export(jax.jit(function))(jax.ShapeDtypeStruct((*n, *SHAPE), jnp.float32))
    path.write_bytes(exported.serialize(vjp_order=int(gradient)))
    return function


@pytest.mark.parametrize("size", [None, 1, 7])
def test_attacks_find_what_they_find_in_the_function_itself(problem, tmp_path, size):
    path = tmp_path / "model.stablehlo"
    function = write(path, problem.w, size=size)
    given = {"labels": problem.labels, "batch_size": 16}
    model = evaluation.of_stablehlo(path, problem.images, **given)
    assert model.name == "model.stablehlo"
    results = [
        m.auto(STAGES, eps=0.02, keep=True) for m in (model, evaluation.of_function(function, problem.images, **given))
    ]
    assert 0 < results[0].robust.sum() < N - 10
    np.testing.assert_array_equal(results[0].robust, results[1].robust)
    np.testing.assert_allclose(results[0].adversarial, results[1].adversarial, atol=1e-5)


@pytest.mark.parametrize("size", [None, 7])
def test_every_attack_takes_it(problem, tmp_path, size):
    """Among them those that call it, or its gradient, under `vmap`, for which `jax.export` has no rule."""
    path = tmp_path / "model.stablehlo"
    function, exported = write(path, problem.w, size=size), stablehlo(path)
    x, labels, key = jnp.asarray(problem.images[:8]), jnp.asarray(problem.labels[:8]), jax.random.key(0)

    def run(name, logits_fn):
        method = ATTACKS[name]
        few = {"steps": 2} if method.counts else {}
        return method.run(logits_fn, x, labels, key=key, eps=2, norm=method.norms[0], **few)

    for name in ATTACKS:
        assert jax.eval_shape(functools.partial(run, name, exported)).shape == x.shape, name
    for name in ("deepfool", "few_pixels"):
        found, own = (jax.jit(functools.partial(run, name, one))() for one in (exported, function))
        np.testing.assert_allclose(found, own, atol=1e-5)
        assert (jnp.abs(found - x).max((1, 2, 3)) > 0).sum() > 2, name


def test_without_its_gradient_it_takes_attacks_that_need_none(problem, tmp_path):
    path = tmp_path / "model.stablehlo"
    write(path, problem.w, gradient=False)
    model = evaluation.of_stablehlo(path, problem.images, problem.labels)
    assert model.auto(STAGES[2:], eps=0.05).robust.sum() < model.clean().sum()
    with pytest.raises(DataError, match=r"was exported without its gradient; serialize\(vjp_order=1\)"):
        model.auto(STAGES[:1], eps=0.05)


def test_other_files_are_refused(problem, tmp_path):
    path = tmp_path / "model.stablehlo"
    with pytest.raises(DataError, match="No such file"):
        evaluation.of_stablehlo(path, problem.images, problem.labels)
    path.write_bytes(b"no such thing" * 9)
    with pytest.raises(DataError, match=r"model\.stablehlo: is no file that jax.export serialized; write it with"):
        evaluation.of_stablehlo(path, problem.images, problem.labels)
    two = jax.export.export(jax.jit(lambda w, x: x @ w))(*(jax.ShapeDtypeStruct((3, 3), jnp.float32),) * 2)
    path.write_bytes(two.serialize())
    with pytest.raises(DataError, match=r"takes .* and returns .*; it must take images \[N, ...\] alone"):
        evaluation.of_stablehlo(path, problem.images, problem.labels)
    for function, message in (
        (lambda x: jnp.zeros((7, 3, 5)) + x.sum(), r"returns \[\('7', '3', '5'\)\]; it must take"),
        (lambda x: jnp.zeros((14, 5)) + x.sum(), "returns 14 rows for 7 images; it must return one for each"),
    ):
        shape = jax.ShapeDtypeStruct((7, *SHAPE), jnp.float32)
        path.write_bytes(jax.export.export(jax.jit(function))(shape).serialize())
        with pytest.raises(DataError, match=message):
            evaluation.of_stablehlo(path, problem.images, problem.labels)
    elsewhere = jax.export.export(jax.jit(lambda x: x.reshape(7, -1)), platforms=["tpu"])
    path.write_bytes(elsewhere(jax.ShapeDtypeStruct((7, *SHAPE), jnp.float32)).serialize())
    with pytest.raises(
        DataError, match=r"was exported for tpu, and JAX runs on cpu; export it with platforms=\['cpu'\]"
    ):
        evaluation.of_stablehlo(path, problem.images, problem.labels)
