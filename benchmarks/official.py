"""The official AutoAttack code and `evaluation.auto`, on the same weights and images.

python -m benchmarks.official --workdir=runs/e2sad [--which=best] [--examples=1000] [--judge=test]   # pip install -e '.[bench]'
python -m benchmarks.official --workdir=runs/a --workdir=runs/b --ball=linf:0.3 --ball=l2:2 --results=results/official

A run's network is carried to PyTorch, where the code of Croce and Hein (https://github.com/fra31/auto-attack, which
`pyautoattack` packages) attacks it: version "standard", in the ball of the run's own eps1, or in those that are given. FAB-T
comes last on both sides, so that the page shows what it adds to the other three. With `--noise=0.1` the network draws Gaussian
noise on its inputs, and both sides average over 20 draws: version "rand". Prints a Markdown page, and writes official.md and
official.json after each network and ball. Ends with exit code 1 if one of the official images leaves its ball, or if
`evaluation.auto` leaves an accuracy more than a point above the official one.
"""

import dataclasses
import importlib.metadata
import itertools
import json
import math
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.official_page import by_seed, failures, outcome, page
from benchmarks.official_sides import (
    Side,
    carried,
    check_runs,
    counted,
    missing,
    noisy,
    official,
    ours,
    right_in_torch,
    tensor,
    trained_by,
)
from e2sad_jax import cli, data
from e2sad_jax._io import check_folder, digest, read_json, write_json, write_text
from e2sad_jax.comparison.request import JUDGES
from e2sad_jax.data.dataset import hold_out, in_words
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import FAB, STAGES, Attack, Model, distances, of_classifier
from e2sad_jax.evaluation.curves import SLACK
from e2sad_jax.reporting import provenance
from e2sad_jax.runs.classifier import CHOICES, Classifier, load
from e2sad_jax.training.config import check, setting
from experiments.step_cost.peers import SHIPPED_BY

