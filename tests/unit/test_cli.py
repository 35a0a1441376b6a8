"""Commands in this process: the console script's words, the recipes' settings, and errors as one line with an exit code."""

import dataclasses
import logging
import re
import subprocess
import sys

import jax
import pytest
from absl import flags

import e2sad_jax
from e2sad_jax import cli, distributed, errors
from e2sad_jax.errors import ConfigError, LostProcessError, OutOfMemoryError, OutOfTimeError, Stopped, WorkdirError
from e2sad_jax.runs import run
from e2sad_jax.runs.recipes import RECIPES
from e2sad_jax.training import configure


@pytest.fixture
def called(monkeypatch):
    """What the console script calls, with `sys.argv` as the command sees it."""
    calls = []
    monkeypatch.setattr(cli, "train", lambda name: calls.append(("train", name, sys.argv)))
    monkeypatch.setattr(cli, "request", lambda name: calls.append(("request", name, sys.argv)))
    return calls


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("train mnist --defense=trades", ("train", "mnist", ["e2sad train mnist", "--defense=trades"])),
        ("train digits", ("train", "digits", ["e2sad train digits"])),
        ("evaluate runs/w --eps=0.1", ("request", "evaluate", ["e2sad evaluate", "--workdir=runs/w", "--eps=0.1"])),
        ("evaluate --predict=a:b", ("request", "evaluate", ["e2sad evaluate", "--predict=a:b"])),
        ("export runs/w", ("request", "export", ["e2sad export", "--workdir=runs/w"])),
        ("compare --data=mnist", ("request", "compare", ["e2sad compare", "--data=mnist"])),
    ],
)
def test_the_console_script_is_the_same_commands(words, call, called, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/e2sad", *words.split()])
    cli.console()
    assert called == [call]


@pytest.mark.parametrize("words", ["", "--help", "train --help"])
def test_without_words_the_console_script_lists_its_commands(words, called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["e2sad", *words.split()])
    cli.console()
    out = capsys.readouterr().out
    for command in ("train mnist", "train svhn", "train digits", "evaluate RUN", "compare", "export RUN", "data "):
        assert f"\ne2sad {command}" in out
    assert called == []


@pytest.mark.parametrize("words", ["train", "train cifar", "attack", "--defense=e2sad", "train --defense=e2sad"])
def test_wrong_words_end_with_2_and_the_list(words, called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["e2sad", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.console()
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err.startswith(f"e2sad: there is no command '{' '.join(words.split()[:2])}'\n\nCommands")
    assert (said.out, called) == ("", [])


def test_the_version_is_the_packages(called, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["e2sad", "--version"])
    cli.console()
    assert capsys.readouterr().out == f"{e2sad_jax.__version__}\n"


def test_help_says_first_what_a_command_does(called, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["e2sad", "evaluate", "--help"])
    monkeypatch.setattr(sys.modules["__main__"], "__doc__", "")
    cli.console()
    assert sys.modules["__main__"].__doc__ == f"{cli.REQUESTS['evaluate'].about}\n\ne2sad evaluate RUN [flags]"


def test_data_takes_what_its_module_takes(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["e2sad", "data", "digits", f"--to={tmp_path / 'd.npz'}"])
    with pytest.raises(SystemExit) as ended:
        cli.console()
    assert ended.value.code == 0
    assert (tmp_path / "d.npz").exists()
    monkeypatch.setattr(sys, "argv", ["e2sad", "data", "digits"])
    with pytest.raises(SystemExit) as ended:
        cli.console()
    assert ended.value.code == 2
    assert "e2sad data --help" in capsys.readouterr().err


@pytest.fixture
def parsed(monkeypatch):
    """Defines the flags of a recipe anew, and reads the configurations that a command line means."""
    kinds = dict(cli.DEFINE)
    plain = {name: getattr(flags, name) for name in ("DEFINE_string", "DEFINE_integer", "DEFINE_bool")}

    def read(name, *arguments, reader=cli.read_configs):
        monkeypatch.setattr(cli, "FLAGS", own := flags.FlagValues())
        monkeypatch.setattr(cli, "DEFINE", {kind: _into(define, own) for kind, define in kinds.items()})
        for attribute, define in plain.items():
            monkeypatch.setattr(flags, attribute, _into(define, own))
        cli.define_flags(RECIPES[name])
        own([name, *arguments])
        return reader(RECIPES[name])

    return read


def test_several_seeds_have_folders_of_their_own(parsed):
    three = parsed("digits", "--seeds=3", "--seed=5", reader=cli.read_seeds)
    assert [[config.seed for config in configs] for configs in three] == [[5, 5], [6, 6], [7, 7]]
    assert [configs[1].workdir for configs in three] == [configs[1].default_workdir() for configs in three]
    assert len({config.workdir for configs in three for config in configs}) == 6
    assert three[0][1].workdir == parsed("digits", "--seed=5")[1].workdir, "the run that is there is taken up"
    named = parsed("digits", "--seeds=2", "--workdir=here", reader=cli.read_seeds)
    assert [config.workdir for configs in named for config in configs] == [
        f"here-seed{seed}{whose}" for seed in (0, 1) for whose in ("-natural", "")
    ]
    for given in ("here", "here/"):
        slashed = parsed("mnist", "--seeds=2", f"--workdir={given}", reader=cli.read_seeds)
        assert [config.workdir for (config,) in slashed] == ["here-seed0", "here-seed1"]
    with pytest.raises(ConfigError, match="--seed=4294967295 --seeds=2: the last seed must be at most 4,294,967,295"):
        parsed("mnist", "--seeds=2", "--seed=4294967295", reader=cli.read_seeds)
    with pytest.raises(ConfigError, match="--workdir=/: must be a folder with a name"):
        parsed("digits", "--workdir=/")
    ((one,),) = parsed("mnist", "--workdir=here", reader=cli.read_seeds)
    assert one.workdir == "here"
    with pytest.raises(ConfigError, match=r"--seeds=0: must be in \[1, 1000\]"):
        parsed("mnist", "--seeds=0", reader=cli.read_seeds)


def _into(define, own):
    return lambda *args, **kwargs: define(*args, flag_values=own, **kwargs)


def test_a_recipe_gives_way_to_flags_and_its_baseline_reads_what_it_can(parsed):
    baseline, chosen = parsed("digits", "--preset=paper", "--lam=0.7", "--steps=5")
    assert (baseline.defense, chosen.defense) == ("natural", "e2sad")
    assert (chosen.settings["lam"], chosen.settings["eps2"], chosen.steps) == (0.7, 0.1, 5)
    assert (baseline.steps, baseline.batch_size, baseline.workdir) == (5, 32, f"{chosen.workdir}-natural")
    assert "lam" not in baseline.settings


def test_a_preset_gives_way_to_flags_and_its_schedule_is_the_baselines_too(parsed):
    beside, chosen = parsed("mnist", "--preset=robust", "--lam=3", "--eps1=0.2", "--baseline=fgsm")
    settings = ("lam", "eps2", "first_point", "adversarial_at", "alpha", "memory", "ball_second")
    assert [chosen.settings[name] for name in settings] == [3.0, 0.1, "start", "second", 0.0, "int8", True]
    assert parsed("mnist")[0].settings["lam"] == 0.3
    assert (chosen.eps_scale, chosen.schedule, chosen.eps_warmup) == (1.1, "cyclic", 0.5)
    assert (beside.settings["alpha"], beside.settings["memory"]) == (0.6, "none")
    assert (beside.eps_scale, beside.schedule, beside.eps_warmup) == (1.1, "cyclic", 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--first_step_size=0.1",),
            "--first_step_size=0.1: has no effect, for --first_point=start takes no first step",
        ),
        (("--nesterov",), "--nesterov=True: has no effect, for --optimizer=adam does not read it; leave it out"),
        (("--crop_padding=2", "--augment=flip"), "--crop_padding=2: has no effect, for --augment=flip has no crop"),
        (("--clip_second",), "--clip_second=True: has no effect, for --ball_second clips it"),
        (("--memory=none", "--norandom_start"), "--first_point=start: needs a start; give --memory=int8, or"),
        (("--preset=paper", "--first_point=start"), "--first_point=start: needs a start"),
    ],
)
def test_flags_without_effect_beside_others_are_refused(flags, message, parsed):
    with pytest.raises(ConfigError, match=re.escape(message)):
        parsed("mnist", "--preset=robust", *flags)
    assert parsed("mnist", "--first_point=step", "--first_step_size=0.1")[0].settings["first_step_size"] == 0.1


def test_robust2_takes_a_step_to_the_first_point_too_and_is_the_preset_of_every_command(parsed):
    (one,), (two,) = parsed("mnist", "--preset=robust"), parsed("mnist")
    assert one.settings["first_point"] == "start"
    changed = {name: value for name, value in two.settings.items() if one.settings[name] != value}
    assert changed == {"first_point": "step", "first_step_size": 0.15}
    assert parsed("mnist", "--first_point=start")[0].digest() == one.digest()
    assert parsed("digits")[-1].settings["first_step_size"] == 0.1
    assert parsed("svhn")[0].settings["first_step_size"] == 12 / 255
    assert parsed("cifar10")[0].settings["first_step_size"] == 4 / 255


def test_the_preset_is_for_every_defense_and_paper_is_one_flag_away(parsed):
    for defense in ("natural", "fgsm", "e2sad"):
        (config,) = parsed("mnist", f"--defense={defense}")
        assert (config.schedule, config.learning_rate, config.soft_label) == ("cyclic", 5e-3, True)
        (paper,) = parsed("mnist", f"--defense={defense}", "--preset=paper")
        assert paper.replace(workdir="") == configure(defense=defense), "the defaults are the paper's"


@pytest.mark.parametrize(("defense", "soft"), [("e2sad", True), ("natural", False), ("trades", False)])
def test_on_svhn_e2sad_alone_has_soft_labels(defense, soft, parsed):
    (config,) = parsed("svhn", "--preset=paper", f"--defense={defense}")
    assert (config.soft_label, config.epochs, config.eps1) == (soft, 20.0, 24 / 255)
    assert (
        parsed("svhn", "--preset=paper", f"--defense={defense}", f"--soft_label={not soft}")[0].soft_label is not soft
    )


def test_trades_has_its_papers_steps_on_mnist(parsed):
    assert parsed("mnist", "--defense=trades")[0].settings["attack_steps"] == 40
    assert parsed("mnist", "--defense=trades", "--attack_steps=7")[0].settings["attack_steps"] == 7
    assert parsed("mnist", "--defense=pgd")[0].settings["attack_steps"] == 30


def test_a_number_may_be_a_quotient(parsed):
    (config,) = parsed("svhn", "--eps1=8/255", "--std=1/4", "--defense=pgd")
    assert config.eps1 == 8 / 255
    assert parsed("svhn", f"--eps1={8 / 255}", "--std=0.25", "--defense=pgd")[0].digest() == config.digest()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--steps=abc", "--steps=abc: must be an integer, at least 1"),
        ("--delta=x", "--delta=x: must be a number, above 0, at most 0.999"),
        ("--eps1=8/0", "--eps1=8/0: must be a number, at least 0"),
        ("--eps1=8/255/2", "--eps1=8/255/2: must be a number, at least 0"),
        ("--resume=maybe", "--resume=maybe: must be true or false"),
        ("--steps=\x1b[2J", "--steps=\\x1b[2J: must be an integer, at least 1"),
        ("--attack_steps=1.5", "--attack_steps=1.5: must be an integer, at least 1"),
    ],
)
def test_a_value_of_another_kind_is_refused_with_the_bound(given, said, parsed, capsys):
    parsed("mnist")
    with pytest.raises(SystemExit) as ended:
        cli._parse(["mnist", given])
    assert ended.value.code == 2
    assert capsys.readouterr().err.endswith(f": flag {said}\n")


