"""Trains and attacks every model of a plan once, in any number of goes, then writes tables, figures and the report."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from e2sad_jax import data
from e2sad_jax._compile import platform
from e2sad_jax._io import check_folder, locked
from e2sad_jax.data import KNOWN, Dataset
from e2sad_jax.errors import BusyError, ConfigError, NonFiniteError, OutOfTimeError, Stopped
from e2sad_jax.evaluation import Attack, transfer
from e2sad_jax.reporting import provenance
from e2sad_jax.runs.checkpoint import state_digest
from e2sad_jax.runs.classifier import Classifier, load
from e2sad_jax.runs.folder import check_workdir, steps_in
from e2sad_jax.runs.opening import Run, open_runs
from e2sad_jax.runs.signals import Interrupted, stopping
from e2sad_jax.runs.trainer import train_together
from e2sad_jax.training import population_key
from e2sad_jax.training.config import Config
from experiments.paper import cache, cost, figures, page, plan, tables
from experiments.paper.cache import Known, Tested
from experiments.paper.plan import Entry, Item, Scale
from experiments.paper.time_budget import Clock

TOGETHER = 8  # runs of one population on an accelerator, if it is faster so; the CPU never is
POLL = 2.0  # seconds between looks at what another process is at work on
PAPER_DATA = ("mnist", "svhn")


@dataclasses.dataclass(frozen=True)
class Request:
    """What to reproduce, and with what.

    Attributes:
      items: tables, figures and studies, in order.
      scale: how much to spend on each model.
      seeds: seeds of each model; 0 for one in tables, three in studies. Figures show seed 0.
      data: files or names to use instead of `mnist` and `svhn`: grey images replace MNIST, RGB images SVHN.
      data_dir: where data sets lie.
      workdir: folder for the runs, in a folder of the scale's name.
      results: folder for what is shown, in a folder of the scale's name.
      time_budget_minutes: stop before that many minutes have passed; 0: no limit.
      together: runs that train in one step; 0: one on the CPU, `TOGETHER` elsewhere if that is faster.
      precision: what the layers compute in.
    """

    items: Sequence[Item]
    scale: Scale = plan.SCALES["small"]
    seeds: int = 0
    data: Sequence[str] = ()
    data_dir: str = ""
    workdir: str = "runs/paper"
    results: str = "results"
    time_budget_minutes: float = 0.0
    together: int = 0
    precision: str = "float32"


class Reproduction:
    """A request with its data, its models, and the outcomes that are known so far."""

    def __init__(self, request: Request):
        """Finds out whether everything asked for is possible; nothing is trained or written.

        Raises:
          ConfigError, DataError: for what cannot be.
          WorkdirError: if a run's folder belongs to another run, or was written by another version.
        """
        self.request, self.scale = request, request.scale
        self.common = {"precision": request.precision}  # settings of every run
        self.results = pathlib.Path(request.results).expanduser() / self.scale.name
        self.root = pathlib.Path(request.workdir).expanduser() / self.scale.name
        self._began = time.monotonic()
        self._known: dict[pathlib.Path, Known] = {}
        self._failed: dict[Config, str] = {}
        provenance.commit()  # of the code that runs
        self.datasets = self._load_data()
        self.attacks = self._attacks_of_runs()
        self.runs = list(self.attacks)
        for config in self.runs:
            check_workdir(pathlib.Path(config.workdir), config, self.dataset_of(config))

    # What is asked for.

    def seeds(self, item: Item) -> int:
        """How many seeds of each model an item shows."""
        return item.seeds(self.request.seeds)

    def entries(self, item: Item) -> list[Entry]:
        """The models of an item, with the data and workdirs of this request."""
        entries = item.entries(self.scale, self.common)
        return [dataclasses.replace(entry, config=self._place(entry.config)) for entry in entries]

    def configs(self, entry: Entry, item: Item) -> list[Config]:
        """The runs of an entry, one for each seed."""
        return [self._place(config) for config in entry.seeds(self.seeds(item))]

    def dataset_of(self, config: Config) -> Dataset:
        return self.datasets[config.data]

    def describe(self, config: Config) -> str:
        """The heading of everything that shows runs like this one."""
        dataset = self.dataset_of(config)
        return self.scale.describe(config, dataset.name, len(dataset.x_test))

    def columns(self, config: Config) -> dict[str, Any]:
        """Scale and data of a run, for every line of a CSV file."""
        dataset, trained = (
            self.dataset_of(config),
            f"{config.epochs:g} epochs" if config.epochs else f"{config.steps} steps",
        )
        return {
            "scale": self.scale.name,
            "data": dataset.name,
            "network": config.model,
            "training": f"{trained} of {config.batch_size}",
            "test_images": self.examples(config),
        }

    def is_paper_data(self, config: Config) -> bool:
        """Whether it is the paper's data set, not a part of it nor another one."""
        dataset = self.dataset_of(config)
        sizes = (len(dataset.x_train), len(dataset.x_test))
        return dataset.name in PAPER_DATA and sizes == KNOWN[dataset.name][:2]

    def _place(self, config: Config) -> Config:
        """The configuration with what depends on the data: examples that are there, and the run's folder."""
        dataset = self.dataset_of(config)
        count = config.eval_examples if config.eval_examples < len(dataset.x_test) else 0
        config = dataclasses.replace(config, data_dir=self.request.data_dir, eval_examples=count, workdir="")
        return dataclasses.replace(
            config, workdir=str(self.root / f"{dataset.name}-{config.defense}-{config.digest()}")
        )

    def _load_data(self) -> dict[str, Dataset]:
        entries = (entry for item in self.request.items for entry in item.entries(self.scale, self.common))
        needed = dict.fromkeys(entry.config.data for entry in entries)
        found: dict[str, Dataset] = {}
        for name in self.request.data:
            dataset = data.load(name, self.request.data_dir or None)
            role = {1: "mnist", 3: "svhn"}.get(dataset.image_shape[-1])
            if role is None:
                raise ConfigError(
                    f"--data={name}: images have {dataset.image_shape[-1]} channels; 1 means MNIST, 3 SVHN"
                )
            if role in found:
                raise ConfigError(f"--data={name}: {found[role].name} stands for {role} already; give one file of each")
            found[role] = dataset
        for role in needed:
            if role not in found:
                found[role] = data.load(role, self.request.data_dir or None)
        return found

    def _attacks_of_runs(self) -> dict[Config, list[Attack]]:
        """Every run once, with the attacks that the tables want of it."""
        wanted: dict[Config, list[Attack]] = {}
        for item in self.request.items:
            for entry in self.entries(item):
                for config in self.configs(entry, item):
                    attacks = wanted.setdefault(config, [])
                    attacks += [attack for attack in item.suite(self.scale) if attack not in attacks]
        return wanted

    # What is known.

    def steps(self, config: Config) -> int:
        return config.total_steps(len(self.dataset_of(config).x_train))

    def weights(self, config: Config) -> str | None:
        """Digest of a finished run's state, None while it is not finished."""
        return state_digest(pathlib.Path(config.workdir), self.steps(config))

    def examples(self, config: Config) -> int:
        """Test images that a run is attacked on."""
        return config.eval_examples or len(self.dataset_of(config).x_test)

    def test_set(self, config: Config) -> tuple[Any, Any]:
        """Images and labels of those."""
        dataset, count = self.dataset_of(config), self.examples(config)
        return dataset.x_test[:count], dataset.y_test[:count]

    def tested(self, config: Config, targets: Sequence[Config] = ()) -> Tested | None:
        """What an outcome belongs to, None while one of the runs is not finished."""
        weights = [self.weights(c) for c in (config, *targets)]
        if None in weights:
            return None
        first, *others = (str(digest) for digest in weights)
        sha256 = self.dataset_of(config).sha256
        return Tested(first, sha256, self.examples(config), config.seed, tuple(others))

    def known(self, config: Config, attack: Attack, targets: Sequence[Config] = ()) -> Known | None:
        """What an attack did to a run, or its images to other runs; None if that is not known yet."""
        tested = self.tested(config, targets)
        if tested is None:
            return None
        path = cache.path_of(pathlib.Path(config.workdir), attack, tested)
        if path not in self._known and (found := cache.read(path, self.test_set(config)[1])):
            if len(found.outcomes) != (len(targets) or 1):
                return None
            self._known[path] = found
        return self._known.get(path)

    def missing(self, config: Config) -> list[Attack]:
        """Attacks that a run still has to stand."""
        return [attack for attack in self.attacks[config] if self.known(config, attack) is None]

    def finished(self, config: Config) -> bool:
        """Whether a run is trained and attacked."""
        return self.weights(config) is not None and not self.missing(config)

    def transfers(self) -> list[tuple[Config, list[Config]]]:
        """Table 2: each substitute with all targets of its seed, itself included."""
        if plan.TABLE_2 not in self.request.items:
            return []
        by_seed = zip(*(self.configs(entry, plan.TABLE_2) for entry in self.entries(plan.TABLE_2)), strict=True)
        return [(substitute, list(targets)) for targets in by_seed for substitute in targets]

    def _possible_transfers(self) -> list[tuple[Config, list[Config]]]:
        """Those that are not known yet, and need no run that diverged."""
        possible = [(s, targets) for s, targets in self.transfers() if not self._failed.keys() & targets]
        return [(s, targets) for s, targets in possible if self.known(s, plan.TRANSFER, targets) is None]

    def classifier(self, config: Config) -> Classifier:
        """A trained run, from its last checkpoint."""
        return load(config.workdir)

    # What is done.

    def run(self) -> list[pathlib.Path]:
        """Does what is left to do, and writes everything that was asked for.

        Returns:
          The files written.

        Raises:
          Stopped, OutOfTimeError: after a checkpoint; the same command resumes.
          NonFiniteError: if runs diverged; after everything that does not need them is written.
          ConfigError: if a folder cannot be written, before anything is trained.
          WorkdirError, CheckpointError, OSError: a full disk, say; finished runs stay.
        """
        check_folder(self.results, f"--results={self.request.results}")
        check_folder(self.root, f"--workdir={self.request.workdir}")
        with stopping() as stop:
            self._clock = Clock(stop, self.request.time_budget_minutes, self._began)
            try:
                self._train_and_attack()
                with self._alone():
                    for substitute, targets in self._possible_transfers():
                        self._transfer(substitute, targets)
                    written = self._write()
            except Interrupted:
                raise self._stopped() from None
        if self._failed:
            failures = "; ".join(f"{pathlib.Path(c.workdir).name}: {why}" for c, why in self._failed.items())
            raise NonFiniteError(f"{failures}. Everything that does not need them is done, and in {self.results}")
        return written

    def check(self) -> None:
        """Stops here if it is time to."""
        self._clock.check()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other processes from measuring costs and writing results at the same time; they may still train."""
        self.root.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(locked(self.root))
                    break
                except BusyError:
                    self._clock.wait(f"another process writes what {self.root} holds", POLL)
            yield

    def _train_and_attack(self) -> None:
        groups = deque(self._groups())
        busy = 0  # groups in a row that other processes are at work on
        while groups:
            group = groups.popleft()
            self.check()
            try:
                self._group(group)
                busy = 0
            except BusyError as error:
                groups.append(group)
                busy += 1
                if busy >= len(groups):
                    self._clock.wait(str(error), POLL)
                    busy = 0
            except NonFiniteError as error:
                busy = 0
                if len(group) > 1:  # the others go on without the one that diverged
                    lost = group[error.member]
                    groups.extendleft([[lost], [config for config in group if config != lost]])
                else:
                    self._failed[group[0]] = str(error)
                    print(f"{_describe(group[0])} diverged: {error}", file=sys.stderr, flush=True)

    def _groups(self) -> list[list[Config]]:
        """Runs that train together, in the order of the plan; finished ones alone."""
        kinds: dict[Any, list[Config]] = {}
        for config in self.runs:
            kinds.setdefault(config if self.weights(config) else population_key(config), []).append(config)
        groups = []
        for kind in kinds.values():
            size = self._together(kind)
            groups += [kind[i : i + size] for i in range(0, len(kind), size)]
        return groups

    def _together(self, kind: Sequence[Config]) -> int:
        """How many runs of a kind to train in one step: what was asked for, or what this device does faster."""
        if self.request.together or len(kind) == 1 or platform() == "cpu":
            return self.request.together or 1
        dataset, runs = self.dataset_of(kind[0]), min(TOGETHER, len(kind))
        self.check()
        cache = self.root / "cost"
        faster = cost.faster_together(kind[0], dataset.image_shape, dataset.num_classes, runs, cache)
        print(f"{cost.key(kind[0])}: {runs} runs in one step are {'' if faster else 'not '}faster", file=sys.stderr)
        return runs if faster else 1

    def _group(self, group: Sequence[Config]) -> None:
        """Trains runs together and attacks each of them, as far as that is not done."""
        if all(map(self.finished, group)):
            return
        dataset = self.dataset_of(group[0])
        with open_runs(group, dataset) as runs:
            if any(run.step < run.steps for run in runs):
                self._announce("train", group)
                train_together(runs, self._clock.stop)
                self.check()
            for run in runs:
                attacks = self.missing(run.config)
                if attacks:
                    self._announce("attack", [run.config])
                    params = run.restore().params
                for attack in attacks:
                    self._attack(run, params, attack)

    def _attack(self, run: Run, params: Any, attack: Attack) -> None:
        with self._clock.bar(
            attack.name, self.examples(run.config) * attack.gradients(run.dataset.num_classes)
        ) as progress:
            outcome = run.attack(params, run.test_set(), [attack], progress=progress)[attack.name]
        tested = self.tested(run.config)
        assert tested is not None
        cache.write(cache.path_of(run.workdir, attack, tested), attack, tested, [outcome])

    def _transfer(self, substitute: Config, targets: Sequence[Config]) -> None:
        self.check()
        self._announce("transfer from", [substitute])
        images, labels = self.test_set(substitute)
        classifiers = [self.classifier(config) for config in targets]
        own = classifiers[targets.index(substitute)]
        with self._clock.bar(plan.TRANSFER.name, len(images) * plan.TRANSFER.gradients()) as progress:
            results = transfer(
                (own.apply, own.params),
                [(c.apply, c.params) for c in classifiers],
                images,
                labels,
                plan.TRANSFER,
                transform=own.transform.apply,
                bounds=own.transform.bounds,
                batch_size=substitute.eval_batch_size,
                seed=substitute.seed,
                progress=progress,
            )
        tested = self.tested(substitute, targets)
        assert tested is not None
        path = cache.path_of(pathlib.Path(substitute.workdir), plan.TRANSFER, tested)
        cache.write(path, plan.TRANSFER, tested, results)

    def costs(self, config: Config) -> Mapping[str, Any]:
        """Cost of the steps of every kind of run that this scale has on this run's data, measured now or found again."""
        dataset = self.dataset_of(config)
        configs = [self._place(entry.config) for entry in plan.all_entries(config.data, self.scale, self.common)]

        def progress(what: str) -> None:
            self.check()
            print(f"cost of a step: {what}", file=sys.stderr)

        return cost.measure(configs, dataset.image_shape, dataset.num_classes, self.root / "cost", progress)

    def _write(self) -> list[pathlib.Path]:
        self.results.mkdir(parents=True, exist_ok=True)
        written = []
        for item in self.request.items:
            self.check()
            needed = {config for entry in self.entries(item) for config in self.configs(entry, item)}
            if self._failed.keys() & needed:
                print(f"{item.file} is not written: it needs runs that diverged", file=sys.stderr)
                continue
            print(f"write {item.file}", file=sys.stderr)
            written += (figures if item.kind == "figure" else tables).write(self, item)
        written += tables.write_models(self)
        written.append(page.write(self.results))
        return written

    # Progress.

    def _announce(self, what: str, group: Sequence[Config]) -> None:
        left = sum(map(self._work_left, self.runs))
        left += sum(plan.attack_work(s, [plan.TRANSFER], self.examples(s)) for s, _ in self._possible_transfers())
        done = sum(map(self.finished, self.runs))
        names = ", ".join(_describe(config) for config in group)
        self._clock.announce(f"{what} {names}", done, len(self.runs), left)

    def _work_left(self, config: Config) -> float:
        if config in self._failed:
            return 0.0
        left = plan.work(config, self.steps(config) - max([0, *steps_in(config.workdir)]))
        return left + plan.attack_work(config, self.missing(config), self.examples(config))

    def _stopped(self) -> Stopped | OutOfTimeError:
        left = [_describe(config) for config in self.runs if not self.finished(config) and config not in self._failed]
        if transfers := len(self._possible_transfers()):
            left.append(f"{transfers} of {len(self.transfers())} rows of Table 2")
        what = f"{sum(map(self.finished, self.runs))} of {len(self.runs)} models are trained and attacked"
        what += "; left: " + ", ".join(left or ["tables and figures"])
        if self._failed:
            what += "; diverged: " + ", ".join(map(_describe, self._failed))
        again = f"Everything is saved in {self.root}. The same command resumes from there:\n  {provenance.again()}"
        number = self._clock.stop()
        if number > 0:
            return Stopped(f"Stopped: {what}. {again}", number)
        return OutOfTimeError(f"The time budget is used up: {what}. {again}")


def _describe(config: Config) -> str:
    """A run in a few words: what it differs in from others of the plan."""
    parts = [config.defense, "soft" if config.soft_label else "hard"]
    if config.defense in ("fgsm", "ifgsm"):
        parts.append(f"eps {config.eps1:.3g}")
    usual = config.entry.defaults()
    parts += [f"{name} {value}" for name, value in config.settings.items() if value != usual[name]]
    return " ".join([*parts, f"seed {config.seed}"])