DLR = Attack("APGD-DLR", "apgd", steps=100, loss="dlr")
ATTACKS = dict(zip(("apgd-ce", "apgd-t", "square", "fab-t", "apgd-dlr"), (*STAGES, FAB, DLR), strict=True))
VERSIONS = {"standard": ("apgd-ce", "apgd-t", "square", "fab-t"), "rand": ("apgd-ce", "apgd-dlr")}
DRAWS = 20  # that an attack averages over, as the official version does
JUDGED_BY = 100  # draws of the last verdict
NORMS = {"linf": "Linf", "l2": "L2"}
BALL = "norm and budget, as linf:0.3 or l2:2, may be given several times; none: the ball of the run's training"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to attack, and how; each field is the flag of that name. The defaults of the effort are AutoAttack's.

    Raises:
      ConfigError: if a value is out of range.
    """

    workdir: tuple[str, ...] = setting((), "folders of the runs to attack, may be given several times")
    ball: tuple[str, ...] = setting((), BALL)
    which: str = setting("last", "weights of the run", choices=CHOICES)
    judge: str = setting("test", "which images are attacked", choices=tuple(JUDGES))
    examples: int = setting(1000, "images, a sample stratified by class, or all if there are fewer; 0: all", lower=0)
    data_dir: str = setting("", "folder of data sets; empty: that of the run")
    noise: float = setting(0.0, "standard deviation of Gaussian noise on the inputs; 0: none", lower=0)
    attacks: str = setting("", f"attacks, of {','.join(ATTACKS)}; empty: those of the version")
    apgd_steps: int = setting(100, "steps of APGD-CE and of APGD-T", lower=1)
    targets: int = setting(9, "wrong classes that APGD-T and FAB-T try", lower=1)
    fab_steps: int = setting(100, "steps of FAB-T", lower=1)
    queries: int = setting(5000, "queries of Square", lower=1)
    near: float = setting(0.0, "run `evaluation.auto` with this `near` too, at least 1; 0: without alone", lower=0)
    batch_size: int = setting(250, "images at once", lower=1)
    seed: int = setting(0, "seed of both sides", lower=0, upper=2**32 - 1)
    results: str = setting("", "folder for official.md and .json; empty: that of the run")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        check_runs(self.workdir, self.results)
        self.balls("linf", 0.0)
        if 0 < self.near < 1:
            raise ConfigError(f"--near={self.near:g}: must be at least 1, or 0")
        if unknown := [name for name in self.attacks.split(",") if self.attacks and name not in ATTACKS]:
            raise ConfigError(f"--attacks={self.attacks}: {unknown[0]!r} must be one of {', '.join(ATTACKS)}")
        if self.noise and (other := [name for name in self.names if name not in VERSIONS["rand"]]):
            raise ConfigError(
                f"--attacks={self.attacks}: {other[0]} does not average over draws; with --noise it must be of "
                f"{', '.join(VERSIONS['rand'])}"
            )

    @property
    def version(self) -> str:
        """The official code's name of what attacks such a network."""
        return "rand" if self.noise else "standard"

    @property
    def names(self) -> list[str]:
        """The attacks, in the order in which they run."""
        chosen = self.attacks.split(",") if self.attacks else VERSIONS[self.version]
        return [name for name in ATTACKS if name in chosen]

    def balls(self, norm: str, eps: float) -> list[tuple[str, float]]:
        """(norm, budget) of each ball, or the run's own, which is given.

        Raises:
          ConfigError: if one is not written as that.
        """
        found = []
        for given in self.ball:
            own, _, budget = given.partition(":")
            try:
                size = float(budget)
            except ValueError:
                size = math.nan
            if own not in NORMS or not 0 < size < math.inf:
                raise ConfigError(f"--ball={given:.100}: must be a norm and a budget above 0, as linf:0.3 or l2:2")
            found.append((own, size))
        return found or [(norm, eps)]

    def stages(self, num_classes: int) -> list[Attack]:
        """The same attacks of this library with the same effort."""
        targets = min(self.targets, num_classes - 1)
        effort: dict[str, Mapping[str, Any]] = {
            "apgd-ce": {"steps": self.apgd_steps},
            "apgd-t": {"steps": self.apgd_steps, "targets": targets},
            "fab-t": {"steps": self.fab_steps, "targets": targets},
            "square": {"steps": self.queries},
            "apgd-dlr": {"steps": self.apgd_steps},
        }
        return [dataclasses.replace(ATTACKS[name], **effort[name]) for name in self.names]


def check_installed() -> None:
    """Refuses to begin without the packages.

    Raises:
      ConfigError: naming them and how to install them.
    """
    if names := missing({"torch": SHIPPED_BY["torch"], "pyautoattack": "pyautoattack"}):
        raise ConfigError(f"needs {names}, not installed here: pip install -e '.[bench]'")


def adversary(net: Any, norm: str, eps: float, num_classes: int, asked: Request) -> Any:
    """The official AutoAttack of the version that is asked, with its effort.

    Args:
      net: the network in PyTorch, `counted`.
      norm: "linf" or "l2".
      eps: budget.
      num_classes: of the network.
      asked: the effort; its defaults leave all at what the version sets.
    """
    from pyautoattack import AutoAttack

    device = next(net.parameters()).device
    found = AutoAttack(net, norm=NORMS[norm], eps=eps, seed=asked.seed, version=asked.version, device=device)
    for apgd in (found.apgd, found.apgd_targeted):
        if apgd.n_iter != asked.apgd_steps:
            apgd.n_iter = apgd.n_iter_orig = steps = asked.apgd_steps
            # Where it looks at its progress is set by its constructor, for 100 steps.
            apgd.n_iter_2, apgd.n_iter_min, apgd.size_decr = (max(int(part * steps), 1) for part in (0.22, 0.06, 0.03))
    found.apgd_targeted.n_target_classes = found.fab.n_target_classes = min(asked.targets, num_classes - 1)
    found.fab.n_iter, found.square.n_queries = asked.fab_steps, asked.queries
    return found


