"""What the tests of the step's cost share; those of peers are collected where the peer is installed."""

import importlib.util
import types

import jax
import pytest

from e2sad_jax import training
from experiments.step_cost import counts, measure

# PyTorch and ART are in no extra that continuous integration installs, and a skipped test would fail it.
collect_ignore = []
if importlib.util.find_spec("torch") is None:
    collect_ignore += ["test_torch_steps.py", "test_art_steps.py"]
elif importlib.util.find_spec("art") is None:
    collect_ignore += ["test_art_steps.py"]


@pytest.fixture(autouse=True)
def standard_promotion():
    """Optax's Adam mixes float and int32."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def made_up(monkeypatch):
    """Steps of made-up cost. What is added to the list is raised in turn by the timers, None for nothing."""
    asked: list[str] = []
    raised: list[BaseException | None] = []

    class Step:
        at_once, compile_seconds = 1, 2.0
        compiled = types.SimpleNamespace(
            memory_analysis=lambda: types.SimpleNamespace(
                temp_size_in_bytes=5, argument_size_in_bytes=7, output_size_in_bytes=4, alias_size_in_bytes=3
            )
        )

        def __init__(self, request, kind):
            self.kind = kind
            if kind.defense == "hamm":
                raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")

        def parameters(self):
            return None

        def losses(self, steps):
            return [1.0] * steps

        def timer(self, seconds):
            def timed():
                asked.append(self.kind.name)
                if raised and (error := raised.pop(0)):
                    raise error
                # A machine that is slower in every round.
                return (1 + len(asked) // 100) * {"natural": 1.0, "fgsm": 2.0, "e2sad": 4.0}.get(self.kind.name, 30.0)

            return timed

    monkeypatch.setattr(measure, "_ours", Step)
    monkeypatch.setattr(
        training,
        "step_counts",
        lambda config, *_: {"flops": 1e9 * (1 + config.settings.get("attack_steps", 1)), "bytes": 1e9},
    )
    monkeypatch.setattr(counts, "product", lambda precision: (lambda: 0.5, 4e9))
    return asked, raised
