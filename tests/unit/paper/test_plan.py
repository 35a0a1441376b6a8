"""What is planned, held against the paper."""

import dataclasses
import re

from e2sad_jax.reporting import paper_numbers
from experiments.paper import plan

LAMBDAS = plan.LAMBDAS  # the fixtures have fewer


def test_full_scale_is_the_papers_setting_to_the_letter():
    full = plan.SCALES["full"]
    entries = plan.table_1(full, {})
    assert [(e.name, e.label) for e in entries[:-1]] == [
        (name, label) for name in ("natural", "FGSM 0.3", "FGSM 0.4", "IFGSM 0.3") for label in ("hard", "soft")
    ] + [("e2SAD", "soft")]
    for entry in entries[:-1]:
        column, why_not = paper_numbers.comparable(
            entry.config.to_json(), "mnist", entry.config.total_steps(60_000), True
        )
        assert column is not None, why_not
        assert column.accuracy == entry.paper
    hamm = entries[-1].config
    assert (hamm.defense, hamm.steps, hamm.batch_size, hamm.soft_label, hamm.eps1) == ("hamm", 30_000, 256, False, 0.3)
    for entry in plan.table_3(full, {}):
        assert entry.config.epochs == 20
        assert entry.config.total_steps(73_257) == 5_724
        column, why_not = paper_numbers.comparable(entry.config.to_json(), "svhn", 5_724, True)
        assert column is not None, why_not
    assert plan.table_3(full, {})[2].config.settings["attack_steps"] == 10


def test_small_scale_is_the_same_set_of_models_and_says_so():
    full, small = plan.SCALES["full"], plan.SCALES["small"]
    for table in (plan.table_1, plan.table_2, plan.table_3):
        pairs = list(zip(table(full, {}), table(small, {}), strict=True))
        for a, b in pairs:
            assert (a.key, a.paper) == (b.key, b.paper)
            changed = {k for k, v in a.config.identity().items() if b.config.identity()[k] != v}
            assert changed <= {"model", "batch_size"}
        said = small.describe(pairs[0][1].config, "mnist", 10_000)
        assert said.startswith("small scale: mnist, ")
        assert re.search(r"the paper: (30,000 steps|20 epochs) of 256", said)
    assert full.describe(full_config := plan.table_1(full, {})[0].config, "mnist", 10_000) == (
        "full scale: mnist, mnist_cnn, 30,000 steps of 256, all 10,000 test images"
    )
    assert "layers in bf16" in full.describe(dataclasses.replace(full_config, precision="bf16"), "mnist", 10_000)


def test_studies_change_one_setting_and_share_the_model_of_table_1(monkeypatch):
    monkeypatch.setattr(plan, "LAMBDAS", LAMBDAS)
    full = plan.SCALES["full"]
    base = next(e.config for e in plan.table_1(full, {}) if e.name == "e2SAD")
    for name, values, field in [
        ("second_step", {"total", "noise", "loss", "literal", "random"}, "second_step"),
        ("lam", {0.03, 0.1, 0.3, 1.0, 3.0}, "lam"),
        ("alpha", {0.2, 0.4, 0.6, 0.8}, "alpha"),
        ("labels", {True, False}, "soft_label"),
    ]:
        configs = [e.config for e in plan.study(name, full, {}) if e.config.defense == "e2sad"]
        assert {c.to_json()[field] for c in configs} == values
        assert base in configs
        for config in configs:
            assert config.replace(**{field: base.to_json()[field]}) == base


def test_the_papers_black_box_table(shared, lines_of):
    names = {
        "natural": "natural",
        "fgsm_at_0.3": "FGSM 0.3",
        "fgsm_at_0.4": "FGSM 0.4",
        "ifgsm_at_0.3_k30": "IFGSM 0.3",
    }
    lines = lines_of(shared("paper/table2_mnist_blackbox.csv"))
    assert len(lines) == 12
    for line in lines:
        substitute = (names[line["substitute"]], line["substitute_label"])
        for column, name in names.items():
            assert paper_numbers.transfer(substitute, (name, line["target_label"])) == float(line[column])
        assert paper_numbers.transfer(substitute, ("e2SAD", "soft")) == float(line["e2sad_soft"])
    assert paper_numbers.transfer(("e2SAD", "soft"), ("natural", "hard")) is None
    assert paper_numbers.transfer(("natural", "hard"), ("Hamm 0.3", "hard")) is None
