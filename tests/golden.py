"""Golden values: float64 numbers of an independent PyTorch implementation, on the paper's two networks.

In float64 everything must agree to 1e-9, from the images to the last gradient. In float32 a max-pooling or ReLU within
rounding of its kink turns an image's gradient, and with it signs and all that follows: there each quantity is checked on
golden points, and images at a kink are told apart in float64 by moving the weights by some float32 roundings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import attacks, defenses, losses, networks

TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
MODEL = {"mnist": networks.MnistCNN, "svhn": networks.SvhnCNN}
# Table 4 and Table 5: kernel size, inputs and outputs of each layer in order; a dense layer has no kernel size.
LAYERS = {
    "mnist": [(5, 1, 32), (5, 32, 64), (None, 7 * 7 * 64, 1024), (None, 1024, 10)],
    "svhn": [(5, 3, 32), (5, 32, 64), (3, 64, 128), (None, 5 * 5 * 128, 512), (None, 512, 10)],
}

Arrays = dict[str, Any]


class Case(NamedTuple):
    """One file in one dtype: its values, ours under the same names, and the images that are not at a kink, bool `[N]`."""

    dtype: str
    golden: Arrays
    ours: Arrays
    smooth: np.ndarray

    def close(self, name: str, ours: str = "") -> None:
        """Ours equal to the golden value within the dtype's tolerance, relative to the largest of the array."""
        want, got = self.golden[name], self.ours[ours or name]
        assert got.dtype == self.dtype
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE[self.dtype] * np.abs(want).max())

    def each_close(self, name: str, ours: str = "") -> None:
        """As `close`, relative to every single element."""
        want, got = self.golden[name], self.ours[ours or name]
        assert got.dtype == self.dtype
        np.testing.assert_allclose(got, want, rtol=TOLERANCE[self.dtype])


def draw(name: str, seed: int, dtype: str) -> tuple[Arrays, list[tuple[str, str]]]:
    """Flax parameters as the golden README draws them, and the (layer, array) names in drawing order."""
    rs = np.random.RandomState(seed)
    layers: dict[str, dict[str, jax.Array]] = {}
    order, count = [], {"Conv": 0, "Dense": 0}
    for size, n_in, n_out in LAYERS[name]:
        kind, shape = ("Dense", (n_in, n_out)) if size is None else ("Conv", (size, size, n_in, n_out))
        layer = f"{kind}_{count[kind]}"
        count[kind] += 1
        kernel = rs.randn(*shape) * np.sqrt(2 / np.prod(shape[:-1]))
        layers[layer] = {"kernel": jnp.asarray(kernel, dtype), "bias": jnp.asarray(rs.randn(n_out) * 0.1, dtype)}
        order += [(layer, "kernel"), (layer, "bias")]
    return {"params": layers}, order