# How a command ends.


@pytest.fixture
def end(monkeypatch, capsys):
    """Calls a command that raises; returns its exit code and what it said."""

    class Exited(BaseException):
        pass

    def exit_at_once(code):
        raise Exited(code)

    def ended(error, failed="all is kept", interrupted="it resumes"):
        def fail():
            raise error

        monkeypatch.setattr(sys, "argv", ["/x/step_cost/__main__.py"])
        monkeypatch.setattr(cli.os, "_exit", exit_at_once)
        with pytest.raises((SystemExit, Exited)) as caught:
            cli._guarded(fail, failed, interrupted)
        return caught.value.args[0], capsys.readouterr().err

    return ended


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (WorkdirError("it is\n\x1b[2Jbusy"), 2, "it is\\n\\x1b[2Jbusy"),
        (Stopped("Stopped. Again:\n  python -m x", 15), 143, "Stopped. Again:\n  python -m x"),
        (OutOfTimeError("used up:\n  python"), 4, "used up:\n  python"),
        (OutOfMemoryError("too large"), 6, "too large"),
        (LostProcessError("one is gone"), 5, "one is gone"),
        (OSError(28, errors.FULL), 1, f"[Errno 28] {errors.FULL}; all is kept"),
        (ValueError(f"RESOURCE_EXHAUSTED: file x: {errors.FULL}"), 1, f"{errors.FULL}; all is kept"),
        (MemoryError(), 6, "out of memory while computing (MemoryError); all is kept. Try a lower batch size"),
        (KeyboardInterrupt(), 130, "interrupted; it resumes"),
    ],
)
def test_what_goes_wrong_is_a_message_and_an_exit_code(error, code, said, end, monkeypatch):
    monkeypatch.setattr(cli.os, "dup2", lambda *args: None)
    assert end(error) == (code, f"step_cost: {said}\n")


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    with pytest.raises(jax.errors.JaxRuntimeError, match="INVALID"):
        cli._guarded(lambda: (_ for _ in ()).throw(jax.errors.JaxRuntimeError("INVALID_ARGUMENT")), "", "")


