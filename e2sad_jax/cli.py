"""What the binaries share: one flag per setting of `Config`, errors as one line, and the call into the library."""

import dataclasses
import functools
import importlib
import logging as standard_logging
import os
import pathlib
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from absl import app, flags, logging

from e2sad_jax.defenses import DEFENSES, Setting, readers
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
from e2sad_jax.runs import _malloc, supervisor
from e2sad_jax.training.config import COMMON, PRESETS, SCHEDULE, Config, configure, preset, setting_of

FLAGS = flags.FLAGS
PATIENCE = 4.0  # seconds that Python has to see to a signal
PLUGINS = "E2SAD_JAX_DEFENSES"  # modules with defenses of the user's own
_connected = False  # to other processes of the same run
DEFINE: Mapping[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
    tuple: flags.DEFINE_multi_string,
}


def main(
    suite: str,
    defaults: Mapping[str, Any],
    by_defense: Mapping[str, Mapping[str, Any]] | None = None,
    baseline: str = "",
) -> None:
    """Runs one experiment from the command line.

    Args:
      suite: attacks to evaluate with.
      defaults: this binary's settings where they differ from `Config`'s.
      by_defense: settings that the paper chooses per defense; they give way to flags on the command line.
      baseline: defense to train beside the chosen one, empty for none.
    """
    by_defense = by_defense or {}
    define_flags(defaults, by_defense, baseline)
    launch(lambda: _run(suite, defaults, by_defense), "the workdir's last checkpoint is safe")


def launch(run: Callable[[], None], saved: str, *, resumes: bool = True) -> None:
    """Parses the flags and calls `run`; what goes wrong is one line and an exit code.

    Args:
      run: the experiment.
      saved: what a failure of the system leaves whole.
      resumes: whether the same command goes on from there.
    """
    failed, interrupted = saved, saved
    if resumes:
        failed = f"{saved}, and the same command goes on from there"
        interrupted = "the same command goes on from the last checkpoint"
    app.run(lambda argv: _guarded(run, failed, interrupted), flags_parser=_parse)


def define_flags(defaults: Mapping[str, Any], by_defense: Mapping[str, Mapping[str, Any]], baseline: str) -> None:
    """Defines a flag for each setting, with its range in the help text, as the main module's own: `--help` lists those."""
    import_defenses()
    for field in COMMON:
        special = [f"{s[field.name]} for {d}" for d, s in by_defense.items() if field.name in s]
        more = f" (unless given: {', '.join(special)})" if special else ""
        _define(setting_of(field), defaults.get(field.name, field.default), more)
    for setting in _own_settings():
        its_defaults = {d: _own_defaults(d, defaults, by_defense)[setting.name] for d in readers(setting.name)}
        value = next(iter(its_defaults.values()))
        special = [f"{other} for {d}" for d, other in its_defaults.items() if other != value]
        more = f"; read by {', '.join(its_defaults)}" + (f" (unless given: {', '.join(special)})" if special else "")
        _define(setting, value, more)
    text = f"settings of e2SAD by name; flags given have precedence; one of {', '.join(PRESETS)}"
    flags.DEFINE_string("preset", PRESETS[0], text, module_name=sys.argv[0])
    text = f"defense to train and show beside it; one of {', '.join(DEFENSES)}; empty: none"
    flags.DEFINE_string("baseline", baseline, text, module_name=sys.argv[0])
    flags.DEFINE_string(
        "coordinator",
        "",
        "several processes: HOST:PORT of the first; auto: found on a cluster or TPU pod",
        module_name=sys.argv[0],
    )
    flags.DEFINE_integer("process_id", -1, "several processes: this one's number, from 0", module_name=sys.argv[0])
    flags.DEFINE_integer("num_processes", 0, "several processes: how many", module_name=sys.argv[0])
    flags.DEFINE_bool("describe", False, "print the network's layers and stop", module_name=sys.argv[0])


