"""Every entrance takes its arguments in any usual form, and refuses in one line what cannot be right."""

import gc
import weakref

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from e2sad_jax import evaluation
from e2sad_jax._compile import pure
from e2sad_jax.errors import DataError
from e2sad_jax.evaluation import Attack, Effort, Model, auto, diagnose, of_function
from tests.unit.evaluation.conftest import K, linear

EPS, N = 0.02, 8
FGSM = Attack("FGSM", "fgsm", EPS, 1)
LITTLE = Effort(budgets=(1.0,), steps=(), restarts=1, pgd_steps=1, fmn=1, worst_case=False)
kept = pure(lambda params, x: linear(params, x))


@pytest.fixture(scope="module")
def few(problem):
    return problem._replace(images=problem.images[4:12], labels=problem.labels[4:12].astype(np.int32))


def ask(few, **changes):
    """`auto` with one cheap stage."""
    given = {"apply": kept, "params": few.w, "images": few.images, "labels": few.labels, "stages": [FGSM], "eps": EPS}
    return auto(**{**given, **changes})


@pytest.fixture(scope="module")
def right(few):
    return ask(few).robust


@pytest.mark.parametrize(
    "form",
    [jnp.asarray, list, np.uint8, np.int64, np.uint64],
    ids=["jax", "list", "uint8", "int64", "uint64"],
)
def test_labels_of_any_form(few, right, form):
    labels = form(few.labels)
    np.testing.assert_array_equal(ask(few, labels=labels).robust, right)
    outcome = evaluation.evaluate(kept, few.w, few.images, labels, [FGSM])["FGSM"]
    np.testing.assert_array_equal(outcome.correct, right)
    shown = evaluation.transfer((kept, few.w), [(kept, few.w)], few.images, labels, FGSM)
    np.testing.assert_array_equal(shown[0].correct, right)
    model = Model("m", kept, few.w, few.images, labels)
    np.testing.assert_array_equal(model.under(FGSM)[0], right)
    assert model.labels.dtype == np.int32


@pytest.mark.parametrize(
    "form",
    [np.float64, jnp.asarray, np.ndarray.tolist],
    ids=["float64", "jax", "list"],
)
def test_images_of_any_form(few, right, form):
    """Warnings are errors here, JAX's of a float64 that it does not have among them."""
    images = form(few.images)
    np.testing.assert_array_equal(ask(few, images=images, bounds=[0, 1], batch_size=np.int64(3)).robust, right)
    assert Model("m", kept, few.w, images, few.labels).images.dtype == np.float32
    assert of_function(lambda x: linear(few.w, x), images, few.labels).clean().tolist() == [False] + [True] * 7


def test_with_64_bits_images_stay_float64(few, right, standard_promotion):
    with jax.enable_x64(True):
        images = np.float64(few.images)
        result = ask(few, params=np.float64(few.w), images=images, keep=True)
        assert result.adversarial.dtype == np.float64
        assert np.abs(result.adversarial - images).max() <= EPS * (1 + 1e-12), "not the budget's float32"
        np.testing.assert_array_equal(result.robust, right)
        assert of_function(lambda x: linear(np.float64(few.w), x), images, few.labels).images.dtype == np.float64


