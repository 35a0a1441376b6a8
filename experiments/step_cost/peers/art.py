"""The defenses that the Adversarial Robustness Toolbox has, through its own trainers, on the PyTorch network."""

import contextlib
import io
from typing import Any

import numpy as np

from e2sad_jax.training.config import Config
from experiments.step_cost.peers import NotOfferedError, pytorch
from experiments.step_cost.step import data


class ArtStep:
    """A batch through `AdversarialTrainer.fit` (natural: `PyTorchClassifier.fit`), from arrays on the host."""

    compile_seconds: float | None = None

    def __init__(self, config: Config, image_shape: tuple[int, ...], num_classes: int, parameters: Any):
        """Builds classifier, attack and trainer; see `peers.build`."""
        if config.defense not in ("natural", "fgsm", "ifgsm", "pgd"):
            raise NotOfferedError(f"ART has no {config.defense}")
        if config.model == "preact_resnet18":
            raise NotOfferedError(f"there is no {config.model} in PyTorch here")
        import torch
        from art.attacks.evasion import BasicIterativeMethod, FastGradientMethod, ProjectedGradientDescent
        from art.defences.trainer import AdversarialTrainer
        from art.estimators.classification import PyTorchClassifier

        c, net = config, pytorch.network(config, image_shape, num_classes, parameters)
        height, width, channels = image_shape
        classifier = PyTorchClassifier(
            net,
            loss=torch.nn.CrossEntropyLoss(),
            optimizer=torch.optim.Adam(net.parameters(), lr=c.learning_rate, eps=1e-8),
            input_shape=(channels, height, width),
            nb_classes=num_classes,
            clip_values=(0.0, 1.0),
            device_type="gpu" if pytorch.device() == "cuda" else "cpu",
        )
        # Each image is clean or adversarial: with this share the expected loss is the mixture of Eq. 3.
        ratio = 1 - c.settings.get("alpha", 0.0)
        own = {"eps": c.eps1, "batch_size": c.batch_size}
        match c.defense:
            case "fgsm":
                attack = FastGradientMethod(classifier, **own)
            case "ifgsm":
                steps = c.settings["attack_steps"]
                size = c.eps1 / steps
                attack = BasicIterativeMethod(classifier, eps_step=size, max_iter=steps, verbose=False, **own)
            case "pgd":
                steps = c.settings["attack_steps"]
                size = 2.5 * c.eps1 / steps
                attack = ProjectedGradientDescent(
                    classifier,
                    eps_step=size,
                    max_iter=steps,
                    num_random_init=1,
                    verbose=False,
                    **own,
                )
        self._fit = classifier.fit if c.defense == "natural" else AdversarialTrainer(classifier, attack, ratio).fit
        self.at_once = 1
        self.note = "batches come from the host"
        if ratio < 1 and c.defense != "natural":
            self.note += (
                f"; ART attacks {ratio:.0%} of a batch and trains on the rest clean, where ours attacks all of it and "
                "trains on both"
            )
        images, labels, _ = self._data = data(image_shape, num_classes, c.batch_size)
        self._images = np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32) / 255
        soft = np.full((len(labels), num_classes), c.delta / (num_classes - 1), np.float32)
        soft[np.arange(len(labels)), labels] = 1 - c.delta
        self._soft, self._batch_size, self._step = soft, c.batch_size, 0

    def run(self, dispatches: int) -> None:
        """Trains on so many batches, and waits for the end."""
        rows = np.concatenate([self._data.batch(self._step + i, self._batch_size) for i in range(dispatches)])
        self._step += dispatches
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            self._fit(self._images[rows], self._soft[rows], batch_size=self._batch_size, nb_epochs=1)
        pytorch.wait()

    def losses(self, steps: int) -> list[float] | None:
        """None: the loss is of other images than ours."""
        self.run(steps)
        return None
