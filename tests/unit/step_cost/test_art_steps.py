"""ART's trainers take batches of the size that was asked for, on the defenses that ART has."""

import io
import sys

import art.estimators.classification  # noqa: F401  # here: its log handlers keep the stderr of their import
import pytest

from e2sad_jax import networks, training
from e2sad_jax.training import configure
from experiments.step_cost import peers

SHAPE = (8, 8, 1)
CONFIG = configure(defense="ifgsm", model="digits_cnn", batch_size=16, attack_steps=2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_batches_are_trained_on_and_what_differs_is_said(monkeypatch):
    told = io.StringIO()
    monkeypatch.setattr(sys, "stderr", told)
    state = training.init_state(CONFIG, networks.create("digits_cnn", 10, SHAPE), SHAPE)
    for defense in ("natural", "fgsm", "ifgsm", "pgd"):
        step = peers.build("art", CONFIG.replace(defense=defense), SHAPE, 10, state.params)
        sizes = []
        trainer = step._fit.__self__
        first, *_ = getattr(trainer, "classifier", trainer).model.children()
        first.register_forward_hook(lambda module, x, y, n=sizes: n.append(len(x[0])) if module.training else None)
        assert step.losses(2) is None
        assert sizes == [16, 16], "two batches were trained on"
        assert ("40% of a batch" in step.note) == (defense in ("fgsm", "ifgsm"))
    assert told.getvalue() == "", "no progress bars among ours"
    for defense in ("hamm", "e2sad"):
        with pytest.raises(peers.NotOfferedError, match=f"ART has no {defense}"):
            peers.build("art", CONFIG.replace(defense=defense), SHAPE, 10, state.params)