def test_one_of_several_processes_ends_at_once_for_what_happened_to_it_alone(end, monkeypatch):
    """An orderly end would wait for the others."""
    exited = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(sys, "exit", lambda code: exited.append(code) or (_ for _ in ()).throw(SystemExit(code)))
    assert end(WorkdirError("of another run"))[0] == 2
    assert end(ValueError("a bug"))[0] == 1
    assert exited == []
    assert end(Stopped("all stop", 15))[0] == 143
    assert exited == [143]


def test_a_full_disk_is_not_taken_for_memory_and_no_thread_tells_it_twice():
    """TensorStore counts a disk among the resources that are exhausted, and tells which after long names."""
    error = ValueError(f'RESOURCE_EXHAUSTED: Error writing "{"x" * 400}": [OS error 28: ENOSPC {errors.FULL}]')
    assert errors.as_device_error(error, "in training", "all is kept", "--batch_size") is None
    assert errors.reason(error) == errors.FULL

    def shown(name: str, package: str, raised: bool) -> bool:
        exc_info = (ValueError, error, None) if raised else None
        record = logging.LogRecord(name, logging.ERROR, f"/lib/{package}/future.py", 1, "failed", (), exc_info)
        return cli._is_told_here_alone(record)

    assert not shown("absl", "orbax", True)
    assert not shown("asyncio", "asyncio", True)
    assert shown("absl", "orbax", False)
    assert shown("absl", "orbaxes", True)


