"""The official AutoAttack code and `evaluation.auto`, on the same weights and images.

python -m benchmarks.official --workdir=runs/e2sad [--which=best] [--examples=1000] [--judge=test]   # pip install -e '.[bench]'

A run's network is carried to PyTorch, where the code of Croce and Hein (https://github.com/fra31/auto-attack, which
`pyautoattack` packages) attacks it: version "standard", in the ball of the run's own eps1. Prints a Markdown page, and writes
official.md and official.json. Ends with exit code 1 if one of the official images leaves its ball, or if `evaluation.auto`
leaves an accuracy more than a point above the official one.
"""

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import logging
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from e2sad_jax import cli, data, networks
from e2sad_jax._compile import jit
from e2sad_jax._io import atomic_file, check_folder, digest, write_json, write_text
from e2sad_jax.comparison.request import JUDGES
from e2sad_jax.data.dataset import hold_out, in_words
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import FAB, STAGES, Attack, Model, distances, in_batches, of_classifier
from e2sad_jax.evaluation.curves import SLACK
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.reporting.table import Table
from e2sad_jax.runs.classifier import CHOICES, Classifier, load
from e2sad_jax.training.config import check, setting
from experiments.step_cost.peers import SHIPPED_BY, pytorch

ATTACKS = dict(zip(("apgd-ce", "apgd-t", "fab-t", "square"), (*STAGES[:2], FAB, STAGES[2]), strict=True))
NORMS = {"linf": "Linf", "l2": "L2"}
MODELS = (networks.MnistCNN, networks.SvhnCNN)
AGREE = 1e-4  # of a logit, between the two networks
TOLERANCE = 0.01  # of accuracy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to attack, and how; each field is the flag of that name. The defaults of the effort are AutoAttack's.

    Raises:
      ConfigError: if a value is out of range.
    """

    workdir: str = setting("", "folder of the run to attack")
    which: str = setting("last", "weights of the run", choices=CHOICES)
    judge: str = setting("test", "which images are attacked", choices=tuple(JUDGES))
    examples: int = setting(1000, "images, a sample stratified by class, or all if there are fewer; 0: all", lower=0)
    data_dir: str = setting("", "folder of data sets; empty: that of the run")
    attacks: str = setting(",".join(ATTACKS), f"attacks, in this order, of {','.join(ATTACKS)}")
    apgd_steps: int = setting(100, "steps of APGD-CE and of APGD-T", lower=1)
    targets: int = setting(9, "wrong classes that APGD-T and FAB-T try", lower=1)
    fab_steps: int = setting(100, "steps of FAB-T", lower=1)
    queries: int = setting(5000, "queries of Square", lower=1)
    batch_size: int = setting(250, "images at once", lower=1)
    seed: int = setting(0, "seed of both sides", lower=0, upper=2**32 - 1)
    results: str = setting("", "folder for official.md and .json; empty: that of the run")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        if not self.workdir:
            raise ConfigError("--workdir=: must name the folder of a run")
        if unknown := [name for name in self.attacks.split(",") if name not in ATTACKS]:
            raise ConfigError(f"--attacks={self.attacks}: {unknown[0]!r} must be one of {', '.join(ATTACKS)}")

    @property
    def names(self) -> list[str]:
        """The attacks, in AutoAttack's order."""
        return [name for name in ATTACKS if name in self.attacks.split(",")]

    def stages(self, num_classes: int) -> list[Attack]:
        """The same attacks of this library with the same effort."""
        targets = min(self.targets, num_classes - 1)
        effort: dict[str, Mapping[str, Any]] = {
            "apgd-ce": {"steps": self.apgd_steps},
            "apgd-t": {"steps": self.apgd_steps, "targets": targets},
            "fab-t": {"steps": self.fab_steps, "targets": targets},
            "square": {"steps": self.queries},
        }
        return [dataclasses.replace(ATTACKS[name], **effort[name]) for name in self.names]


@dataclasses.dataclass(frozen=True, eq=False)
class Side:
    """What one of the two found.

    Attributes:
      standing: bool `[N]` of the clean images and after each attack: what is classified correctly still.
      seconds: of each attack.
      images: `[N, H, W, C]`, the image that fools the network; where none was found, the clean one.
    """

    standing: Sequence[np.ndarray]
    seconds: Sequence[float]
    images: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """Which images an attack has made an adversarial one of, bool `[N]`."""
        return self.standing[0] & ~self.standing[-1]


