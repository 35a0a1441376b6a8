"""Settings: the paper's values as defaults, a clear refusal of each that cannot be right, one identity for equal runs."""

import dataclasses
import json
import math
import pickle

import pytest

from e2sad_jax.defenses import DEFENSES, Setting
from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.training import Config, configure, preset
from e2sad_jax.training.config import COMMON, check, setting_of
from tests.helpers import register_loss


@pytest.mark.parametrize(
    ("defense", "name", "value", "words"),
    [
        ("e2sad", "alpha", 1.5, "--alpha=1.5: must be in [0, 1]"),
        ("e2sad", "alpha", math.nan, "--alpha=nan: must be in [0, 1]"),
        ("e2sad", "lam", -0.1, "--lam=-0.1: must be at least 0"),
        ("e2sad", "lam", math.inf, "--lam=inf: must be at least 0"),
        ("e2sad", "steps", 0, "--steps=0: must be at least 1"),
        ("e2sad", "batch_size", 0, "--batch_size=0: must be at least 1"),
        ("e2sad", "batch_size", 2.5, "--batch_size=2.5: must be of type int"),
        ("e2sad", "learning_rate", 0.0, "--learning_rate=0.0: must be above 0"),
        ("e2sad", "eps1", -0.3, "--eps1=-0.3: must be at least 0"),
        ("e2sad", "eps1", 24.0, "--eps1=24.0: must be in [0, 1.0]"),
        ("e2sad", "eps2", 1.5, "--eps2=1.5: must be in [0, 1.0]"),
        ("e2sad", "delta", 1.0, "--delta=1.0: must be above 0, at most 0.999"),
        (
            "e2sad",
            "defense",
            "mart",
            "--defense=mart: must be one of natural, fgsm, ifgsm, pgd, hamm, e2sad, rs_fgsm, n_fgsm,",
        ),
        ("e2sad", "schedule", "linear", "--schedule=linear: must be one of constant, cyclic, piecewise, cosine"),
        ("e2sad", "eps_warmup", -1.0, "--eps_warmup=-1.0: must be at least 0"),
        ("trades", "beta", -1.0, "--beta=-1.0: must be at least 0"),
        ("free", "replays", 0, "--replays=0: must be at least 1"),
        (
            "e2sad",
            "second_step",
            "entropy",
            "--second_step=entropy: must be one of total, noise, loss, literal, random",
        ),
        ("e2sad", "seed", -1, "--seed=-1: must be in [0, 4294967295]"),
        ("e2sad", "soft_label", 1, "--soft_label=1: must be of type bool"),
        ("e2sad", "transform", "zca", "--transform=zca: must be one of unit, standardize"),
        ("pgd", "attack_steps", 0, "--attack_steps=0: must be at least 1"),
        # Values without an end, or of other types, as a file that somebody else made may hold them.
        ("e2sad", "steps", 2**62, "--steps=4611686018427387904: must be at least 1, at most 9,007,199,254,740,992"),
        ("e2sad", "steps", 10**400, "--steps=an integer of 1,329 bits: must be at least 1, at most"),
        ("e2sad", "learning_rate", -(10**400), "--learning_rate=an integer of 1,329 bits: must be above 0, at most"),
        ("e2sad", "seed", 10**30, "must be in [0, 4294967295]"),
        ("e2sad", "epochs", 1e308, "--epochs=1e+308: must be in"),
        ("e2sad", "steps", True, "--steps=True: must be of type int"),
        ("e2sad", "model", {"a": 1}, "must be of type str"),
        ("e2sad", "model", "x" * 10_000, "must be one of"),
        ("e2sad", "data", "\x1b[2J", r"--data='\x1b[2J': must be printable text"),
        ("e2sad", "data", "a\ud800", "must be printable text"),
        ("e2sad", "y" * 10_000, 1, "unknown setting"),
    ],
)
def test_a_bad_value_is_one_line_with_flag_value_and_range(defense, name, value, words):
    with pytest.raises(ConfigError) as caught:
        configure(**{"defense": defense, name: value})
    assert words in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, Error)


