"""The defenses in PyTorch, as someone at home in it writes them: channels last, no work done twice, Adam in one kernel.

What XLA finds by merging is written by hand. The clean loss has one forward and one backward pass, which gives the
attack's input gradient and the training gradient at once; attacks beyond that go through a twin of the network whose
parameters need no gradient.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from e2sad_jax import networks
from e2sad_jax._compile import platform
from e2sad_jax.errors import ConfigError
from e2sad_jax.training.config import Config
from experiments.step_cost.peers import NotOfferedError
from experiments.step_cost.step import data


def device() -> str:
    """PyTorch's name of the kind of device that JAX uses.

    Raises:
      ConfigError: if PyTorch cannot use that.
    """
    import torch

    if platform() == "cpu":
        return "cpu"
    if platform() != "gpu" or not torch.cuda.is_available():
        raise ConfigError(
            f"--peer=torch: JAX runs on {platform()}, which this PyTorch ({torch.__version__}) cannot use; install one "
            "that can, or set JAX_PLATFORMS=cpu"
        )
    return "cuda"


def wait() -> None:
    """Waits until the device has done all it was given."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()


def network(config: Config, image_shape: tuple[int, ...], num_classes: int, parameters: Any) -> Any:
    """The network of `models` as a `torch.nn.Sequential` from images `[N, C, H, W]` to logits, with the same parameters.

    Args:
      config: names the model.
      image_shape: (H, W, C).
      num_classes: number of classes K.
      parameters: Flax variables, on the host.
    """
    import torch
    from torch import nn

    class Standardized(nn.Module):
        """(x - mean) / std of each channel, as the network in Flax begins."""

        def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
            super().__init__()
            for name, values in (("mean", mean or (0.0,)), ("std", std or (1.0,))):
                self.register_buffer(name, torch.tensor(values).reshape(1, -1, 1, 1))

        def forward(self, x: Any) -> Any:
            return (x - self.mean) / self.std

    model: Any = networks.create(num_classes=num_classes, image_shape=image_shape, **config.network())
    # Width of each kernel, whether it is pooled after.
    svhn = isinstance(model, networks.SvhnCNN)
    kernels = ((5, False), (5, True), (3, True)) if svhn else ((5, True), (5, True))
    padding = 0 if svhn else 2
    (height, width, channels), layers = image_shape, []
    if model.mean or model.std:
        layers.append(Standardized(model.mean, model.std))
    for features, (size, pool) in zip(model.features, kernels, strict=True):
        layers += [nn.Conv2d(channels, features, size, padding=padding), nn.ReLU()]
        height, width, channels = height + 2 * padding - size + 1, width + 2 * padding - size + 1, features
        if pool:
            layers.append(nn.MaxPool2d(2))
            height, width = height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(channels * height * width, model.hidden), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Linear(model.hidden, num_classes))
    net = net.to(device(), memory_format=torch.channels_last)
    modules = [module for module in net if hasattr(module, "weight")]
    with torch.no_grad():
        for module, (weight, bias) in zip(modules, networks.to_torch(model, parameters, image_shape), strict=True):
            module.weight.copy_(torch.tensor(weight))
            module.bias.copy_(torch.tensor(bias))
    return net


