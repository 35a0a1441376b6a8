"""The fixtures of tests/unit/paper, for the trainings of the reproduction."""

from tests.unit.paper.conftest import *  # noqa: F403