def compute(name: str, golden: Arrays, dtype: str, patch: pytest.MonkeyPatch) -> Arrays:
    """Every quantity of the golden file, by the library; the golden points are fed in for what follows them."""
    params, order = draw(name, int(golden["seed"]), dtype)
    model = MODEL[name](precision=jax.lax.Precision.HIGHEST)
    eps1, eps2, alpha, lam, delta = (float(golden[k]) for k in ("eps1", "eps2", "alpha", "lam", "delta"))
    x = jnp.asarray(golden["image_uint8"] / 255, dtype)
    label = jnp.asarray(golden["label"])
    points = {k: jnp.asarray(golden[k], dtype) for k in ("x_fgsm", "x_second", "x_ifgsm10_hard")}
    before_each_step: list[np.ndarray] = []
    fgsm, second_step = attacks.fgsm, attacks.second_step
    if dtype == "float32":  # the defenses below meet the golden points instead of their own
        patch.setattr(attacks, "fgsm", lambda *_, **__: points["x_fgsm"])
        patch.setattr(attacks, "second_step", lambda *_, **__: points["x_second"])

    def norms(gradient: Arrays) -> jax.Array:
        return jnp.stack([jnp.linalg.norm(gradient["params"][layer][array].ravel()) for layer, array in order])

    @jax.jit
    def run(params: Arrays, x: jax.Array, points: dict[str, jax.Array]) -> Arrays:
        soft, hard = losses.soft_labels(label, 10, delta), losses.soft_labels(label, 10, 0)

        def f(z: jax.Array) -> jax.Array:
            return networks.logits_fn(model, params)(z)

        def soft_loss(z: jax.Array) -> jax.Array:
            return losses.cross_entropy(f(z), soft)

        def hard_loss(z: jax.Array) -> jax.Array:
            return losses.cross_entropy(f(z), hard)

        def watched_hard_loss(z: jax.Array) -> jax.Array:
            value = hard_loss(z)
            high = value.mean().astype(jnp.float32)  # in two parts: a callback's thread has float32 alone
            low = (value.mean() - high.astype(dtype)).astype(jnp.float32)
            jax.debug.callback(lambda *v: before_each_step.append(np.sum(v, dtype=dtype)), high, low, ordered=True)
            return value

        def defended(defense: Callable[..., Any], **kwargs: Any) -> tuple[jax.Array, Arrays, jax.Array]:
            def loss(p: Arrays) -> tuple[jax.Array, Arrays]:
                return defense(networks.logits_fn(model, p), x, soft, **kwargs)

            (value, parts), gradient = jax.value_and_grad(loss, has_aux=True)(params)
            return value, parts, norms(gradient)

        x_adv = points["x_fgsm"]
        const = jax.lax.stop_gradient(f(x_adv))
        out = {
            "soft_label": soft,
            "logits": f(x),
            "loss_per_example_soft": soft_loss(x),
            "loss_per_example_hard": hard_loss(x),
            "input_grad_soft": jax.grad(lambda z: soft_loss(z).sum())(x),
            "x_fgsm": fgsm(soft_loss, x, eps=eps1),
            "logits_fgsm": f(x_adv),
            "literal_grad": jax.grad(lambda z: losses.dissimilarity(const, f(z)).sum())(x_adv),
            "second_grad_total": jax.grad(lambda z: losses.dissimilarity(f(z), f(z)).sum())(x_adv),
            "x_second": second_step(f, x_adv, eps=eps2),
            "x_literal": second_step(f, x_adv, eps=eps2, objective="literal"),
            "logits_second": f(points["x_second"]),
            "dissimilarity_per_example": losses.dissimilarity(f(x_adv), f(points["x_second"])),
            "x_ifgsm10_hard": attacks.ifgsm(watched_hard_loss, x, eps=eps1, steps=10),
        }
        out["ifgsm10_last_loss"] = hard_loss(out["x_ifgsm10_hard"]).mean()
        out["loss_at_golden_ifgsm10"] = hard_loss(points["x_ifgsm10_hard"]).mean()
        e2sad = defended(defenses.e2sad, alpha=alpha, lam=lam, eps1=eps1, eps2=eps2)
        out["e2sad_loss"], out["e2sad_parts"], out["e2sad_param_grad_norms"] = e2sad
        fgsm_at = defended(defenses.fgsm, alpha=alpha, eps=eps1)
        out["fgsm_at_loss"], out["fgsm_at_parts"], out["fgsm_at_param_grad_norms"] = fgsm_at
        hamm = defended(defenses.hamm, alpha=0, eps=eps1)
        out["hamm_loss"], hamm_parts, out["hamm_param_grad_norms"] = hamm
        out["hamm_penalty"] = hamm_parts["penalty"]
        return out

    ours = jax.tree.map(np.asarray, run(params, x, points))
    jax.effects_barrier()
    ours["ifgsm10_losses_hard"] = np.stack([*before_each_step[1:], ours["ifgsm10_last_loss"]])
    return ours


def away_from_kinks(name: str, golden: Arrays) -> np.ndarray:
    """Images whose float64 input gradient stays when every weight moves by some float32 roundings, bool `[N]`.

    Processors add up in different orders: where a ReLU or a maximum is nearly undecided, one of them decides otherwise.
    """
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        params, _ = draw(name, int(golden["seed"]), "float64")
        x, y = jnp.asarray(golden["image_uint8"] / 255), jnp.asarray(golden["soft_label"])

        @jax.jit
        def gradient(p: Arrays) -> jax.Array:
            return jax.grad(lambda z: losses.cross_entropy(MODEL[name]().apply(p, z), y).sum())(x)

        rs, tolerance = np.random.RandomState(0), 5e-5 * np.abs(golden["input_grad_soft"]).max()
        smooth = np.ones(len(x), bool)
        for _ in range(6):
            moved = gradient(jax.tree.map(lambda w: w * (1 + 1e-5 * rs.choice([-1.0, 1.0], w.shape)), params))
            smooth &= np.abs(np.asarray(moved) - golden["input_grad_soft"]).max((1, 2, 3)) < tolerance
    return smooth


