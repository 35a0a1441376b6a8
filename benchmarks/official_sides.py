"""The official AutoAttack code and `evaluation.auto`: what each finds on one network."""

import contextlib
import dataclasses
import importlib.util
import logging
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from e2sad_jax import networks
from e2sad_jax._compile import jit
from e2sad_jax._io import atomic_file
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import Attack, Model, in_batches
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.classifier import Classifier
from e2sad_jax.runs.folder import read_training
from experiments.step_cost.peers import pytorch

MODELS = (networks.MnistCNN, networks.SvhnCNN)
AGREE = 1e-4  # of a logit, between the two networks
COMPILATION = "/jax/core/compile/backend_compile_duration"  # JAX's name of XLA's part


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """What one of the two found; what is said of each attack is of each call where several attacks are one.

    Attributes:
      standing: bool `[N]` of the clean images and after each attack: what is classified correctly still.
      seconds: of each attack.
      compiling: of them, what was spent compiling; zeros of the official code.
      gradients: of each attack: how often a gradient was taken, over all images.
      queries: of each attack: how often the network was asked without one.
      images: `[N, H, W, C]`, the image that fools the network; where none was found, the clean one.
    """

    standing: Sequence[np.ndarray]
    seconds: Sequence[float]
    compiling: Sequence[float]
    gradients: Sequence[int]
    queries: Sequence[int]
    images: np.ndarray

    def at_once(self) -> "Side":
        """All attacks as one."""
        ends = [self.standing[0], self.standing[-1]]
        seconds, compiling = [sum(self.seconds)], [sum(self.compiling)]
        return Side(ends, seconds, compiling, [sum(self.gradients)], [sum(self.queries)], self.images)

    @property
    def found(self) -> np.ndarray:
        """Which images an attack has made an adversarial one of, bool `[N]`."""
        return self.standing[0] & ~self.standing[-1]


def check_runs(workdirs: Sequence[str], results: str) -> None:
    """Refuses runs without a name, and several without a folder for their page.

    Raises:
      ConfigError: if that is so.
    """
    if not workdirs or not all(workdirs):
        raise ConfigError("--workdir=: must name the folder of a run")
    if len(workdirs) > 1 and not results:
        raise ConfigError("--results=: must name a folder for the page of several runs")


def trained_by(workdir: str) -> list[str]:
    """The commands that trained a run, for the page of its results; the first one comes first."""
    segments = read_training(pathlib.Path(workdir).expanduser())
    return list(dict.fromkeys(segment["command"] for segment in segments if "command" in segment))


def missing(packages: Mapping[str, str]) -> str:
    """Says which packages are not installed, by module and the name to install; empty if all are."""
    return " and ".join(name for module, name in packages.items() if importlib.util.find_spec(module) is None)


def carried(trained: Classifier, inputs: np.ndarray, batch_size: int = 250) -> tuple[Any, float]:
    """The network of a run in PyTorch, and how far its logits are from JAX's.

    Args:
      trained: the run's classifier.
      inputs: `[N, H, W, C]`, the network's inputs, on which the logits are compared.
      batch_size: images at once.

    Returns:
      The `torch.nn.Module`, from `[N, C, H, W]` to logits, and the largest difference.

    Raises:
      ConfigError: if it has no twin in PyTorch, if its inputs do not lie in [0, 1], or if the logits disagree.
    """
    import torch

    config, shape = trained.config, tuple(trained.dataset["image_shape"])
    if not isinstance(trained.model, MODELS):
        raise ConfigError(f"--workdir: its model {config.model} has no twin in PyTorch; choose a run of a CNN")
    if trained.transform.bounds != (0.0, 1.0):
        raise ConfigError(
            f"--workdir: its inputs lie in {list(trained.transform.bounds)} ({config.transform}), and the official code clips "
            "to [0, 1]; choose a run with --transform=unit"
        )
    torch.backends.cudnn.allow_tf32 = False
    net = pytorch.network(config, shape, trained.dataset["num_classes"], jax.device_get(trained.params))
    net = net.eval().to(memory_format=torch.contiguous_format)  # the official code takes views of gradients
    apply = jit(trained.apply)
    difference = 0.0
    places = np.arange(len(inputs))
    for some, logits in in_batches(lambda full: apply(trained.params, inputs[full]), places, batch_size):
        with torch.no_grad():
            other = net(tensor(inputs[some], net)).cpu().numpy()
        difference = max(difference, float(np.abs(np.asarray(logits)[: len(some)] - other).max()))
    if not difference < AGREE:  # NaN neither
        raise ConfigError(
            f"--workdir={config.workdir}: logits in PyTorch and JAX differ by {difference:.3g}, and must by less than "
            f"{AGREE:g}; a run of --precision={config.precision} is carried to float32"
        )
    return net, difference


