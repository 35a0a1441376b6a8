"""Trains, attacks and writes what is compared, model by model."""

import dataclasses
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax import data
from e2sad_jax._io import read_json, write_json, write_text
from e2sad_jax.comparison.judge import judge
from e2sad_jax.comparison.price import affordable
from e2sad_jax.comparison.request import CHECKPOINTS, Request, known
from e2sad_jax.comparison.show import card, markdown, plot
from e2sad_jax.errors import NonFiniteError, first_line
from e2sad_jax.reporting import provenance


def run(request: Request, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains, attacks, and writes compare.json, .md and .png after each model; goes on where it was stopped.

    Hard labels everywhere, so that only the defense differs. Both the last checkpoint and the best, chosen by PGD-10 on
    images that no run trains on, are attacked. What training costs are FLOPs by XLA's count for the CPU
    (`training.step_flops`) times the steps. What a compare.json of the same question has of other entries is kept.

    Returns:
      What compare.json holds.

    Raises:
      ConfigError: if the data is too small for the request.
      NonFiniteError: if every run diverged.
      Stopped: after Ctrl-C; what is finished stays.
    """
    provenance.commit()  # before the results that are written make it one with changes
    dataset = data.load(request.data, request.data_dir or None)
    folder = pathlib.Path(request.results or request.workdir).expanduser()
    order = list(known())
    entries = sorted(set(request.entries()), key=order.index)
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    earlier = _earlier(folder / "compare.json", request)
    for name in entries:
        runs = []
        for config in request.configs(name):
            try:
                runs.append(judge(request, affordable(request, config, dataset), dataset))
            except NonFiniteError as error:
                say(f"{name}, seed {config.seed}: {error}")
        if not runs:
            continue
        rows.append(row_of(name, runs))
        if len(rows) == 1:
            earlier = _kept(earlier, rows[0], say)
        result = {
            "format": 3,
            "request": dataclasses.asdict(request),
            "attacks": [dataclasses.asdict(stage) for stage in request.stages(dataset.num_classes)],
            "eps": runs[0]["eps"],
            "images": runs[0]["images"],
            "chosen_on": runs[0]["chosen_on"],
            "rows": sorted([*rows, *earlier], key=lambda row: order.index(row["name"])),
            "command": provenance.command(),
            "environment": provenance.environment(),
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "compare.json", result)
        write_text(folder / "compare.md", markdown(result))
        write_text(folder / "compare_card.md", card(result))
        plot(folder / "compare.png", result)
        last, best = (f"clean {rows[-1][c]['clean']:.3f}, robust {rows[-1][c]['robust']:.3f}" for c in CHECKPOINTS)
        apart = rows[-1]["best"]["steps"] != rows[-1]["last"]["steps"]
        say(f"{name}: {last}{f' (best checkpoint: {best})' if apart else ''}, {rows[-1]['flops']:.3g} FLOPs")
    if not rows:
        raise NonFiniteError("every run diverged; nothing was compared")
    return result


def _earlier(path: pathlib.Path, request: Request) -> list[dict[str, Any]]:
    """Rows that a run before, for the same request, wrote of entries that are not asked for now, with their origin."""
    asked = {**dataclasses.asdict(request), "entry": []}
    try:
        before = read_json(path)
        here = {key: before["request"][key] for key in ("data_dir", "workdir", "results")}
        if {**before["request"], "entry": []} != {**asked, **here}:
            return []
        origin = {"command": before["command"], "environment": before["environment"]}
        rows = {row["name"]: {"origin": origin, **row} for row in before["rows"]}
        card({**before, "rows": list(rows.values())})  # has all that is shown
        markdown({**before, "rows": list(rows.values())})
        return [
            row
            for name, row in rows.items()
            if name in known() and name not in request.entries() and _same(request, row)
        ]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        print(f"warning: {path} is of no use ({first_line(error)}); written anew", file=sys.stderr, flush=True)
        return []


def _same(request: Request, row: Mapping[str, Any]) -> bool:
    """Whether the runs of an earlier row are those that this request would make: their folders' names are of their settings."""
    ours = {pathlib.Path(config.workdir).name for config in request.configs(row["name"])}
    return all(any(pathlib.Path(run["workdir"]).name.startswith(name) for name in ours) for run in row["runs"])


def _kept(
    earlier: Sequence[dict[str, Any]], row: Mapping[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Those earlier rows whose models faced the same attacks on the same images as this one's; the others are forgotten."""
    kept = [other for other in earlier if other["runs"][0]["asked"] == row["runs"][0]["asked"]]
    for other in earlier:
        if other not in kept:
            say(f"{other['name']}: an earlier row, of other images or attacks; left out")
    return kept


def row_of(name: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is shown of an entry: means over its runs, and the runs themselves."""
    row: dict[str, Any] = {"name": name}
    for which in CHECKPOINTS:
        clean, robust = ([run[which][key] for run in runs] for key in ("clean", "robust"))
        spread = {"lowest": min(robust), "highest": max(robust), "steps": [run[which]["step"] for run in runs]}
        row[which] = {"clean": float(np.mean(clean)), "robust": float(np.mean(robust)), **spread}
    return (
        row | {key: float(np.mean([r[key] for r in runs])) for key in ("flops", "train_seconds")} | {"runs": list(runs)}
    )
