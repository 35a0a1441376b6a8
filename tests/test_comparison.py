"""The comparison of defenses: trained once, attacked once, shown whole."""

import json

import jax
import pytest

from e2sad_jax import comparison, data, jobs
from e2sad_jax.errors import ConfigError
from tests.test_train import standard_promotion  # noqa: F401

LITTLE = {"steps": 3, "batch_size": 16, "examples": 10, "queries": 5, "apgd_steps": 2, "targets": 1}


def test_models_are_trained_and_attacked_once_and_shown(tiny, tmp_path, monkeypatch, unoptimized):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    monkeypatch.setattr(jobs, "_watch", lambda job, state: {"score": 0.0})
    monkeypatch.setenv("HOME", str(tmp_path))
    request = comparison.Request(
        entry=("RS-FGSM", "natural"), data="tiny.npz", workdir="~/runs", results=str(tmp_path / "out"), **LITTLE
    )
    said = []
    result = comparison.run(request, said.append)
    assert [row["name"] for row in result["rows"]] == ["natural", "RS-FGSM"], "in the order of their price"
    natural, rs_fgsm = result["rows"]
    assert rs_fgsm["flops"] == pytest.approx(1.7 * natural["flops"], rel=0.1)
    for row in result["rows"]:
        (run,) = row["runs"]
        assert 0 <= row["robust"] == run["robust"] <= run["after"]["APGD-CE"] <= row["clean"] == run["clean"]
        assert run["step"] == 3
    page = (tmp_path / "out" / "compare.md").read_text()
    assert "tiny.npz, digits_cnn, 3 steps of 16, 1 seed(s)" in page
    assert "APGD-CE 2 steps, Square 5 queries, one restart each, eps 0.3, 10 test images" in page, (
        "three classes: no DLR"
    )
    assert f"| RS-FGSM | {rs_fgsm['clean']:.3f} |" in page
    assert (tmp_path / "out" / "compare.png").stat().st_size > 5000
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["rows"] == result["rows"]

    def no_more(*args, **kwargs):
        raise AssertionError("done before")

    monkeypatch.setattr(jobs, "train", no_more)
    monkeypatch.setattr(comparison, "auto", no_more)
    assert comparison.run(request, said.append)["rows"] == result["rows"]
    with jax.numpy_dtype_promotion("standard"), pytest.raises(AssertionError, match="done before"):
        comparison.run(comparison.Request(**{**LITTLE, "examples": 5}, data="tiny.npz", workdir="~/runs"), said.append)


def test_requests_that_cannot_be_right_are_refused():
    with pytest.raises(ConfigError, match=r"--entry=pgd: must be of natural, "):
        comparison.Request(entry=("pgd",))
    with pytest.raises(ConfigError, match=r"--eps=0.0: must be above 0"):
        comparison.Request(eps=0.0)
    with pytest.raises(ConfigError, match=r"--seeds=0: must be at least 1"):
        comparison.Request(seeds=0)
