"""What `experiments.evaluate` does with a run's folder, and with anyone's function."""

import dataclasses
import json
import pathlib
import shutil
import sys

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import evaluation
from e2sad_jax.errors import ConfigError, DataError, WorkdirError
from e2sad_jax.evaluation import Effort
from e2sad_jax.runs import black_box, evaluate, folder
from e2sad_jax.runs.evaluate import Request

LITTLE = Effort(budgets=(0.5, 1.0), steps=(1, 5), restarts=2, pgd_steps=5, apgd_steps=5, queries=50, targets=1, fmn=5)


@pytest.fixture(autouse=True)
def little_effort(monkeypatch):
    monkeypatch.setattr(evaluate, "Effort", lambda **given: LITTLE)


def test_a_run_is_evaluated_from_its_workdir(trained, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("e2sad_jax.data.load", lambda name, data_dir: tiny)
    shutil.copytree(trained, workdir := tmp_path / "w")
    result = evaluate.run(Request(workdir=str(workdir), eps=0.2, examples=20, transfer_from=str(workdir)))
    assert (result["eps"], result["images"]) == (0.2, 20)
    out = capsys.readouterr().out
    assert "Checks for gradient masking" in out
    assert result["verdict"] in out
    assert max(map(len, out.split("Checks")[0].splitlines())) <= 120
    saved = json.loads((workdir / "evaluation" / "evaluation.json").read_text())
    assert saved["clean"] == result["clean"] > 0.4
    assert saved["transfer"]["accuracy"] == saved["transfer"]["accuracy_of_substitute"], "from itself"
    assert "worst case" in (workdir / "evaluation" / "evaluation.md").read_text().lower()
    assert (workdir / "evaluation" / "evaluation.png").stat().st_size > 5000


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A module of the user's own in the current folder, and a file of images."""
    w = np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32)
    images = np.random.default_rng(1).integers(0, 256, (10, 4, 4, 1)).astype(np.uint8)
    labels = np.asarray(jnp.asarray(images.reshape(10, 16) / np.float32(255)) @ w).argmax(1)
    train = {"x_train": np.zeros((4, 4, 4, 1), np.uint8), "y_train": np.arange(4)}
    np.savez(tmp_path / "test.npz", **train, x_test=images, y_test=labels)
    np.save(tmp_path / "w.npy", w)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nw = np.load('w.npy')\ndef predict(x):\n    return x.reshape(len(x), -1) @ w\nnumber = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])  # as of the console script
    return str(tmp_path / "test.npz")


def test_images_far_from_the_boundary_can_be_left_out_of_later_attacks(mine, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "Effort", lambda **given: dataclasses.replace(LITTLE, near=given["near"]))
    monkeypatch.setattr(evaluation.near, "LEAST", 1)
    flags = {"predict": "mine:predict", "data": mine, "eps": 0.001, "results": "here"}
    result = evaluate.run(Request(**flags, near=2))
    assert (result["worst_case"]["near"], result["robust"]) == (2, 1)
    assert 0 < (count := result["worst_case"]["left_out"]) < 10
    assert f"Later attacks left out {count} of the 10 images that stand" in capsys.readouterr().out
    assert "near" not in evaluate.run(Request(**flags))["worst_case"]
    with pytest.raises(ConfigError, match=r"--near=0\.5: must be at least 1, or 0"):
        Request(**flags, near=0.5)
    with pytest.raises(ConfigError, match=r"--near=2: is a part of the worst case; leave it out, or --noauto"):
        Request(**flags, near=2, auto=False)


def test_more_attacks_have_a_table_of_their_own(mine, tmp_path, monkeypatch, capsys):
    """Each in the norm of the budget if it has that, else in its own."""
    monkeypatch.setattr(evaluate, "Effort", lambda **given: TINY)
    asked = ("greedy_l0:1", "greedy_l0:16", "pgd:0.2:5", "fmn:0.2", "lbfgs:0.01")
    result = evaluate.run(Request(predict="mine:predict", data=mine, eps=0.1, results="here", attack=asked))
    more = {row["attack"]: row for row in result["more"]}
    assert [row["norm"] for row in more.values()] == ["l0", "l0", "linf", "linf", "l2"]
    assert more["greedy_l0:16"]["accuracy"] <= more["greedy_l0:1"]["accuracy"] < 1
    assert more["fmn:0.2"]["accuracy"] <= more["pgd:0.2:5"]["accuracy"] < 1
    assert "More attacks (10 images)" in capsys.readouterr().out
    assert "greedy_l0:16" in (tmp_path / "here" / "evaluation.md").read_text()
    with pytest.raises(ConfigError, match=r"--attack=pgd:0.2: .*steps=0; it must be at least 1"):
        evaluate.run(Request(predict="mine:predict", data=mine, eps=0.1, attack=("pgd:0.2",)))


