"""What results.json, results.md and a model card say, on made-up outcomes."""

import json

import numpy as np
import pytest

from e2sad_jax.evaluation import SUITES, Outcome
from e2sad_jax.reporting import card, results
from e2sad_jax.reporting.results import Best
from e2sad_jax.training import configure

MNIST = {
    "name": "mnist",
    "version": "3.0.1",
    "train_examples": 60_000,
    "test_examples": 10_000,
    "image_shape": [28, 28, 1],
    "num_classes": 10,
    "sha256": "0123456789abcdef" * 4,
}


def made(count):
    """An outcome with the first `count` images correct, all of class 0."""
    correct = np.arange(10_000) < count
    return Outcome(correct, np.where(correct, 0, 1).astype(np.int32))


def build(suite, correct=9_000, best=None, **changes):
    """Results of a run that classifies the first `correct` images correctly; `best`: step and that number of the best."""

    def outcomes(correct):
        return {attack.name: made(correct) for attack in SUITES[suite]}

    about = {"classes": 10, "steps": 30_000, "parameters": 1, "train_seconds": 1.0}
    about["best"] = best and Best(best[0], "500 training images", outcomes(best[1]))
    return results.build(configure(**changes), MNIST, SUITES[suite], outcomes(correct), **about)


@pytest.mark.parametrize(("suite", "shown"), [("mnist", 5), ("svhn", 1), ("digits", 2)])
def test_the_papers_numbers_are_shown_for_its_own_attacks_alone(suite, shown):
    """IFGSM-10 has another budget in each suite; clean, and FGSM 0.3 on the digits, mean the same everywhere."""
    rows = build(suite)["attacks"]
    with_paper = {row["name"] for row in rows if row["paper"] is not None}
    assert len(with_paper) == shown
    assert ("IFGSM-10" in with_paper) == (suite == "mnist")
    assert "PGD-40" not in with_paper


def test_the_worst_case_counts_images_correct_under_every_attack():
    suite = SUITES["digits"]
    outcomes = {attack.name: made(9_000 - 100 * i) for i, attack in enumerate(suite)}
    built = results.build(configure(), MNIST, suite, outcomes, classes=10, steps=1, parameters=1, train_seconds=1.0)
    assert built["worst_case_accuracy"] == pytest.approx(0.9 - 0.01 * (len(suite) - 1))
    assert built["config"]["lam"] == 0.1
    assert not {"workdir", "data_dir", "resume"} & set(built["config"])


def test_nan_logits_are_said_in_every_report():
    fine = build("mnist")
    broken = {**fine, "attacks": [{**row, "nan": 2 * (row["kind"] == "pgd")} for row in fine["attacks"]]}
    said = "2 of 10,000 images have NaN logits under PGD-40: they count as misclassified."
    assert f"e2sad: {said}" in results.summary({"e2sad": broken})
    assert f"- e2sad: {said}" in results.markdown({"e2sad": broken})
    assert f"- {said}" in card.model_card(broken)
    assert "NaN" not in results.markdown({"e2sad": fine}) + card.model_card(fine)
    outcome = Outcome(np.array([True, False]), np.array([0, -1], np.int32))
    assert results._measured(SUITES["mnist"][:1], {"clean": outcome})["attacks"][0]["nan"] == 1


def test_results_md():
    text = results.markdown({"natural": build("mnist", 5_000, defense="natural"), "e2sad": build("mnist")})
    assert text.startswith("# mnist: accuracy on all 10,000 test images, 30,000 training steps\n")
    assert "| IFGSM-30 (eps 0.3, step eps/30) | 0.5000 | 0.0930 | 0.9000 | 0.8633 |" in text
    assert "- natural: the paper's numbers are from its Table 1.\n" in text
    assert "The gradient of its Eq. 7 is zero" in text
    assert "weak; PGD is stronger" in text
    assert f"- Command: `{build('mnist')['command']}`" in text
    part = {**build("mnist"), "examples": 500, "classes": 9, "paper": "the paper has no such model"}
    text = results.markdown({"e2sad": part})
    assert "mnist: accuracy on 500 of 10,000 test images, 9 of 10 classes, 30,000 training steps" in text
    assert "- e2sad: not compared with the paper: the paper has no such model.\n" in text


def test_a_best_checkpoint_apart_has_a_column():
    natural = build("mnist", 5_000, (30_000, 5_000), defense="natural")
    e2sad = build("mnist", 9_000, (1_500, 9_500))
    assert all("paper" not in row for row in e2sad["best"]["attacks"]), "the paper's are for the last alone"
    text = results.markdown({"natural": natural, "e2sad": e2sad})
    assert "| attack | natural | natural, paper | e2sad | e2sad, paper | e2sad, best (step 1,500) |\n" in text
    assert "| IFGSM-30 (eps 0.3, step eps/30) | 0.5000 | 0.0930 | 0.9000 | 0.8633 | 0.9500 |" in text
    assert "| all attacks combined | 0.5000 |  | 0.9000 |  | 0.9500 |" in text
    assert "- natural: the last checkpoint is also the best by PGD-10 on 500 training images.\n" in text
    assert "- e2sad: the checkpoint of step 1,500 is the best by PGD-10 on 500 training images.\n" in text
    lines = results.summary({"natural": natural, "e2sad": e2sad}).splitlines()
    assert lines[2].endswith("  e2sad, paper  e2sad, best (step 1,500)")
    assert len({len(line) for line in lines[2:-2] if not line.startswith("all attacks")}) == 1, "aligned"
    assert lines[-1].startswith("e2sad: the checkpoint of step 1,500")


