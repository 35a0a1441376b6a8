"""benchmarks.startup: where a command's seconds go, read from the lines of one that trains nothing."""

import pytest

from benchmarks import startup
from benchmarks.results import provenance_of
from e2sad_jax.errors import ConfigError

COMMAND = """
import os, sys
assert os.environ["JAX_LOG_COMPILES"] == "1"
print("W1 dispatch.py:204] Finished tracing init for jit in 0.25 sec", file=sys.stderr)
print("W1 dispatch.py:204] Finished jaxpr to MLIR module conversion jit(init) in 0.5 sec", file=sys.stderr)
print("W1 dispatch.py:204] Finished XLA compilation of jit(init) in 2.0 sec", file=sys.stderr, flush=True)
print("train e2sad on digits: 1/2 steps, loss 1.0", flush=True)
print("W1 dispatch.py:204] Finished XLA compilation of jit(<lambda>) in 1.5 sec", file=sys.stderr, flush=True)
print("train e2sad on digits: 2/2 steps, loss 1.0, took 3s")
print(os.environ["E2SAD_DATA_DIR"])
"""


def test_seconds_are_read_from_the_commands_lines_and_jaxs_log(tmp_path):
    run = startup.timed(["-c", COMMAND], tmp_path)
    assert {name: run[name] for name in (*startup.LOGGED, "programs")} == {
        "tracing": 0.25,
        "lowering": 0.5,
        "XLA": 3.5,
        "programs": 2,
    }
    assert run["first"]["XLA"] == 2.0
    assert 0 < run["first"]["first step"] <= run["trained"] <= run["whole"]


@pytest.mark.parametrize("command", ["raise SystemExit('no such data')", "print('no such data')"])
def test_a_command_that_fails_or_trains_nothing_is_named(command, tmp_path):
    with pytest.raises(ConfigError, match=r"-c .*: ended with exit code [01]: no such data"):
        startup.timed(["-c", command], tmp_path)


def test_the_page_holds_the_table_and_its_provenance():
    first = {"first step": 9.0, "tracing": 1.0, "lowering": 0.5, "XLA": 4.0}
    run = {
        "first": first,
        "trained": 60.0,
        "whole": 90.25,
        "tracing": 2.0,
        "lowering": 1.0,
        "XLA": 40.0,
        "programs": 55,
    }
    about = {
        "date": "2026-12-01 17:00 UTC",
        "hardware": "CPU",
        "python": "3.11",
        "jax": "1",
        "flax": "1",
        "commit": "abc",
    }
    result = {
        "command": "python -m benchmarks.startup",
        "environment": about,
        "imports": {"JAX": 0.75, "the command": 1.5},
        "runs": {"at first": run, "again": run | {"XLA": 3.0}},
    }
    page = startup.page(result)
    assert "| at first | 9.0 | 1.0 | 0.5 | 4.0 | 60.0 | 90.2 | 2.0 | 1.0 | 40.0 | 55 |" in page
    assert "- Imports: JAX 0.8 s, the command 1.5 s." in page
    (found,) = provenance_of(result)
    assert (found["command"], found["commit"]) == ("python -m benchmarks.startup", "abc")