def test_a_model_of_bytes_is_attacked_as_floats(few):
    model = Model("m", kept, few.w, np.uint8(few.images * 255), few.labels)
    assert 0 < np.abs(model.under(FGSM)[1] - np.uint8(few.images * 255) / np.float32(255)).max() <= EPS + 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": float("inf")}, "auto: eps=inf; it must be a number, finite and at least 0"),
        ({"eps": None}, "auto: eps=None; it must be a number"),
        ({"eps": "0.1"}, "auto: eps='0.1'; it must be a number"),
        ({"bounds": (1, 0)}, r"bounds=\(1, 0\); it must be \(lower, upper\)"),
        ({"bounds": (0, np.nan)}, r"bounds=\(0, nan\); it must be \(lower, upper\)"),
        ({"bounds": 1}, r"bounds=1; it must be \(lower, upper\)"),
        (
            {"bounds": (np.zeros(3), np.ones(3))},
            r"bounds have shape \(3,\); .* broadcast against one image \(4, 4, 1\)",
        ),
        ({"batch_size": 0}, "batch_size=0; it must be at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5; it must be at least 1, a whole number"),
        ({"seed": -1}, r"seed=-1; it must be in \[0, 4294967295\]"),
        ({"stages": []}, "stages is empty"),
        ({"labels": np.eye(K)[[0] * N]}, r"labels \(8, 5\) float64 must be one integer .* take labels.argmax\(1\)"),
        ({"labels": np.full(N, 2**40 + 1)}, "labels reach from .*; the model has 5 classes: labels count from 0"),
        (
            {"images": lambda x: x * 255},
            r"8 of 8 images reach outside bounds=\(0, 1\), .* divide pixels of 0..255 by 255",
        ),
        (
            {"images": lambda x: (x - 0.5) / 0.2},
            r"normalisation belongs inside the model: .* evaluation.wrap\(apply, mean=..., std=...\)",
        ),
        ({"images": lambda x: x * np.where(np.arange(N) == 2, np.nan, 1)[:, None, None, None]}, "1 of 8 .* remove NaN"),
        ({"images": lambda x: x[:, :2]}, r"the model fails on images of shape \(2, 2, 4, 1\) float32, .*dot_general"),
        ({"images": lambda x: x[0, 0, 0, 0]}, r"images have shape \(\); it must be \[N, ...\]"),
        ({"images": lambda x: x.astype(object)}, "images are object; they must be uint8 or floating"),
        ({"transform": lambda x: 5 * (x - 0.5)}, "8 of 8 images reach outside .* normalisation belongs inside"),
        ({"transform": lambda x: x[:, 0, 0, 0] > 0}, r"transform returns shape \(2,\) bool; it must return"),
        (
            {"apply": np.zeros(3), "params": linear},
            "apply is a ndarray; it must be a function: the order is apply, params",
        ),
        ({"apply": lambda p, x: (linear(p, x), 1)}, r"returns a tuple .* as lambda x: f\(x\)\[0\]"),
        ({"apply": lambda p, x: {"logits": linear(p, x)}}, r"returns a dict .* as lambda x: f\(x\)\['logits'\]"),
        ({"apply": lambda p, x: None}, r"returns None for 2 images; it must return logits \(2, K\)"),
        ({"apply": lambda p, x: linear(p, x)[:, None]}, r"shape \(2, 1, 5\) .* logits.reshape\(len\(x\), -1\)"),
        ({"apply": lambda p, x: linear(p, x)[:, 0]}, r"shape \(2,\) for 2 images; .* losses.binary_logits"),
        ({"apply": lambda p, x: linear(p, x)[:, :1]}, r"shape \(2, 1\) for 2 images; .* losses.binary_logits"),
        ({"apply": lambda p, x: linear(p, x).argmax(1)[:, None] + jnp.arange(3)[None]}, "int32 .* not classes"),
    ],
)
def test_what_cannot_be_right_is_one_line(few, changes, message):
    changes = {k: v(few.images) if k == "images" and callable(v) else v for k, v in changes.items()}
    with pytest.raises(ValueError, match=message) as caught:
        ask(few, **changes)
    assert "\n" not in str(caught.value)