def run(asked: Request) -> None:
    """Attacks, prints the page and writes it after each network and ball.

    Raises:
      ConfigError, DataError, WorkdirError: before anything is attacked.
    """
    check_installed()
    folder = pathlib.Path(asked.results or asked.workdir[0]).expanduser()
    duels = [duel for workdir in asked.workdir for duel in _duels(workdir, asked)]
    check_folder(folder, f"--results={folder}", make=True)
    before, results = _before(folder), list[Mapping[str, Any]]()
    for number, duel in enumerate(duels, 1):
        print(f"{number} of {len(duels)}: {duel.workdir}, {duel.norm} {duel.eps:g}", file=sys.stderr, flush=True)
        results.append(answer(duel, asked, folder, before))
        answered = {result["question"] for result in results}
        every = [*results, *(result for result in before if result["question"] not in answered)]
        write_text(folder / "official.md", page(every))
        write_json(folder / "official.json", {**_about(), "results": every})
    of_these = [
        group for group in by_seed(every) if any(result["question"] in answered for result in group)
    ]  # seeds of before, too
    shown = list(itertools.chain.from_iterable(of_these))
    print(page(shown), flush=True)
    for path in folder.glob("official-*.npz"):
        path.unlink()
    if failed := failures(shown):
        sys.exit("official: " + "; ".join(failed))


@dataclasses.dataclass(frozen=True, eq=False)
class Duel:
    """A run, its images, and the ball in which both sides attack them."""

    workdir: str
    trained: Classifier
    dataset: data.Dataset
    judged: data.Dataset
    norm: str
    eps: float


def _duels(workdir: str, asked: Request) -> list[Duel]:
    trained = load(workdir, asked.which)
    config = trained.config
    dataset = data.load(config.data, asked.data_dir or config.data_dir or None)
    num_classes = trained.dataset["num_classes"]
    for name, least in (("apgd-t", 4), ("apgd-dlr", 3)):
        if num_classes < least and name in asked.names:
            raise ConfigError(f"--attacks: {name} needs at least {least} classes; {dataset.name} has {num_classes}")
    if asked.judge == "held_out" and not config.validation_examples:
        raise ConfigError(f"--judge=held_out: the run in {workdir} held out no images; take --judge=test")
    judged = hold_out(dataset, config.validation_examples)[1] if asked.judge == "held_out" else dataset
    return [
        Duel(workdir, trained, dataset, judged, norm, eps)
        for norm, eps in asked.balls(config.norm or "linf", config.eps1)
    ]


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("torch", "pyautoattack")}


def _about() -> dict[str, Any]:
    return {"command": provenance.command(), "environment": {**provenance.environment(), **_versions()}}


