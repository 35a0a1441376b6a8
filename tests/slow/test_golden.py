"""Golden values on both networks and in both precisions that tests/unit/defenses/test_golden.py leaves out."""

import pytest

from tests.golden import Case, GoldenValues, golden_case

CASES = [("mnist", "float32"), ("svhn", "float32"), ("svhn", "float64")]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, shared) -> Case:
    return golden_case(*request.param, shared)


class TestGolden(GoldenValues):
    pass
