"""How near to the image attacks find adversarial ones: ours and adv-lib's, on the same weights and images.

python -m benchmarks.optimality --workdir=runs/a --workdir=runs/b --norm=linf --norm=l2 --results=results/optimality

Needs adv-lib beside the extra `bench`. Its dependency visdom builds with an older setuptools alone:
`echo 'setuptools<81' > old.txt; PIP_CONSTRAINT=old.txt pip install adv-lib`.

An attack takes as many steps on both sides. APGD, which has a budget, is run in a search for the least one of each image; it
begins at twice the distance that the minimum-norm attacks have found. The measure is AttackBench's: the area that an attack
takes from below the accuracy curve, as a share of what all attacks together take. Writes optimality.md and optimality.json
after each network and norm.
"""

import dataclasses
import importlib.metadata
import math
import pathlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from benchmarks.official_sides import carried, check_runs, like, missing, right_in_torch, tensor, trained_by
from e2sad_jax import attacks, cli, data, losses
from e2sad_jax._compile import jit
from e2sad_jax._io import check_folder, write_json, write_text
from e2sad_jax.data.dataset import in_words
from e2sad_jax.errors import ConfigError, DataError
from e2sad_jax.evaluation import Attack, Model, distances, in_batches, of_classifier, optimality
from e2sad_jax.evaluation.curves import SLACK
from e2sad_jax.evaluation.diagnosis import reach_of
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.table import Table
from e2sad_jax.runs.classifier import CHOICES, load
from e2sad_jax.training.config import check, setting

NORMS = {"linf": math.inf, "l2": 2.0}
APGD, OURS, THEIRS = "APGD-CE, least budget", "e2sad_jax", "adv-lib"
# From images, labels and budgets [N] to adversarial images; from images to whether each is classified correctly, bool [N].
Make = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
Right = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to attack, and how; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range.
    """

    workdir: tuple[str, ...] = setting((), "folders of the runs to attack, may be given several times")
    which: str = setting("last", "weights of the runs", choices=CHOICES)
    norm: tuple[str, ...] = setting(tuple(NORMS), "norms of the change, linf or l2, may be given several times")
    examples: int = setting(250, "test images, a sample stratified by class, or all if there are fewer", lower=1)
    data_dir: str = setting("", "folder of data sets; empty: those of the runs")
    steps: int = setting(100, "steps of each attack", lower=1)
    rounds: int = setting(10, "budgets that the search for APGD's tries", lower=1)
    batch_size: int = setting(250, "images at once", lower=1)
    seed: int = setting(0, "seed of both sides", lower=0, upper=2**32 - 1)
    results: str = setting("", "folder for optimality.md and .json; empty: that of the first run")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        check_runs(self.workdir, self.results)
        if unknown := [name for name in self.norm or ("",) if name not in NORMS]:
            raise ConfigError(f"--norm={unknown[0]:.100}: must be one of {', '.join(NORMS)}")


def ours(model: Model, norm: str, asked: Request) -> dict[str, Make]:
    """Our attacks by name, each a function of images, labels and budgets."""
    everywhere = reach_of(model, norm)

    def minimum_norm(name: str) -> Make:
        attack = Attack(name, name.lower(), everywhere, asked.steps, norm=norm)
        return lambda x, y, eps: model.attacked(attack)[1]

    def apgd(params: Any, x: jax.Array, y: jax.Array, eps: jax.Array) -> jax.Array:
        def loss(z: jax.Array) -> jax.Array:
            return losses.cross_entropy(model.apply(params, z), losses.soft_labels(y, model.num_classes, 0))

        def wrong(z: jax.Array) -> jax.Array:
            return losses.margin(model.apply(params, z), y) > 0

        key = jax.random.key(asked.seed)
        radius = eps.reshape(-1, 1, 1, 1)
        return attacks.apgd(
            key, loss, x, eps=radius, steps=asked.steps, misclassified_fn=wrong, norm=norm, bounds=model.bounds
        )

    names = ("FMN", "FAB", *(("DDN",) if norm == "l2" else ()))
    return {**{name: minimum_norm(name) for name in names}, APGD: _in_batches(model, jit(apgd))}


def _in_batches(model: Model, function: Callable[..., jax.Array]) -> Make:
    def make(x: np.ndarray, y: np.ndarray, eps: np.ndarray) -> np.ndarray:
        def run(some: np.ndarray) -> jax.Array:
            return function(model.params, x[some], y[some], np.float32(eps[some]))

        batches = in_batches(run, np.arange(len(x)), model.batch_size)
        return np.concatenate([np.asarray(made)[: len(some)] for some, made in batches])

    return make


def theirs(net: Any, norm: str, asked: Request) -> dict[str, Make]:
    """The same attacks of adv-lib, of the network in PyTorch."""
    import torch
    from adv_lib import attacks as peers

    order, steps = NORMS[norm], asked.steps

    def on(function: Callable[..., Any]) -> Make:
        def make(x: np.ndarray, y: np.ndarray, eps: np.ndarray) -> np.ndarray:
            torch.manual_seed(asked.seed)
            made = []
            for first in range(0, len(x), asked.batch_size):
                some = slice(first, first + asked.batch_size)
                images, labels = tensor(x[some], net), like(y[some].astype(np.int64), next(net.parameters()))
                made.append(
                    function(net, images, labels, like(eps[some].astype(np.float32), images)).detach().cpu().numpy()
                )
            return np.concatenate(made).transpose(0, 2, 3, 1)

        return make

    found = {
        "FMN": on(lambda net, x, y, eps: peers.fmn(net, x, y, norm=order, steps=steps)),
        "FAB": on(lambda net, x, y, eps: peers.fab(net, x, y, norm=order, n_iter=steps)),
        APGD: on(lambda net, x, y, eps: peers.apgd(net, x, y, eps, norm=order, n_iter=steps, loss_function="ce")),
    }
    if norm == "l2":  # its grey levels would make every image's distance one of a few
        found["DDN"] = on(lambda net, x, y, eps: peers.ddn(net, x, y, steps=steps, levels=None))
    return found


def reach(model: Model, make: Make, right: Right, norm: str) -> np.ndarray:
    """How far a minimum-norm attack's images are, `[N]`; infinite where it found none, 0 where none was needed."""
    return _far(model, make(model.images, model.labels, np.zeros(len(model.images))), right, norm)