def answer(
    duel: Duel, asked: Request, folder: pathlib.Path, before: Sequence[Mapping[str, Any]] = ()
) -> Mapping[str, Any]:
    """What both sides find, for JSON.

    Args:
      duel: run, images and ball.
      asked: the effort.
      folder: where the official code's finished attacks are kept.
      before: results of an earlier call, of which that of the same question and commit is taken.
    """
    trained, norm, eps = duel.trained, duel.norm, duel.eps
    config, num_classes = trained.config, trained.dataset["num_classes"]
    there = len(duel.judged.y_test)
    places = data.sample(duel.judged.y_test, asked.examples) if asked.examples else np.arange(there)
    sample = data.subset(duel.judged, test=places)
    batch_size = min(asked.batch_size, len(places))
    model = of_classifier(trained, sample.x_test, sample.y_test, batch_size=batch_size, seed=asked.seed)
    net, logits_differ = carried(trained, model.images, batch_size)
    if asked.noise:
        net = noisy(net, asked.noise, asked.seed)
        model = dataclasses.replace(model, apply=_drawing(trained, asked.noise), draws=DRAWS)
    effort = {name: getattr(asked, name) for name in ("apgd_steps", "fab_steps", "queries", "seed")}
    effort |= {"targets": min(asked.targets, num_classes - 1), "batch_size": batch_size}
    # An attack that another version or order has finished is begun again.
    question = {
        **effort,
        "noise": asked.noise,
        "attacks": asked.names,
        "eps": eps,
        "norm": norm,
        **_versions(),
    }
    arrays = {"images": model.images, "labels": model.labels}
    arrays |= {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(trained.params))}
    name = digest(arrays, json.dumps(question, sort_keys=True))[:8]
    commit = provenance.commit()
    for result in before:
        if result["question"] != name:
            continue
        of = result["environment"]["commit"]
        if of == commit and "with changes" not in (commit or "") and result.get("near", 0) == asked.near:
            print(f"from {folder / 'official.json'}", file=sys.stderr, flush=True)
            return result
        print(
            f"that in {folder / 'official.json'} is of commit {of}, near {result.get('near', 0):g}: ours is made again",
            file=sys.stderr,
            flush=True,
        )
    code = adversary(counted(net), norm, eps, num_classes, asked)
    groups = [asked.names] if asked.noise else [[one] for one in asked.names]
    theirs, warnings = official(code, model, groups, batch_size, folder / f"official-{name}.npz")
    stages = asked.stages(num_classes)
    sides = {"official": theirs, "ours": ours(model, stages, eps=eps, norm=norm)}
    if asked.near:
        sides["near"] = ours(model, stages, eps=eps, norm=norm, near=asked.near)
    names = [stage.name for stage in stages]
    if asked.noise:
        names = [" and ".join(names)]
        sides |= {name: side.at_once() for name, side in sides.items() if name != "official"}
    own = sides["ours"]

    def checked(side: Side, wrong: np.ndarray) -> dict[str, Any]:
        lengths = distances(model.images, side.images, side.found, norm=norm)[side.found]
        found = side.images[side.found].reshape(len(lengths), -1)
        outside = (lengths > eps + SLACK) | ((found < 0) | (found > 1)).any(1)
        return {
            "found": int(side.found.sum()),
            "misclassified": int(wrong[side.found].sum()),
            "outside": int(outside.sum()),
            "largest": float(lengths.max(initial=0)),
        }

    def in_torch(side: Side) -> np.ndarray:
        return ~right_in_torch(net, tensor(side.images, net), model.labels, batch_size)

    classes = len(np.unique(sample.y_test))
    return {
        **_about(),
        "question": name,
        "workdir": duel.workdir,
        "which": asked.which,
        "defense": config.defense,
        "model": config.model,
        "step": trained.step,
        "trained": trained_by(duel.workdir),
        "data": duel.dataset.name,
        "judge": asked.judge,
        "examples": len(places),
        "images": in_words(len(places), there, classes, duel.dataset.num_classes, JUDGES[asked.judge]),
        "eps": eps,
        "norm": norm,
        "effort": effort,
        "logits_differ": logits_differ,
        **outcome(names, sides, places),
        "official_images": checked(theirs, ~model.right_on(theirs.images.clip(0, 1))),
        "our_images": checked(own, in_torch(own)),
        **({"noise": asked.noise, "judged": _judged(model, sides)} if asked.noise else {}),
        **({"near": asked.near, "near_images": checked(sides["near"], in_torch(sides["near"]))} if asked.near else {}),
        "warnings": warnings,
    }


def _drawing(trained: Classifier, noise: float) -> Callable[..., jax.Array]:
    def apply(params: Any, x: jax.Array, key: jax.Array) -> jax.Array:
        return trained.apply(params, x + noise * jax.random.normal(key, x.shape, x.dtype))

    return apply


def _judged(model: Model, sides: Mapping[str, Side]) -> dict[str, float]:
    """The accuracy on the clean images and on each side's by the mean of many draws, which no attack has seen."""
    judge = dataclasses.replace(model, draws=JUDGED_BY, seed=(model.seed + 1) % 2**32)
    low, high = model.bounds
    found = {"clean": model.images, **{name: side.images for name, side in sides.items()}}
    return {name: float(judge.right_on(images.clip(low, high)).mean()) for name, images in found.items()}


def _before(folder: pathlib.Path) -> list[Mapping[str, Any]]:
    """The results that an earlier call has left in `folder`."""
    try:
        results = list(read_json(folder / "official.json")["results"])
        page(results)  # has all that is shown
        return results
    except (FileNotFoundError, KeyError, TypeError, ValueError, IndexError, AttributeError):
        return []


if __name__ == "__main__":
    for flag in dataclasses.fields(Request):
        cli.define_flag(flag)
    cli.launch(lambda: run(cli.from_flags(Request)), "what is finished is kept")
