"""benchmarks.official: its arguments, and its page from made-up outcomes."""

import copy
import dataclasses
import importlib.util
import types

import numpy as np
import pytest

from benchmarks import official, official_page, official_sides
from benchmarks.results import provenance_of
from e2sad_jax import evaluation
from e2sad_jax._compile import pure
from e2sad_jax._io import read_json
from e2sad_jax.errors import ConfigError
from e2sad_jax.evaluation import FAB, STAGES, Model
from e2sad_jax.runs.folder import note_training

OF_MINE = "e2sad, 1,000 steps (mine), l-infinity, 0.2"
WEAKER = f"{OF_MINE}: ours leaves 0.5000, the official code 0.2500; ours may leave at most 0.01 more"
BALLS = ("0.3", "linf", "l1:0.3", "linf:0", "l2:much", "linf:nan")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"--workdir=: must name the folder of a run"),
        ({"workdir": ("run", "")}, r"--workdir=: must name the folder of a run"),
        ({"workdir": ("run", "other")}, r"--results=: must name a folder for the page of several runs"),
        *(
            ({"ball": (ball,)}, rf"--ball={ball}: must be a norm and a budget above 0, as linf:0\.3 or l2:2")
            for ball in BALLS
        ),
        ({"which": "newest"}, r"--which='?newest'?: must be .*last, best, average"),
        ({"judge": "train"}, r"--judge='?train'?: must be .*test, held_out"),
        (
            {"attacks": "apgd-ce,pgd"},
            r"--attacks=apgd-ce,pgd: 'pgd' must be one of apgd-ce, apgd-t, square, fab-t, apgd-dlr",
        ),
        ({"attacks": "square,"}, r"--attacks=square,: '' must be one of"),
        (
            {"noise": 0.1, "attacks": "fab-t"},
            "--attacks=fab-t: fab-t does not average over draws; .* apgd-ce, apgd-dlr",
        ),
        ({"noise": -1.0}, r"--noise=-1\.0: must be at least 0"),
        ({"examples": -1}, r"--examples=-1: must be at least 0"),
        ({"near": 0.5}, r"--near=0\.5: must be at least 1, or 0"),
        *(
            ({n: 0}, f"--{n}=0: must be at least 1")
            for n in ("apgd_steps", "targets", "fab_steps", "queries", "batch_size")
        ),
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_in_one_line(given, message):
    with pytest.raises(ConfigError, match=message) as told:
        official.Request(**({"workdir": ("run",)} if given else {}) | given)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("missing", "named"), [(("torch", "pyautoattack"), "torch and pyautoattack"), (("torch",), "torch")]
)
def test_packages_that_are_missing_are_named(monkeypatch, missing, named):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ConfigError, match=rf"^needs {named}, not installed here: pip install -e '\.\[bench\]'$"):
        official.run(official.Request(workdir=("run",)))


def test_the_effort_is_autoattacks_and_can_be_less():
    ce, targeted, square = STAGES
    assert official.Request(workdir=("run",)).stages(10) == [ce, targeted, square, FAB]
    less = official.Request(workdir=("run",), attacks="square,apgd-t", queries=7, apgd_steps=3)
    targeted, square = less.stages(5)
    assert (targeted.name, targeted.steps, targeted.targets) == ("APGD-T", 3, 4), "no more targets than wrong classes"
    assert (square.name, square.steps) == ("Square", 7)


