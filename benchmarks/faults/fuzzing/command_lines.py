"""Command lines, up to where a run would begin."""

import contextlib
import functools
import io
import pathlib
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

from absl import flags

from benchmarks.faults.fuzz import Refused, Wrong
from benchmarks.faults.fuzzing.damage import ODD, Target, damage_bytes
from e2sad_jax import cli
from e2sad_jax.comparison import run as comparison
from e2sad_jax.errors import Error, printable
from e2sad_jax.runs import run
from e2sad_jax.runs.recipes import RECIPES
from experiments.paper import runner
from experiments.step_cost import run as step_cost_run


class _Reached(Exception):
    """The flags are right; from here on a run would begin."""


class Flags(Target):
    """Command lines, up to where a run would begin."""

    name, share = "flags", 0.1

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        from experiments.paper import __main__ as paper
        from experiments.step_cost import __main__ as step_cost

        define: dict[str, Callable[[], None]] = {
            "mnist": functools.partial(cli.define_flags, RECIPES["mnist"]),
            **{name: functools.partial(cli.define_request, name) for name in ("compare", "evaluate")},
            **{"paper": paper.define_flags, "step_cost": step_cost.define_flags},
        }
        runs: dict[str, Callable[[], Any]] = {
            "mnist": lambda: run.train_with_baseline(cli.read_seeds(RECIPES["mnist"])[0], "mnist"),
            **{name: functools.partial(cli.run_request, name) for name in ("compare", "evaluate")},
            **{"paper": paper._run, "step_cost": step_cost._run},
        }
        modules = {"paper": paper, "step_cost": step_cost}
        self.binaries: dict[str, tuple[Any, Callable[[], Any]]] = {}
        for name in define:
            define[name]()
            own = flags.FlagValues()  # type: ignore[no-untyped-call]
            for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]):
                own[flag.name] = flag
                delattr(flags.FLAGS, flag.name)
            own["verbosity"] = flags.FLAGS["verbosity"]
            self.binaries[name] = (modules.get(name, cli), runs[name])
            setattr(self, name, own)
        values: list[str] = [str(value)[:100] for value in ODD if not isinstance(value, float) or value == value]
        self.values = [value for value in values if "\x00" not in value and "\ud800" not in value]
        self.values += [
            "nan",
            "-inf",
            "1e999",
            "0x10",
            "1_000",
            "\uff11",
            "9" * 5000,
            "\udcff",
            "1,2",
            ",",
            "--",
            "natural,e2sad",
            "all",
        ]

    def input(self, rng: random.Random) -> tuple[str, tuple[str, list[str]]]:
        name = rng.choice(list(self.binaries))
        known = sorted(getattr(self, name))
        arguments = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            flag = rng.choice(known)
            how = rng.randrange(6)
            default = getattr(self, name)[flag].default
            value = rng.choice(self.values) if rng.random() < 0.7 else str(default)
            if how == 0:
                flag = damage_bytes(rng, flag.encode())[1].decode("utf-8", "surrogateescape").replace("\x00", "")
            arguments.append(
                rng.choice(
                    (f"--{flag}={value}", f"--{flag}", f"-{flag}={value}", f"--no{flag}", flag, f"--{flag}={value}")
                )
            )
        return name, (name, arguments)

    def run(self, given: tuple[str, list[str]]) -> Any:
        name, arguments = given
        module, run = self.binaries[name]
        own = getattr(self, name)
        for flag in own:
            own[flag].value, own[flag].present = own[flag].default, 0
        own.unparse_flags()
        try:
            with _until_a_run_begins(module, own), contextlib.redirect_stderr(io.StringIO()) as printed:
                cli._parse([name, *arguments])
                run()
        except _Reached:
            return arguments
        except Error as error:
            return Refused(Error(printable(str(error))))
        except SystemExit as error:
            if error.code != 2 or len(printed.getvalue().splitlines()) != 1:
                raise Wrong(f"exit code {error.code}, {printed.getvalue()!r}") from error
            return Refused(Error(printed.getvalue().strip()))
        raise Wrong("it came to an end without a run")


@contextlib.contextmanager
def _until_a_run_begins(module: Any, own: Any) -> Iterator[None]:
    def reached(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    from e2sad_jax.runs import evaluate as diagnosis_run

    places: list[tuple[Any, str, Any]] = [
        (cli, "FLAGS", own),
        (module, "FLAGS", own),
        (run, "train_with_baseline", reached),
        (comparison, "run", reached),
        (diagnosis_run, "run", reached),
        (step_cost_run, "run", reached),
        (runner, "Reproduction", reached),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)
