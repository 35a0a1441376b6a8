"""benchmarks/accelerator.sh: what it runs, in which order, what it does not do again, and how it ends."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "accelerator.sh"
# In place of Python: notes the command, leaves the files that it would, and ends as `rules` say: what the command has in
# it, and its exit code, with "cut" a table of step_cost without all its rounds, with "real" what Python really does. It is
# started hundreds of times, so it imports next to nothing.
STUB = """#!{python} -IS
import os, sys
here, words = {here!r}, sys.argv[1:]
if words[0] == "-c":
    print("torch" if "torch" in words[1] else "0.0")
    sys.exit()
with open(here + "/calls", "a") as calls:
    print(*words, file=calls)
text = " ".join(words)
with open(here + "/rules") as file:
    rules = eval(file.read())
end = next((rule for part, rule in rules.items() if part in text), 0)
if end == "real":
    os.execv({python!r}, [{python!r}, *words])
if end == "sleep":
    import time
    time.sleep(60)
flags = dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)
folder = flags["workdir"] if "mnist" in words[1] else flags["results"]
name = {{"mnist": "results.md", "step_cost": "step_cost.json", "compare": "compare.json"}}
name = name.get(words[1].split(".")[1], "full")
if end in (0, 3, "cut") or (end == 1 and name == "step_cost.json"):
    os.makedirs(folder, exist_ok=True)
    with open(folder + "/" + name, "w") as file:
        print('  "complete":', "false" if end == "cut" else "true", file=file)
