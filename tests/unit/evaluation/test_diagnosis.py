"""Diagnosis of models whose weakness is known, and the checks for gradient masking."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import distributed
from e2sad_jax.errors import DataError
from e2sad_jax.evaluation import Attack, Effort, Model, diagnose, masking, of_function

N, K, EPS = 40, 4, 0.1
LITTLE = Effort(budgets=(0.5, 1.0), steps=(1, 5), restarts=2, pgd_steps=5, apgd_steps=5, queries=150, targets=2, fmn=5)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    w = jnp.asarray(rng.normal(size=(16, K)), jnp.float32)
    images = rng.uniform(0, 1, (N, 4, 4, 1)).astype(np.float32)
    return w, images, np.asarray(images.reshape(N, -1) @ w).argmax(1)


def value(result, name):
    return next(check for check in result["checks"] if check["name"] == name)


@pytest.fixture(scope="module")
def told():
    """What `diagnose` told of its progress."""
    return []


@pytest.fixture(scope="module")
def honest(problem, told):
    w, images, labels = problem
    model = of_function(lambda x: x.reshape(len(x), -1) @ w, images, labels, batch_size=25)
    return diagnose(model, eps=EPS, effort=LITTLE, substitute=model, progress=lambda *what: told.append(what))


def test_fab_finds_what_a_saturated_loss_hides(problem):
    """Of three classes, so that no targeted loss looks past the saturation; FAB finds exactly whom the ball reaches."""
    w, images, _ = problem
    images = 0.2 + 0.6 * images  # the range cuts nothing
    logits = np.float64(images.reshape(N, -1) @ np.asarray(w)[:, :3])
    labels = logits.argmax(1)
    reach = np.array(
        [
            min((logits[i, y] - logits[i, k]) / np.abs(w[:, y] - w[:, k]).sum() for k in range(3) if k != y)
            for i, y in enumerate(labels)
        ]
    )
    model = of_function(lambda x: 1e6 * (x.reshape(len(x), -1) @ w[:, :3]), images, labels, batch_size=25)
    effort = dataclasses.replace(
        LITTLE, budgets=(1.0,), steps=(1,), restarts=1, queries=100, pgd_steps=2, apgd_steps=1, fab=2
    )
    result = diagnose(model, eps=EPS / 2, effort=effort)
    assert value(result, "Square beats gradients")["value"] == 0, "Square is shown only what FAB leaves standing"
    worst = result["worst_case"]
    assert list(worst["accuracy"]) == ["clean", "APGD-CE", "FAB-T", "Square"]
    assert worst["stages"][1]["targets"] == 2
    assert worst["accuracy"]["FAB-T"] < worst["accuracy"]["APGD-CE"] - 0.1
    assert (reach > EPS / 2 * 1.01).mean() <= worst["robust"] <= worst["accuracy"]["FAB-T"]
    assert worst["accuracy"]["FAB-T"] <= (reach > EPS / 2 * 0.99).mean()


@pytest.fixture(scope="module")
def masked(problem):
    """The same, rounding the images: no gradient, but no defense either."""
    w, images, labels = problem

    def predict(x):
        return (jnp.round(x * 50) / 50).reshape(len(x), -1) @ w

    images = np.round(images * 50) / 50
    return diagnose(of_function(predict, images, labels, name="rounding"), eps=EPS, effort=LITTLE)


def test_an_honest_model_is_not_suspected(honest):
    assert [check["name"] for check in honest["checks"] if check["suspicious"]] == []
    assert "none of 10 checks on 40 images" in honest["verdict"]
    assert honest["clean"] == 1
    fgsm, pgd = honest["over_eps"]["accuracy"]["FGSM"], honest["over_eps"]["accuracy"]["PGD-5"]
    assert 1 > pgd[0] > pgd[1]
    assert pgd[1] <= fgsm[1] < 1
    assert honest["over_steps"]["accuracy"][1] <= honest["over_steps"]["accuracy"][0] < 1
    assert honest["over_restarts"]["accuracy"][1] <= honest["over_restarts"]["accuracy"][0]
    assert honest["worst_case"]["robust"] <= min(pgd[1], honest["worst_case"]["accuracy"]["APGD-T"])
    assert honest["transfer"]["accuracy"] == honest["transfer"]["accuracy_of_substitute"] < 1
    assert value(honest, "correct in the whole range")["value"] == 0


def test_one_minimum_norm_run_gives_the_accuracy_at_every_budget(problem):
    """On a linear model, whose distances are known: FMN comes near them from above, and its images count in the worst case."""
    w, images, labels = problem
    logits, wide = np.float64(images.reshape(N, -1) @ np.asarray(w)), np.asarray(w, np.float64)
    exact = np.array(
        [
            min((logits[i, y] - logits[i, k]) / np.linalg.norm(wide[:, y] - wide[:, k]) for k in range(K) if k != y)
            for i, y in enumerate(labels)
        ]
    )
    model = of_function(lambda x: x.reshape(len(x), -1) @ w, images, labels, bounds=(-9, 9), batch_size=25)
    effort = dataclasses.replace(LITTLE, fmn=60, pgd_steps=1, steps=(), restarts=1, worst_case=False)
    result = diagnose(model, eps=0.3, norm="l2", effort=effort, keep=True)
    far = np.array(result["nearest"]["distances"])
    assert (far >= exact * 0.999).all()
    assert np.median(far / exact) < 1.02
    assert result["over_eps"]["accuracy"]["FMN-60"] == [float((far > e * (1 + 1e-6)).mean()) for e in (0.15, 0.3)]
    assert result["robust"] <= (far > 0.3).mean()
    classes = result["per_class"]
    assert [row["class"] for row in classes] == sorted(set(labels.tolist()))
    assert sum(row["images"] * row["robust"] for row in classes) / N == pytest.approx(result["robust"])
    assert sum(row["images"] for row in classes) == N
    assert diagnose(model, eps=0.3, effort=dataclasses.replace(effort, fmn=0))["nearest"] is None


def test_a_model_that_knows_nothing_is_not_called_robust_or_unmasked(problem):
    w, images, labels = problem
    model = of_function(lambda x: x.reshape(len(x), -1) @ w, images, (labels + 1) % K, batch_size=25)
    effort = dataclasses.replace(LITTLE, pgd_steps=1, fmn=1, steps=(), restarts=1, worst_case=False)
    verdict = diagnose(model, eps=EPS, effort=effort)["verdict"]
    assert verdict.startswith(
        "model: accuracy without attack is 0.000, no better than chance (0.250). Check the labels"
    )


def test_progress_counts_every_gradient_once(honest, told):
    names, taken = [name for name, _ in told], np.cumsum([gradients for _, gradients in told])
    # clean, budgets, steps, the restart, the range, FMN, transfer
    curves = N * (3 + 2 * (1 + 5 + 5) + (1 + 5) + 5 + 5 + 5 + 5)
    worst = N * (1 + 5 + 2 * 5 + 150 // 3)
    names = [name.split(" (")[0] for name in names]
    first = names.index("APGD-CE")
    assert curves <= taken[first] <= curves + 2 * N, "where the worst case begins, after its own clean pass"
    assert taken[-1] == curves + worst == LITTLE.work(N, K, transfer=True)
    assert list(dict.fromkeys(names))[-4:] == ["transfer from model", "APGD-CE", "APGD-T", "Square"]
    many = dataclasses.replace(LITTLE, targets=9)
    assert many.work(N, 4, transfer=True) == curves + worst + N * 5, "there are three other classes"
    for changes in ({"budgets": (0.5,)}, {"worst_case": False}, {"restarts": 1}, {"fmn": 0}):
        assert dataclasses.replace(LITTLE, **changes).work(N, K, transfer=True) <= curves + worst


def test_a_model_without_gradients_is_found_out(masked):
    assert value(masked, "zero gradients")["value"] == 1
    assert value(masked, "gradient alignment")["value"] == 0
    assert value(masked, "Square beats gradients")["value"] > 0.1
    for name in ("zero gradients", "gradient alignment", "Square beats gradients", "correct in the whole range"):
        assert value(masked, name)["suspicious"], name
    assert masked["over_eps"]["accuracy"]["FGSM"] == [1, 1], "attacks that follow gradients see nothing"
    assert "rounding: " in masked["verdict"]
    assert "Square beats gradients" in masked["verdict"]
    assert "Do not trust accuracies under gradient attacks alone" in masked["verdict"]


def test_outputs_that_attacks_cannot_work_on_are_found(problem):
    """A softmax inside of the model, and one that draws at each call."""
    w, images, labels = problem

    def logits(x):
        return x.reshape(len(x), -1) @ w

    def noisy(x):
        noise = jax.pure_callback(lambda: np.float32(rng.normal(size=())), jax.ShapeDtypeStruct((), jnp.float32))
        return logits(x) + noise * jnp.arange(K, dtype=jnp.float32)[None]

    rng = np.random.default_rng(0)
    kinds = {"logits": logits, "softmax": lambda x: jax.nn.softmax(logits(x)), "noisy": noisy}
    found = {name: masking.outputs(of_function(kind, images, labels)) for name, kind in kinds.items()}
    assert found["logits"] == masking.Outputs(0, 0)
    assert found["softmax"] == masking.Outputs(1, 0)
    assert found["noisy"] == masking.Outputs(0, 1)


def test_gradient_alignment_against_its_definition(problem):
    w, images, labels = problem

    def predict(x):
        return jnp.sin(4 * x).reshape(len(x), -1) @ w

    model = of_function(predict, images, labels)
    measured = masking.gradients(model, EPS)
    assert 0.5 < measured.alignment < 1
    assert measured.zero == 0
    assert masking.gradients(model, 0.0).alignment == pytest.approx(1, abs=1e-5)
    two = of_function(lambda x: x.reshape(len(x), -1) @ w[:, :2], images, labels % 2)
    assert masking.gradients(two, EPS).alignment == pytest.approx(1, abs=1e-5), "one direction, whatever the image"
    # Where the model is sure its gradient is tiny, not zero.
    sure = of_function(lambda x: 20 * x.reshape(len(x), -1) @ w, images, labels)
    assert np.isfinite(masking.gradients(sure, EPS).alignment)


def test_the_l2_ball_throughout(problem):
    """Images in the middle of the range, so that the worst case is the distance to the nearest other class."""
    w, images, _ = problem
    images, w = 0.4 + 0.2 * images, np.float64(w)
    logits = np.float64(images.reshape(N, -1) @ w)
    labels, eps = logits.argmax(1), 0.1
    distance = np.array(
        [
            min((f[y] - f[k]) / np.linalg.norm(w[:, y] - w[:, k]) for k in range(K) if k != y)
            for f, y in zip(logits, labels, strict=True)
        ]
    )
    model = of_function(lambda x: x.reshape(len(x), -1) @ jnp.float32(w), images, labels, batch_size=25)
    effort = Effort(budgets=(1.0,), steps=(20,), restarts=1, pgd_steps=20, worst_case=False)
    result = diagnose(model, eps=eps, norm="l2", effort=effort, keep=True)
    assert result["norm"] == "l2"
    change = np.linalg.norm((result["worst_images"] - model.images).reshape(N, -1), axis=1)
    assert 0.9 * eps < change.max() <= eps
    near = np.abs(distance / eps - 1) < 0.05
    wrong = ~model.right_on(result["worst_images"])
    np.testing.assert_array_equal(wrong[~near], (distance < eps)[~near])
    assert result["robust"] == (~wrong).mean()
    assert 0 < wrong.sum() < N
    verified = result["verified"]
    assert (verified["fooled"], verified["differ"], verified["outside"]) == (wrong.sum(), 0, 0)
    np.testing.assert_allclose(verified["largest"], change[wrong].max(), rtol=1e-6)
    assert result["overturned"] == 0
    assert value(result, "correct in the whole range")["value"] == 0
    assert value(result, "gradient alignment")["value"] > 0.9


def test_gradient_alignment_is_measured_in_the_ball_of_the_norm(problem):
    w, images, labels = problem
    points = {}

    def gradients(norm, x, eps):
        model = Model("m", lambda w, z: jnp.sin(30 * z).reshape(len(z), -1) @ w, w, x, labels)
        return masking.gradients(model, eps, norm).alignment

    for norm in ("linf", "l2"):
        points[norm] = gradients(norm, 0.4 + 0.2 * images, 0.05)
    assert points["l2"] > points["linf"] + 0.2, "an l2 ball of that radius is smaller"


def test_the_worst_images_are_those_that_fool(honest, problem):
    w, images, labels = problem
    model = of_function(lambda x: x.reshape(len(x), -1) @ w, images, labels, batch_size=25)
    effort = Effort(budgets=(1.0,), steps=(5,), restarts=1, pgd_steps=5, worst_case=False)
    result = diagnose(model, eps=EPS, effort=effort, keep=True)
    worst = result["worst_images"]
    assert np.abs(worst - images).max() <= EPS + 1e-6
    assert (np.abs(worst - images).max((1, 2, 3)) > EPS / 2).all(), "of those that nothing fools the most dangerous"
    assert model.right_on(worst).mean() == result["robust"] <= min(result["over_steps"]["accuracy"])
    assert honest["robust"] == honest["worst_case"]["robust"]
    assert "worst_images" not in honest


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"fgsm": 1.0, "pgd": 0.95}, "FGSM above clean"),
        ({"fgsm": 0.8, "pgd": 0.4}, "FGSM above PGD"),
        ({"loss_decreased": 0.1}, "loss lower after the attack"),
        ({"black": 0.3}, "Square beats gradients"),
        ({"whole": 0.1}, "correct in the whole range"),
        ({"alignment": 0.1}, "gradient alignment"),
        ({"alignment": float("nan")}, "gradient alignment"),
        ({"zero": 0.5}, "zero gradients"),
        ({"probabilities": 0.5}, "outputs are probabilities"),
        ({"random": 0.5}, "outputs are random"),
    ],
)
def test_each_check_finds_its_weakness_and_no_other(changes, name):
    found = checks_of(changes)
    assert [check.name for check in found if check.suspicious] == [name]
    (check,) = (check for check in found if check.suspicious)
    assert masking.verdict("model", found, 100).endswith(
        f"({name} {check.value:.3f}, {check.means}). Do not trust accuracies under "
        f"gradient attacks alone. Next: {check.then}."
    )


def test_an_undefended_model_which_fgsm_hurts_is_not_taken_for_a_masked_one():
    undefended = {"clean": 1.0, "fgsm": 0.4, "pgd": 0.0, "white": 0.0, "black": 0.0}
    assert not any(check.suspicious for check in checks_of(undefended))
    suspicious = [check.name for check in checks_of({**undefended, "alignment": 0.02}) if check.suspicious]
    assert suspicious == ["FGSM above PGD", "gradient alignment"], "one that overfits to FGSM may lose to it, too"


def checks_of(changes):
    """The checks of a model of these numbers, beside which it is honest."""
    numbers = {"clean": 0.9, "fgsm": 0.5, "pgd": 0.4, "white": 0.4, "black": 0.4, "whole": 0.0, "loss_decreased": 0.0}
    numbers |= {"zero": 0.0, "alignment": 0.8, "probabilities": 0.0, "random": 0.0, **changes}
    right = {key: np.arange(100) < 100 * number for key, number in numbers.items()}
    return masking.run_checks(
        clean=right["clean"],
        fgsm=right["fgsm"],
        pgd=right["pgd"],
        white_box=right["white"],
        black_box={"Square": right["black"]},
        whole_range=right["whole"],
        gradients=masking.Gradients(numbers["zero"], numbers["alignment"]),
        outputs=masking.Outputs(numbers["probabilities"], numbers["random"]),
        loss_decreased=numbers["loss_decreased"],
    )


@pytest.mark.parametrize(
    ("function", "images", "labels", "message"),
    [
        (lambda x: x, np.zeros((2, 3, 3, 1)), np.zeros(2, int), r"returns shape \(2, 3, 3, 1\) for 2 images"),
        (lambda x: x @ x, np.zeros((2, 3, 4, 1)), np.zeros(2, int), "fails on images of shape"),
        (
            lambda x: x[:, 0, 0],
            np.full((2, 3, 3, 2), 2.0),
            np.zeros(2, int),
            "reach outside bounds=",
        ),
        (
            lambda x: x[:, 0, 0],
            np.zeros((2, 3, 3, 2)),
            np.full(2, 2),
            "labels reach from 2 to 2; the model has 2 classes",
        ),
        (lambda x: x[:, 0, 0], np.zeros((2, 3, 3, 2)), np.zeros(3, int), "must be one integer for each of 2 images"),
    ],
)
def test_functions_and_images_that_do_not_fit_are_refused(function, images, labels, message):
    with pytest.raises(DataError, match=message):
        of_function(function, images, labels)
    with pytest.raises(ValueError, match="eps=0; it must be a number, finite and above 0"):
        diagnose(None, eps=0)


def test_a_model_measures_the_same_on_several_devices(problem):
    w, images, labels = problem
    attack = Attack("PGD", "pgd", EPS, 2)
    found = []
    for mesh in (None, distributed.mesh(4, 20)):
        model = Model(
            "m", lambda params, x: x.reshape(len(x), -1) @ params, w, images, labels, batch_size=20, mesh=mesh
        )
        right, made = model.under(attack)
        found.append((right, made, model.right_on(made), *model.per_image(masking._losses, images=made)))
        np.testing.assert_array_equal(right, found[-1][2])
    for one, several in zip(*found, strict=True):
        np.testing.assert_allclose(one, several, atol=1e-5)
    again, _ = model.under(attack, restart=1)
    assert again.shape == (N,)
