"""What a comparison shows of its runs: rows of several commands, the table, the card, the picture; on made-up outcomes."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest

from e2sad_jax import data
from e2sad_jax.comparison import run as comparison
from e2sad_jax.comparison import show
from e2sad_jax.comparison.request import ENTRIES, Request
from e2sad_jax.comparison.run import run
from e2sad_jax.errors import ConfigError, Stopped
from e2sad_jax.reporting import provenance
from tests.unit.reporting.helpers import LITTLE, PRICES, no_more, quiet


def test_nan_logits_are_said_in_the_table_and_its_lines(tiny_data, made_up, monkeypatch, tmp_path):
    said, lines, made = "2 of 10 images have NaN logits: they count as misclassified", [], comparison.evaluate_model

    def broken(request, config, dataset):
        outcome = made(request, config, dataset)
        return {**outcome, "last": {**outcome["last"], "nan": said if config.defense == "natural" else ""}}

    monkeypatch.setattr(comparison, "evaluate_model", broken)
    paths = {"workdir": str(tmp_path / "runs"), "results": str(tmp_path)}
    run(Request(entry=("natural", "RS-FGSM"), data="tiny.npz", **paths, **LITTLE), lines.append)
    assert f"natural: last checkpoint, seed 0: {said}" in lines
    assert f"- natural: last checkpoint, seed 0: {said}." in (tmp_path / "compare.md").read_text()
    assert sum("NaN" in line for line in lines) == 1


def test_rows_not_asked_for_again_stay_with_their_origin(tiny_data, tmp_path, made_up, monkeypatch):
    paths = {"workdir": str(tmp_path / "runs"), "results": str(tmp_path)}
    request = Request(entry=("RS-FGSM",), data="tiny.npz", **paths, **LITTLE)
    natural = dataclasses.replace(request, entry=("natural",))
    (rs_fgsm,) = run(request, quiet)["rows"]
    result = run(natural, quiet)
    assert [row["name"] for row in result["rows"]] == ["natural", "RS-FGSM"]
    kept = result["rows"][1]
    assert {**kept, "origin": 0} == {**rs_fgsm, "origin": 0}
    assert kept["origin"]["command"] == result["command"]
    assert json.loads((tmp_path / "compare.json").read_text())["rows"] == result["rows"]
    then = {**kept["origin"], "environment": {**result["environment"], "date": "then"}}
    page = show.markdown({**result, "rows": [result["rows"][0], {**kept, "origin": then}]})
    assert page.count("- Trained and attacked: `") == 2
    assert "Trained at commit" not in page
    assert ", then, commit " in page
    assert ": RS-FGSM.\n" in page

    again = run(request, quiet)
    assert [row["name"] for row in again["rows"]] == ["natural", "RS-FGSM"]
    assert "origin" not in again["rows"][1], "asked for, so its own"
    monkeypatch.chdir(tmp_path)
    moved = dataclasses.replace(natural, workdir="runs", results=".", data_dir="elsewhere")
    assert len(run(moved, quiet)["rows"]) == 2, "wherever it lies"


def test_rows_may_have_numbers_of_seeds_of_their_own(tiny_data, tmp_path, made_up):
    """Three for the leading ones, one for the others, in one table."""
    one = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    run(one, quiet)
    result = run(dataclasses.replace(one, entry=("RS-FGSM",), seeds=3), quiet)
    assert [(row["name"], row["seeds"], len(row["runs"])) for row in result["rows"]] == [
        ("natural", 1, 1),
        ("RS-FGSM", 3, 3),
    ]
    page = show.markdown(result)
    assert "1 to 3 seeds, " in page
    (natural,) = (line for line in page.splitlines() if line.startswith("| natural"))
    (rs_fgsm,) = (line for line in page.splitlines() if line.startswith("| RS-FGSM"))
    assert (natural.count(" .. "), rs_fgsm.count(" .. ")) == (0, 2)
    assert "At most 3 seeds." in show.card(result)


def test_seeds_that_were_measured_are_not_trained_again(tiny_data, tmp_path, made_up):
    request = Request(entry=("RS-FGSM",), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    two = run(dataclasses.replace(request, seeds=2), quiet)["rows"][0]
    del made_up[:]
    said = []
    three = run(dataclasses.replace(request, seeds=3), said.append)["rows"][0]
    assert [config.seed for config in made_up] == [2], "the new one alone"
    assert [{**run, "origin": 0} for run in three["runs"][:2]] == [{**run, "origin": 0} for run in two["runs"]]
    assert ["origin" in run for run in three["runs"]] == [True, True, False]
    assert (three["seeds"], [run["seed"] for run in three["runs"]]) == (3, [0, 1, 2])
    assert three["last"]["highest"] == pytest.approx(two["last"]["highest"] + 0.1), "a mean and range of all three"
    assert said[1] == f"RS-FGSM, seed 1: measured before ({tmp_path / 'compare.json'})"
    one = run(request, quiet)["rows"][0]
    assert [run["last"] for run in one["runs"]] == [run["last"] for run in three["runs"]], "who asks for one loses none"
    pathlib.Path(made_up[0].workdir).mkdir()
    run(dataclasses.replace(request, seeds=3), quiet)
    assert [config.seed for config in made_up] == [2, 2], "what lies in its folder counts before what is noted of it"
    run(dataclasses.replace(request, queries=6), quiet)
    assert [config.seed for config in made_up] == [2, 2, 0], "attacks of its own"


def test_a_comparison_that_is_stopped_keeps_the_seeds_that_were_measured(tiny_data, tmp_path, made_up, monkeypatch):
    """Those of entries that it has not come to, too."""
    request = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    run(dataclasses.replace(request, seeds=2), quiet)
    made = comparison.evaluate_model

    def stopped(request, config, dataset):
        if config.defense == "rs_fgsm":
            raise Stopped("stopped", 2)
        return made(request, config, dataset)

    monkeypatch.setattr(comparison, "evaluate_model", stopped)
    with pytest.raises(Stopped):
        run(dataclasses.replace(request, seeds=3), quiet)
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert [(row["name"], len(row["runs"])) for row in rows] == [("natural", 3), ("RS-FGSM", 2)]


def test_each_seed_keeps_the_command_that_measured_it(tiny_data, tmp_path, made_up, monkeypatch):
    request = Request(entry=("natural",), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    monkeypatch.setattr(provenance, "command", lambda: "the first command")
    run(request, quiet)
    monkeypatch.setattr(provenance, "command", lambda: "the second command")
    result = run(dataclasses.replace(request, seeds=2), quiet)
    run(dataclasses.replace(request, entry=("RS-FGSM",)), quiet)
    for page in (show.markdown(result), (tmp_path / "compare.md").read_text()):
        assert ["Trained and attacked: `the first command`" in page, "`the second command`" in page] == [True, True]


@pytest.mark.parametrize("change", [{"queries": 6}, {"steps": 4}, "damaged", "other images"])
def test_a_file_whose_rows_are_left_out_is_set_aside(change, tiny_data, tmp_path, made_up, monkeypatch):
    request = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    run(dataclasses.replace(request, seeds=2), quiet)
    path, said = tmp_path / "compare.json", []
    if change == "damaged":
        path.write_bytes(path.read_bytes()[:-100])
    if change == "other images":
        monkeypatch.setattr(data, "load", lambda *args: dataclasses.replace(tiny_data, x_test=255 - tiny_data.x_test))
    content = path.read_bytes()
    run(dataclasses.replace(request, entry=("natural",), **(change if isinstance(change, dict) else {})), said.append)
    (kept,) = tmp_path.glob("compare-*.json")
    assert kept.read_bytes() == content
    assert f"{path}: what it had is in {kept}" in said
    if isinstance(change, dict):
        ((name, value),) = change.items()
        told = f"{path}: of another question (--{name}={LITTLE[name]} there, {value} now); its rows are left out"
        assert told in said
    run(dataclasses.replace(request, entry=("natural",), **(change if isinstance(change, dict) else {})), quiet)
    assert list(tmp_path.glob("compare-*.json")) == [kept], "once"


def test_two_comparisons_at_once_lose_no_row(tiny_data, tmp_path, made_up, monkeypatch):
    request = Request(entry=("natural", "PGD-3"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    made = comparison.evaluate_model

    def meanwhile(asked, config, dataset):
        if config.defense == "pgd":  # another process begins and ends
            monkeypatch.setattr(comparison, "evaluate_model", made)
            run(dataclasses.replace(request, entry=("RS-FGSM",)), quiet)
        return made(asked, config, dataset)

    monkeypatch.setattr(comparison, "evaluate_model", meanwhile)
    assert [row["name"] for row in run(request, quiet)["rows"]] == ["natural", "RS-FGSM", "PGD-3"]
    assert not list(tmp_path.glob("compare-*.json"))


def test_entries_of_the_same_settings_are_one_row_by_the_name_asked_for(tiny_data, tmp_path, made_up):
    names = "e2SAD, robust, first point by a step", "e2SAD, robust2"
    first, second = (Request(entry=(name,), data="tiny.npz", workdir=str(tmp_path), **LITTLE) for name in names)
    run(first, quiet)
    (row,) = run(dataclasses.replace(second, seeds=2), quiet)["rows"]
    assert (row["name"], len(row["runs"])) == ("e2SAD, robust2", 2)
    assert [config.seed for config in made_up] == [0, 1]


def test_rows_of_another_question_are_left_out(tiny_data, tmp_path, made_up, monkeypatch, capsys):
    request = Request(entry=("RS-FGSM",), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    natural = dataclasses.replace(request, entry=("natural",))

    def names(asked, say=quiet):
        run(request, quiet)
        return [row["name"] for row in run(asked, say)["rows"]]

    assert names(natural) == ["natural", "RS-FGSM"]
    said = []
    with monkeypatch.context() as changed:
        run(request, quiet)
        changed.setattr(data, "load", lambda *args: dataclasses.replace(tiny_data, x_test=255 - tiny_data.x_test))
        assert [row["name"] for row in run(natural, said.append)["rows"]] == ["natural"], "other test images"
    assert "RS-FGSM: an earlier row, of other images or attacks; left out" in said
    with monkeypatch.context() as changed:
        run(request, quiet)
        recipe = {**ENTRIES, "RS-FGSM": {"defense": "rs_fgsm", "attack_step_size": 0.5}}
        changed.setattr("e2sad_jax.comparison.request.ENTRIES", recipe)
        assert [row["name"] for row in run(natural, quiet)["rows"]] == ["natural"], "another recipe by now"
    assert names(dataclasses.replace(natural, queries=6)) == ["natural"], "other attacks, another table"
    (tmp_path / "compare.json").write_text("{}")
    capsys.readouterr()
    assert [row["name"] for row in run(natural, quiet)["rows"]] == ["natural"]
    assert "compare.json is unusable" in capsys.readouterr().err


def test_rows_of_a_file_older_than_a_setting_count_where_it_did_what_was_done_then(tiny_data, tmp_path, made_up):
    request = Request(
        entry=("natural",), data="tiny.npz", workdir=str(tmp_path), **{**LITTLE, "delta": 0.0, "eps_scale": 1.0}
    )
    before = run(request, quiet)
    for name in ("delta", "eps_scale", "ema", "last_only"):
        del before["request"][name]
    for name in ("optimizer", "augment", "ema"):
        del before["rows"][0]["settings"][name]
    for asked, names in (
        (dataclasses.replace(request, entry=("RS-FGSM",)), ["natural", "RS-FGSM"]),
        (dataclasses.replace(request, entry=("RS-FGSM",), delta=0.25), ["RS-FGSM"]),
    ):
        (tmp_path / "compare.json").write_text(json.dumps(before))
        assert [row["name"] for row in run(asked, quiet)["rows"]] == names
    said, (row,) = [], before["rows"]
    for changed in ({"learning_rate": 1.0}, {"forgotten": 1}):
        rows = [{**row, "settings": {**row["settings"], **changed}}]
        (tmp_path / "compare.json").write_text(json.dumps({**before, "rows": rows}))
        other = dataclasses.replace(request, entry=("RS-FGSM",))
        assert [row["name"] for row in run(other, said.append)["rows"]] == ["RS-FGSM"]
    assert said.count("natural: an earlier row, of other settings; left out") == 2


def test_weights_that_training_began_with_are_named(tiny_data, tmp_path, made_up):
    request = Request(entry=("natural",), data="tiny.npz", results=str(tmp_path), init_from="runs/n", **LITTLE)
    run(request, quiet)
    for name in ("compare.md", "compare_card.md"):
        assert "begun with the weights of `runs/n` (their FLOPs are not counted)" in (tmp_path / name).read_text()


def test_a_natural_step_perturbs_no_weights(tiny_data, tmp_path, made_up, monkeypatch):
    """The unit of all prices, whatever the first row's settings are."""
    monkeypatch.setattr(comparison, "step_flops", lambda config, *about: 2.0 + config.awp)
    name = "e2SAD, robust, perturbed weights"
    result = run(Request(entry=(name,), data="tiny.npz", workdir=str(tmp_path), **LITTLE), quiet)
    assert result["rows"][0]["step_flops"] == 2.005
    assert result["natural_step_flops"] == 2.0