@pytest.fixture
def without_gradient(mine):
    """The function of `mine`, as a file that has no gradient."""
    w = np.load("w.npy")
    function = jax.jit(lambda x: x.reshape(x.shape[0], -1) @ w)
    shape = (*jax.export.symbolic_shape("N"), 4, 4, 1)
    exported = jax.export.export(function)(jax.ShapeDtypeStruct(shape, jnp.float32))
    pathlib.Path("black.stablehlo").write_bytes(exported.serialize())
    return "black.stablehlo"


def test_a_file_without_its_gradient_faces_attacks_that_need_none(without_gradient, mine, tmp_path, capsys):
    flags = {"predict": without_gradient, "data": mine, "eps": 0.1}
    result = evaluate.run(Request(**flags, queries=200, attack=("few_pixels:1:2",), save_images=True, quantize=False))
    square, pixel = result["attacks"]
    assert (square["attack"], pixel["norm"]) == ("Square", "l0")
    assert result["robust"] == square["accuracy"] < result["clean"] == 1.0, "a pixel of any size is beyond the budget"
    strong = evaluate.run(Request(predict="mine:predict", data=mine, eps=0.1, results="white"))
    assert strong["robust"] <= result["robust"]
    saved = np.load("runs/evaluation/black/worst_images.npz")["x_test"]
    assert np.abs(saved - np.load(mine)["x_test"] / 255).max() <= 0.1 + 1e-6
    assert (tmp_path / "runs/evaluation/black/evaluation.md").read_text().count("The model has no gradient") == 1
    assert "all within the budget" in capsys.readouterr().out
    assert not (tmp_path / "runs/evaluation/black/unfinished").exists()


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        ({"queries": 0}, ConfigError, r"--queries=0: must be above 0, or --transfer_from given, for the model has no"),
        ({"fab": 2}, ConfigError, r"--fab=2: follows the gradient, and the model has none"),
        ({"attack": ("pgd:0.1:2",)}, DataError, r"black.stablehlo: was exported without its gradient; serialize\(vjp"),
    ],
)
def test_attacks_that_follow_a_gradient_are_refused_where_there_is_none(flags, error, message, without_gradient, mine):
    with pytest.raises(error, match=message):
        evaluate.run(Request(predict=without_gradient, data=mine, eps=0.1, **{"queries": 20, **flags}))


def test_images_of_another_model_are_shown_to_one_without_gradient(mine):
    w = np.load("w.npy")
    images = np.load(mine)["x_test"].astype(np.float32) / 255
    labels = np.load(mine)["y_test"]

    def refuse(x):
        raise DataError("no gradient")

    apply = jax.custom_vjp(lambda x: x.reshape(len(x), -1) @ w)
    apply.defvjp(refuse, lambda residuals, g: (g,))
    black, white = (
        evaluation.of_function(f, images, labels, name=name)
        for f, name in ((apply, "black"), (lambda x: x.reshape(len(x), -1) @ w, "white"))
    )
    assert [black_box.has_gradient(model) for model in (black, white)] == [False, True]
    result = black_box.evaluate(
        black,
        [],
        eps=0.2,
        norm="linf",
        substitute=white,
        transfer=evaluation.Attack("PGD-5", "pgd", 0.2, 5),
        progress=lambda what, count: None,
    )
    (row,) = result["attacks"]
    assert row["attack"] == "PGD-5 on white"
    assert result["robust"] == row["accuracy"] < result["clean"]


TINY = Effort(budgets=(1.0,), steps=(1,), restarts=1, pgd_steps=1, fmn=1, worst_case=False)


def read_back(monkeypatch, **flags):
    monkeypatch.setattr(evaluate, "Effort", lambda **given: TINY)
    return evaluate.run(Request(**flags))["clean"]


@pytest.fixture
def evaluated(mine, capsys):
    """The result of a whole evaluation, and what it printed."""
    flags = {"predict": "mine:predict", "eps": 0.05, "results": "here"}
    return evaluate.run(Request(**flags, data=mine, save_images=True, quantize=True)), capsys.readouterr()


