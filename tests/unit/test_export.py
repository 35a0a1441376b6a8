"""Exported models: their logits and gradients are the network's; files are whole or not there."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import sys

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
from safetensors import numpy as safetensors_numpy

import e2sad_jax
from e2sad_jax import export, losses, networks, training
from e2sad_jax.data.transforms import TRANSFORMS
from e2sad_jax.errors import ConfigError, Error, WorkdirError
from e2sad_jax.networks import cpu_conv, preact_resnet
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.runs.folder import describe_dataset, write_config
from e2sad_jax.training.config import Config

LABELS = np.array([0, 1, 2, 0, 1])

# (model, transform, precision, image)
CASES = {
    "cnn": ("digits_cnn", "unit", "float32", (8, 8, 1)),
    "bf16": ("digits_cnn", "unit", "bf16", (8, 9, 1)),
    "resnet": ("preact_resnet18", "standardize", "float32", (8, 8, 3)),
}
CLOSE = {"cnn": 1e-5, "bf16": 3e-2, "resnet": 1e-5}  # as a share of the largest
NARROW = {
    "digits_cnn": functools.partial(networks.MnistCNN, features=(4, 8), hidden=16),
    "preact_resnet18": functools.partial(preact_resnet.PreActResNet18, width=4),
}


@pytest.fixture(scope="module", autouse=True)
def narrow():
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        for name, model in NARROW.items():
            patch.setitem(networks.NETWORKS, name, model)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def classifier(case: str) -> Classifier:
    """Not trained, but with other numbers than 0 and 1 everywhere, in running averages too."""
    name, transform, precision, shape = CASES[case]
    config = Config(model=name, transform=transform, precision=precision, data="/home/somebody/tiny.npz")
    model = networks.create(name, 3, shape, precision)
    params = training.init_state(config, model, shape).params
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda a: a + jnp.asarray(rng.uniform(0.0, 0.1, a.shape), jnp.float32), params)
    about = {"name": "tiny", "version": "", "sha256": "0" * 64, "image_shape": list(shape), "num_classes": 3}
    return Classifier(config, about, 7, model, params, TRANSFORMS[transform])


@functools.cache
def images(case: str) -> np.ndarray:
    return np.random.default_rng(1).random((5, *CASES[case][3]), np.float32)


def logits(of: Classifier, x: np.ndarray) -> np.ndarray:
    return np.asarray(jax.jit(lambda x: of.logits(of.transform.apply(x)))(x))


def close(got, want, tolerance):
    np.testing.assert_allclose(got, want, rtol=0, atol=tolerance * np.abs(want).max())


def test_stablehlo_is_the_network_and_its_gradient(monkeypatch):
    """The gradient is JAX's own, of the network made of JAX's own operations; tests/slow asks another process."""
    written = jax.export.deserialize(bytearray(export.to_stablehlo(classifier("cnn"))))
    check_gradient("cnn", lambda x: written.call(x), monkeypatch)


def loss_of(logits_fn):
    return lambda x: losses.cross_entropy(logits_fn(x), jax.nn.one_hot(LABELS, 3)).sum()


def check_gradient(case, written, monkeypatch):
    """Holds logits and gradient of what was written against the network made of JAX's own operations."""
    x, of = jnp.asarray(images(case)), classifier(case)
    want = logits(of, images(case))
    assert np.ptp(want, axis=0).min() > 0, "images must matter"
    close(jax.jit(written)(x), want, CLOSE[case])
    got = jax.jit(jax.grad(loss_of(written)))(x)
    close(got, gradient_of_jaxs_own(of, x, monkeypatch), 3 * CLOSE[case])


def gradient_of_jaxs_own(of, x, monkeypatch):
    """The gradient of the network made of JAX's own operations."""
    monkeypatch.setattr(cpu_conv, "conv", cpu_conv._conv)
    monkeypatch.setattr(cpu_conv, "max_pool", lambda x: nn.max_pool(x, (2, 2), strides=(2, 2)))
    return np.asarray(jax.jit(jax.grad(loss_of(lambda x: of.logits(of.transform.apply(x)))))(x))


