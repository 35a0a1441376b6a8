"""The scripts of `examples/` run as they stand, at a small size, and print what their pages say."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

EXAMPLES = sorted((pathlib.Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
SMALL = {
    "digits.py": ["--steps=4", "--images=20"],
    "new_defense.py": ["--steps=4", "--images=20", "--only=natural", "--only=logit pairing"],
    "own_flax_model.py": ["--steps=4", "--images=20"],
}

# Each as `python SCRIPT ARGUMENTS` would, in one process: what they import is most of it.
RUN = """
import json, runpy, sys
for script, arguments in json.loads(sys.argv[1]):
    print(f"script {script}", flush=True)
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    """What each script printed, by its name, in a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("anywhere")
    environment = {
        **{**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(EXAMPLES[0].parents[2])},
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # the compiler's are most of so few steps
    }
    runs = json.dumps([(str(script), SMALL[script.name]) for script in EXAMPLES])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", RUN, runs],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert not list(folder.iterdir()), "nothing is left behind"
    printed = (part.partition("\n") for part in re.split(r"^script ", done.stdout, flags=re.M)[1:])
    return {pathlib.PurePath(script).name: text for script, _, text in printed}


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.name)
def test_it_runs_from_any_folder_and_prints_accuracies(script, said):
    accuracies = [float(value) for value in re.findall(r"\b[01]\.\d{3}\b", said[script.name])]
    assert len(accuracies) >= 4
    assert all(0 <= value <= 1 and round(20 * value, 6).is_integer() for value in accuracies), "shares of 20 images"
    if script.name == "new_defense.py":
        prices = {name: float(price) for name, price in re.findall(r"^(.+?)  .* (\d+\.\d\d)$", said[script.name], re.M)}
        assert prices["natural"] == 1
        # Two gradients of the images, two thirds of a step each, and a second pass: 1 + 2 * 2/3 + 1.
        assert prices["logit pairing"] == pytest.approx(3.33, abs=0.2)


def test_every_script_is_run():
    assert {script.name for script in EXAMPLES} == set(SMALL)
