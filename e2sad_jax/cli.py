"""Commands: a flag for each setting, errors as one line and an exit code, and the console script `e2sad`."""

import dataclasses
import functools
import importlib
import logging as standard_logging
import os
import pathlib
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

from absl import app, flags, logging

from e2sad_jax import distributed
from e2sad_jax._version import __version__
from e2sad_jax.defenses import DEFENSES, PLUGINS, Setting, readers
from e2sad_jax.errors import (
    FULL,
    ConfigError,
    Error,
    LostProcessError,
    NonFiniteError,
    OutOfTimeError,
    Stopped,
    as_device_error,
    first_line,
    printable,
)
from e2sad_jax.runs import _compilation_cache, _malloc
from e2sad_jax.runs.recipes import RECIPES, Recipe
from e2sad_jax.training.config import COMMON, Config, configure, parse_number, setting_of
from e2sad_jax.training.presets import PRESETS, RECIPE, preset

FLAGS = flags.FLAGS


class Number(flags.FloatParser):
    """Parser of a number, or of a quotient of two, such as 8/255."""

    def convert(self, argument: int | float | str) -> float:
        """The number of a flag's text."""
        return parse_number(argument) if isinstance(argument, str) else float(argument)


DEFINE: Mapping[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: functools.partial(flags.DEFINE, Number(), serializer=flags.ArgumentSerializer()),
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_multi_string,
}
MOST_SEEDS = 1000  # all their settings are checked before the first is trained
KINDS = {"int": "an integer", "float": "a number", "bool": "true or false"}  # by absl's names


def train(name: str) -> None:
    """Runs the training command of that name in `runs.recipes.RECIPES`: trains, evaluates and reports."""
    recipe = RECIPES[name]
    define_flags(recipe)

    def main() -> None:
        by_seed = read_seeds(recipe)
        from e2sad_jax.runs import run  # after the flags are known to be right: this brings Orbax along

        distributed.connect(FLAGS.coordinator, FLAGS.process_id, FLAGS.num_processes)
        distributed.require_backend()
        if FLAGS.describe:
            print(run.describe(by_seed[0][-1]))
            return
        run.train_seeds(by_seed, name)

    launch(main, "a checkpoint that was written is safe")


class Command(NamedTuple):
    """A command whose flags are the fields of a dataclass.

    Attributes:
      module: has the dataclass, `Request`, and the function to call with one, `run`.
      saved: what a failure of the system leaves intact.
      resumes: whether the same command resumes from there.
      about: what the command does, in a line.
    """

    module: str
    saved: str
    resumes: bool
    about: str


REQUESTS: Mapping[str, Command] = {
    "evaluate": Command(
        "e2sad_jax.runs.evaluate",
        "finished batches are safe",
        True,
        "measures the robust accuracy of a model: curves, the worst case over strong attacks, checks for gradient masking",
    ),
    "compare": Command(
        "e2sad_jax.comparison.run",
        "finished models and the others' last checkpoints are safe",
        True,
        "trains every defense for the same number of updates and compares robust accuracy with training cost",
    ),
    "export": Command(
        "e2sad_jax.export",
        "the same command with --overwrite exports again",
        False,
        "exports a trained model for programs without this library: StableHLO and safetensors",
    ),
}


def request(name: str) -> None:
    """Runs the command of that name in `REQUESTS`."""
    command = REQUESTS[name]
    define_request(name)
    launch(lambda: run_request(name), command.saved, resumes=command.resumes)


def define_request(name: str) -> None:
    """Defines a flag for each field of a command's request."""
    import_defenses()
    for field in dataclasses.fields(importlib.import_module(REQUESTS[name].module).Request):
        define_flag(field)


def run_request(name: str) -> None:
    """Runs a command with the values of its flags."""
    module = importlib.import_module(REQUESTS[name].module)
    asked = from_flags(module.Request)
    distributed.require_backend()
    module.run(asked)


def from_flags(kind: Any) -> Any:
    """A request of a dataclass whose fields are flags, of the values given; its `of`, if it has one, knows the others."""
    given = {field.name: FLAGS[field.name].value for field in dataclasses.fields(kind) if FLAGS[field.name].present}
    return getattr(kind, "of", kind)(**{k: tuple(v or ()) if isinstance(v, list) else v for k, v in given.items()})