def test_a_command_that_is_only_asked_about_imports_no_orbax():
    code = "import sys, e2sad_jax.cli; assert not {'orbax', 'matplotlib'} & set(sys.modules), 'slow'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_platform_that_is_not_there_is_one_line_and_exit_code_2(monkeypatch, capsys):
    def missing():
        raise AssertionError  # as of JAX without CUDA

    monkeypatch.setattr(jax, "devices", missing)
    for start in (distributed.require_backend, lambda: distributed.mesh(1, 8)):
        with pytest.raises(SystemExit) as ended:
            cli._guarded(start, "all is kept", "it resumes")
        assert ended.value.code == 2
        said = capsys.readouterr().err
        assert "JAX_PLATFORMS=cpu: JAX finds no such device" in said
        assert said.count("\n") == 1


def test_cifar10_has_the_recipe_of_fastat_benchmark(parsed):
    """Section 4 there: 100 epochs of 128 of 49,000 images, one cycle of SGD, crops and flips, smoothing of 0.4, averages."""
    for config in (*parsed("cifar10"), *parsed("cifar10", "--defense=pgd")):
        field = (config.optimizer, config.learning_rate, config.momentum, config.weight_decay, config.schedule)
        assert field == ("sgd", 0.1, 0.9, 5e-4, "onecycle")
        assert (config.total_steps(49_000), config.augment, config.ema) == (38_282, "crop,flip", 0.9995)
        assert config.soft_label
        assert config.delta == pytest.approx(0.4 * 9 / 10)
        assert (config.eps1, config.eps_scale, config.eps_warmup) == (8 / 255, 1.0, 0.0)
    assert config.settings["attack_steps"] == 10
    assert parsed("cifar10")[0].settings["eps2"] == 4 / 255
    assert parsed("cifar10", "--preset=paper")[0].settings["eps2"] == 8 / 255 / 3


def test_recipes_are_settings_that_there_are():
    for name, recipe in RECIPES.items():
        assert name in run.SUITES
        assert recipe.about
        known = {field.name for field in cli.COMMON} | {s.name for d in cli.DEFENSES.values() for s in d.settings}
        assert {*recipe.settings, *(s for own in recipe.by_defense.values() for s in own)} <= known
    assert dataclasses.replace(RECIPES["mnist"], baseline="natural") != RECIPES["mnist"]
