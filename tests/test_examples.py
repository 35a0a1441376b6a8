"""The scripts of `examples/` run as they stand, at a small size, and print what their pages say."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).resolve().parents[1] / "examples").glob("*.py"))
SMALL = {
    "digits.py": ["--steps=4", "--images=20"],
    "new_defense.py": ["--steps=4", "--images=20", "--only=natural", "--only=logit pairing"],
    "own_flax_model.py": ["--steps=4", "--images=20"],
}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_it_runs_from_any_folder_and_prints_accuracies(script, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(script.parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), *SMALL[script.name]],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    accuracies = [float(value) for value in re.findall(r"\b[01]\.\d{3}\b", done.stdout)]
    assert len(accuracies) >= 4
    assert all(0 <= value <= 1 and round(20 * value, 6).is_integer() for value in accuracies), "shares of 20 images"
    assert not list(tmp_path.iterdir()), "nothing is left behind"
    if script.name == "new_defense.py":
        prices = {name: float(price) for name, price in re.findall(r"^(.+?)  .* (\d+\.\d\d)$", done.stdout, re.M)}
        assert prices["natural"] == 1
        # Two gradients of the images, two thirds of a step each, and a second pass: 1 + 2 * 2/3 + 1.
        assert prices["logit pairing"] == pytest.approx(3.33, abs=0.2)


def test_every_script_is_run():
    assert {script.name for script in EXAMPLES} == set(SMALL)