def test_other_entrances_refuse_the_same(few):
    pair, model = (linear, few.w), of_function(lambda x: linear(few.w, x), few.images, few.labels)
    for eps in (float("nan"), float("inf"), None, "0.1", 0):
        with pytest.raises(ValueError, match=r"diagnose: eps=.*; it must be a number, finite and above 0"):
            diagnose(model, eps=eps)
    with pytest.raises(ValueError, match="norm='l1'; it must be one of linf, l2"):
        diagnose(model, eps=0.1, norm="l1")
    with pytest.raises(ValueError, match="bounds are infinite; they must be finite"):
        diagnose(Model("m", *pair, few.images, few.labels, (-np.inf, np.inf)), eps=0.1)
    with pytest.raises(ValueError, match="substitute has other images"):
        diagnose(model, eps=0.1, substitute=of_function(lambda x: linear(few.w, x), few.images / 2, few.labels))
    with pytest.raises(ValueError, match=r"reach outside bounds=\(0, 1\)"):
        Model("m", *pair, few.images * 2, few.labels)
    with pytest.raises(ValueError, match="attacks is empty"):
        evaluation.evaluate(*pair, few.images, few.labels, [])
    with pytest.raises(ValueError, match="the model has 3 classes"):
        evaluation.transfer(pair, [(linear, few.w[:, :3])], few.images, few.labels, FGSM)
    with pytest.raises(DataError, match=r"^m: the model returns a tuple .*f\(x\)\[0\]"):
        of_function(lambda x: (linear(few.w, x),), few.images, few.labels, name="m")
    outside = evaluation.predict(*pair, few.images * 3)
    np.testing.assert_array_equal(outside, linear(few.w, few.images * 3).argmax(1), "nothing is attacked")
    with pytest.raises(ValueError, match="reach outside"):
        evaluation.predict(*pair, few.images * 3, bounds=(0, 1))


class Unhashable(eqx.Module):
    """Arrays in a callable: JAX cannot hash it."""

    w: jax.Array

    def __call__(self, *arguments):
        return linear(self.w, arguments[-1])


def test_callables_need_no_hash(few, right):
    model = Unhashable(jnp.asarray(few.w))
    with pytest.raises(TypeError, match="unhashable"):
        hash(model)
    np.testing.assert_array_equal(ask(few, apply=model, params=None).robust, right)
    np.testing.assert_array_equal(of_function(model, few.images, few.labels).under(FGSM)[0], right)


def test_parameters_may_have_leaves_that_are_no_arrays(few):
    """As an Equinox module, whose activation function is one, and its dropout's rate and mode."""
    key = jax.random.key(0)
    mlp = eqx.nn.Sequential([eqx.nn.MLP(16, K, 4, 1, key=key), eqx.nn.Dropout(0.5, inference=True)])

    def apply(model, x):
        return jax.vmap(model)(x.reshape(len(x), -1))

    labels = np.asarray(apply(mlp, few.images)).argmax(1)
    assert evaluation.predict(apply, mlp, few.images).tolist() == labels.tolist()
    assert Model("m", apply, mlp, few.images, labels).clean().all()
    np.testing.assert_array_equal(
        ask(few, apply=apply, params=mlp, labels=labels, eps=0.3).robust,
        ask(few, apply=lambda _, x: apply(mlp, x), params=None, labels=labels, eps=0.3).robust,
    )


# Models whose weights change between two calls: the second call judges the second weights.


def by_nnx(w):
    model = nnx.Linear(16, K, rngs=nnx.Rngs(0))
    model.bias[...] = jnp.zeros(K)

    def train(w):
        model.kernel[...] = jnp.asarray(w)

    return lambda _, x: model(x.reshape(len(x), -1) - 0.5), train


class Holder:
    """An object with weights."""

    def apply(self, params, x):
        return linear(self.w, x)

    def train(self, w):
        self.w = w


def by_method(w):
    held = Holder()
    return held.apply, held.train


WEIGHTS: list[np.ndarray] = []


def by_global(w):
    def train(w):
        WEIGHTS[:] = [w]

    return lambda _, x: linear(WEIGHTS[0], x), train


def measured_by_auto(apply, few):
    return lambda: ask(few, apply=apply, params=None).accuracy["clean"]


def measured_by_diagnose(apply, few):
    model = Model("m", apply, None, few.images, few.labels)
    return lambda: diagnose(model, eps=EPS, effort=LITTLE)["clean"]


def measured_by_model(apply, few):
    model = Model("m", apply, None, few.images, few.labels)
    return lambda: model.clean().mean()