def test_every_number_has_a_range_and_every_setting_a_help():
    for field in COMMON:
        assert field.metadata["help"]
        if type(field.default) in (int, float):
            assert setting_of(field).range, field.name
            check(field, field.default)


def test_budgets_may_span_the_range_of_the_transform():
    config = configure(transform="standardize", eps1=2.0, eps2=2.0)
    assert (config.eps1, config.settings["eps2"]) == (2.0, 2.0)
    with pytest.raises(
        ConfigError, match=r"--attack_step_size=1.5: must be in \[0, 1.0\], the width of --transform=unit"
    ):
        configure(defense="pgd", attack_step_size=1.5)


def test_epochs_count_every_image():
    config = Config(epochs=20.0, batch_size=256)
    assert config.total_steps(73_257) == 5_724 == math.ceil(20 * 73_257 / 256)
    assert Config(steps=7).total_steps(73_257) == 7


# --- a defense's own settings


@pytest.mark.parametrize("defense", DEFENSES)
def test_a_run_has_its_defenses_settings_and_no_others(defense):
    config = Config(defense=defense)
    assert config.settings == DEFENSES[defense].defaults()
    for name, value in config.settings.items():
        assert configure(defense=defense, **{name: value}) == config
    for other in DEFENSES:
        for name, value in DEFENSES[other].defaults().items():
            if name not in config.settings:
                with pytest.raises(ConfigError, match=f"--{name}=.*: --defense={defense} does not read it; .*{other}"):
                    configure(defense=defense, **{name: value})


def test_a_setting_that_nobody_reads_is_unknown():
    with pytest.raises(
        ConfigError,
        match=r"unknown setting 'lambda'; --defense=trades has defense, .*, attack_step_size, memory, norm$",
    ):
        configure(defense="trades", **{"lambda": 1.0})


def test_a_defense_may_not_name_its_setting_as_every_run_does(monkeypatch):
    def loss(logits_fn, x, y, *, steps):
        return logits_fn(x).mean(), {}

    register_loss(monkeypatch, "mine", loss, settings=(Setting("steps", 1, "twice", lower=1),))
    with pytest.raises(ConfigError, match="--defense=mine: has a setting 'steps', as every run has; rename it"):
        Config(defense="mine")


def test_another_defense_keeps_what_both_read():
    config = configure(defense="ifgsm", alpha=0.2, attack_steps=7, attack_step_size=0.1, seed=3)
    assert config.replace(defense="pgd") == configure(defense="pgd", attack_steps=7, attack_step_size=0.1, seed=3)
    assert config.replace(defense="natural", steps=5) == configure(defense="natural", seed=3, steps=5)
    assert config.replace(alpha=0.3).settings == {**config.settings, "alpha": 0.3}
    assert dataclasses.replace(config, steps=5) == config.replace(steps=5)
    with pytest.raises(ConfigError, match=r"--beta=1\.0: --defense=ifgsm does not read it"):
        config.replace(beta=1.0)
    with pytest.raises(ConfigError, match="--defense=mart: must be one of natural, "):
        config.replace(defense="mart")


def test_a_configuration_cannot_change_and_equal_ones_are_one_key():
    config = configure(lam=1)
    with pytest.raises((TypeError, ValueError)):
        config.settings["lam"] = 2.0
    assert {config: 1}[configure(lam=1.0)] == 1
    assert hash(config) != hash(configure(lam=2.0))
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("defense", DEFENSES)
def test_json_round_trip(defense):
    config = configure(defense=defense, seed=3, **preset("robust", 0.2) if defense == "e2sad" else {})
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lambda": 1.0}, "unknown setting 'lambda'"),
        ({"steps": "5"}, "--steps='5': must be of type int"),
        ({"defense": "natural", "lam": 0.1}, "--lam=0.1: --defense=natural does not read it"),
        ({"defense": None}, "--defense=None: must be of type str"),
        ({"settings": 1}, "unknown setting 'settings'"),
        ({3: 1}, "unknown setting '3'"),
        ([], "the settings are .*; they must be given by name"),
    ],
)
def test_json_that_is_no_configuration_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Config.from_json(values)