def test_anyones_function_is_evaluated_by_its_name(mine, evaluated, tmp_path, monkeypatch):
    result, printed = evaluated
    assert (result["name"], result["clean"], result["images"]) == ("predict", 1.0, 10)
    assert (result["test_images"], result["num_classes"]) == (10, 4)
    assert (tmp_path / "here" / "evaluation.png").exists()
    assert printed.err.count("took") == 1
    for name, words in {
        "mine:nothing": "module 'mine' has no attribute 'nothing'",
        "mine:number": "is a int; it must be a function of images",
        "yours:predict": "No module named 'yours'",
    }.items():
        with pytest.raises(ConfigError, match=f"--predict={name}: {words}"):
            evaluate.run(Request(predict=name, data=mine, eps=0.1))

    # The worst images are saved, and read back bit for bit.
    assert 0 < result["robust"] == result["worst_case"]["robust"] < 1
    assert f"worst_images.npz (--data reads it back: clean accuracy {result['robust']:.4f})" in printed.out
    assert f"rounded to grey levels inside the ball: accuracy {result['quantized']:.4f}" in printed.out
    with np.load(mine) as given:
        clean, labels = given["x_test"] / np.float32(255), given["y_test"]
    for name, accuracy in (("worst_images", result["robust"]), ("worst_images_8bit", result["quantized"])):
        with np.load(path := tmp_path / "here" / f"{name}.npz") as saved:
            images = saved["x_test"] if name == "worst_images" else saved["x_test"] / np.float32(255)
            np.testing.assert_array_equal(saved["y_test"], labels)
        assert images.dtype == np.float32
        assert 0.04 < np.abs(images - clean).max() <= 0.05 + 1e-6
        flags = {"predict": "mine:predict", "eps": 0.05, "data": str(path), "results": "again"}
        assert read_back(monkeypatch, **flags) == accuracy


def test_inputs_behind_a_transform_are_saved_as_they_are(trained, tiny, tmp_path, monkeypatch):
    """No pixels become the adversarial inputs of a network whose transform standardizes."""
    monkeypatch.setattr("e2sad_jax.data.load", lambda name, data_dir: tiny)
    shutil.copytree(trained, workdir := tmp_path / "w")
    config, _ = folder.read_config(workdir)
    folder.write_config(workdir, config.replace(transform="standardize"), tiny)
    monkeypatch.setattr(evaluate, "Effort", lambda **given: TINY)
    flags = {"workdir": str(workdir), "eps": 0.1, "examples": 20}
    result = evaluate.run(Request(**flags, save_images=True))
    file = workdir / "evaluation" / "worst_images.npz"
    with np.load(file) as saved:
        assert saved["x_test"].min() < 0
        assert str(saved["transform"]) == "standardize"
    assert 0 < result["robust"] < result["clean"]
    assert read_back(monkeypatch, **flags, data=str(file), results=str(tmp_path / "again")) == result["robust"]
    with pytest.raises(
        ConfigError, match=r"--quantize: .* the run attacks behind --transform=standardize; leave it out"
    ):
        evaluate.run(Request(**flags, quantize=True))
    with pytest.raises(DataError, match="behind the transform 'standardize', those of this model behind 'unit'"):
        evaluate.run(Request(workdir=str(trained), eps=0.1, data=str(file)))


def test_nan_logits_are_said_in_plain_sight(mine, tmp_path, monkeypatch, capsys):
    (tmp_path / "broken.py").write_text(
        "from mine import predict\n\n\ndef nan(x):\n    return predict(x) * float('nan')\n"
    )
    with np.load(mine) as given:
        np.savez(tmp_path / "test_only.npz", x_test=given["x_test"], y_test=given["y_test"], num_classes=4)
    monkeypatch.setattr(evaluate, "Effort", lambda **given: TINY)
    between = np.full((3, 4, 4, 1), 0.1234, np.float32)
    np.savez(tmp_path / "between.npz", x_test=between, y_test=np.arange(3), num_classes=4)
    with pytest.raises(ConfigError, match=r"--quantize: .* of 3 of 3 images there is no 8-bit image"):
        evaluate.run(Request(predict="mine:predict", data="between.npz", eps=0.001, quantize=True))
    result = evaluate.run(Request(predict="broken:nan", data="test_only.npz", eps=0.1, results="here"))
    said = "10 of 10 images have NaN logits"
    out = capsys.readouterr().out
    assert f"NaN: {said}: they count as misclassified." in out
    assert f"nan: {said}" in out.splitlines()[-6], "the verdict begins with it"
    assert said in (tmp_path / "here" / "evaluation.md").read_text()
    assert json.loads((tmp_path / "here" / "evaluation.json").read_text())["nan"]["clean"] == 10
    assert result["robust"] == result["clean"] == 0


