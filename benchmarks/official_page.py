"""official.md: the two sides of `benchmarks.official` beside each other."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.official_sides import Side
from e2sad_jax.evaluation import FAB, STAGES
from e2sad_jax.reporting.table import Table

TOLERANCE = 0.01  # of accuracy
ADDED = FAB.name  # the attack that `evaluation.auto` leaves out in the l-infinity ball
SQUARE = STAGES[2].name  # the one that queries
SPENT = ("gradients", "seconds")
NAMES = {"official": "official", "ours": "ours", "near": "ours, near"}  # of the sides


def outcome(stages: Sequence[str], sides: Mapping[str, Side], places: np.ndarray) -> dict[str, Any]:
    """The sides after each attack, and every image on which the official code and `evaluation.auto` disagree at the end.

    Args:
      stages: names of the attacks.
      sides: what the official code found, "official", and `evaluation.auto`, "ours", perhaps with `near`, "near".
      places: `[N]`, of the images in their data set.

    Returns:
      "rows" and "differ", for JSON.
    """
    rows: list[dict[str, Any]] = []
    theirs, own = sides["official"], sides["ours"]
    for i, name in enumerate(("clean", *stages)):
        they, we = theirs.standing[i], own.standing[i]
        row = {
            "attack": name,
            **{side: float(of.standing[i].mean()) for side, of in sides.items()},
            "official_alone": int((we & ~they).sum()),
            "ours_alone": int((they & ~we).sum()),
        }
        if i:
            for side, of in sides.items():
                row[f"{side}_seconds"] = round(float(of.seconds[i - 1]), 2)
                row[f"{side}_gradients"], row[f"{side}_queries"] = of.gradients[i - 1], of.queries[i - 1]
            row["ours_compiling"] = round(float(own.compiling[i - 1]), 2)
        rows.append(row)

    def fell_to(side: Side, i: Any) -> str | None:
        return next((n for n, right in zip(("clean", *stages), side.standing, strict=True) if not right[i]), None)

    differ = [
        {"image": int(places[i]), "official": fell_to(theirs, i), "ours": fell_to(own, i)}
        for i in np.flatnonzero(theirs.standing[-1] != own.standing[-1])
    ]
    return {"rows": rows, "differ": differ}


def _network(result: Mapping[str, Any]) -> str:
    """The defense, its steps and the folder of the run."""
    folder = pathlib.PurePath(result["workdir"]).name
    return f"{result['defense']}, {result['step']:,} steps ({folder})"


def _ball(result: Mapping[str, Any]) -> str:
    noise = f", noise {result['noise']:g}" if "noise" in result else ""
    return f"{'l-infinity' if result['norm'] == 'linf' else result['norm']}, {result['eps']:.4g}{noise}"


def _seed(result: Mapping[str, Any]) -> str:
    return f", seed {result['effort']['seed']}" if result["effort"]["seed"] else ""


def default(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The rows of the attacks that `evaluation.auto` has by default: FAB-T in the l2 ball alone."""
    return [row for row in result["rows"][1:] if row["attack"] != ADDED or result["norm"] == "l2"]


