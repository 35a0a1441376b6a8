"""No file that is read runs code or opens another file: a data set, a run's folder; and reading a run prints nothing."""

import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import jax
import pytest

from e2sad_jax import networks, training
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.runs.folder import write_config
from e2sad_jax.training import configure

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory) -> pathlib.Path:
    """A run's folder with one checkpoint."""
    folder = tmp_path_factory.mktemp("trained")
    config = configure(data="tiny.npz", model="digits_cnn", steps=4, batch_size=8)
    write_config(folder, config, tiny)
    with jax.numpy_dtype_promotion("standard"), Checkpoints(folder) as checkpoints:
        state = training.init_state(config, networks.create("digits_cnn", 3, SHAPE), SHAPE)
        checkpoints.save(4, state.replace(step=state.step + 4), {"score": 1.5, "seconds": 2.0})
    return folder


def test_load_says_nothing(trained):
    code = f"import e2sad_jax; print(e2sad_jax.load({str(trained)!r}).step)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("4\n", "")


HEARD = """
import io, json, os, pathlib, pickle, sys, zipfile
import numpy as np
import e2sad_jax
from e2sad_jax import data
from e2sad_jax.runs.folder import read_training
from e2sad_jax.errors import Error

class Canary:
    def __reduce__(self):
        return os.mkdir, (str(folder / "ran"),)

folder, good = map(pathlib.Path, sys.argv[1:])
e2sad_jax.load(good)  # imports whatever it needs
data.load("digits")
heard = []
own = str(pathlib.Path(e2sad_jax.__file__).parent)
allowed = (str(folder), str(good), sys.prefix, sys.base_prefix, own, "/usr", "/proc", "/sys")

def hear(event, args):
    if event in ("pickle.find_class", "os.system", "os.exec", "subprocess.Popen", "os.mkdir"):
        heard.append((event, str(args)))
    if event == "exec" and not args[0].co_filename.startswith(allowed):
        heard.append((event, args[0].co_filename))
    if event == "open" and isinstance(args[0], str) and not os.path.realpath(args[0]).startswith(allowed):
        heard.append((event, args[0]))

x, y = np.zeros((4, 2, 2), np.uint8), np.arange(4) % 2
arrays = {"x_train": x, "y_train": y, "x_test": x, "y_test": y}
for name in (*arrays, "num_classes", "metadata"):
    np.savez(folder / f"{name}.npz", **{**arrays, name: np.array([Canary()], object)})
(folder / "pickle.npz").write_bytes(pickle.dumps(Canary()))
with zipfile.ZipFile(folder / "code.npz", "w") as archive:
    text = "{'descr': __import__('os').mkdir('ran'), 'fortran_order': False, 'shape': ()}".ljust(118).encode()
    for name in arrays:
        archive.writestr(name + ".npy", b"\\x93NUMPY\\x01\\x00" + len(text).to_bytes(2, "little") + text)
sys.addaudithook(hear)
refused = 0
for path in sorted(folder.glob("*.npz")):
    try:
        data.load(str(path))
    except Error:
        refused += 1
for path in sorted(folder.glob("w*")):
    try:
        e2sad_jax.load(path)
    except Error:
        refused += 1
    read_training(path)
silent = list(heard)
pickle.loads(pickle.dumps(Canary()))  # that the hook hears at all
print(json.dumps([refused, silent, [event for event, _ in heard]]))
"""


def test_no_file_runs_code_or_opens_another(trained, tmp_path):
    damaged = {
        "checkpoints/4/default/_METADATA": pickle.dumps(print),
        "checkpoints/4/default/manifest.ocdbt": pickle.dumps(print),
        "checkpoints/4/metrics/metrics": b'{"score": "__import__(\'os\')"}',
        "config.json": pickle.dumps(print),
        "training.json": pickle.dumps(print),
    }
    for i, (name, content) in enumerate(damaged.items()):
        shutil.copytree(trained, tmp_path / f"w{i}")
        (tmp_path / f"w{i}" / name).write_bytes(content)
    command = [sys.executable, "-c", HEARD, str(tmp_path), str(trained)]
    elsewhere = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=elsewhere)
    refusals, heard, control = json.loads(done.stdout.splitlines()[-1])
    assert refusals == 8 + 4, "training.json is not needed to load a network"
    assert heard == []
    assert control == ["pickle.find_class", "os.mkdir"]