def read_configs(defaults: Mapping[str, Any], by_defense: Mapping[str, Mapping[str, Any]]) -> list[Config]:
    """The configuration that the flags say, after that of the baseline where there is one.

    Raises:
      ConfigError: if a value is out of range, or a flag is given that the defense does not read.
    """
    config = _read_config(defaults, by_defense, FLAGS.defense)
    config = dataclasses.replace(config, workdir=config.workdir or config.default_workdir())
    if FLAGS.baseline not in ("", *DEFENSES):
        raise ConfigError(f"--baseline={FLAGS.baseline}: must be empty or one of {', '.join(DEFENSES)}")
    if FLAGS.baseline in ("", config.defense):
        return [config]
    workdir = pathlib.Path(config.workdir).expanduser()
    if workdir.name in ("", ".."):
        workdir = workdir.resolve()
    beside = workdir.with_name(f"{workdir.name}-{FLAGS.baseline}")
    return [dataclasses.replace(_read_config(defaults, by_defense, FLAGS.baseline), workdir=str(beside)), config]


def define_flag(field: "dataclasses.Field[Any]") -> None:
    """Defines the flag of a `config.setting`, with its range in the help text, as the main module's own."""
    _define(setting_of(field), field.default)


def import_defenses() -> None:
    """Imports the modules that $E2SAD_JAX_DEFENSES names, with commas between them: they register defenses of their own."""
    for name in filter(None, os.environ.get(PLUGINS, "").split(",")):
        try:
            importlib.import_module(name)
        except ImportError as error:
            _fail(f"${PLUGINS} names {name}: {error}; it must be a module that Python finds, as on $PYTHONPATH", 2)


def _define(setting: Setting, default: Any, more: str = "") -> None:
    text = setting.help + (f"; {setting.range}" if setting.range else "") + more
    define = DEFINE[type(default)]
    define(setting.name, list(default) if default == () else default, text, module_name=sys.argv[0])


def _own_settings() -> list[Setting]:
    """The settings that defenses alone read, each once."""
    return list({s.name: s for defense in reversed(DEFENSES.values()) for s in defense.settings}.values())


def _own_defaults(
    defense: str, defaults: Mapping[str, Any], by_defense: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The values of a defense's own settings in this experiment where no flag is given."""
    own = DEFENSES[defense].defaults()
    return {name: value for name, value in {**own, **defaults, **by_defense.get(defense, {})}.items() if name in own}


def _read_config(defaults: Mapping[str, Any], by_defense: Mapping[str, Mapping[str, Any]], defense: str) -> Config:
    values: dict[str, Any] = {field.name: FLAGS[field.name].value for field in COMMON}
    values["defense"] = defense
    if defense not in DEFENSES:
        return Config(defense=defense)  # which refuses it
    own = _own_defaults(defense, defaults, by_defense)
    given = {s.name: FLAGS[s.name].value for s in _own_settings() if FLAGS[s.name].present}
    if defense != FLAGS.defense:  # a baseline takes what it reads
        given = {name: value for name, value in given.items() if name in own}
    named = preset(FLAGS.preset, values["eps1"])
    if named and FLAGS.defense != "e2sad":
        raise ConfigError(
            f"--preset={FLAGS.preset}: is one of --defense=e2sad, not of {FLAGS.defense}; leave it out, or train e2sad"
        )
    if defense != "e2sad":  # a baseline has the same schedule and labels
        named = {name: value for name, value in named.items() if name in (*SCHEDULE, "soft_label")}
    for name, value in {**by_defense.get(defense, {}), **named}.items():
        if name in values and not FLAGS[name].present:
            values[name] = value
    if FLAGS["steps"].present and not FLAGS["epochs"].present:
        values["epochs"] = 0.0
    points = {name: value for name, value in named.items() if name in own}
    return configure(**{**values, **own, **points, **given})


def _parse(argv: Sequence[str]) -> list[str]:
    """Parses the flags; what is wrong with them is one line and exit code 2."""
    try:
        rest = FLAGS(argv)
        if not FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)  # Orbax tells a page for each checkpoint
        if len(rest) > 1:
            raise flags.Error(f"unexpected argument {rest[1]!r}; settings are given as --name=value")
        return rest
    except flags.Error as error:
        _fail(first_line(error), 2)
    except SystemExit:  # after --help, which is no failure
        sys.exit(0)
    except BrokenPipeError:  # nor is a reader of --help who has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)