@pytest.mark.usefixtures("unoptimized")
def test_our_side_has_the_time_of_each_attack(monkeypatch):
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(12, 3)).astype(np.float32), rng.uniform(size=(8, 2, 6, 1)).astype(np.float32)
    apply = pure(lambda params, z: z.reshape(len(z), -1) @ params)
    model = Model("linear", apply, w, x, (x.reshape(8, -1) @ w).argmax(1), batch_size=4)
    stages = [dataclasses.replace(STAGES[i], steps=4) for i in (0, 2)]
    own = official_sides.ours(model, stages, eps=0.3, norm="linf")
    assert len(own.seconds) == 2
    assert min(own.seconds) > 0
    assert own.standing[0].all()
    assert own.found.any()
    assert 0 < own.compiling[0] < own.seconds[0]
    left = int(own.standing[1].sum())
    assert (list(own.gradients), list(own.queries)) == ([8 * (4 + 1), 0], [0, left * 4]), "and that at the start"
    monkeypatch.setattr(evaluation.near, "LEAST", 1)
    near = official_sides.ours(model, stages, eps=0.01, norm="linf", near=1.0)
    assert 0 < near.queries[1] < 4 * int(near.standing[1].sum())


def test_a_run_is_attacked_in_its_own_ball_or_in_those_that_are_given():
    assert official.Request(workdir=("run",)).balls("l2", 0.5) == [("l2", 0.5)]
    assert official.Request(workdir=("run",), ball=("linf:0.3", "l2:2")).balls("l2", 0.5) == [
        ("linf", 0.3),
        ("l2", 2.0),
    ]


def side(*standing, seconds=(1.25, 2.0), compiling=(0.0, 0.0)):
    standing = [np.array(list(s)) == "1" for s in standing]
    return official_sides.Side(standing, seconds, compiling, (400, 0), (44, 9000), np.zeros((4, 2, 2, 1), np.float32))


@pytest.fixture
def result():
    theirs, own = side("1110", "0110", "0010"), side("1110", "1010", "1010", seconds=(0.5, 4.0), compiling=(0.25, 0))
    assert theirs.found.tolist() == [True, True, False, False]
    found = official_page.outcome(["APGD-CE", "Square"], {"official": theirs, "ours": own}, np.array([3, 5, 8, 9]))
    about = {"hardware": "CPU, 2 cores, Some CPU", "date": "2026-11-29 09:00 UTC", "commit": "abc123"}
    return {
        "command": "python -m benchmarks.official --workdir=run",
        "environment": {**about, "pyautoattack": "0.2.0", "torch": "2.13.0", "jax": "0.10.2"},
        **{
            "workdir": "runs/mine",
            "which": "last",
            "defense": "e2sad",
            "step": 1000,
            "trained": ["python -m experiments.digits", "python -m experiments.digits --steps=1000"],
            "data": "digits",
            "images": "4 of 355 test images",
        },
        **{"eps": 0.2, "norm": "linf", "logits_differ": 3e-7, "warnings": ["it seems to be a dynamic defense!"]},
        "effort": {"apgd_steps": 100, "targets": 9, "fab_steps": 100, "queries": 5000, "seed": 0},
        **found,
        "official_images": {"found": 2, "misclassified": 2, "outside": 0, "largest": 0.2},
        "our_images": {"found": 1, "misclassified": 1, "outside": 0, "largest": 0.2},
    }


def test_the_commands_that_trained_a_run_are_those_of_its_folder(tmp_path):
    for begun, command in ((0, "first"), (5, "second"), (7, "second")):
        note_training(tmp_path, {"from_step": begun, "to_step": begun + 5, "command": command})
    assert official_sides.trained_by(str(tmp_path)) == ["first", "second"]
    assert official_sides.trained_by(str(tmp_path / "elsewhere")) == []


def test_images_on_which_the_two_disagree_are_counted_and_named(result):
    clean, first, last = result["rows"]
    assert (clean["official"], clean["ours"], "official_seconds" in clean) == (0.75, 0.75, False)
    assert (first["official_alone"], first["ours_alone"], first["official"], first["ours"]) == (1, 1, 0.5, 0.5)
    assert (last["official_alone"], last["ours_alone"], last["official"], last["ours"]) == (1, 0, 0.25, 0.5)
    assert result["differ"] == [{"image": 3, "official": "APGD-CE", "ours": None}]


