"""Evaluates one trained model and writes tables and files; `experiments.evaluate` calls it."""

import dataclasses
import importlib
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from e2sad_jax import data, distributed
from e2sad_jax._io import make_folder, write_json, write_text
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import Effort, Model, diagnose, of_classifier, of_function
from e2sad_jax.reporting import diagnosis, provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.classifier import load
from e2sad_jax.training.config import check, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range, or the flags do not fit together.
    """

    workdir: str = setting("", "folder of the run to evaluate")
    which: str = setting("last", "checkpoint of the run", choices=("last", "best"))
    predict: str = setting(
        "", "instead of a run: MODULE:FUNCTION, from images in [0, 1] to logits, in JAX; needs --data and --eps"
    )
    data: str = setting("", "data set whose test images are attacked; empty: that of the run")
    data_dir: str = setting("", "folder of data sets; empty: that of the run")
    eps: float = setting(0.0, "l-infinity budget in the network's units, 0: the run's own eps1", lower=0)
    examples: int = setting(
        500, "test images, a sample stratified by class, or all if there are fewer; 0: all", lower=0
    )
    batch_size: int = setting(250, "images at once", lower=1)
    devices: int = setting(1, "devices to split each batch over, 0: all", lower=0)
    seed: int = setting(0, "seed of the attacks", lower=0, upper=2**32 - 1)
    transfer_from: str = setting(
        "",
        "folder of a run, such as a natural model, whose adversarial images the evaluated model classifies; empty: none",
    )
    auto: bool = setting(True, "the worst case over APGD-CE, APGD-T and Square")
    queries: int = setting(5000, "queries of Square, 0: leave it out", lower=0)
    targets: int = setting(9, "wrong classes that the targeted APGD tries", lower=1)
    fab: int = setting(0, "wrong classes that FAB tries, before Square, 0: leave it out", lower=0)
    restarts: int = setting(5, "random starts of PGD-40", lower=1)
    results: str = setting(
        "", "folder for evaluation.md, .json and .png; empty: WORKDIR/evaluation, or runs/evaluation for --predict"
    )

    def __post_init__(self) -> None:
        if bool(self.workdir) == bool(self.predict):
            raise ConfigError(
                "--workdir or --predict: exactly one of them must be given, a run's folder or MODULE:FUNCTION"
            )
        if self.predict and ":" not in self.predict:
            raise ConfigError(f"--predict={self.predict}: must be MODULE:FUNCTION")
        if self.predict and not self.data.endswith(".npz"):
            raise ConfigError(f"--data={self.data}: must be PATH.npz with --predict")
        if self.predict and not self.eps:
            raise ConfigError("--eps=0: must be above 0 with --predict, which has no run's budget")
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        if self.fab and not self.auto:
            raise ConfigError(f"--fab={self.fab}: is a part of the worst case; leave it out, or --noauto")


def run(request: Request) -> dict[str, Any]:
    """Evaluates, prints the tables, and writes evaluation.json, .md and .png.

    Raises:
      ConfigError, DataError, WorkdirError: before anything is measured.
    """
    model, eps, folder, tests = _model(request)
    substitute = None
    if request.transfer_from:
        classifier = load(request.transfer_from)
        if (bounds := classifier.transform.bounds) != model.bounds:
            raise ConfigError(
                f"--transfer_from={request.transfer_from}: its images lie in {bounds}, those of the evaluated model "
                f"in {model.bounds}"
            )
        if (shape := tuple(classifier.dataset["image_shape"])) != model.images.shape[1:]:
            raise ConfigError(
                f"--transfer_from={request.transfer_from}: its images are {shape}, not {model.images.shape[1:]}"
            )
        if (classes := classifier.dataset["num_classes"]) != model.num_classes:
            raise ConfigError(
                f"--transfer_from={request.transfer_from}: has {classes} classes, not {model.num_classes}"
            )
        substitute = dataclasses.replace(
            model, name=classifier.config.defense, apply=classifier.apply, params=classifier.params
        )
    make_folder(folder, f"--results={folder}")
    effort = Effort(
        queries=request.queries,
        targets=request.targets,
        fab=request.fab,
        restarts=request.restarts,
        worst_case=request.auto,
    )
    total = effort.work(len(model.images), model.num_classes, substitute is not None)
    with Bar(f"evaluate {model.name}", total, "gradients") as bar:
        result = diagnose(
            model,
            eps=eps,
            effort=effort,
            substitute=substitute,
            progress=lambda what, gradients: bar.update(gradients, what),
        )
    classes = {"classes": len(np.unique(model.labels)), "num_classes": model.num_classes}
    result |= {
        "test_images": tests,
        **classes,
        "command": provenance.command(),
        "environment": provenance.environment(),
    }
    write_json(folder / "evaluation.json", result)
    write_text(folder / "evaluation.md", diagnosis.markdown(result))
    diagnosis.plot(folder / "evaluation.png", [result])
    print(f"\n{diagnosis.text(result)}\n")
    for name in ("evaluation.md", "evaluation.json", "evaluation.png"):
        print(folder / name)
    return result


def _model(request: Request) -> tuple[Model, float, pathlib.Path, int]:
    """The model to be evaluated, the budget, where the files go, and how many test images there are."""
    mesh = distributed.mesh(request.devices, request.batch_size)
    if request.predict:
        dataset = data.load(request.data, None)
        sample = data.sample_tests(dataset, request.examples)
        model = of_function(
            _function(request.predict),
            sample.x_test,
            sample.y_test,
            name=request.predict.split(":")[1],
            batch_size=request.batch_size,
            seed=request.seed,
            mesh=mesh,
        )
        folder = pathlib.Path(request.results or "runs/evaluation").expanduser()
        return model, request.eps, folder, len(dataset.x_test)
    classifier = load(request.workdir, request.which)
    dataset = data.load(request.data or classifier.config.data, request.data_dir or classifier.config.data_dir or None)
    if dataset.image_shape != tuple(classifier.dataset["image_shape"]):
        raise ConfigError(
            f"--data={request.data}: its images are {dataset.image_shape}, those of {request.workdir} "
            f"{tuple(classifier.dataset['image_shape'])}"
        )
    if dataset.num_classes > classifier.dataset["num_classes"]:
        raise ConfigError(
            f"--data={request.data}: has {dataset.num_classes} classes, {request.workdir} {classifier.dataset['num_classes']}"
        )
    folder, sample = pathlib.Path(request.workdir).expanduser(), data.sample_tests(dataset, request.examples)
    model = of_classifier(
        classifier,
        sample.x_test,
        sample.y_test,
        name=f"{classifier.config.defense} ({folder.name})",
        batch_size=request.batch_size,
        seed=request.seed,
        mesh=mesh,
    )
    eps = request.eps or classifier.config.eps1
    if not eps:
        raise ConfigError("--eps=0: must be above 0, for the run itself has --eps1=0")
    results = pathlib.Path(request.results).expanduser() if request.results else folder / "evaluation"
    return model, eps, results, len(dataset.x_test)


def _function(name: str) -> Callable[..., Any]:
    """The function of `MODULE:FUNCTION`, looked for in the current folder too.

    Raises:
      ConfigError: if there is none.
    """
    module, _, attribute = name.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"--predict={name}: {error}; it must be MODULE:FUNCTION, importable from here") from error
    if not callable(function):
        raise ConfigError(f"--predict={name}: is a {type(function).__name__}; it must be a function of images")
    return function  # type: ignore[no-any-return]
