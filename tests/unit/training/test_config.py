"""Settings: the paper's values as defaults, and a clear refusal of each that cannot be right."""

import dataclasses
import math

import pytest

from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.reporting import paper_numbers
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


def csv(path):
    lines = [line.split(",") for line in path.read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def ours(data, defense, **setting):
    (column,) = [
        c
        for c in paper_numbers.COLUMNS
        if c.data == data and {"defense": defense, **setting}.items() <= dict(c.setting).items()
    ]
    return column.accuracy


TABLE_1 = {"fgsm_at_0.3": ("fgsm", 0.3), "fgsm_at_0.4": ("fgsm", 0.4), "ifgsm_at_0.3_k30": ("ifgsm", 0.3)}


def test_table_1_is_the_papers(shared):
    rows = {("clean", "", ""): "clean", ("fgsm", "0.3", "1"): "FGSM 0.3", ("fgsm", "0.4", "1"): "FGSM 0.4"}
    rows |= {("ifgsm", "0.3", "10"): "IFGSM-10", ("ifgsm", "0.3", "30"): "IFGSM-30"}
    checked = 0
    for line in csv(shared("paper/table1_mnist_whitebox.csv")):
        name, soft = rows[line["attack"], line["eps"], line["steps"]], line["train_label"] == "soft"
        for column, (defense, eps) in {"natural": ("natural", None), **TABLE_1}.items():
            setting = {"soft_label": soft} | ({} if eps is None else {"eps1": eps})
            assert ours("mnist", defense, **setting)[name] == float(line[column])
            checked += 1
        if soft:
            assert ours("mnist", "e2sad")[name] == float(line["e2sad"])
            checked += 1
    assert checked == 45


def test_table_3_is_the_papers(shared):
    lines = csv(shared("paper/table3_svhn_whitebox.csv"))
    names = ["clean", "FGSM 24/255", "IFGSM-10", "IFGSM-20", "IFGSM-30"]
    columns = {"natural": "natural", "fgsm": "fgsm_at", "ifgsm": "ifgsm_at_k10", "e2sad": "e2sad"}
    for name, line in zip(names, lines, strict=True):
        for defense, column in columns.items():
            assert ours("svhn", defense)[name] == float(line[column])


def test_the_papers_numbers_stand_only_beside_the_papers_setting():
    config = Config()
    column, why = paper_numbers.beside(config, "mnist", 30_000, True)
    assert column is not None
    assert column.accuracy["IFGSM-30"] == 0.8633
    assert why == ""
    for changes, data, steps, full, words in [
        ({}, "mnist", 2_000, True, "steps 2000 (paper: 30000)"),
        ({"lam": 1.0}, "mnist", 30_000, True, "lam 1.0 (paper: 0.1)"),
        ({"soft_label": False}, "mnist", 30_000, True, "soft_label False (paper: True)"),
        ({"second_step": "noise"}, "mnist", 30_000, True, "second_step noise"),
        ({"validation_examples": 100}, "mnist", 30_000, True, "100 training images held out"),
        ({}, "mnist", 30_000, False, "part of the test set"),
        ({}, "digits", 30_000, True, "no e2sad model on digits"),
        ({"defense": "hamm"}, "mnist", 30_000, True, "no hamm model on mnist"),
    ]:
        column, why = paper_numbers.beside(dataclasses.replace(config, **changes), data, steps, full)
        assert column is None
        assert words in why
