"""Robust accuracy after several lengths of training, on made-up outcomes."""

import dataclasses
import pathlib

import pytest

from benchmarks import lengths
from e2sad_jax import data
from e2sad_jax._io import read_json, write_json
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import Attack

BUDGET = {"data": "tiny.npz", "model": "digits_cnn", "batch_size": 16, "validation_examples": 10, "examples": 10}


@pytest.fixture
def trained(tiny, monkeypatch):
    """The runs that were asked for; their accuracies grow with their steps."""
    seen = []

    def made(request, config, dataset):
        folder = pathlib.Path(config.workdir)
        began = folder / "checkpoints" / "step"
        assert not began.exists() or int(began.read_text()) <= config.steps, "never shortened"
        seen.append((folder.name, int(began.read_text()) if began.exists() else 0))
        began.parent.mkdir(parents=True, exist_ok=True)
        began.write_text(str(config.steps))
        robust = config.steps / 40
        last = {"clean": 0.9, "after": {"clean": 0.9, "IFGSM-30": robust + 0.1, "APGD-CE": robust}, "robust": robust}
        return {"last": last, "images": 10}

    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    monkeypatch.setattr(lengths, "evaluate_model", made)
    monkeypatch.setattr(lengths.training, "step_flops", lambda config, *about: 2.0)
    return seen


def test_each_length_is_trained_once_and_a_constant_rate_goes_on(trained, tmp_path):
    asked = lengths.Request(steps=("10", "5"), workdir=str(tmp_path), **BUDGET)
    lengths.run(asked)
    assert trained == [("robust2-5", 0), ("paper-5", 0), ("robust2-10", 0), ("paper-10", 5)], "and where each began"
    before = read_json(tmp_path / "lengths.json")
    for row in before["rows"]:
        del row["settings"]["awp"]  # as if there had been no such choice
    write_json(tmp_path / "lengths.json", before)
    lengths.run(dataclasses.replace(asked, steps=("20",), preset=("paper",)))
    assert trained[4:] == [("paper-20", 10)]
    rows = read_json(tmp_path / "lengths.json")["rows"]
    assert [(row["preset"], row["steps"]) for row in rows] == [
        ("robust2", 5),
        ("robust2", 10),
        ("paper", 5),
        ("paper", 10),
        ("paper", 20),
    ]
    assert [row["flops"] for row in rows] == [2 * row["steps"] for row in rows]
    page = (tmp_path / "lengths.md").read_text()
    assert "| paper | 20 | 0.900 | 0.600 | 0.500 |" in page
    assert "The paper has 0.8633 under IFGSM-30" in page
    lengths.run(dataclasses.replace(asked, examples=9, steps=("5",), preset=("paper",)))
    assert trained[5:] == [("paper-5", 5)], "another question"


def test_rows_of_other_settings_and_damaged_files_do_not_count(trained, tmp_path, monkeypatch, capsys):
    asked = lengths.Request(steps=("5",), workdir=str(tmp_path), **BUDGET)
    lengths.run(asked)
    own = lengths.preset
    monkeypatch.setattr(
        lengths, "preset", lambda name, eps: {**own(name, eps), "lam": 0.5} if name == "robust2" else {}
    )
    lengths.run(asked)
    assert trained[2:] == [("robust2-5", 5)], "the preset is another one now"
    assert capsys.readouterr().err == ""
    (tmp_path / "lengths.json").write_text("[")
    lengths.run(asked)
    assert trained[3:] == [("robust2-5", 5), ("paper-5", 5)]
    assert "lengths.json is unusable" in capsys.readouterr().err


def test_the_paper_s_setting_and_the_attacks(tmp_path):
    asked = lengths.Request(data="mnist", workdir=str(tmp_path))
    paper, robust = (asked.config(name, 2000) for name in ("paper", "robust2"))
    assert (paper.eps1, paper.schedule, paper.eps_scale, paper.soft_label) == (0.3, "constant", 1, True)
    assert paper.settings["eps2"] == pytest.approx(0.1)
    assert (robust.settings["memory"], robust.schedule) == ("int8", "cyclic")
    first, *others = asked.comparison().stages(10)
    assert first == Attack("IFGSM-30", "ifgsm", 0.3, 30)
    assert [stage.name for stage in others] == ["APGD-CE", "APGD-T", "Square"]


def test_a_preset_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="--preset=x: must be one of robust2, paper"):
        lengths.Request(preset=("x",))


@pytest.mark.parametrize("length", ["0", "-1", "1e3", "x"])
def test_a_length_that_is_none_is_refused(length):
    with pytest.raises(ConfigError, match=f"--steps={length}: must be a whole number, at least 1"):
        lengths.Request(steps=(length,))
