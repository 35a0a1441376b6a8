"""Evaluates one trained model and writes tables and files; `experiments.evaluate` calls it."""

import dataclasses
import functools
import importlib
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from e2sad_jax import data, distributed
from e2sad_jax._io import check_folder, write_json, write_text
from e2sad_jax.attacks import ATTACKS, core
from e2sad_jax.errors import ConfigError, DataError, close_to
from e2sad_jax.evaluation import Attack, Effort, Model, diagnose, of_classifier, of_function, quantize
from e2sad_jax.evaluation.evaluator import BEFORE
from e2sad_jax.evaluation.exported import stablehlo
from e2sad_jax.evaluation.finished import Finished
from e2sad_jax.reporting import diagnosis, provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs import black_box, saved_images
from e2sad_jax.runs.classifier import CHOICES, load
from e2sad_jax.training.config import Config, check, parse_number, setting

UNFINISHED = "unfinished"  # folder of finished batches, until all of them are
EXAMPLES, SHOWN = "examples.png", 10  # columns of the picture, at most
WORST, WORST_8BIT = "worst_images.npz", "worst_images_8bit.npz"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to evaluate; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range, or the flags do not fit together.
    """

    workdir: str = setting("", "folder of the run to evaluate")
    which: str = setting("last", "weights of the run", choices=CHOICES)
    predict: str = setting(
        "",
        "instead of a run: MODULE:FUNCTION, from images in [0, 1] to logits, in JAX, or PATH.stablehlo, such a function as "
        "jax.export wrote it, with its gradient or without; needs --data and --eps",
    )
    data: str = setting("", "data set whose test images are attacked; empty: that of the run")
    data_dir: str = setting("", "folder of data sets; empty: that of the run")
    eps: float = setting(0.0, "budget in the network's units, 0: the run's own eps1", lower=0)
    norm: str = setting(
        "", "of the budget, linf or l2; empty: the run's own, or linf with --predict", choices=("", *core.NORMS)
    )
    examples: int = setting(
        500,
        "test images, a sample stratified by class, or all if there are fewer; 0: all; saved ones are read whole",
        lower=0,
    )
    batch_size: int = setting(250, "images at once", lower=1)
    devices: int = setting(1, "devices to split each batch over, 0: all", lower=0)
    seed: int = setting(0, "seed of the attacks", lower=0, upper=2**32 - 1)
    transfer_from: str = setting(
        "",
        "folder of a run, such as a natural model, whose adversarial images the evaluated model classifies; empty: none",
    )
    auto: bool = setting(True, "the worst case over APGD-CE, APGD-T and Square, in the l2 ball FAB too")
    queries: int = setting(5000, "queries of Square, 0: leave it out", lower=0)
    targets: int = setting(9, "wrong classes that the targeted APGD tries", lower=1)
    fab: int = setting(
        -1,
        "wrong classes that FAB tries, before Square, 0: leave it out, -1: 9 in the l2 ball, none elsewhere",
        lower=-1,
    )
    near: float = setting(
        0.0,
        "later attacks of the worst case leave out images whose decision boundary is estimated to lie beyond so many budgets, "
        "at least 1; 0: none",
        lower=0,
    )
    restarts: int = setting(5, "random starts of PGD-40", lower=1)
    attack: tuple[str, ...] = setting(
        (),
        f"one more attack, NAME:EPS or NAME:EPS:STEPS, of {', '.join(ATTACKS)}; EPS is in --norm, or else in the norm that "
        "the attack has (of few_pixels, greedy_l0 and jsma a number of pixels); may be given several times",
    )
    save_images: bool = setting(
        False,
        f"write {WORST}: the worst image of each test image, which --data reads back",
    )
    quantize: bool = setting(
        False,
        f"measure the worst images rounded to 8-bit grey levels in the ball too; with --save_images, write {WORST_8BIT}",
    )
    results: str = setting(
        "",
        "folder for evaluation.html, .md, .json and .png; empty: WORKDIR/evaluation, or runs/evaluation/NAME for --predict, "
        "NAME of the function or file",
    )

    def __post_init__(self) -> None:
        if bool(self.workdir) == bool(self.predict):
            raise ConfigError(
                "--workdir or --predict: exactly one of them must be given, a run's folder or MODULE:FUNCTION"
            )
        if self.predict and ":" not in self.predict and not _is_exported(self.predict):
            raise ConfigError(f"--predict={self.predict}: must be MODULE:FUNCTION or PATH.stablehlo")
        if self.predict and not self.data:
            raise ConfigError("--data: must be given with --predict, a data set or PATH.npz")
        if self.predict and not self.eps:
            raise ConfigError("--eps=0: must be above 0 with --predict, which has no run's budget")
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        for text in self.attack:
            _attack(text, "linf")
        if 0 < self.near < 1:
            raise ConfigError(f"--near={self.near:g}: must be at least 1, or 0")
        for name in ("fab", "near"):
            if (given := getattr(self, name)) > 0 and not self.auto:
                raise ConfigError(f"--{name}={given:g}: is a part of the worst case; leave it out, or --noauto")


class _Asked(NamedTuple):
    """What a request asks about.

    Attributes:
      model: the model and its images.
      test_images: how many there are, of which the model's are a sample.
      eps: the budget.
      norm: its norm.
      folder: where the files go.
      make: the model with other images, as stored, and labels.
      transform: name of the transform that the model's images are behind.
    """

    model: Model
    test_images: int
    eps: float
    norm: str
    folder: pathlib.Path
    make: Callable[[Any, Any], Model]
    transform: str


def run(request: Request) -> dict[str, Any]:
    """Evaluates, prints the tables, and writes evaluation.html, .md, .json and .png; goes on where it was stopped.

    Of a model without a gradient it writes evaluation.md and .json.

    Raises:
      ConfigError, DataError, WorkdirError: before anything is measured.
    """
    asked = _asked(request)
    model, eps, folder = asked.model, asked.eps, asked.folder
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
    check_folder(folder, f"--results={folder}", make=True)
    finished = Finished(folder / UNFINISHED)
    if there := len(finished):
        print(
            f"{finished.folder}: {there:,} finished batches found; each counts if images, model, attack and seed are the same",
            file=sys.stderr,
        )
    model = dataclasses.replace(model, finished=finished)
    effort = Effort(
        queries=request.queries,
        targets=request.targets,
        fab=None if request.fab < 0 else request.fab,
        restarts=request.restarts,
        worst_case=request.auto,
        near=request.near or None,
    )
    more = [_attack(text, asked.norm) for text in dict.fromkeys(request.attack)]
    for attack in more:
        try:
            attack.check(model.num_classes, model.images.ndim)
        except ValueError as error:
            raise ConfigError(f"--attack={attack.name}: {error}") from error
    n = len(model.images)
    if _is_exported(request.predict) and not black_box.has_gradient(model):
        return _without_gradient(request, asked, model, substitute, more)
    rejects = model.detector is not None
    total = effort.work(n, model.num_classes, substitute is not None, model.images.ndim, rejects, asked.norm)
    total += n * sum(attack.gradients(model.num_classes) for attack in more)
    with Bar(f"evaluate {model.name}", total, "gradients") as bar:

        def progress(what: str, gradients: int) -> None:
            (bar.skip if what == BEFORE else bar.update)(gradients, what)

        result = diagnose(
            model,
            eps=eps,
            norm=asked.norm,
            effort=effort,
            substitute=substitute,
            keep=True,
            progress=progress,
        )
        found = model.evaluate(more, progress=progress) if more else {}
    result["more"] = [
        {"attack": a.name, "norm": a.norm, "eps": a.eps, "accuracy": float(found[a.name].withstood.mean())}
        for a in more
    ]
    worst = result.pop("worst_images")
    files = ["evaluation.html", "evaluation.md", "evaluation.json", "evaluation.png"]
    result["quantized"], saved = _save(request, asked, model, worst)
    files += saved
    classes = {"classes": len(np.unique(model.labels)), "num_classes": model.num_classes}
    examples = _examples(folder / EXAMPLES, model, worst)
    files += [EXAMPLES] if examples else []
    result |= {
        "examples": EXAMPLES if examples else "",
        "test_images": asked.test_images,
        **classes,
        "command": provenance.command(),
        "environment": provenance.environment(),
    }
    write_json(folder / "evaluation.json", result)
    write_text(folder / "evaluation.md", diagnosis.markdown(result))
    diagnosis.plot(folder / "evaluation.png", [result])
    write_text(folder / "evaluation.html", diagnosis.page(result, folder))
    finished.clear()
    print(f"\n{diagnosis.text(result)}\n")
    for name in files:
        accuracy = {WORST: result["robust"], WORST_8BIT: result["quantized"]}.get(name)
        print(f"{folder / name}{'' if accuracy is None else f' (--data reads it back: clean accuracy {accuracy:.4f})'}")
    return result


def _save(request: Request, asked: _Asked, model: Model, worst: np.ndarray) -> tuple[float | None, list[str]]:
    """The accuracy on the worst images in grey levels, if that is asked for, and the names of the files that it writes."""
    quantized, files = None, []
    if request.quantize:
        grey = quantize(worst, model.images, eps=asked.eps, norm=asked.norm)
        quantized = float(asked.make(grey, model.labels).clean().mean())
    if request.save_images:
        saved_images.write(asked.folder / WORST, worst, model.labels, model.num_classes, asked.transform)
        files.append(WORST)
        if request.quantize:
            saved_images.write(asked.folder / WORST_8BIT, grey, model.labels, model.num_classes)
            files.append(WORST_8BIT)
    return quantized, files


def _without_gradient(
    request: Request, asked: _Asked, model: Model, substitute: Model | None, more: Sequence[Attack]
) -> dict[str, Any]:
    """Evaluates a model that Square and other models' images alone can attack, prints the table, and writes it.

    Raises:
      ConfigError: if there is no such attack, or a flag asks for others.
    """
    square = request.queries and model.images.ndim == 4
    if not (square or substitute or more):
        raise ConfigError("--queries=0: must be above 0, or --transfer_from given, for the model has no gradient")
    if request.fab > 0:
        raise ConfigError(f"--fab={request.fab}: follows the gradient, and the model has none; leave it out")
    stages = [Attack("Square", "square", asked.eps, request.queries, norm=asked.norm)] if square else []
    transfer = Attack("PGD-40", "pgd", asked.eps, 40, norm=asked.norm)
    attacks = [*stages, *more, *([transfer] if substitute else [])]
    total = len(model.images) * sum(attack.gradients(model.num_classes) for attack in attacks)
    with Bar(f"evaluate {model.name}", total, "queries") as bar:
        result = black_box.evaluate(
            model,
            [*stages, *more],
            eps=asked.eps,
            norm=asked.norm,
            substitute=substitute,
            transfer=transfer,
            progress=lambda what, count: (bar.skip if what == BEFORE else bar.update)(count, what),
        )
    result["quantized"], saved = _save(request, asked, model, result.pop("worst_images"))
    result |= {
        "test_images": asked.test_images,
        "command": provenance.command(),
        "environment": provenance.environment(),
    }
    write_json(asked.folder / "evaluation.json", result)
    table = black_box.table(result)
    write_text(asked.folder / "evaluation.md", table.markdown())
    Finished(asked.folder / UNFINISHED).clear()
    print(f"\n{table.text()}\n")
    for name in ("evaluation.md", "evaluation.json", *saved):
        print(asked.folder / name)
    return result


def _examples(path: pathlib.Path, model: Model, worst: np.ndarray) -> bool:
    """Draws the first images of each class that are classified correctly, and their worst images; whether there are any."""
    path.unlink(missing_ok=True)  # that of another model
    outcome = model.judge(model.images)
    right = np.flatnonzero(outcome.correct)
    _, first = np.unique(model.labels[right], return_index=True)
    chosen = right[first][:SHOWN]
    if model.images.ndim != 4 or model.images.shape[-1] not in (1, 3) or not len(chosen):
        return False
    seen = model.judge(worst).prediction
    titles = [
        f"{model.labels[i]}, then {seen[i]}" if seen[i] != model.labels[i] else f"{model.labels[i]}, kept"
        for i in chosen
    ]
    width = float(np.max(np.subtract(*model.bounds[::-1])))
    diagnosis.examples(path, model.images[chosen], worst[chosen], titles, width)
    return True


def _attack(text: str, norm: str) -> Attack:
    """The attack of NAME:EPS or NAME:EPS:STEPS, in `norm` if it has that, else in its own.

    Raises:
      ConfigError: if there is none of that name, or the numbers are none.
    """
    name, *numbers = text.split(":")
    try:
        eps, steps = parse_number(numbers[0]), int(numbers[1]) if len(numbers) > 1 else 0
        if name not in ATTACKS or len(numbers) > 2 or eps < 0 or steps < 0:
            raise ValueError
        norms = ATTACKS[name].norms
        return Attack(text, name, eps, steps, norm=norm if norm in norms else norms[0])
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"--attack={text:.100}: {'' if name in ATTACKS else close_to(name, ATTACKS)}must be NAME:EPS or NAME:EPS:STEPS, "
            f"with a budget of at least 0 and a NAME of {', '.join(ATTACKS)}"
        ) from error


def _asked(request: Request) -> _Asked:
    """Loads what a request asks about.

    Raises:
      ConfigError, DataError, WorkdirError: if it cannot be, or the images are none of the model's.
    """
    mesh = distributed.mesh(request.devices, request.batch_size)
    how: dict[str, Any] = {"batch_size": request.batch_size, "seed": request.seed, "mesh": mesh}
    results = pathlib.Path(request.results).expanduser() if request.results else None
    make: Callable[..., Model]
    if request.predict:
        if _is_exported(request.predict):
            function, name = stablehlo(request.predict), pathlib.Path(request.predict).name
        else:
            function, name = _function(request.predict), request.predict.split(":")[1]
        make = functools.partial(of_function, function, name=name, **how)
        transform, eps = "unit", request.eps
        folder = results or pathlib.Path("runs/evaluation", pathlib.Path(name).stem)
        norm = request.norm or "linf"
    else:
        classifier = load(request.workdir, request.which)
        workdir = pathlib.Path(request.workdir).expanduser()
        name = f"{classifier.config.defense} ({workdir.name}{', averaged weights' if classifier.averaged else ''})"
        make = functools.partial(of_classifier, classifier, name=name, **how)
        transform, eps, folder = classifier.config.transform, request.eps, results or workdir / "evaluation"
        norm = request.norm or classifier.config.norm
        if not eps and norm != classifier.config.norm:
            raise ConfigError(
                f"--eps=0: must be above 0 with --norm={norm}, for that of the run is {classifier.config.norm}"
            )
        if not eps and not (eps := classifier.config.eps1):
            raise ConfigError("--eps=0: must be above 0, for the run itself has --eps1=0")
    if request.quantize and transform != "unit":
        raise ConfigError(
            f"--quantize: its grey levels are those of images in [0, 1], but the run attacks behind --transform={transform}; "
            "leave it out"
        )
    saved = saved_images.read(data.expand(request.data), transform) if _is_file(request.data) else None
    if saved is not None:
        shape, num_classes = saved.inputs.shape[1:], saved.num_classes
    else:
        dataset = _dataset(request, None if request.predict else classifier.config)
        shape, num_classes = dataset.image_shape, dataset.num_classes
    if not request.predict and tuple(shape) != tuple(classifier.dataset["image_shape"]):
        raise ConfigError(
            f"--data={request.data}: its images are {tuple(shape)}, those of {request.workdir} "
            f"{tuple(classifier.dataset['image_shape'])}"
        )
    if not request.predict and num_classes > classifier.dataset["num_classes"]:
        raise ConfigError(
            f"--data={request.data}: has {num_classes} classes, {request.workdir} {classifier.dataset['num_classes']}"
        )
    if saved is None:
        sample, tests = data.sample_tests(dataset, request.examples), len(dataset.x_test)
        model = make(sample.x_test, sample.y_test)
    else:  # inputs, which no transform may touch again
        blank = make(np.zeros((1, *shape), np.uint8), np.zeros(1, np.int32))
        try:
            model = dataclasses.replace(blank, images=saved.inputs, labels=saved.labels)
            tests = len(model.labels)  # whole, so that the accuracy is the one that was printed
        except ValueError as error:
            raise DataError(f"{request.data}: {error}") from error
    width = float(np.max(np.subtract(*model.bounds[::-1])))
    if norm == "linf" and eps > width:
        raise ConfigError(
            f"--eps={eps:g}: must be at most {width:g}, the width of the images' range (8 of 255: {8 / 255:.4f})"
        )
    if request.quantize:
        try:
            quantize(model.images, model.images, eps=eps, norm=norm)
        except ValueError as error:
            raise ConfigError(f"--quantize: {error}") from error
    return _Asked(model, tests, eps, norm, folder, make, transform)


def _is_exported(name: str) -> bool:
    return name.lower().endswith(".stablehlo")


def _is_file(name: str) -> bool:
    return name.lower().endswith(".npz")


def _dataset(request: Request, config: Config | None) -> data.Dataset:
    """The data set that is asked for, or that of the run; of a file the test images are enough."""
    if _is_file(request.data):
        return data.load_npz(data.expand(request.data), test_only=True)
    folder = request.data_dir or (config.data_dir if config else "")
    return data.load(request.data or (config.data if config else ""), folder or None)


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