# --- identity


def test_identity_is_what_changes_the_trained_network():
    one = Config()
    for changes in ({"lam": 0.3}, {"seed": 1}, {"precision": "bf16"}, {"validation_examples": 5}, {"defense": "fgsm"}):
        assert one.replace(**changes).digest() != one.digest()
    for changes in ({"steps": 5}, {"workdir": "x"}, {"eval_examples": 5}, {"data_dir": "d"}, {"resume": False}):
        assert one.replace(**changes).digest() == one.digest()
    assert one.default_workdir() == f"runs/mnist-e2sad-{one.digest()}"


def test_the_name_of_a_run_is_the_same_in_later_versions():
    """Else the same command, after an update, would train anew in another folder."""
    assert Config().digest() == "2e1cfb15"
    assert configure(defense="pgd", eps1=0.2).digest() == "63a9a0a7"
    assert configure(defense="pgd", eps1=0.2, training_loss="qub").digest() != "63a9a0a7"


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"lam": 1}, {"lam": 1.0}),
        ({"eps1": 0, "eps2": 0.0}, {"eps1": -0.0, "eps2": 0}),
        ({"soft_label": False}, {"soft_label": False, "delta": 0.1}),
        ({"defense": "natural"}, {"defense": "natural", "eps_warmup": 0.5}),
        ({"defense": "input_gradient"}, {"defense": "input_gradient", "eps_warmup": 9}),
        ({"attack_steps": 30, "defense": "pgd"}, {"defense": "pgd"}),
    ],
)
def test_equal_runs_have_one_name(one, other):
    assert configure(**one).digest() == configure(**other).digest()


def test_the_length_of_a_run_is_part_of_what_stretches_over_it():
    usual = Config().identity()
    assert "steps" not in usual
    for changes in ({"eps_warmup": 0.25}, {"schedule": "cosine"}):
        assert Config(**changes, steps=7).identity() == {**usual, **changes, "steps": 7}
    assert Config(schedule="cosine", epochs=2.0).identity() == {**usual, "schedule": "cosine", "epochs": 2.0}
    assert Config(eps_warmup=3).identity() == {**usual, "eps_warmup": 3.0}


def test_settings_without_effect_do_not_make_another_run():
    robust = preset("robust", 0.3)
    one = configure(**robust)
    assert configure(**robust, first_step_size=0.1).digest() == one.digest()
    assert configure(**{**robust, "random_start": False}).digest() == one.digest()
    step = configure(**robust | {"first_point": "step"})
    assert (
        configure(**robust | {"first_point": "step", "first_step_size": 0.1}).digest() != step.digest() != one.digest()
    )


def test_a_preset_is_refused_by_name():
    assert preset("paper", 0.3) == {}
    assert configure(**preset("robust", 0.3)).settings["eps2"] == pytest.approx(0.15)
    with pytest.raises(ConfigError, match="--preset=best: must be one of robust, robust2, paper"):
        preset("best", 0.3)


def test_budgets_of_the_l2_ball_may_be_longer_than_the_range():
    """And a run in the l-infinity ball keeps the folder that it had before there was a choice."""
    config = configure(defense="pgd", norm="l2", eps1=2.0)
    assert config.norm == "l2"
    assert config.identity()["norm"] == "l2"
    assert "norm" not in configure(defense="pgd").identity()
    with pytest.raises(ConfigError, match=r"--eps1=2\.0: must be in \[0, 1\.0\]"):
        configure(defense="pgd", eps1=2.0)
    with pytest.raises(ConfigError, match=r"--norm='?l1'?: must be one of linf, l2"):
        configure(defense="pgd", norm="l1")
    with pytest.raises(ConfigError, match=r"--norm='?l2'?: --defense=natural does not read it"):
        configure(defense="natural", norm="l2")