def _run(suite: str, defaults: Mapping[str, Any], by_defense: Mapping[str, Mapping[str, Any]]) -> None:
    configs = read_configs(defaults, by_defense)
    from e2sad_jax import distributed  # after the flags are known to be right: this brings Orbax along
    from e2sad_jax.runs import run  # after the flags are known to be right: this brings Orbax along

    if FLAGS.coordinator and not supervisor.is_watched():
        supervisor.run_again(configs[-1].workdir)
    distributed.connect(FLAGS.coordinator, FLAGS.process_id, FLAGS.num_processes)
    global _connected
    _connected = bool(FLAGS.coordinator)

    if FLAGS.describe:
        print(run.describe(configs[-1]))
    else:
        run.run_beside(configs, suite)


def _end_when_stuck() -> None:
    """Ends the process on Ctrl-C or SIGTERM where Python does not see to them for long, and nothing is lost by it."""
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell, warn_on_full_buffer=False)

    def watch() -> None:
        while True:
            number = os.read(told, 1)[0]
            time.sleep(PATIENCE)
            jobs = sys.modules.get("e2sad_jax.runs.jobs")
            if number in (signal.SIGINT, signal.SIGTERM) and jobs and jobs.stuck():
                os.write(2, f"\n{_program()}: stopped while it compiled; the same command goes on\n".encode())
                os._exit(128 + number)

    threading.Thread(target=watch, daemon=True).start()


def _guarded(run: Callable[[], None], failed: str, interrupted: str) -> None:
    _malloc.keep_freed()
    _end_when_stuck()
    for logger in (logging.get_absl_logger(), standard_logging.getLogger("asyncio")):
        logger.addFilter(_not_told_elsewhere)
    sys.unraisablehook = functools.partial(_told_late, sys.unraisablehook)
    try:
        run()
        sys.stdout.flush()
    except Error as error:
        # With other processes an orderly end waits for all, which is right only for what happens to all.
        if isinstance(error, LostProcessError) or (_connected and not isinstance(error, (Stopped, NonFiniteError))):
            print(f"{_program()}: {error}", file=sys.stderr, flush=True)
            os._exit(error.exit_code)
        _fail(_told(error), error.exit_code)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # if it was standard output that failed, not again at the exit
        _fail(f"{error}; {failed}", 1)
    except KeyboardInterrupt:
        print(f"{_program()}: interrupted; {interrupted}", file=sys.stderr, flush=True)
        os._exit(130)  # not through the teardown of threads that the second Ctrl-C cut short
    except Exception as error:
        if not _connected:
            if FULL in str(error):
                _fail(f"{FULL}; {failed}", 1)
            if named := as_device_error(error, "while computing", failed, "batch size"):
                _fail(str(named), named.exit_code)
            raise
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def _not_told_elsewhere(record: standard_logging.LogRecord) -> bool:
    """Leaves out the tracebacks of Orbax's threads, and of its tasks on a full disk: they are raised where the run waits."""
    if not record.exc_info:
        return True
    in_task = record.name == "asyncio" and FULL in str(record.exc_info[1])
    return not (in_task or "orbax" in pathlib.PurePath(record.pathname).parts)


def _told_late(told: Callable[[Any], None], late: Any) -> None:
    """Leaves out what TensorStore's threads say of a write that comes back after Orbax has given up on it, and on its loop."""
    if not (late.exc_type is RuntimeError and str(late.exc_value) == "Event loop is closed" and late.object is None):
        told(late)


def _program() -> str:
    return pathlib.PurePath(sys.argv[0]).stem


def _told(error: Error) -> str:
    """The message of an error in one line, whatever it quotes; of a run that was stopped, with the command that goes on."""
    return str(error) if isinstance(error, (Stopped, OutOfTimeError)) else printable(str(error))


def _fail(message: str, exit_code: int) -> NoReturn:
    print(f"{_program()}: {message}", file=sys.stderr)
    sys.exit(exit_code)
