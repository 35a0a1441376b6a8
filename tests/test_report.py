"""What a report says beside the numbers: the paper's only where they are comparable, the command as it can be typed."""

import sys

import numpy as np
import pytest

from e2sad_jax import data, report
from e2sad_jax.config import Config
from e2sad_jax.evaluate import SUITES, Outcome


@pytest.fixture(scope="module")
def mnist() -> data.Dataset:
    """The name and sizes of MNIST, nothing in it."""
    x, y = np.zeros((10_000, 2, 2, 1), np.uint8), np.zeros(10_000, np.int32)
    return data.Dataset("mnist", "3.0.1", x, y, x, y, num_classes=10, source_sha256={})


def build(mnist, suite, correct=9_000, **changes):
    outcome = Outcome(np.arange(10_000) < correct, np.zeros(10_000, np.int32))
    outcomes = {attack.name: outcome for attack in SUITES[suite]}
    return report.build(
        Config(**changes), mnist, SUITES[suite], outcomes, steps=30_000, parameters=1, train_seconds=1.0
    )


@pytest.mark.parametrize(("suite", "shown"), [("mnist", 5), ("svhn", 1), ("digits", 2)])
def test_the_papers_numbers_stand_only_beside_the_papers_attacks(suite, shown, mnist):
    """IFGSM-10 has another budget in each suite; clean, and FGSM 0.3 on the digits, mean the same everywhere."""
    rows = build(mnist, suite)["attacks"]
    with_paper = {row["name"] for row in rows if row["paper"] is not None}
    assert len(with_paper) == shown
    assert ("IFGSM-10" in with_paper) == (suite == "mnist")
    assert "PGD-40" not in with_paper


def test_the_table_in_markdown(mnist):
    text = report.markdown({"natural": build(mnist, "mnist", 5_000, defense="natural"), "e2sad": build(mnist, "mnist")})
    assert text.startswith("# mnist: accuracy on all 10,000 test images, 30,000 training steps\n")
    assert "| IFGSM-30 (eps 0.3, step eps/30) | 0.5000 | 0.0930 | 0.9000 | 0.8633 |" in text
    assert "gradient is zero" in text
    assert "IFGSM is the paper's and weak" in text


def test_the_command_can_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["mnist.py", "--data=my file.npz", "--steps=3"])
    assert report.command().endswith(" '--data=my file.npz' --steps=3")


def test_hardware_is_what_a_run_uses():
    """One device, however many there are (these tests have four)."""
    assert " x " not in report.environment()["hardware"]
