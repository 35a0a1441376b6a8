"""The paper's tables against the reference files, and which runs may be compared with them."""

import csv

import pytest

from e2sad_jax.reporting import paper_numbers
from e2sad_jax.training import Config


def lines_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


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
    for line in lines_of(shared("paper/table1_mnist_whitebox.csv")):
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
    lines = lines_of(shared("paper/table3_svhn_whitebox.csv"))
    names = ["clean", "FGSM 24/255", "IFGSM-10", "IFGSM-20", "IFGSM-30"]
    columns = {"natural": "natural", "fgsm": "fgsm_at", "ifgsm": "ifgsm_at_k10", "e2sad": "e2sad"}
    for name, line in zip(names, lines, strict=True):
        for defense, column in columns.items():
            assert ours("svhn", defense)[name] == float(line[column])


@pytest.mark.parametrize("defense", ["natural", "fgsm", "e2sad"])
def test_a_run_of_the_papers_setting_is_compared(defense):
    settings = Config(defense=defense, **({"eps1": 0.3} if defense == "fgsm" else {})).to_json()
    column, why = paper_numbers.comparable(settings, "mnist", 30_000, True)
    assert why == ""
    assert column.table == "Table 1"
    assert column.setting["soft_label"]
    if defense == "e2sad":
        assert column.accuracy["IFGSM-30"] == 0.8633


@pytest.mark.parametrize(
    ("changes", "about", "reason"),
    [
        ({}, {"steps": 2_000}, "steps 2000 (paper: 30000)"),
        ({"lam": 1.0}, {}, "lam 1.0 (paper: 0.1)"),
        ({"soft_label": False}, {}, "soft_label False (paper: True)"),
        ({"second_step": "noise"}, {}, "second_step noise"),
        ({"schedule": "cyclic"}, {}, "schedule cyclic"),
        ({"eps_warmup": 9.0}, {}, "eps_warmup 9"),
        ({"random_start": True}, {}, "random_start True"),
        ({"validation_examples": 100}, {}, "100 training images held out (paper: 0)"),
        ({}, {"full_test_set": False}, "part of the test set"),
        ({}, {"data": "digits"}, "the paper has no e2sad model on digits"),
        ({"defense": "hamm"}, {}, "the paper has no hamm model on mnist"),
    ],
)
def test_another_setting_is_not_compared_and_the_reason_is_given(changes, about, reason):
    settings = {**Config().to_json(), **changes}
    column, why = paper_numbers.comparable(
        settings, **{"data": "mnist", "steps": 30_000, "full_test_set": True, **about}
    )
    assert column is None
    assert reason in why
