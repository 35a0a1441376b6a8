"""The command that measures what a model's robustness is worth: a run's folder or a function in, tables and files out."""

import json

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import Effort
from e2sad_jax.runs import evaluate
from e2sad_jax.runs.evaluate import Request

LITTLE = Effort(budgets=(0.5, 1.0), steps=(1,), restarts=1, pgd_steps=2, apgd_steps=2, queries=10, targets=1)


@pytest.fixture(autouse=True)
def _little(monkeypatch):
    monkeypatch.setattr(evaluate, "Effort", lambda **given: LITTLE)


def test_a_run_is_evaluated_from_its_folder(trained, tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    request = Request(
        workdir=str(trained), eps=0.2, examples=20, transfer_from=str(trained), results=str(tmp_path / "e")
    )
    result = evaluate.run(request)
    assert (result["eps"], result["images"]) == (0.2, 20)
    out = capsys.readouterr().out
    assert "Checks for gradient masking" in out
    assert result["verdict"] in out
    assert max(map(len, out.split("Checks")[0].splitlines())) <= 120
    saved = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert saved["clean"] == result["clean"] > 0.4
    assert saved["transfer"]["accuracy"] == saved["transfer"]["accuracy_of_substitute"], "from itself"
    assert "worst case" in (tmp_path / "e" / "evaluation.md").read_text().lower()
    assert (tmp_path / "e" / "evaluation.png").stat().st_size > 5000


def test_a_function_of_the_current_folder_is_evaluated_on_several_devices(tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    w, images = rng.normal(size=(16, 4)).astype(np.float32), rng.uniform(0, 1, (10, 4, 4, 1)).astype(np.float32)
    labels = (images.reshape(10, -1) @ w).argmax(1)
    np.savez(tmp_path / "test.npz", x_train=images[:4], y_train=np.arange(4), x_test=images, y_test=labels)
    np.save(tmp_path / "w.npy", w)
    (tmp_path / "mine.py").write_text(
        "import numpy as np\nw = np.load('w.npy')\ndef predict(x):\n    return x.reshape(len(x), -1) @ w\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    given = {"data": "test.npz", "eps": 0.1, "results": "here", "examples": 10}
    result = evaluate.run(Request(predict="mine:predict", devices=2, batch_size=10, **given))
    assert result["clean"] == 1
    printed = capsys.readouterr()
    assert "predict: " in printed.out
    assert "checks on 10 images" in printed.out
    assert printed.err.count("took") == 1, printed.err
    assert (tmp_path / "here" / "evaluation.png").exists()
    with pytest.raises(ConfigError, match="--predict=mine:nothing: module 'mine' has no attribute 'nothing'"):
        evaluate.run(Request(predict="mine:nothing", **given))
    with pytest.raises(ConfigError, match="--batch_size=3: must be a multiple of the 2 devices"):
        evaluate.run(Request(predict="mine:predict", devices=2, batch_size=3, **given))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "--workdir or --predict: one of them must be given"),
        ({"workdir": "a", "predict": "b:c"}, "--workdir or --predict"),
        ({"predict": "b:c"}, r"--predict=b:c: must be MODULE:FUNCTION, beside --data=PATH.npz"),
        ({"workdir": "a", "examples": -1}, r"--examples=-1: must be at least 0"),
        ({"workdir": "a", "fab": -1}, r"--fab=-1: must be at least 0"),
        ({"workdir": "a", "eps": float("nan")}, r"--eps=nan: must be at least 0"),
        ({"workdir": "a", "which": "first"}, r"--which=first: must be one of last, best"),
        ({"workdir": "a", "fab": 3, "auto": False}, r"--fab=3: is a part of the worst case; leave it out, or --noauto"),
    ],
)
def test_impossible_requests_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        Request(**changes)