def counted(net: Any) -> Any:
    """The `torch.nn.Module`, with `gradients` and `queries`: for how many images it was asked with a gradient, and without."""
    import torch

    class Counted(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.gradients, self.queries = net, 0, 0

        def forward(self, x: Any) -> Any:
            if torch.is_grad_enabled() and x.requires_grad:
                self.gradients += len(x)
            else:
                self.queries += len(x)
            return self.net(x)

    return Counted().eval()


def noisy(net: Any, noise: float, seed: int) -> Any:
    """The `torch.nn.Module` with Gaussian noise of this deviation on its inputs, a draw at each call."""
    import torch

    class Noisy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.generator = torch.Generator(next(net.parameters()).device).manual_seed(seed)

        def forward(self, x: Any) -> Any:
            drawn = torch.randn(x.shape, generator=self.generator, device=x.device, dtype=x.dtype)
            return self.net(x + noise * drawn)

    return Noisy().eval()


def official(
    official_code: Any,
    model: Model,
    groups: Sequence[Sequence[str]],
    batch_size: int,
    kept: pathlib.Path | None = None,
) -> tuple[Side, list[str]]:
    """Runs attacks of the official code, each on the images that are left; and what it warned of.

    The code attacks the images that are left in the order in which they are. So one call for each attack is what one call
    for all of them is, and each has its time. Of a random network it is not, because each call judges the clean images anew.

    Args:
      official_code: of `adversary`, of a network that is `counted`.
      model: whose images and labels are attacked.
      groups: names of the attacks of each call.
      batch_size: images at once.
      kept: file that keeps what is finished, of this question alone; a run that ended in between goes on from there.
    """
    net = official_code.model
    x, y = tensor(model.images, net), model.labels.astype(np.int64)
    made, standing = np.array(model.images), [right_in_torch(net, x, y, batch_size)]
    seconds: list[float] = []
    asked: list[tuple[int, int]] = []
    with _told(official_code.logger) as warnings, contextlib.redirect_stdout(sys.stderr):
        if kept is not None and kept.exists():
            with np.load(kept) as there:
                made, standing, seconds = there["made"], list(there["standing"]), list(there["seconds"])
                asked = [(int(gradients), int(queries)) for gradients, queries in there["asked"]]
                warnings.extend(there["warnings"].tolist())
            print(f"official code: {len(seconds)} of {len(groups)} calls from {kept}", file=sys.stderr, flush=True)
        for names in groups[len(seconds) :]:
            began, left = time.perf_counter(), np.flatnonzero(standing[-1])
            net.gradients = net.queries = 0
            right = standing[-1].copy()
            if len(left):
                official_code.attacks_to_run = list(names)
                labels = like(y[left], x)
                images, predicted = official_code.run_standard_evaluation(x[left], labels, batch_size=batch_size)
                right[left] = (predicted == labels).cpu().numpy()
                made[left] = images.cpu().numpy().transpose(0, 2, 3, 1)
            standing.append(right)
            seconds.append(time.perf_counter() - began)
            asked.append((net.gradients, net.queries))
            if kept is not None:
                with atomic_file(kept) as file:
                    np.savez(
                        file,
                        made=made,
                        standing=standing,
                        seconds=seconds,
                        asked=asked,
                        warnings=np.array(warnings, str),
                    )
    gradients, queries = zip(*asked, strict=True)
    return Side(standing, seconds, [0.0] * len(seconds), gradients, queries, made), warnings


def ours(model: Model, stages: Sequence[Attack], *, eps: float, norm: str, near: float | None = None) -> Side:
    """Runs `evaluation.auto`; the seconds of a stage hold its compilation, which is given beside."""
    compiling, began = [0.0], time.perf_counter()
    ended: dict[str, tuple[float, float]] = {"clean": (began, 0.0)}
    total = len(model.images) * sum(
        attack.gradients(model.num_classes) for attack in (Attack("clean", "clean"), *stages)
    )
    names = ("clean", *(stage.name for stage in stages))

    def compiled(event: str, duration_secs: float, **kwargs: str | int) -> None:
        compiling[0] += duration_secs if event == COMPILATION else 0

    with Bar("evaluation.auto", total, "gradients") as bar:

        def progress(what: str, gradients: int) -> None:  # `what` begins with the attack's name
            name = next(name for name in names if what.startswith(name))
            ended[name] = time.perf_counter(), compiling[0]
            bar.update(gradients, what)

        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            result = model.auto(stages, eps=eps, norm=norm, keep=True, progress=progress, near=near)
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)
    assert result.adversarial is not None
    seconds, spent = (np.diff(column) for column in zip(*(ended[name] for name in result.standing), strict=True))
    passes = []
    for stage in stages:
        count = result.passes[stage.name]
        if stage.kind == "apgd":  # the gradient at its start, which the official code's count has too
            count += count // stage.passes
        passes.append((stage.kind == "square", count))
    return Side(
        list(result.standing.values()),
        list(seconds),
        list(spent),
        [0 if score_based else count for score_based, count in passes],
        [count if score_based else 0 for score_based, count in passes],
        result.adversarial,
    )


def like(values: np.ndarray, other: Any) -> Any:
    import torch

    return torch.tensor(values, device=other.device)


def tensor(images: np.ndarray, net: Any) -> Any:
    """`[N, H, W, C]` as a tensor `[N, C, H, W]` where the network is."""
    return like(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32), next(net.parameters()))


def right_in_torch(net: Any, x: Any, labels: np.ndarray, batch_size: int) -> np.ndarray:
    """Whether the network in PyTorch classifies images correctly, bool `[N]`."""
    import torch

    with torch.no_grad():
        predicted = torch.cat([net(part).argmax(1) for part in x.split(batch_size)])
    return predicted.cpu().numpy() == labels


class _Messages(logging.Handler):
    """Shows what the official code logs, and keeps its warnings, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if record.levelno >= logging.WARNING and message not in self.warnings:
            self.warnings.append(message)
        if record.levelno >= logging.WARNING or "successfully perturbed" in message:
            print(f"official code: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _told(logger: logging.Logger) -> Any:
    handler, before = _Messages(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    try:
        yield handler.warnings
    finally:
        logger.removeHandler(handler)
        logger.level, logger.propagate = before
