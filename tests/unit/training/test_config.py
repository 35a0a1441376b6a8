"""Settings: the paper's values as defaults, and a clear refusal of each that cannot be right."""

import dataclasses
import math

import pytest

from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.training.config import Config, check, range_of


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("alpha", 1.5, "--alpha=1.5: must be in [0, 1]"),
        ("alpha", math.nan, "--alpha=nan: must be in [0, 1]"),
        ("lam", -0.1, "--lam=-0.1: must be at least 0"),
        ("lam", math.inf, "--lam=inf: must be at least 0"),
        ("steps", 0, "--steps=0: must be at least 1"),
        ("batch_size", 0, "--batch_size=0: must be at least 1"),
        ("batch_size", 2.5, "--batch_size=2.5: must be of type int"),
        ("learning_rate", 0.0, "--learning_rate=0.0: must be above 0"),
        ("eps1", -0.3, "--eps1=-0.3: must be at least 0"),
        ("eps1", 24.0, "--eps1=24.0: must be in [0, 1.0]"),
        ("eps2", 1.5, "--eps2=1.5: must be in [0, 1.0]"),
        ("delta", 1.0, "--delta=1.0: must be above 0, at most 0.999"),
        ("defense", "mart", "--defense=mart: must be one of natural, fgsm, ifgsm, pgd, hamm, e2sad, rs_fgsm, n_fgsm,"),
        ("schedule", "linear", "--schedule=linear: must be one of constant, cyclic, piecewise, cosine"),
        ("eps_warmup", -1.0, "--eps_warmup=-1.0: must be at least 0"),
        ("beta", -1.0, "--beta=-1.0: must be at least 0"),
        ("replays", 0, "--replays=0: must be at least 1"),
        ("second_step", "entropy", "--second_step=entropy: must be one of total, noise, loss, literal, random"),
        ("seed", -1, "--seed=-1: must be in [0, 4294967295]"),
        ("soft_label", 1, "--soft_label=1: must be of type bool"),
        ("transform", "zca", "--transform=zca: must be one of unit, standardize"),
        ("attack_steps", 0, "--attack_steps=0: must be at least 1"),
    ],
)
def test_a_bad_value_is_one_line_with_flag_value_and_range(name, value, words):
    with pytest.raises(ConfigError) as caught:
        Config(**{name: value})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, Error)


def test_every_number_has_a_range_and_every_setting_a_help():
    for field in dataclasses.fields(Config):
        assert field.metadata["help"]
        if type(field.default) in (int, float):
            assert range_of(field), field.name
            check(field, field.default)


def test_budgets_may_span_the_range_of_the_transform():
    assert Config(transform="standardize", eps1=2.0).eps1 == 2.0


def test_epochs_count_every_image():
    config = Config(epochs=20.0, batch_size=256)
    assert config.total_steps(73_257) == 5_724 == math.ceil(20 * 73_257 / 256)
    assert Config(steps=7).total_steps(73_257) == 7


def test_identity_is_what_changes_the_trained_network():
    one = Config()
    for changes in ({"lam": 0.3}, {"seed": 1}, {"precision": "bf16"}, {"validation_examples": 5}):
        assert dataclasses.replace(one, **changes).digest() != one.digest()
    for changes in ({"steps": 5}, {"workdir": "x"}, {"eval_examples": 5}, {"data_dir": "d"}, {"resume": False}):
        assert dataclasses.replace(one, **changes).digest() == one.digest()


def test_json_round_trip_and_refusals():
    config = Config(lam=0.25, defense="hamm")
    assert Config.from_json(dataclasses.asdict(config)) == config
    with pytest.raises(ConfigError, match="unknown setting 'lambda'"):
        Config.from_json({"lambda": 1.0})
    with pytest.raises(ConfigError, match="--steps='5': must be of type int"):
        Config.from_json({"steps": "5"})