def golden_case(name: str, dtype: str, shared: Callable[[str], Any]) -> Case:
    """The golden values of a network, and ours in this dtype."""
    with np.load(shared(f"golden/e2sad_{name}_0.npz")) as file:
        golden = dict(file)
    smooth = away_from_kinks(name, golden) if dtype == "float32" else np.ones(16, bool)
    strict = jax.numpy_dtype_promotion("standard" if dtype == "float64" else "strict")
    with jax.enable_x64(dtype == "float64"), strict, pytest.MonkeyPatch.context() as patch:
        return Case(dtype, golden, compute(name, golden, dtype, patch), smooth)


class GoldenValues:
    """The tests, of a fixture `case`."""

    @pytest.mark.parametrize(
        "name",
        [
            "soft_label",
            "logits",
            "loss_per_example_soft",
            "loss_per_example_hard",
            "logits_fgsm",
            "second_grad_total",
            "logits_second",
            "dissimilarity_per_example",
        ],
    )
    def test_value(self, case, name):
        case.close(name)

    def test_input_gradient(self, case):
        assert case.smooth.sum() >= 12
        want, got = case.golden["input_grad_soft"], case.ours["input_grad_soft"]
        atol = TOLERANCE[case.dtype] * np.abs(want).max()
        np.testing.assert_allclose(got[case.smooth], want[case.smooth], rtol=0, atol=atol)

    @pytest.mark.parametrize(("point", "gradient"), [("x_fgsm", "input_grad_soft"), ("x_second", "second_grad_total")])
    def test_point(self, case, point, gradient):
        """Signs are compared where the golden gradient is not within rounding of zero; in float64 everywhere."""
        size = np.abs(case.golden[gradient])
        clear = size > (1e-5 * size.max() if case.dtype == "float32" else 0)
        assert clear.mean() > 0.8
        if point == "x_fgsm":
            clear &= case.smooth[:, None, None, None]
            assert clear.mean() > 0.6
        np.testing.assert_allclose(
            case.ours[point][clear], case.golden[point][clear], rtol=0, atol=TOLERANCE[case.dtype]
        )

    def test_literal_gradient_vanishes(self, case):
        """Eq. 7's trap: nothing but rounding noise, thousands of times below the gradient through both arguments."""
        noise, signal = (
            np.abs(case.ours["literal_grad"]).max(),
            np.abs(case.golden["second_grad_total"]).max(),
        )
        assert noise < {"float32": 1e-5, "float64": 1e-14}[case.dtype] * signal
        assert case.golden["second_grad_literal_max_abs"] < 1e-14 * signal

    def test_literal_objective_is_another_point(self, case):
        """The sign of the noise is no direction: it agrees with the gradient's as coins do, never as `total` does."""
        move = np.sign(case.ours["x_literal"] - case.golden["x_fgsm"].astype(case.dtype))
        agreement = (move == np.sign(case.golden["second_grad_total"])).mean()
        assert agreement < 0.7

    @pytest.mark.parametrize("name", ["e2sad", "fgsm_at", "hamm"])
    def test_defense(self, case, name):
        """End to end in float64: the defense finds its own points from the clean images."""
        case.each_close(f"{name}_loss")
        case.each_close(f"{name}_param_grad_norms")

    def test_hamm_penalty(self, case):
        case.each_close("hamm_penalty")

    def test_parts(self, case):
        """Parts are batch means before their weights."""
        parts, rtol = case.ours["e2sad_parts"], TOLERANCE[case.dtype]
        clean, d = case.golden["loss_per_example_soft"].mean(), case.golden["dissimilarity_per_example"].mean()
        alpha = case.golden["alpha"]
        adversarial = (case.golden["fgsm_at_loss"] - alpha * clean) / (1 - alpha)
        np.testing.assert_allclose(parts["clean"], clean, rtol=rtol)
        np.testing.assert_allclose(parts["dissimilarity"], d, rtol=rtol)
        np.testing.assert_allclose(parts["adversarial"], adversarial, rtol=rtol)
        np.testing.assert_allclose(case.ours["fgsm_at_parts"]["adversarial"], adversarial, rtol=rtol)

    def test_ifgsm(self, case):
        """Ten steps in float64; in float32 the first, after which kinks decide, and the loss at the golden end."""
        want, got, rtol = case.golden["ifgsm10_losses_hard"], case.ours["ifgsm10_losses_hard"], TOLERANCE[case.dtype]
        np.testing.assert_allclose(case.ours["loss_at_golden_ifgsm10"], want[-1], rtol=rtol)
        np.testing.assert_allclose(got[0], want[0], rtol=rtol)
        assert got.shape == want.shape == (10,)
        if case.dtype == "float64":
            np.testing.assert_allclose(got, want, rtol=rtol)
            np.testing.assert_allclose(case.ours["x_ifgsm10_hard"], case.golden["x_ifgsm10_hard"], rtol=0, atol=rtol)