def test_the_page_holds_the_table_and_its_provenance(result):
    page = official_page.page([result])
    assert "| APGD-CE | 0.5000 | 0.5000 | 1 | 1 | 400 | 400 |  |  | 1.2 | 0.5 | 0.2 |" in page
    assert "| Square | 0.2500 | 0.5000 | 1 | 0 |  |  | 9,000 | 9,000 | 2.0 | 4.0 |  |" in page
    assert "4 of 355 test images of digits, last weights. APGD-CE (100 steps), Square (5,000 queries)." in page
    assert (
        "| e2sad, 1,000 steps (mine) | digits | l-infinity, 0.2 | 1 | 0.750 | 0.250 | 0.500 | 400 | 400 | 3 | 4 |"
        in page
    )
    assert "Of 2 adversarial images of the official code, JAX misclassifies 2; 0 lie outside the ball" in page
    assert "- Image 3: official APGD-CE, ours robust." in page
    assert (
        "Trained by `python -m experiments.digits`.\n\nTrained by `python -m experiments.digits --steps=1000`." in page
    )
    assert "- The official code warned: it seems to be a dynamic defense!" in page
    for content in (page, result):
        (about,) = provenance_of(content)
        assert (about["command"], about["commit"]) == ("python -m benchmarks.official --workdir=run", "abc123")


def test_a_random_network_is_judged_by_draws_of_its_own(result):
    asked = official.Request(workdir=("run",), noise=0.1, apgd_steps=7)
    assert (asked.version, asked.names) == ("rand", ["apgd-ce", "apgd-dlr"])
    assert [(stage.loss, stage.steps) for stage in asked.stages(10)] == [("ce", 7), ("dlr", 7)]
    judged = result | {"noise": 0.1, "judged": {"clean": 0.75, "official": 0.25, "ours": 0.255}}
    page = official_page.page([judged])
    assert (
        "other draws: 0.750 of the clean images are classified correctly, 0.250 after the official attacks, 0.255"
        in page
    )
    assert "| l-infinity, 0.2, noise 0.1 | 1 | 0.750 | 0.250 | 0.255 |" in page
    assert official_page.failures([judged]) == [], "the verdicts of one draw do not count"
    judged["judged"]["ours"] = 0.5
    assert official_page.failures([judged]) == [WEAKER.replace("0.2:", "0.2, noise 0.1:")]


def test_several_seeds_are_one_row_and_one_verdict(result):
    second = result | {"effort": result["effort"] | {"seed": 1}, "rows": copy.deepcopy(result["rows"])}
    second["rows"][-1].update(official=0.5, ours=0.25, ours_gradients=200)
    other = result | {"norm": "l2", "workdir": "runs/other"}
    page = official_page.page([result, other, second])
    row = "| digits | l-infinity, 0.2 | 2 | 0.750 | 0.375 ± 0.177 | 0.375 ± 0.177 | 400 | 500 | 3 | 4 |"
    assert row in page
    assert page.index("## e2sad, 1,000 steps (mine), l-infinity, 0.2, seed 1\n") > page.index(
        "(mine), l-infinity, 0.2\n"
    )
    assert official_page.failures([result, second]) == [], "no more on average"
    assert [len(group) for group in official_page.by_seed([result, other, second])] == [2, 1]
    again = second | {"question": "of other weights before"}
    assert [len(group) for group in official_page.by_seed([result, second, again])] == [2], "one of each seed"
    newer = second | {"environment": second["environment"] | {"torch": "2.14.1"}}
    assert [len(group) for group in official_page.by_seed([result, newer])] == [1, 1], "another version"
    less = second | {"effort": second["effort"] | {"queries": 10}}
    assert [len(group) for group in official_page.by_seed([result, less])] == [1, 1], "another effort"