def by_seed(results: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """The results that differ in the seed alone, together, the first one of each seed; in the order in which they come."""
    asked = ("workdir", "which", "step", "data", "judge", "images", "norm", "eps", "noise", "near")
    versions = ("torch", "pyautoattack")
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        attacks = [row["attack"] for row in result["rows"]]
        effort = {name: value for name, value in result["effort"].items() if name != "seed"}
        about = [*(result.get(name) for name in asked), *(result["environment"][name] for name in versions)]
        group = groups.setdefault(json.dumps([attacks, effort, about], sort_keys=True), [])
        if result["effort"]["seed"] not in [other["effort"]["seed"] for other in group]:
            group.append(result)
    return list(groups.values())


def _over_seeds(values: Sequence[float]) -> str:
    """The value of one seed, or the mean and the standard deviation of several."""
    deviation = f" ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else ""
    return f"{np.mean(values):.3f}{deviation}"


def _left_out(result: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """All rows, if `evaluation.auto` leaves out one of their attacks by default."""
    every = result["rows"][1:]
    return every if len(default(result)) < len(every) else []


def summary(results: Sequence[Mapping[str, Any]]) -> Table:
    """A row for each network and ball: all official attacks, and ours with and without the one that `auto` leaves out.

    Of several seeds it has the means, and the standard deviations of the accuracies.
    """
    chosen: list[tuple[str, str, Callable[[Mapping[str, Any]], list[Mapping[str, Any]]]]]
    chosen = [("official", "official", lambda result: result["rows"][1:]), ("ours", "ours", default)]
    if any(map(_left_out, results)):
        chosen.append(("ours and FAB-T", "ours", _left_out))
    if any("near" in result for result in results):
        chosen.append((NAMES["near"], "near", lambda result: default(result) if "near" in result else []))
    rows = []
    for group in by_seed(results):
        first = group[0]
        cells: list[list[str | None]] = []  # accuracy, gradients and seconds of each side
        for _, side, of in chosen:
            parts = [of(result) for result in group]
            if not all(parts):
                cells.append([None] * 3)
                continue
            # Of a random network the verdicts by draws of their own.
            left = [result.get("judged", part[-1])[side] for result, part in zip(group, parts, strict=True)]
            sums = [[sum(row[f"{side}_{what}"] for row in part) for part in parts] for what in SPENT]
            cells.append([_over_seeds(left), *(f"{np.mean(values):,.0f}" for values in sums)])
        clean = np.mean([result.get("judged", {}).get("clean", result["rows"][0]["ours"]) for result in group])
        about = [_network(first), first["data"], _ball(first), len(group), f"{clean:.3f}"]
        rows.append([*about, *(cell for column in zip(*cells, strict=True) for cell in column)])
    columns = [f"{what}{name}" for what in ("", "gradients, ", "s, ") for name, *_ in chosen]
    return Table(columns=["network", "data", "ball", "seeds", "clean", *columns], rows=rows)


def _details(result: Mapping[str, Any]) -> list[str]:
    """The attacks one by one, and the images on which the sides disagree."""

    def number(row: Mapping[str, Any], key: str, form: str) -> str | None:
        return f"{row[key]:{form}}" if row.get(key) else None

    sides = ("official", "ours", *(["near"] if "near" in result else []))
    named = [NAMES[side] for side in sides]
    columns = ["after", *named, "fell to the official alone", "to ours alone"]
    columns += [f"{what}, {name}" for what in ("gradients", "queries", "s") for name in named]
    table = Table(
        columns=[*columns, "s, ours: compiling"],
        rows=[
            [
                row["attack"],
                *(f"{row[side]:.4f}" for side in sides),
                row["official_alone"],
                row["ours_alone"],
                *(number(row, f"{side}_gradients", ",") for side in sides),
                # Others look at points without a gradient too, which only the official side counts.
                *(number(row, f"{side}_queries", ",") if row["attack"] == SQUARE else None for side in sides),
                *(number(row, f"{side}_seconds", ".1f") for side in sides),
                number(row, "ours_compiling", ".1f"),
            ]
            for row in result["rows"]
        ],
    )
    they, we, about = (result[key] for key in ("official_images", "our_images", "environment"))
    notes = [
        f"Logits in PyTorch and JAX differ by at most {result['logits_differ']:.1e}.",
        f"Of {they['found']:,} adversarial images of the official code, JAX misclassifies {they['misclassified']:,}; "
        f"{they['outside']:,} lie outside the ball (largest change {they['largest']:.6f}).",
        f"Of {we['found']:,} of ours, PyTorch misclassifies {we['misclassified']:,}; {we['outside']:,} lie outside the ball "
        f"(largest change {we['largest']:.6f}).",
        *_near(result),
        *(
            f"Image {d['image']:,}: official {d['official'] or 'robust'}, ours {d['ours'] or 'robust'}."
            for d in result["differ"]
        ),
        *_of_chance(result),
        *(f"The official code warned: {warning}" for warning in result["warnings"]),
    ]
    return [
        f"## {_network(result)}, {_ball(result)}{_seed(result)}\n",
        f"{result['images']} of {result['data']}, {result['which']} weights. {_effort(result)}.\n",
        table.markdown(),
        *(f"- {note}" for note in notes),
        "",
        *(f"Trained by `{command}`.\n" for command in result.get("trained", [])),
        f"`{result['command']}`, {about['hardware']}, {about['date']}, commit {about['commit']}; "
        f"pyautoattack {about['pyautoattack']}, PyTorch {about['torch']}, JAX {about['jax']}",
        "",
    ]


def _effort(result: Mapping[str, Any]) -> str:
    """The attacks that were run, each with its steps."""
    effort = result["effort"]
    names = [name for row in result["rows"][1:] for name in row["attack"].split(" and ")]  # several of one call
    steps = {
        "APGD-T": f"{effort['apgd_steps']} steps for each of {effort['targets']} targets",
        ADDED: f"{effort['fab_steps']} steps for each of {effort['targets']} targets",
        SQUARE: f"{effort['queries']:,} queries",
    }
    return ", ".join(f"{name} ({steps.get(name, str(effort['apgd_steps']) + ' steps')})" for name in names)


def _near(result: Mapping[str, Any]) -> list[str]:
    if "near" not in result:
        return []
    found = result["near_images"]
    return [
        f"Of {found['found']:,} of ours with near {result['near']:g}, PyTorch misclassifies {found['misclassified']:,}; "
        f"{found['outside']:,} lie outside the ball."
    ]


def _of_chance(result: Mapping[str, Any]) -> list[str]:
    if "noise" not in result:
        return []
    clean, official, ours = (f"{result['judged'][side]:.3f}" for side in ("clean", "official", "ours"))
    return [
        f"The network draws noise of deviation {result['noise']:g}. The official verdicts are of one draw each, ours of the "
        f"mean of several. The table above has the verdicts of the mean of other draws: {clean} of the clean images are "
        f"classified correctly, {official} after the official attacks, {ours} after ours."
    ]


def page(results: Sequence[Mapping[str, Any]]) -> str:
    """What official.json holds, in Markdown."""
    return "\n".join(
        [
            "# The official AutoAttack code and `evaluation.auto`\n",
            "Robust accuracy of the same weights on the same images. Each attack is run on the images that are left, in the "
            "same order on both sides. FAB-T, which `evaluation.auto` has by default in the l2 ball alone, comes last, and not "
            "before Square. A row has the mean of its seeds, ± their standard deviation. A gradient is one of one image. Of "
            "Square ours counts all queries of an image, the official code those until it falls. Our seconds hold tracing and "
            "compiling; the last column is XLA's part of that. Near: with `evaluation.auto(near=)`.\n",
            summary(results).markdown(),
            *(line for result in results for line in _details(result)),
        ]
    )


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes the command end with exit code 1."""
    found = []
    for group in by_seed(results):
        name = f"{_network(group[0])}, {_ball(group[0])}"
        for result in group:
            for side in ("official_images", "our_images", "near_images"):
                if outside := result.get(side, {"outside": 0})["outside"]:
                    found.append(f"{name}{_seed(result)}: {side}: {outside} outside the ball")
        last = [result.get("judged", result["rows"][-1]) for result in group]
        official = float(np.mean([row["official"] for row in last]))
        for side in ("ours", "near") if "near" in group[0] else ("ours",):
            if (left := float(np.mean([row[side] for row in last]))) > official + TOLERANCE:
                found.append(
                    f"{name}: {NAMES[side]} leaves {left:.4f}, the official code {official:.4f}; ours may leave at most "
                    f"{TOLERANCE} more"
                )
    return found
