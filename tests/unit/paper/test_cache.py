"""What a reproduction keeps beside its runs: read as written, and no more than nothing once it is damaged."""

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


def test_outcomes_are_read_as_written_or_not_at_all(tmp_path):
    tested = cache.Tested("00", "11", 4, 0)
    path = cache.path_of(tmp_path, Attack("PGD", "pgd", 0.1, 3), tested)
    assert cache.read(path, LABELS) is None
    cache.write(path, Attack("PGD", "pgd", 0.1, 3), tested, [Outcome(PREDICTION == LABELS, PREDICTION)])
    (outcome,) = cache.read(path, LABELS).outcomes
    np.testing.assert_array_equal(outcome.prediction, PREDICTION)
    np.testing.assert_array_equal(outcome.correct, [True, True, False, False])
    assert cache.read(path, LABELS[:3]) is None, "of other images"
    for damaged in damages(random.Random(0), path.read_bytes(), 100):
        path.write_bytes(damaged)
        found = cache.read(path, LABELS)
        assert found is None or (found.outcomes[0].prediction == PREDICTION).all(), damaged


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
