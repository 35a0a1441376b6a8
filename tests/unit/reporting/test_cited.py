"""The comparison of cited systems: its table on made-up rows, its parts by hand, and one small run of all of it."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax._io import write_json
from e2sad_jax.comparison import around, cited
from e2sad_jax.comparison import run as comparison
from e2sad_jax.comparison.request import Request
from e2sad_jax.errors import ConfigError
from e2sad_jax.reporting import provenance
from tests.unit.reporting.helpers import LITTLE


def row(clean, claimed, adaptive, commit="abc"):
    return {
        "clean": clean,
        "claimed": {"attack": "PGD-40", "robust": claimed},
        "adaptive": {"attack": "APGD-CE", "robust": adaptive},
        "training": 1.5,
        "inference": 3.0,
        "nearest": {"fooled": 0.75, "l2": 1.25} if adaptive < 0.2 else None,
        "origin": {"command": "python", "hardware": "CPU", "date": "2026-11-29", "commit": commit},
    }


def test_the_share_of_changes_has_the_gradient_of_the_probabilities():
    own = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    mutated = jnp.array([[[1.0, 0.5, 0.0], [0.0, 2.0, 1.0]], [[0.0, 3.0, 0.0], [0.0, 0.0, 5.0]]])
    np.testing.assert_allclose(around._changes(mutated, own), [0.5, 0.5])
    want = jax.grad(lambda z: -jax.nn.softmax(z)[:, jnp.array([0, 1]), jnp.array([0, 2])].mean(0).sum())(mutated)
    np.testing.assert_allclose(jax.grad(lambda z: around._changes(z, own).sum())(mutated), want, rtol=1e-6)
    assert np.abs(want).max() > 0.01


def test_the_table_has_both_attacks_and_both_prices(tmp_path):
    request = Request(data="tiny.npz", cited=True, **LITTLE)
    result = {
        "request": {"data": "tiny.npz", "model": "digits_cnn", "steps": 3, "batch_size": 16, "eps": 0.3},
        "images": "10 of 50 test images",
        "environment": {"hardware": "CPU", "date": "2026-11-29", "commit": "abc"},
        "command": "python -m experiments.compare --cited",
        "rows": {"natural": row(1.0, 0.5, 0.25), "MagNet": row(0.9, 0.8, 0.125)},
    }
    lines = cited.table(result).markdown().splitlines()
    assert lines[4] == "| natural | 1.000 | PGD-40 | 0.500 | APGD-CE | 0.250 | 1.50 | 3.0 | - |"
    assert "MagNet" in lines[5]
    assert "0.125" in lines[5]
    assert lines[5].endswith("| 0.75 (1.25) |")
    assert any("10 of 50 test images" in line and "0.3" in line for line in lines)
    assert lines[-1] == "- `python`, CPU, 2026-11-29, commit abc."
    given = {**result, "request": {**result["request"], "init_from": "runs/n"}}
    assert "one seed, begun with the weights of `runs/n` (their FLOPs" in cited.table(given).markdown()
    result["rows"]["MagNet"] = row(0.9, 0.8, 0.125, commit="abd")
    assert cited.table(result).markdown().splitlines()[-2:] == [
        "- `python`, CPU, 2026-11-29, commit abc: natural.",
        "- `python`, CPU, 2026-11-29, commit abd: MagNet.",
    ]
    path, asked = tmp_path / "cited.json", {"question": request.question(), "data": "d", "commit": "abc"}
    write_json(path, {**result, "asked": asked})
    both = result["rows"]
    assert cited._earlier(path, asked, ()) == {"natural": both["natural"]}, "of this commit"
    assert cited._earlier(path, {**asked, "commit": "abe"}, ("natural",)) == {"MagNet": both["MagNet"]}
    assert cited._earlier(path, {**asked, "commit": "abe"}, ("feature squeezing",)) == both
    assert cited._earlier(path, {**asked, "commit": "abe"}, ()) == {}
    before = {key: value for key, value in asked["question"].items() if key != "width"}
    write_json(path, {**result, "asked": {**asked, "question": before}})
    assert cited._earlier(path, asked, ()) == {"natural": both["natural"]}, "of before there was a width"
    assert cited._earlier(path, {**asked, "data": "e"}, ("natural",)) == {}
    for found in both.values():
        del found["origin"]
    write_json(path, {**result, "asked": asked})
    assert set(cited._earlier(path, {**asked, "commit": "abc"}, ())) == set(both), "as older files are"
    path.write_text("{")
    assert cited._earlier(path, asked, ()) == {}


@pytest.mark.parametrize("other", [{"parts": True}, {"equal_flops": True}, {"judge": "held_out"}])
def test_what_it_does_not_read_is_refused(other):
    with pytest.raises(ConfigError, match="--cited: chooses what is compared"):
        Request(cited=True, **{**LITTLE, **other})


@pytest.mark.slow
def test_all_systems_are_made_attacked_once_and_shown(little, tiny, tmp_path, monkeypatch, standard_promotion):
    monkeypatch.setattr(data, "load", lambda name, data_dir: tiny)
    for name, few in {"AUTOENCODER_STEPS": 2, "GAN_STEPS": 2, "PROJECTION_STEPS": 3, "COPIES": 3}.items():
        monkeypatch.setattr(around, name, few)
    monkeypatch.setattr(cited, "SEARCH", {"steps": 3, "binary_steps": 2})
    monkeypatch.setattr(provenance, "commit", lambda: "a" * 40)
    request = Request(
        data="tiny.npz", cited=True, workdir=str(tmp_path / "runs"), results=str(tmp_path / "out"), **LITTLE
    )
    said = []
    with jax.numpy_rank_promotion("allow"):
        result = comparison.run(request, said.append)
    assert list(result["rows"]) == [*cited.TRAINED, *around.AROUND] == [line.split(":")[0] for line in said]
    for found in result["rows"].values():
        assert 0 <= found["adaptive"]["robust"] <= 1
        assert found["training"] >= 1
    rows = result["rows"]
    evaded = [name for name, found in rows.items() if "Orthogonal PGD" in found["adaptive"]["attack"]]
    assert evaded == ["feature squeezing", "input mutation", "model mutation", "MagNet"], "those with a detector"
    assert rows["Defense-GAN"]["adaptive"]["attack"] == "PGD-40 through the projection, PGD-100 by BPDA"
    assert [name for name, found in rows.items() if found["nearest"]] == ["natural", "feature squeezing", "MagNet"]
    assert rows["distillation"]["training"] == pytest.approx(2, abs=0.1), "with its teacher"
    assert rows["feature squeezing"]["inference"] == pytest.approx(3, rel=0.05), "the image and two squeezed ones"
    assert rows["input mutation"]["inference"] == pytest.approx(4, rel=0.05), "the image and three mutations"
    assert rows["natural"]["adaptive"]["robust"] <= rows["natural"]["clean"]
    assert json.loads((tmp_path / "out" / "cited.json").read_text())["rows"] == rows
    with pytest.raises(
        ConfigError, match=r"--entry=PGD-2: did you mean 'PGD-3'\? must be of natural, .*Defense-GAN with --cited"
    ):
        comparison.run(dataclasses.replace(request, entry=("PGD-2",)), said.append)
    monkeypatch.setattr(provenance, "commit", lambda: "b" * 40)
    monkeypatch.setattr(cited, "_of_around", None)
    with jax.numpy_rank_promotion("allow"):
        again = comparison.run(dataclasses.replace(request, entry=("natural",)), said.append)["rows"]
    assert list(again) == list(rows)
    assert [name for name, found in again.items() if found["origin"]["commit"] == "b" * 40] == ["natural"]
    assert {**again["natural"], "origin": 0} == {**rows["natural"], "origin": 0}
    monkeypatch.setattr(provenance, "commit", lambda: "a" * 40)
    with jax.numpy_rank_promotion("allow"):
        rows = comparison.run(dataclasses.replace(request, entry=("natural",)), said.append)["rows"]
    monkeypatch.setattr(cited, "_of_trained", None)
    assert comparison.run(request, said.append)["rows"] == rows, "nothing is attacked again"