@pytest.mark.parametrize(
    ("make", "entry"),
    [
        (by_nnx, measured_by_auto),
        (by_method, measured_by_auto),
        (by_global, measured_by_auto),
        (by_nnx, measured_by_model),
        (by_method, measured_by_diagnose),
        (by_global, measured_by_model),
    ],
)
def test_a_model_that_has_learned_is_judged_by_its_new_weights(few, make, entry):
    apply, train = make(few.w)
    measure = entry(apply, few)
    train(-few.w)
    before = measure()
    train(few.w)
    assert before < 0.5
    assert measure() == 7 / 8, "one label is wrong"


@pytest.mark.parametrize("entry", [measured_by_auto, measured_by_diagnose])
def test_no_model_is_kept_alive(few, entry):
    held = [Holder()]
    held[0].train(few.w)
    gone = weakref.ref(held[0])
    assert entry(held[0].apply, few)() == 7 / 8
    held.clear()
    gc.collect()
    assert gone() is None


def test_bounds_may_differ_from_column_to_column(few):
    """A table of two columns, one within [0, 10], one within [-1, 0]."""
    low, high = np.array([0.0, -1.0]), np.array([10.0, 0.0])
    table = np.float32([[0.05, -0.5], [9.95, -0.02], [5.0, -0.97]])
    bounds, eps = (low, high), 0.1

    def apply(_, x):  # the first class where the sum is above 4
        total = x.sum(1) - 4
        return jnp.stack([total, -total], axis=1)

    labels = np.array([1, 0, 1])
    result = auto(apply, None, table, labels, eps=eps, stages=[FGSM], bounds=bounds, keep=True)
    assert result.accuracy == {"clean": 2 / 3, "FGSM": 2 / 3}
    model = Model("m", pure(apply), None, table, labels, bounds)
    moved = model.under(Attack("FGSM", "fgsm", eps, 1))[1]
    np.testing.assert_allclose(moved, [[0.15, -0.4], [9.85, -0.12], [5.1, -0.87]], atol=1e-6)
    moved = model.under(Attack("FGSM", "fgsm", 9.0, 1))[1]
    np.testing.assert_allclose(moved, [[9.05, 0], [0.95, -1], [10, 0]], atol=1e-6)
    shown = evaluation.transfer(
        (apply, None), [(apply, None)], table, labels, Attack("FGSM", "fgsm", eps, 1), bounds=bounds
    )
    assert shown[0].correct.tolist() == [True, True, False]
    with pytest.raises(ValueError, match="1 of 3 images reach outside bounds, from -1 to 11"):
        auto(apply, None, table + np.float32([[0, 0], [1.05, -0.98], [0, 0]]), labels, eps=eps, bounds=bounds)
    assert diagnose(model, eps=eps, norm="l2", effort=LITTLE)["bounds"] == [[0, -1], [10, 0]]
    assert [stage.name for stage in Effort().stages(1000, ndim=2)] == ["APGD-CE", "APGD-T"], "Square needs images"


def test_two_classes_and_a_thousand(few):
    """What needs four classes is left out by the diagnosis and refused by `auto`; a thousand are nothing special."""
    two = ask(few, params=few.w[:, :2], labels=few.labels % 2)
    assert 0 <= two.accuracy["FGSM"] <= 1
    with pytest.raises(
        ValueError, match="'APGD-T': its loss targeted_dlr needs at least 4 classes; the model has 2: leave"
    ):
        ask(few, params=few.w[:, :2], labels=few.labels % 2, stages=evaluation.STAGES)
    assert [stage.name for stage in Effort().stages(2)] == ["APGD-CE", "Square"]
    w = np.random.default_rng(0).normal(size=(16, 1000)).astype(np.float32)
    stages = (
        Attack("APGD-CE", "apgd", steps=2),
        Attack("APGD-T", "apgd", steps=2, loss="targeted_dlr", targets=2),
        Attack("Square", "square", steps=3),
    )
    many = ask(few, params=w, labels=linear(w, few.images).argmax(1), stages=stages, eps=0.1)
    assert many.accuracy["clean"] == 1
    assert many.accuracy["APGD-T"] < 1