def console(program: str = "e2sad") -> None:
    """The console script `e2sad`, and `python -m e2sad_jax`: `e2sad train mnist --defense=trades`, `e2sad evaluate RUN`.

    Args:
      program: how the user calls it.
    """
    words = sys.argv[1:]
    match words:
        case [] | ["-h" | "-help" | "--help"] | ["train", "-h" | "-help" | "--help"]:
            print(_commands(program))
        case ["--version"]:
            print(__version__)
        case ["train", name, *rest] if name in RECIPES:
            _describe(f"{program} train {name}", RECIPES[name].about)
            sys.argv = [f"{program} train {name}", *rest]
            train(name)
        case [name, *rest] if name in REQUESTS:
            if rest and not rest[0].startswith("-") and name != "compare":
                rest[0] = f"--workdir={rest[0]}"
            _describe(_usage(program, name), REQUESTS[name].about)
            sys.argv = [f"{program} {name}", *rest]
            request(name)
        case ["data", *rest]:
            from e2sad_jax.data.__main__ import main

            sys.exit(main(rest, f"{program} data"))
        case _:
            given = printable(" ".join(words[:2]))
            print(f"{program}: there is no command {given!r}\n\n{_commands(program)}", file=sys.stderr)
            sys.exit(2)


def _describe(usage: str, about: str) -> None:
    """What `--help` prints above the flags: the main module's docstring."""
    sys.modules["__main__"].__doc__ = f"{about}\n\n{usage} [flags]"


def _usage(program: str, name: str) -> str:
    return f"{program} {name}{' RUN' if name != 'compare' else ''}"


def _commands(program: str) -> str:
    lines = [f"{program} train {name}\n    {recipe.about}" for name, recipe in RECIPES.items()]
    for name, command in REQUESTS.items():
        lines.append(f"{_usage(program, name)}\n    {command.about}")
    lines.append(f"{program} data mnist --to=PATH.npz\n    a prepared data set as one file")
    return "\n".join(["Commands; each has --help:\n", *lines])


def launch(run: Callable[[], None], saved: str, *, resumes: bool = True) -> None:
    """Parses the flags and calls `run`; what goes wrong is one line and an exit code.

    Args:
      run: the command.
      saved: what a failure of the system leaves intact.
      resumes: whether the same command resumes from there.
    """
    failed, interrupted = saved, saved
    if resumes:
        failed = interrupted = f"{saved}, and the same command resumes from there"
    app.run(lambda argv: _guarded(run, failed, interrupted), flags_parser=_parse)


def define_flags(recipe: Recipe) -> None:
    """Defines a flag for each setting, with its range in the help text, as the main module's own: `--help` lists those."""
    import_defenses()
    eps1 = recipe.settings.get("eps1", Config.eps1)
    presets = {name: {**own, **recipe.robust} for name in PRESETS if (own := preset(name, eps1))}

    def chosen(setting: str, whose: str = "") -> dict[str, Any]:
        """The values that presets have, by what the help says of them."""
        values: dict[Any, list[str]] = {}
        for name, own in presets.items():
            if setting in own:
                values.setdefault(own[setting], []).append(name)
        return {f"{whose}with --preset={' or '.join(names)}": value for value, names in values.items()}

    for field in COMMON:
        other = {f"for {d}": s[field.name] for d, s in recipe.by_defense.items() if field.name in s}
        other |= chosen(field.name)
        _define(setting_of(field), recipe.settings.get(field.name, field.default), _defaults(other))
    for setting in _own_settings():
        if setting.name in FLAGS:
            names = ", ".join(readers(setting.name))
            _fail(f"the setting {setting.name!r} of {names} has the name of another flag; choose another name", 2)
        its_defaults = {d: _own_defaults(d, recipe)[setting.name] for d in readers(setting.name)}
        value = next(iter(its_defaults.values()))
        other = {f"for {d}": own for d, own in its_defaults.items() if own != value}
        other |= chosen(setting.name, "for e2sad ")
        _define(setting, value, f"; read by {', '.join(its_defaults)}{_defaults(other)}")
    text = (
        "robust: settings with robust accuracy under strong attacks, for one gradient step; robust2: for two; paper: the "
        f"paper's; other flags have precedence; one of {', '.join(PRESETS)}"
    )
    flags.DEFINE_string("preset", recipe.preset, text, module_name=sys.argv[0])
    text = f"second defense to train, shown in the same table; one of {', '.join(DEFENSES)}; empty: none"
    flags.DEFINE_string("baseline", recipe.baseline, text, module_name=sys.argv[0])
    text = "runs to train, with --seed and the seeds after it; their mean and standard deviation are shown; in "
    text += f"[1, {MOST_SEEDS}]"
    flags.DEFINE_integer("seeds", 1, text, module_name=sys.argv[0])
    flags.DEFINE_string(
        "coordinator",
        "",
        "several processes: HOST:PORT of the first; auto: found on a cluster or TPU pod",
        module_name=sys.argv[0],
    )
    flags.DEFINE_integer("process_id", -1, "several processes: this one's number, from 0", module_name=sys.argv[0])
    flags.DEFINE_integer("num_processes", 0, "several processes: their number", module_name=sys.argv[0])
    flags.DEFINE_bool("describe", False, "print the network's layers and stop", module_name=sys.argv[0])


