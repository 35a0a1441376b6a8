"""Our own step as XLA has it on the CPU without `networks.cpu_conv`: its convolutions, and attacks unrolled for them."""

from e2sad_jax._compile import straight_line
from e2sad_jax.training.config import Config
from experiments.step_cost.step import Step


class XlaStep:
    """A peer's step (`peers.PeerStep`), from the parameters that ours begins with."""

    def __init__(self, config: Config, image_shape: tuple[int, ...], num_classes: int, steps_per_dispatch: int = 0):
        with straight_line():
            self._step = Step(config, image_shape, num_classes, steps_per_dispatch=steps_per_dispatch)
        self.at_once = self._step.at_once
        self.note = ""
        self.compile_seconds: float | None = self._step.compile_seconds

    def run(self, dispatches: int) -> None:
        self._step.run(dispatches)

    def losses(self, steps: int) -> list[float] | None:
        return self._step.losses(steps)