def test_show_counts_prices_again_and_keeps_the_rows(tiny_data, tmp_path, made_up, monkeypatch):
    request = Request(entry=("RS-FGSM", "PGD-3"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    before = run(request, quiet)
    assert [row["flops"] for row in before["rows"]] == [3 * 1.7, 3 * 3.0]
    monkeypatch.setitem(PRICES, "pgd", 1.2)
    monkeypatch.setattr(comparison, "evaluate_model", no_more)
    monkeypatch.setattr(data, "load", no_more)
    after = run(Request(show=True, results=str(tmp_path)), quiet)
    assert [(row["name"], row["flops"]) for row in after["rows"]] == [("PGD-3", 3 * 1.2), ("RS-FGSM", 3 * 1.7)]
    assert after["natural_step_flops"] == 1.0, "though natural training is no row"
    for key in ("request", "environment", "command", "attacks"):
        assert after[key] == json.loads(json.dumps(before))[key]
    trained = {row["name"]: row["runs"] for row in before["rows"]}
    assert {row["name"]: row["runs"] for row in after["rows"]} == trained
    assert json.loads((tmp_path / "compare.json").read_text()) == json.loads(json.dumps(after))
    assert "| PGD-3 | 0.900 | 0.075 | 3 | 0.900 | 0.125 | 2 | 3.6 | 1.20 |" in (tmp_path / "compare.md").read_text()
    with pytest.raises(ConfigError, match=r"has no compare\.json; leave out --show"):
        run(Request(show=True, results=str(tmp_path / "none")), quiet)
    (tmp_path / "compare.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"compare\.json is unusable"):
        run(Request(show=True, results=str(tmp_path)), quiet)


def test_the_table_and_card_of_one_seed_and_of_several(tiny_data, tmp_path, made_up):
    names = ("natural", "PGD-3", "IFGSM-30 (Eq. 3)")
    one = run(Request(entry=names, data="tiny.npz", workdir=str(tmp_path / "1"), **LITTLE), quiet)
    page = show.markdown(one)
    assert page.startswith("# Robust accuracy against the price of training\n\n| defense | clean | robust | steps |")
    assert ".." not in page.split("\n- ")[0], "no range of one seed"
    assert "| PGD-3 | 0.900 | 0.075 | 3 | 0.900 | 0.125 | 2 | 9 | 3.00 |" in page
    assert (
        "network `digits_cnn`, 3 steps of 16, 1 seed, soft labels (delta 0.25), budget of training 1.1 eps, "
        "learning rate 0.005 (cyclic)" in page
    )
    other = show.markdown({**one, "request": {**one["request"], "width": 16, "augment": "crop,flip"}})
    assert "network `digits_cnn` of width 16, 3 steps" in other
    assert "soft labels (delta 0.25), budget of training 1.1 eps, augmentation (crop,flip), learning rate" in other
    assert "APGD-CE (2 steps), Square (5 queries); one restart each, eps 0.3" in page, "three classes: no DLR"
    assert "under PGD-10 on 10 held-out images" in page
    assert "- FLOPs: XLA's count for the CPU, JAX " in page
    card = show.card(one)
    assert "`digits_cnn`, 3 of them: natural; PGD-3; IFGSM-30 (Eq. 3)." in card
    assert f"SHA-256 of the content `{tiny_data.sha256[:16]}...`" in card
    assert f"Command:** `{one['command']}`" in card
    assert "One seed. The standard error of an accuracy on 10 images is up to 0.158." in card
    assert "from 0.025 to 0.500 (IFGSM-30 (Eq. 3))." in card

    said = []
    two = run(Request(entry=names, data="tiny.npz", seeds=2, workdir=str(tmp_path / "2"), **LITTLE), said.append)
    page = show.markdown(two)
    assert "| robust (lowest .. highest) |" in page
    assert "| PGD-3 | 0.900 | 0.125 (0.075 .. 0.175) | 3 | 0.900 | 0.175 (0.125 .. 0.225) | 2 |" in page
    assert "| IFGSM-30 (Eq. 3) (1 of the seeds diverged) | 0.900 | 0.500 (0.500 .. 0.500) |" in page
    assert "IFGSM-30 (Eq. 3), seed 1: step 7: loss=nan" in said
    assert "At most 2 seeds." in show.card(two)


def test_models_that_were_trained_or_attacked_at_another_commit_say_so(tiny_data, tmp_path, made_up, monkeypatch):
    """A run that is found is not the work of the command that found it; a resumed one has several commits."""
    here = comparison.provenance.environment()["commit"]
    at = {"natural": [here], "rs_fgsm": ["b" * 40, here]}
    monkeypatch.setattr(
        comparison,
        "read_training",
        lambda workdir: [{"commit": commit} for commit in at["natural" if "natural" in workdir.name else "rs_fgsm"]],
    )
    whole = comparison.evaluate_model

    def made(request, config, dataset):
        outcome = whole(request, config, dataset)
        known = {} if config.defense == "natural" else {"commit": "a" * 40}
        return {**outcome, "last": {**outcome["last"], **known}}

    monkeypatch.setattr(comparison, "evaluate_model", made)
    asked = Request(entry=("natural", "RS-FGSM"), data="tiny.npz", workdir=str(tmp_path), **LITTLE)
    result = run(asked, quiet)
    for page, before in ((show.markdown(result), "- "), (show.card(result), "- **Other commits:** ")):
        assert f"{before}Trained at commit {'b' * 40}: RS-FGSM.\n" in page
        assert f"{before}Attacked at commit {'a' * 40}: RS-FGSM.\n" in page
        assert page.count("at commit") == 2


@pytest.mark.parametrize("how", ["by price", "equal_flops", "parts"])
def test_the_picture(how, tiny_data, tmp_path, made_up, monkeypatch):
    figures = []
    monkeypatch.setattr(show.plots, "save", lambda path, figure, dpi: figures.append(figure))
    request = Request(
        **({"entry": ("natural", "PGD-3", "e2SAD, robust")} if how != "parts" else {"parts": True}),
        **{"data": "tiny.npz", "workdir": str(tmp_path), "equal_flops": how == "equal_flops", **LITTLE, "seeds": 2},
    )
    result = run(request, quiet)
    show.plot(tmp_path / "compare.png", result)
    (axes,) = figures[-1].axes
    figures[-1].draw_without_rendering()
    title, whole = (figures[-1]._suptitle or axes._left_title).get_window_extent(), figures[-1].bbox
    assert whole.x0 <= title.x0 < title.x1 <= whole.x1, "the title is there as a whole"
    marked = [line for line in axes.lines if line.get_marker() != "None"]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marked]
    rows = [row["last"] for row in result["rows"]]
    robust = [row["robust"] for row in rows]
    if how == "parts":
        assert [x for x, _ in points] == robust
        names = [label.get_text() for label in axes.get_yticklabels()]
        assert names[:3] == ["natural (1.00)", "e2SAD, robust (3.00)", "no memory (3.00)"]
        return
    assert points == [(1.0, robust[0]), (3.0, robust[1]), (3.0, robust[2])]
    assert {text.get_text() for text in axes.texts} == {"natural", "PGD-3", "e2SAD, robust"}
    assert axes.get_xscale() == "log"
    frontier, *bars = (line for line in axes.lines if line not in marked)
    assert list(frontier.get_ydata())[:2] == [robust[0], max(robust)], "the best at each price or below it"
    assert [tuple(bar.get_ydata()) for bar in bars] == [(row["lowest"], row["highest"]) for row in rows]
    assert any(row["lowest"] < row["highest"] for row in rows)
    steps = {row["name"]: row["last"]["steps"][0] for row in result["rows"]}
    assert how == "by price" or steps == {"natural": 9, "PGD-3": 3, "e2SAD, robust": 3}, "what the same FLOPs buy"
    for row, high in zip(result["rows"], (0.0, 0.93, 0.97), strict=True):
        row["last"] |= {"robust": high, "lowest": high, "highest": min(high + 0.01, 1)}
    show.plot(tmp_path / "compare.png", result)
    (axes,) = figures[-1].axes
    heights = axes.transData.transform([(1, y) for y in (0, 0.03, 0.93, 0.97, 0.98)])[:, 1]
    assert (np.diff(heights) > 0).all()
    assert heights[3] - heights[2] > 5 * (heights[1] - heights[0]), "high accuracies have more room"
    assert axes.get_ylim()[0] < 0
    assert 0.98 < axes.get_ylim()[1] <= 1
    result["rows"][0]["last"] |= {"robust": 0.9, "lowest": 0.88, "highest": 0.91}
    show.plot(tmp_path / "compare.png", result)
    (axes,) = figures[-1].axes
    assert 0.8 < axes.get_ylim()[0] < 0.88, "no room for accuracies that no row has"
    assert len(axes.get_yticks()) > 5


def test_numbers_that_were_published_stand_beside_ours(tiny_data, tmp_path, made_up):
    paths = {"workdir": str(tmp_path / "runs"), "results": str(tmp_path)}
    result = run(Request(entry=("RS-FGSM", "natural"), data="tiny.npz", **paths, **LITTLE), quiet)
    assert "published" not in show.markdown(result)
    page = show.markdown({**result, "request": {**result["request"], "recipe": "fastat", "eps_warmup": 0.0}})
    lines = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("|")]
    rows = {cells[1]: cells for cells in lines}
    first = rows["defense"].index("published: clean")
    assert rows["defense"][first + 1] == "published: AutoAttack"
    assert rows["RS-FGSM"][first : first + 2] == ["0.777", "0.431"]
    assert rows["natural"][first : first + 2] == ["", ""]
    assert "the same eps in all steps" in page
