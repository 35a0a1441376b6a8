"""Metrics of a run that go to an experiment tracker, for which a module stands in; and what keeps it from starting."""

import json
import re
import sys
import types

import pytest

from e2sad_jax.errors import ConfigError
from e2sad_jax.runs import opening, trainer
from e2sad_jax.runs.tracker import Tracker
from tests.unit.runs.helpers import config_of, never, stop_after

pytestmark = pytest.mark.usefixtures("scores")


@pytest.fixture
def begun(monkeypatch):
    """The runs that a package of wandb's functions has begun, each as its arguments and what was logged."""
    runs = []

    def init(**given):
        logged = []
        runs.append((given, logged))
        finish = lambda: logged.append("finished")  # noqa: E731
        return types.SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=finish)

    for name in ("wandb", "trackio"):
        monkeypatch.setitem(sys.modules, name, types.SimpleNamespace(init=init))
    return runs


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_it_gets_what_metrics_jsonl_gets_and_a_resumed_run_goes_on(name, begun, tiny, tmp_path):
    config = config_of(tmp_path / "w", tracker=name)
    for stop in (stop_after(7), never):
        with opening.open_run(config, tiny) as run:
            trainer.train(run, stop)
    (first, earlier), (second, later) = begun
    assert first == second, "the same run"
    assert (first["project"], first["resume"]) == ("e2sad_jax", "allow")
    assert first["name"] == "w" or (name == "trackio" and first["name"].startswith("w-")), (
        "trackio has no other identity"
    )
    assert first["config"]["learning_rate"] == config.learning_rate
    assert earlier.pop() == later.pop() == "finished"
    lines = [json.loads(line) for line in (tmp_path / "w" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert {step: values["train/loss"] for step, values in earlier + later if "train/loss" in values} == losses
    assert any("validation/" in tag for _, values in later for tag in values)


@pytest.mark.parametrize(("name", "key"), [("wandb", "id"), ("trackio", "name")])
def test_folders_of_one_name_are_several_runs(name, key, begun, tmp_path):
    for folder in ("a/seed:0", "b/seed:0", "a/seed:0"):
        Tracker(name, tmp_path / folder, {})
    first, other, again = (given[key] for given, _ in begun)
    assert first == again != other
    assert re.fullmatch(r"seed-0-[0-9a-f]{8}", first), "without the characters that wandb refuses"


def test_what_keeps_it_from_starting_is_said_before_anything_is_written(monkeypatch, tiny, tmp_path):
    config = config_of(tmp_path / "w", tracker="wandb")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with (
        pytest.raises(
            ConfigError, match=r"--tracker=wandb: the package cannot be imported .*; pip install wandb, or leave"
        ),
        opening.open_run(config, tiny),
    ):
        pass
    assert not (tmp_path / "w").exists()

    def refuses(**given):
        raise PermissionError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=refuses))
    with (
        opening.open_run(config, tiny) as run,
        pytest.raises(
            ConfigError, match=r"it does not start \(PermissionError: no API key\); log in, or set WANDB_MODE=off"
        ),
    ):
        trainer.train(run, never)