def least(model: Model, make: Make, right: Right, norm: str, start: np.ndarray, rounds: int) -> np.ndarray:
    """The same of an attack with a budget, by bisection of each image's budget from `start` `[N]` down."""
    low, high = np.zeros(len(model.images)), start.copy()
    best = np.full(len(low), np.inf)
    for _ in range(rounds):
        eps = (low + high) / 2
        far = _far(model, make(model.images, model.labels, eps), right, norm)
        best = np.minimum(best, far)
        low, high = np.where(np.isfinite(far), low, eps), np.minimum(high, best)
    return best


def _far(model: Model, made: np.ndarray, right: Right, norm: str) -> np.ndarray:
    low, high = model.bounds
    made = np.asarray(made, np.float32)
    if (outside := max(low - made.min(), made.max() - high)) > SLACK:
        raise DataError(f"an attack's images leave [{low}, {high}] by {outside:.3g}; its distances would not count")
    made = made.clip(low, high)
    far = distances(model.images, made, ~right(made), norm=norm)
    return np.where(model.clean(), far, 0.0)


def summarise(
    found: Mapping[tuple[str, str], np.ndarray], seconds: Mapping[tuple[str, str], float]
) -> list[dict[str, Any]]:
    """A row for each attack and side: its optimality, the median distance, what it found, and its seconds.

    Args:
      found: by (attack, side): distances `[N]`.
      seconds: by (attack, side).
    """
    nearest = np.min(list(found.values()), axis=0)
    none = not (np.isfinite(nearest) & (nearest > 0)).any()
    return [
        {
            "attack": attack,
            "side": side,
            "optimality": None if none else optimality(far, nearest),
            "median": float(np.median(far)) if np.isfinite(np.median(far)) else None,
            "found": int(np.isfinite(far).sum()),
            "seconds": round(seconds[attack, side], 2),
        }
        for (attack, side), far in found.items()
    ]