def check_installed() -> None:
    """Refuses to begin without the packages.

    Raises:
      ConfigError: naming them and how to install them.
    """
    needed = {"torch": SHIPPED_BY["torch"], "pyautoattack": "pyautoattack"}
    if missing := [name for package, name in needed.items() if importlib.util.find_spec(package) is None]:
        raise ConfigError(f"needs {' and '.join(missing)}, not installed here: pip install -e '.[bench]'")


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
            other = net(_tensor(inputs[some], net)).cpu().numpy()
        difference = max(difference, float(np.abs(np.asarray(logits)[: len(some)] - other).max()))
    if not difference < AGREE:  # NaN neither
        raise ConfigError(
            f"--workdir={config.workdir}: logits in PyTorch and JAX differ by {difference:.3g}, and must by less than "
            f"{AGREE:g}; a run of --precision={config.precision} is carried to float32"
        )
    return net, difference


def adversary(net: Any, norm: str, eps: float, num_classes: int, asked: Request) -> Any:
    """The official AutoAttack of version "standard", its effort that which is asked.

    Args:
      net: the network in PyTorch.
      norm: "linf" or "l2".
      eps: budget.
      num_classes: of the network.
      asked: the effort; its defaults leave all at what the version sets.
    """
    from pyautoattack import AutoAttack

    device = next(net.parameters()).device
    found = AutoAttack(net, norm=NORMS[norm], eps=eps, seed=asked.seed, version="standard", device=device)
    for apgd in (found.apgd, found.apgd_targeted):
        if apgd.n_iter != asked.apgd_steps:
            apgd.n_iter = apgd.n_iter_orig = steps = asked.apgd_steps
            # Where it looks at its progress is set by its constructor, for 100 steps.
            apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    found.apgd_targeted.n_target_classes = found.fab.n_target_classes = min(asked.targets, num_classes - 1)
    found.fab.n_iter, found.square.n_queries = asked.fab_steps, asked.queries
    return found


def official(
    official_code: Any, model: Model, names: Sequence[str], batch_size: int, kept: pathlib.Path | None = None
) -> tuple[Side, list[str]]:
    """Runs attacks of the official code, each on the images that are left; and what it warned of.

    The code attacks the images that are left in the order in which they are, so one call for each attack is what one call
    for all of them is, and each has its time.

    Args:
      official_code: of `adversary`.
      model: whose images and labels are attacked.
      names: of the attacks.
      batch_size: images at once.
      kept: file that keeps what is finished, of this question alone; a run that ended in between goes on from there.
    """
    x, y = _tensor(model.images, official_code.model), model.labels.astype(np.int64)
    made, standing, seconds = np.array(model.images), [_right(official_code.model, x, y, batch_size)], []
    with _told(official_code.logger) as warnings, contextlib.redirect_stdout(sys.stderr):
        if kept is not None and kept.exists():
            with np.load(kept) as there:
                made, standing, seconds = there["made"], list(there["standing"]), list(there["seconds"])
                warnings.extend(there["warnings"].tolist())
            print(f"official code: {', '.join(names[: len(seconds)])} from {kept}", file=sys.stderr, flush=True)
        for name in names[len(seconds) :]:
            began, left = time.perf_counter(), np.flatnonzero(standing[-1])
            right = standing[-1].copy()
            if len(left):
                official_code.attacks_to_run = [name]
                labels = _like(y[left], x)
                images, predicted = official_code.run_standard_evaluation(x[left], labels, batch_size=batch_size)
                right[left] = (predicted == labels).cpu().numpy()
                made[left] = images.cpu().numpy().transpose(0, 2, 3, 1)
            standing.append(right)
            seconds.append(time.perf_counter() - began)
            if kept is not None:
                with atomic_file(kept) as file:
                    np.savez(file, made=made, standing=standing, seconds=seconds, warnings=np.array(warnings, str))
    return Side(standing, seconds, made), warnings


def ours(model: Model, stages: Sequence[Attack], *, eps: float, norm: str) -> Side:
    """Runs `evaluation.auto`; the seconds of a stage hold its compilation."""
    ended: dict[str, float] = {"clean": time.perf_counter()}
    total = len(model.images) * sum(
        attack.gradients(model.num_classes) for attack in (Attack("clean", "clean"), *stages)
    )
    names = ("clean", *(stage.name for stage in stages))
    with Bar("evaluation.auto", total, "gradients") as bar:

        def progress(what: str, gradients: int) -> None:  # `what` begins with the attack's name
            name = next(name for name in names if what.startswith(name))
            ended[name] = time.perf_counter()
            bar.update(gradients, what)

        result = model.auto(stages, eps=eps, norm=norm, keep=True, progress=progress)
    assert result.adversarial is not None
    times = [ended[name] for name in result.standing]
    return Side(list(result.standing.values()), list(np.diff(times)), result.adversarial)


