"""A small run: a linear network on three classes of 50 images, a few steps, a folder of its own; and its training."""

import json
import pathlib
from collections.abc import Callable

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from e2sad_jax import networks, training
from e2sad_jax.runs import opening, trainer
from e2sad_jax.training import Config, configure

SHAPE = (8, 8, 1)


class Linear(nn.Module):
    """Stands for `digits_cnn`: compiled in a fraction of the time."""

    num_classes: int
    dtype: object = None
    precision: object = None
    mean: tuple = ()
    std: tuple = ()

    min_size = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.num_classes)(x.reshape(x.shape[0], -1))


def config_of(workdir: pathlib.Path, **changes) -> Config:
    """Twelve steps, with checkpoints at 5, 10 and 12."""
    settings = dict(data="tiny.npz", model="digits_cnn", steps=12, batch_size=16, checkpoint_every=5, log_every=2)
    return configure(**{**settings, "defense": "natural", "learning_rate": 1e-2, "workdir": str(workdir), **changes})


def state_of(config: Config, step: int = 0) -> training.TrainState:
    """A fresh state, said to be of a step; each step's parameters are other ones."""
    state = training.init_state(config, networks.create(config.model, 3, SHAPE), SHAPE)
    return state.replace(step=jnp.int32(step), params=jax.tree.map(lambda a: a + step, state.params))


def stop_after(times: int, number: int = 15) -> Callable[[], int]:
    """A stop that comes when it has been asked about so many times: after each step, and in each validation."""
    asked = 0

    def stop() -> int:
        nonlocal asked
        asked += 1
        return number if asked >= times else 0

    return stop


def never() -> int:
    return 0


def train(config, dataset, stop=never) -> training.TrainState:
    with opening.open_run(config, dataset) as run:
        return trainer.train(run, stop)[0]


def losses(workdir) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (pathlib.Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def same(a: training.TrainState, b: training.TrainState) -> None:
    chex.assert_trees_all_equal(jax.random.key_data(a.key), jax.random.key_data(b.key))
    chex.assert_trees_all_equal(a.replace(key=None), b.replace(key=None))


def fit_with(monkeypatch, at: int, do) -> None:
    """Training that does something before the metrics of a step are recorded; `do` may return other metrics."""
    real = training.fit

    def fit(*args, record, **kwargs):
        def recording(step, metrics, count):
            if step == at:
                with jax.transfer_guard("allow"):
                    metrics = do(metrics) or metrics
            record(step, metrics, count)

        return real(*args, record=recording, **kwargs)

    monkeypatch.setattr(trainer, "fit", fit)


def members(tmp_path, **changes):
    own = [{"seed": 3}, {"seed": 3, "lam": 1.0}, {"seed": 4, "eps1": 0.2}]
    common = {"defense": "e2sad", "eps1": 0.1, "eps2": 0.05, **changes}
    return [config_of(tmp_path / f"run{i}", **{**common, **values}) for i, values in enumerate(own)]


def train_together(configs, dataset, stop=never):
    with opening.open_runs(configs, dataset) as runs:
        trainer.train_together(runs, stop)
        return [run.restore() for run in runs]