@pytest.mark.parametrize("attacks", [("FAB-T",), ("APGD-CE", "FAB-T")])
def test_the_summary_tells_what_the_default_leaves_out(result, attacks):
    theirs, own = (side("1110", *["0110"] * len(attacks), seconds=(1.0, 2.0)[: len(attacks)]) for _ in "ab")
    rows = official_page.outcome(attacks, {"official": theirs, "ours": own}, np.arange(4))
    (row,) = official_page.summary([result | rows]).rows
    alone = len(attacks) == 1
    assert row[5:8] == ["0.500", None if alone else "0.500", "0.500"]
    assert row[11:] == (["1", None, "1"] if alone else ["3", "1", "3"])


def test_near_is_a_side_of_its_own(result):
    near = side("1110", "0110", "0110", seconds=(0.5, 1.0))
    sides = {name: side("1110", "0110", "0010") for name in ("official", "ours")} | {"near": near}
    found = {"found": 1, "misclassified": 1, "outside": 0, "largest": 0.2}
    rows = official_page.outcome(["APGD-CE", "Square"], sides, np.arange(4))
    result = result | rows | {"near": 2.0, "near_images": found}
    page = official_page.page([result])
    assert "| 0.250 | 0.250 | 0.500 | 400 | 400 | 400 | 3 | 3 | 2 |" in page
    assert "| Square | 0.2500 | 0.2500 | 0.5000 | 0 | 0 |" in page
    assert "- Of 1 of ours with near 2, PyTorch misclassifies 1; 0 lie outside the ball." in page
    assert official_page.failures([result]) == [WEAKER.replace("ours leaves", "ours, near leaves")]
    assert len(official_page.by_seed([result, {**result, "near": 1.5}])) == 2


def test_a_second_call_attacks_nothing_again_and_other_networks_stay(result, monkeypatch, tmp_path):
    made = []

    def answer(duel, asked, folder, before):
        name = f"{duel.workdir} {duel.eps}"
        if known := [one for one in before if one["question"] == name]:
            return known[0]
        made.append(name)
        return result | {"question": name, "workdir": duel.workdir}

    def duels(workdir, asked):
        return [types.SimpleNamespace(workdir=workdir, norm=norm, eps=eps) for norm, eps in asked.balls("", 0)]

    monkeypatch.setattr(official, "check_installed", lambda: None)
    monkeypatch.setattr(official, "failures", lambda results: [])
    monkeypatch.setattr(official, "_about", dict)
    monkeypatch.setattr(official, "_duels", duels)
    monkeypatch.setattr(official, "answer", answer)
    asked = official.Request(workdir=("a", "b"), ball=("linf:0.1", "l2:1"), results=str(tmp_path))
    official.run(asked)
    assert made == ["a 0.1", "a 1.0", "b 0.1", "b 1.0"]
    first = (tmp_path / "official.json").read_text()
    official.run(asked)
    assert len(made) == 4
    assert (tmp_path / "official.json").read_text() == first
    official.run(official.Request(workdir=("c",), ball=("l2:1",), results=str(tmp_path)))
    assert made[4:] == ["c 1.0"]
    there = read_json(tmp_path / "official.json")["results"]
    assert [one["question"] for one in there] == ["c 1.0", *made[:4]]


def test_an_image_outside_its_ball_and_a_weaker_worst_case_fail(result):
    assert official_page.failures([result]) == [WEAKER]
    result["rows"][-1]["ours"] = 0.26
    assert official_page.failures([result]) == []
    result["official_images"]["outside"] = 1
    assert official_page.failures([result]) == [
        "e2sad, 1,000 steps (mine), l-infinity, 0.2: official_images: 1 outside the ball"
    ]


def test_distances_are_those_of_the_norm():
    images = np.zeros((2, 2, 2, 1), np.float32)
    made = images.copy()
    made[1, 0, :, 0] = 3, -4
    assert official.distances(images, made, np.ones(2, bool), norm="linf").tolist() == [0, 4]
    assert official.distances(images, made, np.ones(2, bool), norm="l2").tolist() == [0, 5]
