"""Trains and attacks every model of a plan once, in any number of goes, then writes tables, figures and the report."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from e2sad_jax import checkpoint, data, jobs, report
from e2sad_jax.attacks._loops import platform
from e2sad_jax.config import Config
from e2sad_jax.data import Dataset
from e2sad_jax.errors import BusyError, ConfigError, NonFiniteError, OutOfTimeError, Stopped
from e2sad_jax.evaluate import Attack, Outcome, evaluate, transfer
from e2sad_jax.progress import Bar, duration
from e2sad_jax.reproduction import cost, figures, outcomes, page, plan, tables
from e2sad_jax.reproduction.plan import Entry, Scale
from e2sad_jax.train import population_key
from e2sad_jax.transforms import TRANSFORMS
from e2sad_jax.workdir import check_workdir, write_config

TOGETHER = 8  # runs of one population on an accelerator; the CPU is no faster with several at once
POLL = 2.0  # seconds between looks at a run that another process is at work on
MARGIN = (
    30.0  # seconds before the end of the time budget that nothing new is begun in, or a tenth of it if that is less
)


@dataclasses.dataclass(frozen=True)
class Request:
    """What to reproduce, and with what.

    Attributes:
      tables: of "1", "2", "3".
      figures: of "2", "3", "4".
      studies: of `plan.STUDIES`.
      scale: how much to spend on each model.
      seeds: seeds of each model; 0 for one in tables and figures, three in studies.
      data: files or names to use instead of `mnist` and `svhn`: grey images stand for MNIST, RGB images for SVHN.
      data_dir: where data sets lie.
      workdir: folder for the runs, in a folder of the scale's name.
      results: folder for what is shown, in a folder of the scale's name.
      time_budget_minutes: stop before that many minutes have passed; 0: no limit.
      together: runs that train in one step; 0: one on the CPU, `TOGETHER` elsewhere.
      precision: what the layers compute in.
    """

    tables: Sequence[str] = ()
    figures: Sequence[str] = ()
    studies: Sequence[str] = ()
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
        self.request = request
        self.scale = request.scale
        self.results = pathlib.Path(request.results).expanduser() / self.scale.name
        self.root = pathlib.Path(request.workdir).expanduser() / self.scale.name
        self._began = time.monotonic()
        self._known: dict[pathlib.Path, list[Outcome]] = {}
        report.commit()  # of the code that runs
        self.datasets = self._load_data()
        self.attacks = self._attacks_of_runs()
        self.runs = list(self.attacks)
        for config in self.runs:
            check_workdir(pathlib.Path(config.workdir), config, self.dataset_of(config))

    # What is asked for.

    @property
    def common(self) -> Mapping[str, Any]:
        """Settings of every run."""
        return {"precision": self.request.precision}

    def seeds(self, item: str) -> int:
        """How many seeds a table, figure or study takes."""
        return self.request.seeds or (plan.STUDY_SEEDS if item in plan.STUDIES else 1)

    def entries(self, item: str) -> list[Entry]:
        """The models of "table 1", "figure 4" or a study, with the data and workdirs of this request."""
        kind, _, number = item.partition(" ")
        if kind in plan.STUDIES:
            entries = plan.study(kind, self.scale, self.common)
        else:
            entries = getattr(plan, f"{kind}_{number}")(self.scale, self.common)
        return [dataclasses.replace(entry, config=self._place(entry.config)) for entry in entries]

    def configs(self, entry: Entry, item: str) -> list[Config]:
        """The runs of an entry, one for each seed."""
        return [self._place(config) for config in entry.seeds(self.seeds(item.partition(" ")[0]))]

    def items(self) -> list[str]:
        """Everything that was asked for and needs models: tables first."""
        r = self.request
        figures_with_models = [f for f in r.figures if f != "2"]
        return [*(f"table {t}" for t in r.tables), *r.studies, *(f"figure {f}" for f in figures_with_models)]

    def dataset_of(self, config: Config) -> Dataset:
        return self.datasets["svhn" if config.transform == "standardize" else "mnist"]

    def describe(self, config: Config) -> str:
        """The heading of everything that shows runs like this one."""
        dataset = self.dataset_of(config)
        return self.scale.describe(config, dataset.name, len(dataset.x_test))

    def is_paper_data(self, config: Config) -> bool:
        """Whether it is the paper's data set, not a part of it nor another one."""
        dataset = self.dataset_of(config)
        sizes = (len(dataset.x_train), len(dataset.x_test))
        return sizes == {"mnist": (60_000, 10_000), "svhn": (73_257, 26_032)}.get(dataset.name)

    def _place(self, config: Config) -> Config:
        """The configuration with what depends on the data: examples that are there, and the run's folder."""
        dataset = self.dataset_of(config)
        count = config.eval_examples
        config = dataclasses.replace(
            config,
            data_dir=self.request.data_dir,
            eval_examples=0 if count >= len(dataset.x_test) else count,
            workdir="",
        )
        return dataclasses.replace(
            config, workdir=str(self.root / f"{dataset.name}-{config.defense}-{config.digest()}")
        )

    def _load_data(self) -> dict[str, Dataset]:
        needed = []
        if {"1", "2"} & set(self.request.tables) or self.request.studies or {"3", "4"} & set(self.request.figures):
            needed.append("mnist")
        if "3" in self.request.tables:
            needed.append("svhn")
        found: dict[str, Dataset] = {}
        for name in self.request.data:
            dataset = data.load(name, self.request.data_dir or None)
            role = {1: "mnist", 3: "svhn"}.get(dataset.image_shape[-1])
            if role is None:
                raise ConfigError(
                    f"--data={name}: images have {dataset.image_shape[-1]} channels; 1 stands for MNIST, 3 for SVHN"
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
        for item in self.items():
            kind, _, number = item.partition(" ")
            suite = () if kind == "figure" or number == "2" else plan.suite(number or kind, self.scale)
            for entry in self.entries(item):
                for config in self.configs(entry, item):
                    attacks = wanted.setdefault(config, [])
                    attacks += [attack for attack in suite if attack not in attacks]
        return wanted

    # What is known.

    def tested(self, config: Config) -> outcomes.Tested:
        dataset = self.dataset_of(config)
        steps = config.total_steps(len(dataset.x_train))
        return outcomes.Tested(steps, dataset.sha256, config.eval_examples or len(dataset.x_test), config.seed)

    def test_set(self, config: Config) -> tuple[Any, Any]:
        dataset = self.dataset_of(config)
        count = config.eval_examples or len(dataset.x_test)
        return dataset.x_test[:count], dataset.y_test[:count]

    def outcome(self, config: Config, attack: Attack) -> Outcome | None:
        """What an attack did to a run, None if that is not known yet."""
        path = outcomes.path_of(pathlib.Path(config.workdir), attack, self.tested(config))
        known = self._read(path, config)
        return known[0] if known and len(known) == 1 else None

    def _read(self, path: pathlib.Path, config: Config) -> list[Outcome] | None:
        if path not in self._known and (found := outcomes.read(path, self.test_set(config)[1])):
            self._known[path] = found
        return self._known.get(path)

    def transferred(self, substitute: Config, targets: Sequence[Config]) -> list[Outcome] | None:
        """What images made for one run did to others, None if that is not known yet."""
        known = self._read(self._transfer_path(substitute, targets), substitute)
        return known if known and len(known) == len(targets) else None

    def _transfer_path(self, substitute: Config, targets: Sequence[Config]) -> pathlib.Path:
        names = [pathlib.Path(t.workdir).name for t in targets]
        return outcomes.path_of(pathlib.Path(substitute.workdir), plan.TRANSFER, self.tested(substitute), targets=names)

    def missing(self, config: Config) -> list[Attack]:
        return [attack for attack in self.attacks[config] if self.outcome(config, attack) is None]

    def transfers(self) -> list[tuple[Config, list[Config]]]:
        """Table 2: each substitute with all targets of its seed, white-box ones included."""
        if "2" not in self.request.tables:
            return []
        by_seed = zip(*(self.configs(entry, "table 2") for entry in self.entries("table 2")), strict=True)
        return [(substitute, list(targets)) for targets in by_seed for substitute in targets]

    def trained(self, config: Config) -> bool:
        workdir, steps = pathlib.Path(config.workdir), self.tested(config).step
        return (workdir / "checkpoints" / str(steps)).is_dir()

    def classifier(self, config: Config) -> checkpoint.Classifier:
        """A trained run, from its last checkpoint."""
        return checkpoint.load(config.workdir)

    # What is done.

    def run(self) -> list[pathlib.Path]:
        """Does what is left to do, and writes everything that was asked for.

        Returns:
          The files written.

        Raises:
          Stopped, OutOfTimeError: after a checkpoint; the same command goes on.
          NonFiniteError: if runs diverged; after all others are done.
          WorkdirError, CheckpointError, OSError: a full disk, say; finished runs stay.
        """
        with jobs.interruptible() as interrupted:
            self._clock = _Clock(self, interrupted)
            try:
                self._train_and_attack()
                for substitute, targets in self.transfers():
                    if self.transferred(substitute, targets) is None:
                        self._transfer(substitute, targets)
                return self._write()
            except _Interruption:
                raise self._clock.stopped() from None

    def _train_and_attack(self) -> None:
        clock, failures = self._clock, []
        groups = deque(self._groups())
        busy = 0  # groups in a row that other processes are at work on
        while groups:
            group = groups.popleft()
            clock.check()
            try:
                self._group(group)
                busy = 0
            except BusyError as error:
                groups.append(group)
                busy += 1
                if busy == len(groups):
                    clock.wait(str(error))
                    busy = 0
            except NonFiniteError as error:
                if len(group) > 1:  # the others go on without the one that diverged
                    groups.extendleft([config] for config in reversed(group))
                else:
                    failures.append(f"{pathlib.Path(group[0].workdir).name}: {error}")
        if failures:
            raise NonFiniteError("; ".join([*failures, "all other models are done"]))

    def _groups(self) -> list[list[Config]]:
        """Runs that train together, in the order of the plan; finished ones alone."""
        size = self.request.together or (1 if platform() == "cpu" else TOGETHER)
        kinds: dict[Any, list[Config]] = {}
        for config in self.runs:
            kind = (config.workdir,) if self.trained(config) else (population_key(config),)
            kinds.setdefault(kind, []).append(config)
        return [kind[i : i + size] for kind in kinds.values() for i in range(0, len(kind), size)]

    def _group(self, group: Sequence[Config]) -> None:
        if all(self.trained(config) and not self.missing(config) for config in group):
            return
        clock = self._clock
        dataset = self.dataset_of(group[0])
        with contextlib.ExitStack() as stack:
            opened = [stack.enter_context(jobs.open_job(config, dataset)) for config in group]
            for job in opened:
                write_config(job.workdir, job.config, dataset)
            if any(job.step < job.steps for job in opened):
                clock.announce("train", group)
                jobs.train_together(opened, clock.stop)
                clock.check()
            for job in opened:
                attacks = self.missing(job.config)
                if not attacks:
                    continue
                clock.announce("attack", [job.config])
                params = job.restore().params
                for attack in attacks:
                    self._attack(job, params, attack)

    def _attack(self, job: jobs.Job, params: Any, attack: Attack) -> None:
        clock, config = self._clock, job.config
        images, labels = self.test_set(config)
        with clock.bar(attack.name, len(images) * attack.gradients()) as progress:
            outcome = evaluate(
                job.model,
                params,
                images,
                labels,
                [attack],
                transform=job.transform,
                num_classes=job.dataset.num_classes,
                batch_size=config.eval_batch_size,
                seed=config.seed,
                progress=progress,
            )[attack.name]
        tested = self.tested(config)
        outcomes.write(outcomes.path_of(job.workdir, attack, tested), attack, tested, [outcome])

    def _transfer(self, substitute: Config, targets: Sequence[Config]) -> None:
        clock = self._clock
        clock.check()
        clock.announce("transfer from", [substitute])
        images, labels = self.test_set(substitute)
        loaded = [self.classifier(config) for config in (substitute, *targets)]
        with clock.bar(plan.TRANSFER.name, len(images) * plan.TRANSFER.gradients()) as progress:
            results = transfer(
                (loaded[0].model, loaded[0].params),
                [(c.model, c.params) for c in loaded[1:]],
                images,
                labels,
                plan.TRANSFER,
                transform=TRANSFORMS[substitute.transform],
                num_classes=self.dataset_of(substitute).num_classes,
                batch_size=substitute.eval_batch_size,
                seed=substitute.seed,
                progress=progress,
            )
        path = self._transfer_path(substitute, targets)
        outcomes.write(path, plan.TRANSFER, self.tested(substitute), results)

    def check(self) -> None:
        """Stops here if it is time to."""
        self._clock.check()

    def costs(self, configs: Sequence[Config]) -> dict[str, Any]:
        """Cost of the steps of these runs, measured now or found again."""
        dataset = self.dataset_of(configs[0])

        def progress(what: str) -> None:
            self._clock.check()
            print(f"cost of a step: {what}", file=sys.stderr)

        return cost.measure(configs, dataset.image_shape, dataset.num_classes, self.root / "cost", progress)

    def _write(self) -> list[pathlib.Path]:
        self.results.mkdir(parents=True, exist_ok=True)
        written = []
        for item in self.items():
            self._clock.check()
            if not item.startswith("figure"):
                written += tables.write(self, item)
        for number in self.request.figures:
            self._clock.check()
            print(f"draw figure {number}", file=sys.stderr)
            written += figures.write(self, number)
        if self.runs:
            written += tables.write_models(self)
        written.append(page.write(self.results))
        return written


class _Interruption(Exception):
    """Time to stop; whoever is at work saves and lets it pass."""


class _Clock:
    """When to stop, and how far the plan has come."""

    def __init__(self, reproduction: Reproduction, interrupted: Callable[[], int]):
        self._r, self._interrupted = reproduction, interrupted
        minutes = reproduction.request.time_budget_minutes
        self._budget = 60 * minutes
        self._done = self._left_at_start = 0.0
        self._start = time.monotonic()
        for config in reproduction.runs:
            self._left_at_start += self._left(config)
        self._left_at_start += sum(
            plan.attack_work(s, [plan.TRANSFER], len(reproduction.test_set(s)[0]))
            for s, targets in reproduction.transfers()
            if reproduction.transferred(s, targets) is None
        )

    def _left(self, config: Config) -> float:
        r = self._r
        training = 0.0 if r.trained(config) else plan.work(config, len(r.dataset_of(config).x_train))
        return training + plan.attack_work(config, r.missing(config), len(r.test_set(config)[0]))

    def stop(self) -> int:
        """Not 0 if it is time to stop: the number of a signal, or -1 for the end of the time budget."""
        if number := self._interrupted():
            return number
        late = time.monotonic() - self._r._began > self._budget - min(MARGIN, self._budget / 10)
        return -1 if self._budget and late else 0

    def check(self) -> None:
        if self.stop():
            raise _Interruption

    def wait(self, why: str) -> None:
        print(f"{why}; waiting for it", file=sys.stderr)
        self.check()
        time.sleep(POLL)

    def announce(self, what: str, group: Sequence[Config]) -> None:
        """Says what comes next, and how far the whole plan is."""
        r = self._r
        remaining = sum(self._left(config) for config in r.runs)
        remaining += sum(
            plan.attack_work(s, [plan.TRANSFER], len(r.test_set(s)[0]))
            for s, targets in r.transfers()
            if r.transferred(s, targets) is None
        )
        done = self._left_at_start - remaining
        finished = sum(r.trained(config) and not r.missing(config) for config in r.runs)
        elapsed = time.monotonic() - self._start
        left = f", about {duration(elapsed * remaining / done)} left" if done > 0.02 * self._left_at_start else ""
        names = ", ".join(_name(config) for config in group)
        print(f"[{finished}/{len(r.runs)} models done{left}] {what} {names}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def bar(self, name: str, total: int) -> Any:
        with Bar(name, total, "gradients") as bar:

            def progress(_: str, gradients: int) -> None:
                bar.update(gradients)
                self.check()

            yield progress

    def stopped(self) -> Stopped | OutOfTimeError:
        r = self._r
        left = [config for config in r.runs if not r.trained(config) or r.missing(config)]
        what = f"{len(r.runs) - len(left)} of {len(r.runs)} models are trained and attacked"
        if left:
            what += "; left: " + ", ".join(_name(config) for config in left)
        else:
            what += "; left: tables and figures"
        again = f"Everything is saved in {r.root}. The same command goes on from there:\n  {report.command()}"
        number = self.stop()
        if number > 0:
            return Stopped(f"Stopped: {what}. {again}", number)
        return OutOfTimeError(f"The time budget is used up: {what}. {again}")


def _name(config: Config) -> str:
    """A run in a few words: what it differs in from others of the plan."""
    parts = [config.defense, "soft" if config.soft_label else "hard"]
    if config.defense in ("fgsm", "ifgsm"):
        parts.append(f"eps {config.eps1:g}")
    if config.defense == "e2sad":
        default = Config()
        parts += [
            f"{name} {getattr(config, name)}"
            for name in ("second_step", "lam", "alpha")
            if getattr(config, name) != getattr(default, name)
        ]
    return " ".join([*parts, f"seed {config.seed}"])