class TorchStep:
    """A training step of any defense, eager or with its network compiled by `torch.compile`."""

    note = ""

    def __init__(
        self,
        config: Config,
        image_shape: tuple[int, ...],
        num_classes: int,
        parameters: Any,
        *,
        compiled: bool = False,
    ):
        """Puts network, optimiser and data on the device; see `peers.build`."""
        if not hasattr(self, f"_{config.defense}"):
            raise NotOfferedError(f"there is no {config.defense} in PyTorch here")
        if config.model == "preact_resnet18":
            raise NotOfferedError(f"there is no {config.model} in PyTorch here")
        import torch
        import torch.nn.functional as F

        # In PyTorch convolutions on GPUs are rounded to TF32 by default; float32 is what is compared.
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.benchmark = True  # the fastest of its algorithms, as XLA looks for
        torch.set_float32_matmul_precision("highest")
        self._torch, self._cross_entropy, self._config = torch, F.cross_entropy, config
        self._net = network(config, image_shape, num_classes, parameters)
        self._twin = network(config, image_shape, num_classes, parameters)
        for own, other in zip(self._net.parameters(), self._twin.parameters(), strict=True):
            other.requires_grad_(False)
            other.data = own.data  # the same memory: the optimiser updates both
        self._optimizer = torch.optim.Adam(self._net.parameters(), lr=config.learning_rate, eps=1e-8, fused=True)
        self.compile_seconds: float | None = None
        self._compiled = compiled
        if compiled:
            _without_disk_or_processes()
            self._net, self._twin = torch.compile(self._net), torch.compile(self._twin)
        images, labels, order = data(image_shape, num_classes, config.batch_size)
        place = device()
        self._images, self._labels = torch.tensor(images, device=place), torch.tensor(labels, device=place)
        self._order = torch.tensor(order, device=place)
        delta = config.delta if config.soft_label else 0.0
        soft = np.full((num_classes, num_classes), delta / (num_classes - 1), np.float32)
        np.fill_diagonal(soft, 1 - delta)
        self._soft = torch.tensor(soft, device=place)
        self._step = 0
        self.at_once = 1

    def run(self, dispatches: int) -> None:
        """Trains, and waits for the end."""
        for _ in range(dispatches):
            self._train()
        wait()

    def losses(self, steps: int) -> list[float] | None:
        """Trains for so many steps; the loss of each, None for PGD, whose random start is another here."""
        began = time.perf_counter()
        losses = [float(self._train())]
        if self._compiled and self.compile_seconds is None:
            self.compile_seconds = time.perf_counter() - began
        losses += [float(self._train()) for _ in range(steps - 1)]
        return None if self._config.defense == "pgd" else losses

    def _train(self) -> Any:
        """One step; its loss, on the device."""
        c = self._config
        offset = self._step * c.batch_size % len(self._images)
        batch = self._order[offset : offset + c.batch_size]
        x = self._images[batch].permute(0, 3, 1, 2).float() / 255  # of NHWC memory: channels last
        y = self._soft[self._labels[batch]]
        self._optimizer.zero_grad(set_to_none=True)
        loss = getattr(self, f"_{c.defense}")(x, y)
        self._optimizer.step()
        self._step += 1
        return loss

    def _backward(self, loss: Any, *more: Any) -> Any:
        """Gradients in the parameters, and in `more`, alone."""
        loss.backward(inputs=[*self._net.parameters(), *more])
        return loss.detach()

    def _gradient(self, z: Any, y: Any) -> Any:
        z = z.detach().requires_grad_()
        return self._torch.autograd.grad(self._cross_entropy(self._twin(z), y), z)[0]

    def _clean(self, x: Any, y: Any) -> tuple[Any, Any]:
        """The weighted clean loss, differentiated in parameters and images at once, and the images' gradient."""
        x = x.requires_grad_()
        loss = self._backward(self._config.settings["alpha"] * self._cross_entropy(self._net(x), y), x)
        return loss, x.grad

    def _first_point(self, x: Any, y: Any) -> tuple[Any, Any]:
        loss, gradient = self._clean(x, y)
        return loss, (x.detach() + self._config.eps1 * gradient.sign()).clamp(0, 1)

    def _natural(self, x: Any, y: Any) -> Any:
        return self._backward(self._cross_entropy(self._net(x), y))

    def _fgsm(self, x: Any, y: Any) -> Any:
        loss, x_adv = self._first_point(x, y)
        return loss + self._backward((1 - self._config.settings["alpha"]) * self._cross_entropy(self._net(x_adv), y))

    def _ifgsm(self, x: Any, y: Any) -> Any:
        c = self._config
        loss, gradient = self._clean(x, y)
        x, steps = x.detach(), c.settings["attack_steps"]
        lower, upper = (x - c.eps1).clamp(min=0), (x + c.eps1).clamp(max=1)
        z = x
        for i in range(steps):
            gradient = self._gradient(z, y) if i else gradient
            z = (z + c.eps1 / steps * gradient.sign()).clamp(lower, upper)
        return loss + self._backward((1 - c.settings["alpha"]) * self._cross_entropy(self._net(z), y))

    def _pgd(self, x: Any, y: Any) -> Any:
        c, steps = self._config, self._config.settings["attack_steps"]
        lower, upper = (x - c.eps1).clamp(min=0), (x + c.eps1).clamp(max=1)
        z = (x + c.eps1 * (2 * self._torch.rand_like(x) - 1)).clamp(lower, upper)
        for _ in range(steps):
            z = (z + 2.5 * c.eps1 / steps * self._gradient(z, y).sign()).clamp(lower, upper)
        return self._backward(self._cross_entropy(self._net(z), y))

    def _hamm(self, x: Any, y: Any) -> Any:
        c = self._config
        loss, x_adv = self._first_point(x, y)
        x_adv.requires_grad_()
        adversarial = self._cross_entropy(self._net(x_adv), y)
        (gradient,) = self._torch.autograd.grad(adversarial, x_adv, create_graph=True)
        penalty = c.eps1 * len(x) / 2 * gradient.norm()
        return loss + self._backward((1 - c.settings["alpha"]) * (adversarial + penalty))

    def _e2sad(self, x: Any, y: Any) -> Any:
        c = self._config
        loss, x_adv = self._first_point(x, y)
        x_adv.requires_grad_()
        logits = self._net(x_adv)
        entropy = self._cross_entropy(logits, logits.softmax(1))
        (gradient,) = self._torch.autograd.grad(entropy, x_adv, retain_graph=True)
        x_adv2 = (x_adv + c.settings["eps2"] * gradient.sign()).detach()
        dissimilarity = self._cross_entropy(self._net(x_adv2), logits.softmax(1))
        adversarial = self._cross_entropy(logits, y)
        return loss + self._backward((1 - c.settings["alpha"]) * adversarial + c.settings["lam"] * dissimilarity)


def _without_disk_or_processes() -> None:
    """Settings of `torch.compile`: its time is measured, and its helpers must not run on while others are timed."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._functorch.config.donated_buffer = False  # e2SAD goes through one graph twice
    torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.compile_threads = 1
    torch._dynamo.config.recompile_limit = 64  # each defense needs its own graphs of the one network