def outcome(stages: Sequence[str], theirs: Side, own: Side, places: np.ndarray) -> dict[str, Any]:
    """Both sides after each attack, and every image on which they disagree at the end.

    Args:
      stages: names of the attacks.
      theirs: what the official code found.
      own: what `evaluation.auto` found.
      places: `[N]`, of the images in their data set.

    Returns:
      "rows" and "differ", for JSON.
    """
    rows = []
    for i, name in enumerate(("clean", *stages)):
        they, we = theirs.standing[i], own.standing[i]
        rows.append(
            {
                "attack": name,
                "official": float(they.mean()),
                "ours": float(we.mean()),
                "official_alone": int((we & ~they).sum()),
                "ours_alone": int((they & ~we).sum()),
                "official_seconds": round(theirs.seconds[i - 1], 2) if i else None,
                "ours_seconds": round(own.seconds[i - 1], 2) if i else None,
            }
        )

    def fell_to(side: Side, i: Any) -> str | None:
        return next((n for n, right in zip(("clean", *stages), side.standing, strict=True) if not right[i]), None)

    differ = [
        {"image": int(places[i]), "official": fell_to(theirs, i), "ours": fell_to(own, i)}
        for i in np.flatnonzero(theirs.standing[-1] != own.standing[-1])
    ]
    return {"rows": rows, "differ": differ}


def page(result: Mapping[str, Any]) -> str:
    """What official.json holds, in Markdown."""
    rows, they, we = result["rows"], result["official_images"], result["our_images"]

    def seconds(value: float | None) -> str | None:
        return None if value is None else f"{value:.1f}"

    table = Table(
        columns=["after", "official", "ours", "fell to the official alone", "to ours alone", "official, s", "ours, s"],
        rows=[
            [
                row["attack"],
                f"{row['official']:.4f}",
                f"{row['ours']:.4f}",
                row["official_alone"],
                row["ours_alone"],
                seconds(row["official_seconds"]),
                seconds(row["ours_seconds"]),
            ]
            for row in rows
        ],
    )
    effort, about = result["effort"], result["environment"]
    norm = "l-infinity" if result["norm"] == "linf" else result["norm"]
    notes = [
        f"Logits in PyTorch and JAX differ by at most {result['logits_differ']:.1e}.",
        f"Of {they['found']:,} adversarial images of the official code, JAX misclassifies {they['misclassified']:,}; "
        f"{they['outside']:,} lie outside the ball (largest change {they['largest']:.6f}).",
        f"Of {we['found']:,} of ours, PyTorch misclassifies {we['misclassified']:,}; {we['outside']:,} lie outside the ball "
        f"(largest change {we['largest']:.6f}).",
        *(
            f"Image {d['image']:,}: official {d['official'] or 'robust'}, ours {d['ours'] or 'robust'}."
            for d in result["differ"]
        ),
        *(f"The official code warned: {warning}" for warning in result["warnings"]),
    ]
    return "\n".join(
        [
            "# The official AutoAttack code and `evaluation.auto`\n",
            f"{result['defense']}, {result['step']:,} steps ({result['which']} weights); "
            f"{result['images']} of {result['data']}; {norm} ball of {result['eps']:.4g}. "
            "Robust accuracy after each attack, which is run on what is left. "
            f"APGD {effort['apgd_steps']} steps, {effort['targets']} targets, FAB {effort['fab_steps']} steps, "
            f"Square {effort['queries']:,} queries. Our seconds hold the compilation.\n",
            table.markdown(),
            *(f"- {note}" for note in notes),
            "",
            f"`{result['command']}`, {about['hardware']}, {about['date']}, commit {about['commit']}; "
            f"pyautoattack {about['pyautoattack']}, PyTorch {about['torch']}, JAX {about['jax']}",
            "",
        ]
    )


def failures(result: Mapping[str, Any]) -> list[str]:
    """What makes the command end with exit code 1."""
    found, last = [], result["rows"][-1]
    for side in ("official_images", "our_images"):
        if outside := result[side]["outside"]:
            found.append(f"{side}: {outside} outside the ball")
    if last["ours"] > last["official"] + TOLERANCE:
        found.append(f"ours leaves {last['ours']:.4f}, the official code {last['official']:.4f}")
    return found


