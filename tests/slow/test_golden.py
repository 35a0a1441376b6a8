"""Golden values of another framework, on both networks and in both precisions."""

import pytest

from tests.golden import Case, GoldenValues, golden_case

CASES = [("mnist", "float32"), ("mnist", "float64"), ("svhn", "float32"), ("svhn", "float64")]


@pytest.fixture(scope="module", params=CASES, ids=["-".join(case) for case in CASES])
def case(request, shared) -> Case:
    return golden_case(*request.param, shared)


class TestGolden(GoldenValues):
    pass