def read_seeds(recipe: Recipe) -> list[list[Config]]:
    """What `read_configs` returns for each of --seeds; where there are several, a --workdir begins the names of their folders.

    Raises:
      ConfigError: as `read_configs`, or if --seeds is out of range.
    """
    first, workdir = FLAGS.seed, FLAGS.workdir
    if not 1 <= FLAGS.seeds <= MOST_SEEDS:
        raise ConfigError(f"--seeds={FLAGS.seeds}: must be in [1, {MOST_SEEDS}]")
    if FLAGS.seeds == 1:
        return [read_configs(recipe)]
    if first + FLAGS.seeds > 2**32:
        raise ConfigError(
            f"--seed={first} --seeds={FLAGS.seeds}: the last seed must be at most {2**32 - 1:,}; lower one of them"
        )
    found = []
    for seed in range(first, first + FLAGS.seeds):
        FLAGS["seed"].value = seed
        if workdir:
            FLAGS["workdir"].value = _beside(workdir, f"seed{seed}")
        found.append(read_configs(recipe))
    return found


def read_configs(recipe: Recipe) -> list[Config]:
    """The configuration that the flags say, after that of the baseline where there is one.

    Raises:
      ConfigError: if a value is out of range, or a flag is given that the defense does not read.
    """
    config = _read_config(recipe, FLAGS.defense)
    config = dataclasses.replace(config, workdir=config.workdir or config.default_workdir())
    if FLAGS.baseline not in ("", *DEFENSES):
        raise ConfigError(f"--baseline={FLAGS.baseline}: must be empty or one of {', '.join(DEFENSES)}")
    if FLAGS.baseline in ("", config.defense):
        return [config]
    second = _beside(config.workdir, FLAGS.baseline)
    return [dataclasses.replace(_read_config(recipe, FLAGS.baseline), workdir=second), config]


def _beside(workdir: str, end: str) -> str:
    """The folder beside another one whose name has this end more."""
    path = pathlib.Path(workdir).expanduser()
    if path.name in ("", ".."):
        path = path.resolve()
    if not path.name:
        raise ConfigError(f"--workdir={workdir}: must be a folder with a name, for another run's is beside it")
    return str(path.with_name(f"{path.name}-{end}"))


def define_flag(field: "dataclasses.Field[Any]") -> None:
    """Defines the flag of a `config.setting`, with its range in the help text, as the main module's own."""
    _define(setting_of(field), field.default)


def import_defenses() -> None:
    """Imports the modules that $E2SAD_JAX_DEFENSES names, with commas between them: they register defenses of their own."""
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        if "" not in sys.path:
            sys.path.insert(0, "")  # a module of the current folder, too
        try:
            importlib.import_module(name)
        except Exception as error:  # whatever the module raises
            _fail(f"${PLUGINS} names {name}: {first_line(error)}; it must be a module that registers defenses", 2)


def _define(setting: Setting, default: Any, more: str = "") -> None:
    text = setting.help + (f"; {setting.range}" if setting.range else "") + more
    define = DEFINE[type(default)]
    define(setting.name, list(default) if default == () else default, text, module_name=sys.argv[0])


def _defaults(values: Mapping[str, Any]) -> str:
    """Defaults that differ from the flag's own, for its help: what for, and the value."""
    shown = [f"default {where}: {f'{v:.4g}' if type(v) is float else v}" for where, v in values.items()]
    return f" ({'; '.join(shown)})" if shown else ""


def _own_settings() -> list[Setting]:
    """The settings that defenses alone read, each once."""
    return list({s.name: s for defense in reversed(DEFENSES.values()) for s in defense.settings}.values())


def _own_defaults(defense: str, recipe: Recipe) -> dict[str, Any]:
    """The values of a defense's own settings in this experiment where no flag is given."""
    own = DEFENSES[defense].defaults()
    values = {**own, **recipe.settings, **recipe.by_defense.get(defense, {})}
    return {name: value for name, value in values.items() if name in own}