def test_several_seeds_are_their_mean_and_standard_deviation():
    by_seed = [
        {"natural": build("digits", seed=seed), "e2sad": build("digits", correct, (20_000, correct + 300), seed=seed)}
        for seed, correct in ((3, 9_000), (4, 9_100), (5, 9_500))
    ]
    table = results.of_seeds(by_seed)
    assert table.columns == ["attack", "natural", "e2sad", "e2sad, best"]
    assert table.rows[-1] == ("all attacks combined", "0.9000 ± 0.0000", "0.9200 ± 0.0265", "0.9500 ± 0.0265")
    by_seed[0]["e2sad"]["best"] = None
    assert results.of_seeds(by_seed).rows[-1][3] == "0.9400 ± 0.0400", "its last counts"
    assert table.notes[0] == "Mean ± standard deviation over 3 runs, of seeds 3, 4, 5."


def test_a_run_without_a_best_checkpoint_says_nothing_of_one():
    made = build("mnist", defense="natural")
    assert made["best"] is None
    assert results.about_best({"natural": made}) == []
    assert "checkpoint" not in results.markdown({"natural": made})


def test_the_files_of_a_workdir(tmp_path):
    before, own = build("mnist", 5_000, defense="natural"), build("mnist", 9_000, (1_500, 9_500))
    outcomes = {attack.name: made(9_000) for attack in SUITES["mnist"]}
    best = Best(1_500, "500 training images", {name: made(9_500) for name in outcomes})
    results.write(tmp_path, own, outcomes, best, before={"natural": before})
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(own))
    assert (tmp_path / "results.md").read_text() == results.markdown({"natural": before, "e2sad": own})
    assert (tmp_path / "model_card.md").read_text() == card.model_card(own)
    with np.load(tmp_path / "outcomes.npz") as arrays:
        assert list(arrays["attacks"]) == list(outcomes)
        assert arrays["correct"].shape == arrays["best_prediction"].shape == (len(outcomes), 10_000)
        assert (arrays["correct"].sum(), arrays["best_correct"].sum()) == (len(outcomes) * 9_000, len(outcomes) * 9_500)


def test_an_attack_at_its_own_step_is_shown_without_one():
    row = {"kind": "pgd", "name": "PGD-5", "eps": 0.1, "steps": 5, "step_size": None}
    assert results._attack_name(row) == "PGD-5 (eps 0.1, random start)"


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"ema": 0.999}, "--ema=0.999"),
        ({"memory": "int8"}, "--memory=int8"),
        ({"norm": "l2"}, "--norm=l2"),
        ({"first_step_size": 0.1}, "--first_step_size=0.1"),
        ({"defense": "pgd", "training_loss": "qub"}, "--training_loss=qub"),
    ],
)
def test_a_model_card_names_settings_that_a_runs_name_leaves_out_at_their_defaults(changes, flag):
    assert flag in card.model_card(build("mnist", **changes))
    plain = card.model_card(build("mnist", defense=changes.get("defense", "e2sad")))
    assert flag.split("=")[0] not in plain


@pytest.mark.parametrize("changes", [{"memory": "int8"}, {"norm": "l2"}])
def test_a_run_that_the_paper_does_not_have_is_not_compared_with_it(changes):
    paper = build("mnist", **changes)["paper"]
    assert "its setting is not the paper's: " + " ".join(*changes.items()) in paper
    assert build("mnist")["paper"].startswith("Table")


def test_a_model_card_holds_what_a_number_needs():
    """Attack, budget, steps, step size, restarts, images; and the settings, as flags that make the same run again."""
    made = build("mnist", 400, (1_500, 9_500), batch_size=64, soft_label=False, eps_warmup=0.5, clip_second=True)
    text = card.model_card({**made, "examples": 2_500})
    assert text.startswith("# Model card: e2sad on mnist\n")
    assert "On 2,500 of 10,000 test images, 10 of 10 classes, with their true labels" in text
    assert "| attack | budget | steps | step size | restarts | accuracy | best checkpoint, step 1,500 |\n" in text
    assert "| PGD-40 | 0.3 | 40 | 0.02 | 1 | 0.0400 | 0.9500 |\n" in text
    assert "| IFGSM-30 | 0.3 | 30 | 0.01 | 1 | 0.0400 | 0.9500 |\n" in text
    assert "| all attacks combined |  |  |  |  | 0.0400 | 0.9500 |\n" in text
    assert "is up to 0.010." in text
    assert "not robust at these budgets" in text
    assert "not robust" not in card.model_card(build("mnist", 9_000))
    assert "is broken" not in text
    distilled = {**made, "config": {**made["config"], "defense": "distillation"}}
    assert "- This defense is broken (Carlini and Wagner, 2016, https://arxiv.org/abs/1607.04311)" in card.model_card(
        distilled
    )
    flags = text.split("steps of 64, `")[1].split("`")[0].split()
    assert sorted(flags) == [
        *(
            "--batch_size=64",
            "--clip_second",
            "--defense=e2sad",
            "--eps_warmup=0.5",
            "--nosoft_label",
            "--preset=paper",
        ),
    ]


def test_a_card_has_every_setting_that_had_an_effect():
    config = configure(defense="natural", optimizer="sgd", nesterov=True, augment="crop", crop_padding=2, momentum=0.8)
    flags = card._flags({**config.to_json(), "cutout_size": 3})
    assert {"--optimizer=sgd", "--nesterov", "--momentum=0.8", "--augment=crop", "--crop_padding=2"} <= set(flags)
    assert not any("cutout" in flag for flag in flags), "of which there is none"
