"""Evaluation under JAX's other settings, and of models in the l2 ball, as a whole."""

import dataclasses
import sys

import jax
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax._compile import pure
from e2sad_jax.evaluation import Attack, Effort, auto, diagnose, of_function
from e2sad_jax.runs import evaluate
from tests.unit.evaluation.conftest import linear, problem  # noqa: F401  # a fixture

EPS = 0.02
FGSM = Attack("FGSM", "fgsm", EPS, 1)
LITTLE = Effort(budgets=(1.0,), steps=(1,), restarts=2, pgd_steps=1, apgd_steps=1, queries=3, targets=1, fab=1, fmn=1)
kept = pure(lambda params, x: linear(params, x))


@pytest.fixture(scope="module")
def few(problem, all_unoptimized):  # noqa: F811
    return problem._replace(images=problem.images[4:12], labels=problem.labels[4:12].astype(np.int32))


def all_measures(few):
    """Accuracies by every entrance."""
    model = of_function(lambda x: linear(few.w, x), few.images, few.labels, batch_size=3)
    result = diagnose(model, eps=EPS, effort=LITTLE, substitute=model)
    outcomes = evaluation.evaluate(kept, few.w, few.images, few.labels, [FGSM], batch_size=3)
    shown = evaluation.transfer((kept, few.w), [(kept, few.w)], few.images, few.labels, FGSM)
    worst = auto(kept, few.w, few.images, few.labels, eps=EPS, stages=[FGSM], batch_size=3)
    accuracies = [outcomes["FGSM"].accuracy, shown[0].accuracy, worst.robust.mean()]
    return [result["robust"], result["clean"], *result["worst_case"]["accuracy"].values(), *accuracies]


@pytest.fixture(scope="module")
def plain(few):
    return all_measures(few)


def test_every_transfer_is_explicit(few, plain):
    weights = jax.device_put(few.w)  # the model's own
    with jax.transfer_guard("disallow"):
        assert all_measures(few._replace(w=weights)) == plain


def test_nothing_of_ours_is_nan_or_infinite(few, plain):
    with jax.debug_nans(True), jax.debug_infs(True):
        assert all_measures(few) == plain


def test_without_jit(few):
    stages = (FGSM, Attack("PGD", "pgd", steps=2), Attack("APGD", "apgd", steps=2), Attack("Square", "square", steps=2))
    with_jit, without = (
        (lambda: auto(kept, few.w, few.images, few.labels, eps=EPS, stages=stages, keep=True)) for _ in range(2)
    )
    expected = with_jit()
    with jax.disable_jit():
        found = without()
    assert found.accuracy == expected.accuracy
    np.testing.assert_allclose(found.adversarial, expected.adversarial, atol=1e-5)


def test_the_command_in_the_l2_ball(tmp_path, monkeypatch, capsys):
    """Curves, worst case, checks, titles and files; the worst images are read back bit for bit."""
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(16, 4)).astype(np.float32), rng.integers(60, 196, (20, 4, 4, 1)).astype(np.uint8)
    y = (x.reshape(20, 16) / np.float32(255) @ w).argmax(1)
    np.savez(tmp_path / "test.npz", x_test=x, y_test=y, num_classes=4)
    np.save(tmp_path / "w.npy", w)
    (tmp_path / "l2model.py").write_text(
        "import numpy as np\nw = np.load('w.npy')\ndef predict(x):\n    return x.reshape(len(x), -1) @ w\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    effort = dataclasses.replace(LITTLE, pgd_steps=10, apgd_steps=10, queries=100, targets=3)
    monkeypatch.setattr(evaluate, "Effort", lambda **given: effort)
    asked = {"predict": "l2model:predict", "eps": 0.1, "norm": "l2"}
    result = evaluate.run(evaluate.Request(**asked, data="test.npz", results="a", save_images=True, quantize=True))
    out = capsys.readouterr().out
    assert result["norm"] == "l2"
    assert {(stage["norm"], stage["eps"]) for stage in result["worst_case"]["stages"]} == {("l2", 0.1)}
    assert "l2 eps 0.1" in out
    distance = np.array(
        [
            min((f[k] - g) / np.linalg.norm(np.float64(w[:, k] - w[:, j])) for j, g in enumerate(f) if j != k)
            for f, k in zip(x.reshape(20, 16) / 255 @ np.float64(w), y, strict=True)
        ]
    )
    assert (distance > 0.102).mean() <= result["robust"] <= (distance > 0.098).mean()
    for name, accuracy in (("worst_images", result["robust"]), ("worst_images_8bit", result["quantized"])):
        with np.load(tmp_path / "a" / f"{name}.npz") as saved:
            images = saved["x_test"] if saved["x_test"].dtype == np.float32 else saved["x_test"] / np.float32(255)
        change = np.linalg.norm((images - x / np.float32(255)).reshape(20, -1), axis=1)
        assert 0.09 < change.max() <= 0.1
        again = evaluate.run(evaluate.Request(**asked, data=f"a/{name}.npz", results="b", auto=False))
        assert again["clean"] == accuracy