def test_stablehlo_is_for_all_platforms_and_calls_nothing_outside_of_it():
    model = jax.export.deserialize(bytearray(export.to_stablehlo(classifier("cnn"))))
    assert model.platforms == ("cpu", "cuda", "tpu")
    assert (str(model.in_avals[0]), str(model.out_avals[0])) == ("float32[N,8,8,1]", "float32[N,3]")
    assert "stablehlo.case" in model.vjp().mlir_module(), "the CPU has forms of its own"
    for program in (model, model.vjp()):
        called = set(re.findall(r"custom_call @(\w+)", program.mlir_module()))
        assert called <= {"shape_assertion"}, "of the number of images, and JAX's own"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_what_is_lowered_for_an_accelerator_computes_the_same(platform):
    """The program for that platform alone, its own check of where it runs left out, on the CPU."""
    anywhere = [jax.export.DisabledSafetyCheck.platform()]
    model, x = classifier("cnn"), jnp.asarray(images("cnn"))
    there = export.exported(model, (platform,), disabled_checks=anywhere)
    weights = jnp.asarray(np.random.default_rng(2).standard_normal((5, 3)), jnp.float32)

    def both(logits_fn):
        return jax.jit(jax.value_and_grad(lambda x: (logits_fn(x) * weights).sum()))(x)

    for got, want in zip(both(there.call), both(model.logits), strict=True):
        close(got, want, 1e-5)


def test_safetensors_hold_the_parameters_and_give_the_classifier_back(tmp_path):
    check_safetensors("cnn", tmp_path)