sys.exit({{"cut": 1}}.get(end, end))
"""
ALL = [
    *("e2sad-float32", "e2sad-tf32", "e2sad-bf16"),
    *("step_cost/torch", "step_cost/ifgsm", "step_cost/precisions"),
    *("compare_full", "compare_equal", "compare_long", "compare_parts"),
    *("--table=1,2", "--study=second_step", "--figure=all", "--study=lam,labels,alpha", "--table=1 --precision=bf16"),
]


class Stage:
    """A folder with a stub of Python, and what was called since one last looked."""

    def __init__(self, folder):
        self.folder, self.results = folder, folder / "results"
        self.python = folder / "stub"
        self.python.write_text(STUB.format(python=sys.executable, here=str(folder)))
        self.python.chmod(0o755)

    def run(self, *arguments, rules=None, environment=None, minutes=9):
        """Exit code, and the commands."""
        (self.folder / "rules").write_text(repr(rules or {}))
        (self.folder / "calls").write_text("")
        environment = {"PYTHON": str(self.python), "E2SAD_RESULTS": str(self.results), **(environment or {})}
        done = subprocess.run(
            [shutil.which("bash"), SCRIPT, str(minutes), str(self.folder / "runs"), *arguments],
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=900,
            check=False,
        )
        self.said = done.stderr
        return done.returncode, (self.folder / "calls").read_text().splitlines()


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def is_called(calls, names):
    assert len(calls) == len(names), calls
    for call, name in zip(calls, names, strict=True):
        assert name in call


def test_everything_is_run_once(stage):
    code, calls = stage.run()
    assert code == 0, stage.said
    is_called(calls, ALL)
    with_data = [call for call in calls if "step_cost" not in call]
    assert all(" --data=mnist " in call for call in with_data)
    assert "--peer=torch --compile_seconds=60" in calls[3]
    assert f"--results={stage.folder}/runs/bf16 " in calls[-1]
    assert stage.run() == (0, [])


def test_data_sets_and_flags_are_passed_on(stage):
    flags = {name: f"--{name} --of=it" for name in ("TRAIN", "STEP_COST", "COMPARE", "PAPER")}
    code, calls = stage.run("a.npz", "b.npz", environment={f"E2SAD_{k}_FLAGS": v for k, v in flags.items()})
    assert code == 0, stage.said
    assert [call.split("--data=")[1].split()[0] for call in calls if "--table=3" in call] == ["b.npz"]
    assert all("--data=a.npz" in call for call in calls if "step_cost" not in call and "--table=3" not in call)
    for i, call in enumerate(calls):
        which = "TRAIN" if i < 3 else "STEP_COST" if i < 6 else "COMPARE" if i < 10 else "PAPER"
        assert call.endswith(f" --{which} --of=it")


def test_when_time_ran_out_the_next_call_goes_on_there(stage):
    code, calls = stage.run(rules={"step_cost/ifgsm": 124})
    assert code == 4
    is_called(calls, ALL[:5])
    code, calls = stage.run(rules={"--table=1,2": 4})
    assert code == 4
    is_called(calls, ALL[4:11])
    code, calls = stage.run()
    assert code == 0
    assert len(calls) == 5
    assert "--table=1,2" in calls[0]


def test_a_program_that_takes_longer_is_told_to_stop(stage):
    """By the real `timeout`, with a second instead of the minutes that are left."""
    path = stage.folder / "bin"
    path.mkdir()
    (path / "timeout").write_text(
        f'#!/bin/bash\necho "$@" >{path}/told\nexec {shutil.which("timeout")} "$1" "$2" 1 "${{@:4}}"\n'
    )
    (path / "timeout").chmod(0o755)
    environment = {"PATH": f"{path}:{os.environ['PATH']}"}
    code, calls = stage.run(rules={"e2sad-float32": "sleep"}, environment=environment)
    assert code == 4
    assert len(calls) == 1
    signal, kill, seconds, *_ = (path / "told").read_text().split()
    assert (signal, kill) == ("--signal=TERM", "--kill-after=40")
    assert 500 < int(seconds) <= 540


def test_without_a_minute_nothing_is_begun_and_what_is_done_is_known(stage):
    assert stage.run(minutes=0) == (4, [])
    assert stage.run()[0] == 0
    assert stage.run(minutes=0) == (0, [])


def test_the_papers_command_is_told_how_many_minutes_there_are(stage):
    _, calls = stage.run(minutes=7)
    budgets = [float(call.split("--time_budget_minutes=")[1].split()[0]) for call in calls[10:]]
    assert 6 < min(budgets) <= max(budgets) <= 7


@pytest.mark.parametrize(("where", "code"), [("e2sad-tf32", 3), ("step_cost/precisions", 1)])
def test_what_could_not_be_done_whole_is_told_at_the_end_of_each_call(where, code, stage):
    """A run that diverged, a step that cannot be measured: all the others are done."""
    ended, calls = stage.run(rules={where: code})
    assert (ended, len(calls)) == (code, len(ALL))
    assert stage.run() == (code, [])


@pytest.mark.parametrize(
    ("where", "end", "code"), [("step_cost/torch", "cut", 1), ("e2sad-tf32", 1, 1), ("compare_equal", 2, 2)]
)
def test_a_command_that_fails_ends_the_call_and_is_tried_again(where, end, code, stage):
    """With an old whole table of the same name in its folder, too."""
    old = stage.folder / "runs" / "step_cost" / "torch" / "step_cost.json"
    old.parent.mkdir(parents=True)
    old.write_text('{"complete": true}')
    os.utime(old, (1, 1))
    for _ in range(2):
        ended, calls = stage.run(rules={where: end})
        assert ended == code
        assert where in calls[-1]
    ended, calls = stage.run()
    assert ended == 0
    assert where in calls[0]


def test_what_lost_its_result_is_done_again(stage):
    stage.run()
    shutil.rmtree(stage.results / "compare_long")
    (stage.folder / "runs" / "done" / "step_cost-ifgsm").unlink()
    code, calls = stage.run()
    assert code == 0
    is_called(calls, ["step_cost/ifgsm", "compare_long"])


def test_where_there_is_no_python_it_is_python3(stage):
    path = stage.folder / "bin"
    path.mkdir()
    for name in ("dirname", "timeout", "env", "mkdir", "touch", "grep"):
        (path / name).symlink_to(shutil.which(name))
    (path / "python3").symlink_to(stage.python)
    code, calls = stage.run(environment={"PYTHON": "", "PATH": str(path)})
    assert code == 0, stage.said
    assert len(calls) == len(ALL)


def test_the_first_run_is_a_real_one_without_what_an_accelerator_may_lack(stage, tmp_path):
    """No tensorflow-datasets, no tensorboardX; data from a file."""
    rng = np.random.default_rng(0)
    images, labels = rng.random((64, 8, 8, 1), np.float32), np.arange(64) % 10
    np.savez(tmp_path / "tiny.npz", x_train=images, y_train=labels, x_test=images[:16], y_test=labels[:16])
    (tmp_path / "without").mkdir()
    lacking = "import sys\nfor name in ('tensorflow_datasets', 'tensorboardX'):\n    sys.modules[name] = None\n"
    (tmp_path / "without" / "sitecustomize.py").write_text(lacking)
    environment = {
        "PYTHONPATH": f"{tmp_path / 'without'}:{ROOT}",
        "JAX_PLATFORMS": "cpu",
        "E2SAD_TRAIN_FLAGS": "--model=digits_cnn --steps=2 --batch_size=8 --log_every=1 --eval_batch_size=16",
    }
    code, calls = stage.run(str(tmp_path / "tiny.npz"), rules={"e2sad-float32": "real"}, environment=environment)
    assert code == 0, stage.said
    assert len(calls) == len(ALL)
    workdir = tmp_path / "runs" / "e2sad-float32"
    assert "pip install tensorboardX" in stage.said
    assert "| clean" in (workdir / "results.md").read_text()
    assert '"step": 2' in (workdir / "metrics.jsonl").read_text()
    assert json.loads((workdir / "training.json").read_text())[-1]["to_step"] == 2
    assert not list(workdir.glob("events.out.*"))