def _read_config(recipe: Recipe, defense: str) -> Config:
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in COMMON}
    values["defense"] = defense
    if defense not in DEFENSES:
        return Config(defense=defense)  # which refuses it
    own = _own_defaults(defense, recipe)
    given = {s.name: FLAGS[s.name].value for s in _own_settings() if FLAGS[s.name].present}
    if defense != FLAGS.defense:  # a baseline takes what it reads
        given = {name: value for name, value in given.items() if name in own}
    named = {**preset(FLAGS.preset, values["eps1"]), **(recipe.robust if FLAGS.preset != "paper" else {})}
    if defense != "e2sad":  # the points are e2SAD's, schedule and labels everybody's
        named = {name: value for name, value in named.items() if name in RECIPE}
    for name, value in {**recipe.by_defense.get(defense, {}), **named}.items():
        if name in values and not FLAGS[name].present:
            values[name] = value
    if FLAGS["steps"].present and not FLAGS["epochs"].present:
        values["epochs"] = 0.0
    points = {name: value for name, value in named.items() if name in own}
    config = configure(**{**values, **own, **points, **given})
    if defense == FLAGS.defense:
        given |= {field.name: FLAGS[field.name].value for field in COMMON if FLAGS[field.name].present}
    defaults = {field.name: field.default for field in COMMON} | own
    for name, why in config.without_effect().items():
        if given.get(name, defaults[name]) != defaults[name]:
            raise ConfigError(f"--{name}={given[name]}: has no effect, for {why}; leave it out")
    return config


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one line and exit code 2."""
    try:
        rest = FLAGS(argv)
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax logs a page for each checkpoint
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}; settings are given as --name=value")
        return rest
    except flags.IllegalFlagValueError as error:
        _fail(_wrong_kind(str(error), error.__context__), 2)
    except flags.Error as error:
        _fail(first_line(error), 2)
    except SystemExit:  # after --help, which is no failure
        sys.exit(0)
    except BrokenPipeError:  # nor is a reader of --help who has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)


def _wrong_kind(message: str, cause: BaseException | None) -> str:
    """What absl says of a value that is of another kind than its flag's, with the kind and the range in place of the cause."""
    given = message.removesuffix(f": {cause}")
    name = given.removeprefix("flag --").partition("=")[0]
    if name not in FLAGS or (kind := KINDS.get(FLAGS[name].flag_type())) is None:
        return first_line(message)
    bound = re.search(r"; ((?:at least|above|in \[)[^;(]*)", FLAGS[name].help)  # as every help text has it
    return first_line(f"{given}: must be {kind}{f', {bound[1].strip()}' if bound else ''}")


def _guarded(run: Callable[[], None], failed: str, interrupted: str) -> None:
    """Calls `run` and ends the process on an error, with one line and the error's exit code."""
    _malloc.keep_freed()
    _compilation_cache.keep_compiled()
    for logger in (logging.get_absl_logger(), standard_logging.getLogger("asyncio")):
        logger.addFilter(_is_told_here_alone)
    try:
        run()
        sys.stdout.flush()
    except Error as error:
        # With other processes an orderly end waits for all, which is right only for what happens to all.
        if isinstance(error, LostProcessError) or (_joined() and not isinstance(error, (Stopped, NonFiniteError))):
            _end_at_once(str(error), error.exit_code)
        keeps_lines = isinstance(error, (Stopped, OutOfTimeError))  # the command that resumes has its own
        _fail(str(error) if keeps_lines else printable(str(error)), error.exit_code)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # if it was standard output that failed, not again at the exit
        _fail(f"{error}; {failed}", 1)
    except KeyboardInterrupt:
        # Not through the teardown of threads that the second Ctrl-C cut short.
        _end_at_once(f"interrupted; {interrupted}", 130)
    except Exception as error:
        if _joined():
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
        if FULL in str(error):
            _fail(f"{FULL}; {failed}", 1)
        if named := as_device_error(error, "while computing", failed, "batch size"):
            _fail(str(named), named.exit_code)
        raise


def _is_told_here_alone(record: standard_logging.LogRecord) -> bool:
    """Leaves out the tracebacks that Orbax and its tasks log of a full disk, say: what they log is raised in `run`, too."""
    of_orbax = record.name == "asyncio" or "orbax" in pathlib.PurePath(record.pathname).parts
    return not (record.exc_info and of_orbax)


def _joined() -> bool:
    """Whether this process is one of several of the same run."""
    return "jax" in sys.modules and bool(sys.modules["jax"].distributed.is_initialized())


def _program() -> str:
    path = pathlib.PurePath(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.stem


def _end_at_once(message: str, exit_code: int) -> NoReturn:
    print(f"{_program()}: {message}", file=sys.stderr, flush=True)
    os._exit(exit_code)


def _fail(message: str, exit_code: int) -> NoReturn:
    print(f"{_program()}: {message}", file=sys.stderr)
    sys.exit(exit_code)