def check_safetensors(case, tmp_path):
    """Holds parameters, in the file and read back, against the classifier; tests/slow asks of the other networks."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(export.to_safetensors(classifier(case)))
    held = safetensors_numpy.load_file(path)
    flat = jax.tree_util.tree_leaves_with_path(classifier(case).params)
    assert len(held) == len(flat)
    for keys, leaf in flat:
        np.testing.assert_array_equal(held[".".join(key.key for key in keys)], leaf)
    back = export.load_safetensors(path)
    assert (back.step, back.config.model, back.transform.name) == (7, CASES[case][0], CASES[case][1])
    np.testing.assert_array_equal(back(images(case)), classifier(case)(images(case)))


def changed(path, *, about=None, **arrays):
    """The file with other metadata or arrays, None for without."""
    with safetensors.safe_open(path, framework="numpy") as file:
        known = json.loads(file.metadata()["e2sad_jax"])
    held = {**safetensors_numpy.load_file(path), **{name.replace("__", "."): a for name, a in arrays.items()}}
    metadata = {"e2sad_jax": json.dumps({**known, **about})} if about is not False else None
    safetensors_numpy.save_file({name: a for name, a in held.items() if a is not None}, path, metadata)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"about": {}, "params__Dense_1__bias": np.zeros(4, np.float32)}, r"Dense_1.bias is F32 \[4\], .*F32 \[3\]"),
        ({"about": {}, "params__Dense_1__bias": np.zeros(3)}, r"Dense_1.bias is F64 \[3\], .*F32 \[3\]"),
        ({"about": {}, "params__Dense_1__bias": None}, r"Dense_1.bias is absent, .*F32 \[3\]"),
        ({"about": {}, "params__more": np.zeros(3, np.float32)}, r"params.more is F32 \[3\], .*absent"),
        ({"about": False}, "does not describe a network"),
        ({"about": {"format": 2}}, "format 2, this version reads 1"),
        ({"about": {"config": {"model": "vgg"}}}, "--model=vgg: must be one of"),
        ({"about": {"config": {"modle": "vgg"}}}, "unknown setting 'modle'"),
        ({"about": {"dataset": {}}}, "image_shape"),
        ({"about": {"dataset": {"image_shape": [8, 8], "num_classes": 3}}}, r"shape \(8, 8\)"),
    ],
)
def test_parameters_that_are_not_the_networks_are_refused(changes, words, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(export.to_safetensors(classifier("cnn")))
    changed(path, **changes)
    with pytest.raises(WorkdirError, match=words):
        export.load_safetensors(path)


def test_what_is_no_file_of_parameters_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    with pytest.raises(WorkdirError, match=r"model.safetensors is not a file of parameters"):
        export.load_safetensors(path)
    content = export.to_safetensors(classifier("cnn"))
    for broken in (b"", content[:100], content[:-1]):
        path.write_bytes(broken)
        with pytest.raises(WorkdirError, match=r"model.safetensors is not a file of parameters"):
            export.load_safetensors(path)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny) -> pathlib.Path:
    """A run with checkpoints at steps 1, the best, and 2."""
    folder = tmp_path_factory.mktemp("run")
    config = Config(model="digits_cnn", data=str(folder / "tiny.npz"), workdir=str(folder), data_dir=str(folder))
    write_config(folder, config, tiny)
    state = training.init_state(config, networks.create("digits_cnn", 3, tiny.image_shape), tiny.image_shape)
    with Checkpoints(folder) as checkpoints:
        for step, score in [(1, 0.9), (2, 0.5)]:
            params = jax.tree.map(lambda a, step=step: a + 0.1 * step, state.params)
            checkpoints.save(step, state.replace(step=jnp.int32(step), params=params), {"score": score, "seconds": 1.0})
            checkpoints.wait()
    return folder


def test_a_run_is_exported_with_a_card_that_says_what_the_files_are(workdir, tiny, tmp_path, capsys):
    card = export.run(export.Request(workdir=str(workdir), which="best", to=str(tmp_path / "deep" / "to")))
    folder = tmp_path / "deep" / "to"
    names = ["model.stablehlo", "model.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*names, "export.json"])
    assert json.loads((folder / "export.json").read_text()) == card
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"{folder / n}  {(folder / n).stat().st_size:,} bytes" for n in [*names, "export.json"]]
    for name in names:
        content = (folder / name).read_bytes()
        assert card["files"][name]["sha256"] == hashlib.sha256(content).hexdigest()
        assert str(workdir).encode() not in content
    assert (card["step"], card["checkpoint"], card["dataset"]) == (1, "best", describe_dataset(tiny))
    assert card["input"] == {"name": "images", "dtype": "float32", "shape": ["N", 8, 8, 1], "range": [0, 1]}
    assert card["output"] == {"name": "logits", "dtype": "float32", "shape": ["N", 3]}
    assert str(workdir) not in json.dumps({k: v for k, v in card.items() if k != "environment"})
    # Three ways to the same probabilities.
    x = tiny.x_test[:4]
    want, pixels = np.asarray(e2sad_jax.load(workdir, "best")(x)), (x / np.float32(255)).astype(np.float32)
    hlo = jax.export.deserialize(bytearray((folder / names[0]).read_bytes()))
    np.testing.assert_allclose(jax.nn.softmax(hlo.call(pixels)), want, atol=1e-5)
    np.testing.assert_allclose(export.load_safetensors(folder / names[1])(x), want, atol=1e-5)


def test_an_earlier_export_is_replaced_only_when_asked_and_as_a_whole(workdir, tmp_path):
    def request(**changes):
        return export.Request(workdir=str(workdir), to=str(tmp_path), **changes)

    export.run(request(format="safetensors,safetensors"))
    (tmp_path / "model.stablehlo").write_text("of another export")
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "export.json").read_text()
    with pytest.raises(ConfigError, match=r"holds export.json, model.stablehlo, model.safetensors of .*--overwrite"):
        export.run(request(format="safetensors", which="best"))
    assert (tmp_path / "export.json").read_text() == before
    card = export.run(request(format="stablehlo", overwrite=True))
    assert {path.name for path in tmp_path.iterdir()} == {"model.stablehlo", "export.json", "notes.txt"}
    assert (card["step"], card["checkpoint"], list(card["files"])) == (2, "last", ["model.stablehlo"])


def test_nothing_is_written_unless_all_of_it_says_what_the_network_says(workdir, tmp_path, monkeypatch):
    """A converter that gets a layer wrong."""

    def wrong(of):
        return export.to_safetensors(
            dataclasses.replace(of, params=jax.tree.map(lambda a: jnp.asarray(a) * 1.01, of.params))
        )

    monkeypatch.setattr(export, "WRITERS", {**export.WRITERS, "safetensors": wrong})
    with pytest.raises(Error, match=r"--format=safetensors: what was to be written gives logits that are .* from"):
        export.run(export.Request(workdir=str(workdir), to=str(tmp_path), format="stablehlo,safetensors"))
    assert not list(tmp_path.iterdir())


def test_a_package_that_is_missing_is_named_before_anything_is_done(monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(
        ConfigError, match=r"--format=safetensors: needs safetensors.*e2sad_jax\[export\].*leave safetensors out"
    ):
        export.Request(workdir="w")
    export.Request(workdir="w", format="stablehlo")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"workdir": ""}, "--workdir: must be given"),
        ({"format": "tflite"}, "--format=tflite: must be of stablehlo, safetensors"),
        ({"format": ""}, "--format=: must be of"),
        ({"which": "first"}, "--which=first: must be one of last, best"),
    ],
)
def test_refuses(changes, words):
    with pytest.raises(ConfigError, match=words):
        export.Request(**{"workdir": "w", **changes})
