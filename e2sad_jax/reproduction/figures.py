"""Figures."""

import pathlib
from typing import Any


def write(reproduction: Any, number: str) -> list[pathlib.Path]:
    """Draws one figure."""
    return []


def study(path: pathlib.Path, table: Any) -> None:
    """Draws a study."""
