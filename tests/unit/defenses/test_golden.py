"""Golden values in float64 on Table 4's network; tests/slow/test_golden.py has Table 5's, and float32."""

import pytest

from tests.golden import Case, GoldenValues, golden_case


@pytest.fixture(scope="module")
def case(shared) -> Case:
    return golden_case("mnist", "float64", shared)


class TestMnistFloat64(GoldenValues):
    pass