def run(asked: Request) -> None:
    """Attacks, prints the page and writes it.

    Raises:
      ConfigError, DataError, WorkdirError: before anything is attacked.
    """
    check_installed()
    folder = pathlib.Path(asked.results or asked.workdir).expanduser()
    trained = load(asked.workdir, asked.which)
    config = trained.config
    dataset = data.load(config.data, asked.data_dir or config.data_dir or None)
    num_classes = trained.dataset["num_classes"]
    if num_classes < 4 and "apgd-t" in asked.names:
        raise ConfigError(
            f"--attacks={asked.attacks}: apgd-t needs at least 4 classes; {dataset.name} has {num_classes}"
        )
    judged = hold_out(dataset, config.validation_examples)[1] if asked.judge == "held_out" else dataset
    there = len(judged.y_test)
    places = data.sample(judged.y_test, asked.examples) if asked.examples else np.arange(there)
    sample = data.subset(judged, test=places)
    batch_size = min(asked.batch_size, len(places))
    model = of_classifier(trained, sample.x_test, sample.y_test, batch_size=batch_size, seed=asked.seed)
    net, logits_differ = carried(trained, model.images, batch_size)
    check_folder(folder, f"--results={folder}", make=True)
    code = adversary(net, config.norm, config.eps1, num_classes, asked)
    question = dataclasses.asdict(asked) | {"results": "", "data_dir": "", "eps": config.eps1, "norm": config.norm}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack")}
    question |= versions  # an attack that another version has finished is begun again
    arrays = {"images": model.images, "labels": model.labels}
    arrays |= {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trained.params))}
    kept = folder / f"official-{digest(arrays, json.dumps(question, sort_keys=True))[:8]}.npz"
    theirs, warnings = official(code, model, asked.names, batch_size, kept)
    stages = asked.stages(num_classes)
    own = ours(model, stages, eps=config.eps1, norm=config.norm)

    def checked(side: Side, wrong: np.ndarray) -> dict[str, Any]:
        lengths = distances(model.images, side.images, side.found, norm=config.norm)[side.found]
        found = side.images[side.found].reshape(len(lengths), -1)
        outside = (lengths > config.eps1 + SLACK) | ((found < 0) | (found > 1)).any(1)
        return {
            "found": int(side.found.sum()),
            "misclassified": int(wrong[side.found].sum()),
            "outside": int(outside.sum()),
            "largest": float(lengths.max(initial=0)),
        }

    in_torch = _right(net, _tensor(own.images, net), model.labels, batch_size)
    classes = len(np.unique(sample.y_test))
    result = {
        "command": provenance.command(),
        "environment": {
            **provenance.environment(),
            **versions,
        },
        "workdir": asked.workdir,
        "which": asked.which,
        "defense": config.defense,
        "model": config.model,
        "step": trained.step,
        "data": dataset.name,
        "judge": asked.judge,
        "examples": len(places),
        "images": in_words(len(places), there, classes, dataset.num_classes, JUDGES[asked.judge]),
        "eps": config.eps1,
        "norm": config.norm,
        "effort": {name: getattr(asked, name) for name in ("apgd_steps", "targets", "fab_steps", "queries", "seed")},
        "logits_differ": logits_differ,
        **outcome([stage.name for stage in stages], theirs, own, places),
        "official_images": checked(theirs, ~model.right_on(theirs.images.clip(0, 1))),
        "our_images": checked(own, ~in_torch),
        "warnings": warnings,
    }
    text = page(result)
    print(text, flush=True)
    write_text(folder / "official.md", text)
    write_json(folder / "official.json", result)
    kept.unlink(missing_ok=True)
    if failed := failures(result):
        sys.exit("official: " + "; ".join(failed))


def _like(values: np.ndarray, other: Any) -> Any:
    import torch

    return torch.tensor(values, device=other.device)


def _tensor(images: np.ndarray, net: Any) -> Any:
    """`[N, H, W, C]` as a tensor `[N, C, H, W]` where the network is."""
    return _like(np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32), next(net.parameters()))


def _right(net: Any, x: Any, labels: np.ndarray, batch_size: int) -> np.ndarray:
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


if __name__ == "__main__":
    for flag in dataclasses.fields(Request):
        cli.define_flag(flag)
    cli.launch(lambda: run(cli.from_flags(Request)), "each attack of the official code that is finished is kept")