def test_a_sample_of_a_file_sorted_by_class_has_every_class(mine, tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (40, 4, 4, 1)).astype(np.uint8)
    order = np.repeat(np.arange(4), 10)
    np.savez(tmp_path / "sorted.npz", x_train=images, y_train=order, x_test=images, y_test=order)
    asked = evaluate._asked(Request(predict="mine:predict", data="sorted.npz", eps=0.1, examples=8))
    assert (np.bincount(asked.model.labels).tolist(), asked.test_images) == ([2, 2, 2, 2], 40)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--workdir or --predict: exactly one of them must be given"),
        ({"workdir": "a", "predict": "b:c"}, "--workdir or --predict"),
        ({"predict": "b"}, "--predict=b: must be MODULE:FUNCTION"),
        ({"predict": "b:c", "eps": 0.1}, "--data: must be given with --predict, a data set or PATH.npz"),
        ({"predict": "b:c", "data": "a.npz"}, "--eps=0: must be above 0 with --predict"),
        ({"workdir": "a", "examples": -1}, r"--examples=-1: must be at least 0"),
        ({"workdir": "a", "fab": -2}, r"--fab=-2: must be at least -1"),
        ({"workdir": "a", "eps": float("nan")}, r"--eps=nan: must be at least 0"),
        ({"workdir": "a", "norm": "l1"}, r"--norm=l1: must be empty or one of linf, l2"),
        ({"workdir": "a", "which": "first"}, r"--which=first: must be one of last, best"),
        ({"workdir": "a", "attack": ("jsma",)}, "--attack=jsma: must be NAME:EPS or NAME:EPS:STEPS"),
        ({"workdir": "a", "attack": ("pgd:0.1:5", "pgdd:0.1")}, "--attack=pgdd:0.1: did you mean 'pgd' or 'apgd'"),
        ({"workdir": "a", "attack": ("pgd:x",)}, "--attack=pgd:x: must be .* a NAME of fgsm, ifgsm"),
        ({"workdir": "a", "attack": ("pgd:-1:5",)}, "--attack=pgd:-1:5: must be .* at least 0"),
        ({"workdir": "a", "fab": 3, "auto": False}, r"--fab=3: is a part of the worst case; leave it out, or --noauto"),
    ],
)
def test_requests_that_cannot_be_right_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Request(**changes)


def test_what_cannot_be_written_or_is_no_run_is_refused(trained, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("e2sad_jax.data.load", lambda name, data_dir: tiny)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"--results=.*file: cannot be written"):
        evaluate.run(Request(workdir=str(trained), results=str(tmp_path / "file")))
    with pytest.raises(ConfigError, match="--eps=0: must be above 0 with --norm=l2, for that of the run is linf"):
        evaluate.run(Request(workdir=str(trained), norm="l2"))
    with pytest.raises(WorkdirError, match="is not the workdir of a run"):
        evaluate.run(Request(workdir=str(tmp_path)))


def test_a_function_is_measured_on_a_data_set_by_name_in_a_folder_of_its_own(mine, tiny, monkeypatch):
    small = dataclasses.replace(tiny, x_train=tiny.x_train[:, ::2, ::2], x_test=tiny.x_test[:, ::2, ::2])
    monkeypatch.setattr("e2sad_jax.data.load", lambda name, data_dir: {"mnist": small}[name])
    asked = evaluate._asked(Request(predict="mine:predict", data="mnist", eps=0.1, examples=10))
    assert (len(asked.model.labels), asked.test_images) == (10, len(tiny.x_test))
    assert asked.folder == pathlib.Path("runs/evaluation/predict")


def test_a_budget_in_grey_levels_is_refused(mine):
    with pytest.raises(ConfigError, match=r"--eps=8: must be at most 1, .*8 of 255: 0\.0314"):
        evaluate._asked(Request(predict="mine:predict", data=mine, eps=8.0))