def measure(model: Model, net: Any, norm: str, asked: Request) -> list[dict[str, Any]]:
    """Runs all attacks of both sides, each judged by the network in its own library."""
    found: dict[tuple[str, str], np.ndarray] = {}
    seconds: dict[tuple[str, str], float] = {}

    def in_torch(images: np.ndarray) -> np.ndarray:
        return right_in_torch(net, tensor(images, net), model.labels, asked.batch_size)

    rights: dict[str, Right] = {OURS: model.right_on, THEIRS: in_torch}
    sides = {OURS: ours(model, norm, asked), THEIRS: theirs(net, norm, asked)}
    for attack in sides[OURS]:  # APGD last
        if attack == APGD:
            start = 2 * np.min(list(found.values()), axis=0)
            start = np.where(np.isfinite(start), start, reach_of(model, norm))
        for side, makers in sides.items():
            began, given = time.perf_counter(), (model, makers[attack], rights[side], norm)
            far = least(*given, start, asked.rounds) if attack == APGD else reach(*given)
            found[attack, side], seconds[attack, side] = far, time.perf_counter() - began
            print(f"{norm}, {attack}, {side}: {seconds[attack, side]:.1f} s", file=sys.stderr, flush=True)
    return summarise(found, seconds)


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """What optimality.json holds, in Markdown."""
    lines = [
        "# How near to the image attacks find adversarial ones\n",
        "Optimality: what an attack takes from the area below the accuracy curve, as a share of what the best of all attacks "
        "of both sides takes, image by image (AttackBench's local optimality). Found: images that are misclassified after the "
        "attack. A median is empty where most images are not found. A step of FAB costs a gradient for each class, and APGD is "
        "run once for each budget. Our seconds hold tracing and compiling.\n",
    ]
    for result in results:
        of = {(row["attack"], row["side"]): row for row in result["rows"]}
        rows = []
        for attack in dict.fromkeys(row["attack"] for row in result["rows"]):
            pair = [of[attack, side] for side in (OURS, THEIRS)]
            optimal = [None if row["optimality"] is None else f"{100 * row['optimality']:.1f}" for row in pair]
            medians = [None if row["median"] is None else f"{row['median']:.4f}" for row in pair]
            counts = [row["found"] for row in pair]
            rows.append([attack, *optimal, *medians, *counts, *(f"{row['seconds']:.1f}" for row in pair)])
        columns = [
            f"{side}, {what}" for what in ("optimality, %", "median distance", "found", "s") for side in (OURS, THEIRS)
        ]
        norm = "l-infinity" if result["norm"] == "linf" else result["norm"]
        lines += [
            f"## {result['defense']}, {result['step']:,} steps ({pathlib.PurePath(result['workdir']).name}), {norm}\n",
            f"{result['images']} of {result['data']}, clean accuracy {result['clean']:.3f}. Steps of each attack: "
            f"{result['steps']}; budgets of APGD: {result['rounds']}.\n",
            Table(columns=["attack", *columns], rows=rows).markdown(),
            *(f"Trained by `{command}`.\n" for command in result.get("trained", [])),
        ]
    about = results[-1]["environment"]
    lines.append(
        f"`{results[-1]['command']}`, {about['hardware']}, {about['date']}, commit {about['commit']}; adv-lib "
        f"{about['adv-lib']}, PyTorch {about['torch']}, JAX {about['jax']}\n"
    )
    return "\n".join(lines)


def run(asked: Request) -> None:
    """Attacks, prints the page and writes it.

    Raises:
      ConfigError, DataError, WorkdirError: before anything is attacked.
    """
    if names := missing({"adv_lib": "adv-lib", "torch": "torch"}):
        raise ConfigError(f"needs {names}, not installed here: see the top of benchmarks/optimality.py")
    folder = pathlib.Path(asked.results or asked.workdir[0]).expanduser()
    runs = [(workdir, load(workdir, asked.which)) for workdir in asked.workdir]
    check_folder(folder, f"--results={folder}", make=True)
    versions = {name: importlib.metadata.version(name) for name in ("adv-lib", "torch")}
    results: list[dict[str, Any]] = []
    for workdir, trained in runs:
        dataset = data.load(trained.config.data, asked.data_dir or trained.config.data_dir or None)
        sample = data.sample_tests(dataset, asked.examples)
        batch_size = min(asked.batch_size, len(sample.y_test))
        model = of_classifier(trained, sample.x_test, sample.y_test, batch_size=batch_size, seed=asked.seed).compiled()
        net, _ = carried(trained, model.images, batch_size)
        classes = len(np.unique(sample.y_test))
        for norm in asked.norm:
            print(f"{workdir}, {norm}", file=sys.stderr, flush=True)
            results.append(
                {
                    "command": provenance.command(),
                    "environment": {**provenance.environment(), **versions},
                    "workdir": workdir,
                    "which": asked.which,
                    "seed": asked.seed,
                    "batch_size": batch_size,
                    "defense": trained.config.defense,
                    "step": trained.step,
                    "trained": trained_by(workdir),
                    "data": dataset.name,
                    "images": in_words(len(sample.y_test), len(dataset.y_test), classes, dataset.num_classes),
                    "clean": float(model.clean().mean()),
                    "norm": norm,
                    "steps": asked.steps,
                    "rounds": asked.rounds,
                    "rows": measure(model, net, norm, asked),
                }
            )
            write_text(folder / "optimality.md", page(results))
            about = {name: results[-1][name] for name in ("command", "environment")}
            write_json(folder / "optimality.json", {**about, "results": results})
    print(page(results), flush=True)


if __name__ == "__main__":
    for flag in dataclasses.fields(Request):
        cli.define_flag(flag)
    cli.launch(
        lambda: run(cli.from_flags(Request)), "the page has all networks and norms that are finished", resumes=False
    )
