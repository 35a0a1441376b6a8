"""What a reproduction keeps beside its runs: read as written, and no more than nothing once it is damaged."""

import dataclasses
import random

import numpy as np
import pytest

from e2sad_jax._io import sealed, write_json
from e2sad_jax.evaluation import Attack, Outcome
from experiments.paper import cache, cost
from tests.unit.runs.test_folder import damages

LABELS = np.array([0, 1, 2, 1], np.int32)
PREDICTION = np.array([0, 1, 1, -1], np.int32)
STEP = {"milliseconds": 2.0, "fastest": 1.0, "slowest": 3.0, "time_natural": 1.0, "flops": 1.0, "flops_natural": 1.0}


def outcome(prediction):
    return Outcome(prediction == LABELS, prediction)


def test_outcomes_are_read_as_written_or_not_at_all(tmp_path):
    tested = cache.Tested("00", "11", 4, 0)
    path = cache.path_of(tmp_path, Attack("PGD", "pgd", 0.1, 3), tested)
    assert cache.read(path, LABELS) is None
    cache.write(path, Attack("PGD", "pgd", 0.1, 3), tested, [outcome(PREDICTION)])
    (found,) = cache.read(path, LABELS).outcomes
    np.testing.assert_array_equal(found.prediction, PREDICTION)
    np.testing.assert_array_equal(found.correct, [True, True, False, False])
    assert cache.read(path, LABELS[:3]) is None, "of other images"
    for damaged in damages(random.Random(0), path.read_bytes(), 100):
        path.write_bytes(damaged)
        found = cache.read(path, LABELS)
        assert found is None or (found.outcomes[0].prediction == PREDICTION).all(), damaged


def test_what_images_did_to_other_models_is_found_again_for_those_models_alone(tmp_path):
    attack, own = Attack("PGD", "pgd", 0.1, 3), cache.Tested("00", "11", 4, 0)
    shown = dataclasses.replace(own, targets=("22", "33"))
    other = 1 - PREDICTION
    cache.write(path := cache.path_of(tmp_path, attack, shown), attack, shown, [outcome(PREDICTION), outcome(other)])
    found = cache.read(path, LABELS).outcomes
    np.testing.assert_array_equal([each.prediction for each in found], [PREDICTION, other])
    for targets in ((), ("22",), ("33", "22"), ("22", "44")):
        assert cache.read(cache.path_of(tmp_path, attack, dataclasses.replace(own, targets=targets)), LABELS) is None


@pytest.mark.parametrize("change", [{}, {"milliseconds": "2"}, {"flops": []}, {"fastest": None}])
def test_costs_of_the_wrong_types_count_as_none(change, tmp_path):
    path = tmp_path / "cost.json"
    assert cost._known(path, ["natural"]) is None
    known = {"steps": {"natural": STEP | change}, "command": "python", "environment": {}}
    write_json(path, sealed(known))
    assert cost._known(path, ["natural"]) == (None if change else known)
    assert cost._known(path, ["natural", "e2sad"]) is None
    path.write_bytes(path.read_bytes()[:-20])
    assert cost._known(path, ["natural"]) is None
