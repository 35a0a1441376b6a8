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
    "batch_norm.py": ["--steps=4", "--images=20"],
    "digits.py": ["--steps=4", "--images=20"],
    "fine_tune.py": ["--steps=4", "--images=20"],
    "new_defense.py": ["--steps=4", "--images=20", "--defense=natural", "--defense=logit_pairing"],
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
        cost = {name: float(gflop) for name, gflop in re.findall(r"^(.+?)  .* (\d+\.\d\d)$", said[script.name], re.M)}
        # Two gradients of the images, two thirds of a step each, and a second pass: 1 + 2 * 2/3 + 1.
        assert cost["logit pairing"] / cost["natural"] == pytest.approx(3.33, abs=0.2)


def test_the_commands_know_a_defense_of_a_module_that_the_environment_names(tmp_path):
    """Trained, and read back by its name; without the module the run's folder is refused in one line."""
    root = EXAMPLES[0].parents[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root), "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    known = {**environment, "E2SAD_JAX_DEFENSES": "examples.new_defense"}

    def call(command, *flags, env=known):
        arguments = [sys.executable, "-m", f"experiments.{command}", *flags]
        return subprocess.run(arguments, capture_output=True, text=True, cwd=tmp_path, env=env, timeout=600)

    flags = [
        "--defense=logit_pairing",
        "--pairing=1",
        "--steps=2",
        "--batch_size=8",
        "--eval_examples=8",
        "--baseline=",
    ]
    done = call("digits", *flags, f"--workdir={tmp_path / 'w'}")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "w" / "results.json").read_text())
    assert (results["config"]["defense"], results["config"]["pairing"]) == ("logit_pairing", 1.0)
    small = ["--examples=8", "--noauto", f"--results={tmp_path / 'r'}"]
    done = call("evaluate", f"--workdir={tmp_path / 'w'}", *small)
    assert done.returncode == 0, done.stderr
    done = call("evaluate", f"--workdir={tmp_path / 'w'}", env=environment)
    assert done.returncode == 2
    assert re.search("--defense=logit_pairing: must be one of natural, ", done.stderr)
    assert "--entry: what to compare" in (said := call("compare", "--help").stdout)
    assert '"logit_pairing"' in said


def test_every_script_is_run():
    assert {script.name for script in EXAMPLES} == set(SMALL)
