"""Trains, attacks and shows what is compared, model by model."""

import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from e2sad_jax import data
from e2sad_jax._io import check_folder, read_json, write_json, write_text
from e2sad_jax.comparison import cited
from e2sad_jax.comparison.evaluate_model import evaluate_model, question
from e2sad_jax.comparison.flops import match_flops, step_flops
from e2sad_jax.comparison.request import YOUNGER, Request, position
from e2sad_jax.comparison.show import broken, card, markdown, plot
from e2sad_jax.errors import ConfigError, NonFiniteError, first_line
from e2sad_jax.reporting import provenance
from e2sad_jax.runs.folder import read_training
from e2sad_jax.runs.weights import check_unseen, source_of
from e2sad_jax.training import Config

FORMAT = 4


def run(request: Request, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Trains, attacks, and writes compare.json, .md and .png after each model; resumes where it was stopped.

    The same labels everywhere, so that only the defense differs. The last checkpoint is attacked and, unless `last_only`,
    the averaged weights and the best checkpoint, chosen by PGD-10 on images that no run trains on. The price of training is
    XLA's count of FLOPs for the CPU, by this code.
    What a compare.json for the same question has of other entries is kept, with its origin. Of an entry it keeps the seeds:
    one whose run is gone from the workdir is not trained again. Entries of the same settings are one, by the name that is
    asked for. A compare.json that has other rows, or is damaged, is set aside under another name.

    Args:
      request: what to compare.
      say: takes a line of progress.

    Returns:
      What compare.json holds.

    Raises:
      ConfigError: if the data is too small for the request, the initial weights have seen the images that are attacked, or
        the folder of the results cannot be written.
      NonFiniteError: if every run diverged.
      Stopped: after Ctrl-C; what is finished stays.
    """
    if request.cited:
        return cited.run(request, say)
    provenance.commit()  # before the results that are written make it one with changes
    folder = pathlib.Path(request.results or request.workdir).expanduser()
    if request.show:
        shown = _show(folder)
        _tell(folder, say)
        return shown
    check_folder(folder, f"--results={folder}")
    if request.judge == "held_out":
        check_unseen(request.init_from, request.data, request.validation_examples)
    dataset = data.load(request.data, request.data_dir or None)
    shape, num_classes = tuple(dataset.image_shape), dataset.num_classes
    rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {}
    path = folder / "compare.json"
    earlier, whole = _earlier(path, request, shape, num_classes, say)
    asked = {
        name: [match_flops(request, config, shape, num_classes) for config in request.configs(name)]
        for name in sorted(request.entries(), key=position)
    }
    faced, source = question(request, dataset), source_of(request.init_from)
    for name, configs in asked.items():
        same = [row for row in earlier if _settings_then(row) == settings_of(configs[0])]
        measured = {
            run["seed"]: {"origin": row["origin"], **run}
            for row in same
            for run in row["runs"]
            if run["asked"] == faced and _same(run.get("begun_with"), source)
        }
        for config in configs:
            if config.seed in measured and not os.path.exists(config.workdir):
                say(f"{name}, seed {config.seed}: measured before ({path})")
                continue  # of `measured`
            try:
                outcome = evaluate_model(request, config, dataset)
                segments = read_training(pathlib.Path(config.workdir))
                made = {**outcome, "trained": list(dict.fromkeys(segment["commit"] for segment in segments))}
                if {**measured.get(config.seed, {}), **made} != measured.get(config.seed):  # else it keeps its origin
                    measured[config.seed] = made
            except NonFiniteError as error:
                measured.pop(config.seed, None)
                say(f"{name}, seed {config.seed}: {error}")
        if not measured:
            continue
        runs = [measured[seed] for seed in sorted(measured)]
        rows.append({**row_of(name, configs[0], runs), "seeds": max([request.seeds, *(row["seeds"] for row in same)])})
        if len(rows) == 1:
            same_images = _same_question(earlier, rows[0], say)
            if path.exists() and not (whole and same_images == earlier):
                _set_aside(path, say)
            earlier = same_images
        else:  # another process may have added some meanwhile
            earlier = _same_question(_earlier(path, request, shape, num_classes, _quiet)[0], rows[0], _quiet)
        mine = [row["settings"] for row in rows]
        earlier = [row for row in earlier if _settings_then(row) not in mine]
        result = priced(
            {
                "format": FORMAT,
                "request": dataclasses.asdict(request),
                "attacks": [dataclasses.asdict(stage) for stage in request.stages(num_classes)],
                "eps": runs[0]["eps"],
                **{key: runs[0].get(key) for key in ("images", "of", "classes")},
                "image_shape": list(shape),
                "num_classes": num_classes,
                "chosen_on": runs[0]["chosen_on"],
                "rows": [*rows, *earlier],
                "command": provenance.command(),
                "environment": provenance.environment(),
            }
        )
        _write(folder, result)
        row = next(row for row in result["rows"] if row["name"] == name)
        last, best = (
            f"clean {a['clean']:.3f}, robust {a['robust']:.3f}" for a in (row["last"], row.get("best", row["last"]))
        )
        title = f"{name}, mean of {len(runs)} seeds" if len(runs) > 1 else name
        say(f"{title}: {last}{f' (best checkpoint: {best})' if best != last else ''}, {row['flops']:.3g} FLOPs")
        for sentence in broken(row):
            say(f"{name}: {sentence}")
    if not rows:
        raise NonFiniteError("every run diverged; nothing was compared")
    _tell(folder, say)
    return result


def priced(result: Mapping[str, Any]) -> dict[str, Any]:
    """Counts the cost of each row of a comparison with this code, and sorts the rows by the cost of a step.

    Args:
      result: what compare.json holds, with or without prices.

    Returns:
      A copy: each row has `step_flops` and `flops` (of its training), the whole `natural_step_flops` and `priced`, where
      and when they were counted.

    Raises:
      ConfigError: if JAX has no CPU to count FLOPs for, or a row's settings are none of this version.
    """
    shape, num_classes = result["image_shape"], result["num_classes"]
    rows = []
    for row in result["rows"]:
        price = step_flops(Config.from_json(row["settings"]), shape, num_classes)
        rows.append({**row, "step_flops": price, "flops": price * row["settings"]["steps"]})
    any_row = Config.from_json(result["rows"][0]["settings"])
    natural = step_flops(any_row.replace(defense="natural", awp=0.0), shape, num_classes)
    by_price = not result["request"]["parts"]
    rows.sort(key=lambda row: (row["step_flops"] if by_price else 0, position(row["name"])))
    about = {key: provenance.environment()[key] for key in ("date", "jax", "commit")}
    return {**result, "rows": rows, "natural_step_flops": natural, "priced": about}


def _write(folder: pathlib.Path, result: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "compare.json", result)
    write_text(folder / "compare.md", markdown(result))
    write_text(folder / "compare_card.md", card(result))
    plot(folder / "compare.png", result)


def _show(folder: pathlib.Path) -> dict[str, Any]:
    """Counts the prices of a finished comparison again and writes its files; rows keep where they were trained."""
    path = folder / "compare.json"
    try:
        result = priced(read_json(path))
        _write(folder, result)
    except FileNotFoundError as error:
        raise ConfigError(f"--results={folder}: has no compare.json; leave out --show to make one") from error
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"--results={folder}: compare.json is unusable ({first_line(error)})") from error
    return result


def _earlier(
    path: pathlib.Path, request: Request, shape: Sequence[int], num_classes: int, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], bool]:
    """Rows that a run before wrote for the same question, with their origin, and whether these are all that it wrote."""
    try:
        before = read_json(path)
        asked = YOUNGER | before["request"]
        now = request.question()
        if differ := [f"--{key}={asked.get(key)} there, {now[key]} now" for key in now if asked.get(key) != now[key]]:
            say(f"{path}: of another question ({'; '.join(differ)}); its rows are left out")
            return [], False
        origin = {"command": before["command"], "environment": before["environment"]}
        rows = [{"origin": origin, "seeds": before["request"]["seeds"], **row} for row in before["rows"]]
        card({**before, "rows": rows})  # has all that is shown
        markdown({**before, "rows": rows})
        kept = []
        for row in rows:
            if _settings_then(row) == _settings_now(request, row["name"], shape, num_classes):
                kept.append(row)
            else:
                say(f"{row['name']}: an earlier row, of other settings; left out")
        return kept, len(kept) == len(rows)
    except FileNotFoundError:
        return [], True
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        print(f"warning: {path} is unusable ({first_line(error)}); it is written again", file=sys.stderr, flush=True)
        return [], False


def _set_aside(path: pathlib.Path, say: Callable[[str], None]) -> None:
    """Keeps a file under a name that its content gives it."""
    kept = path.with_name(f"{path.stem}-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}{path.suffix}")
    path.replace(kept)
    say(f"{path}: what it had is in {kept}")


def _quiet(line: str) -> None:
    pass


def _tell(folder: pathlib.Path, say: Callable[[str], None]) -> None:
    """Names the files of a comparison."""
    for name in ("compare.md", "compare.json", "compare.png", "compare_card.md"):
        say(str(folder / name))


def _settings_then(row: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a row, those that are younger than it at their defaults; empty where one is not known any more."""
    try:
        return settings_of(Config.from_json(row["settings"]))
    except ConfigError:
        return {}


def _settings_now(request: Request, name: str, shape: Sequence[int], num_classes: int) -> dict[str, Any] | None:
    """The settings that an entry has by this code; None where it is not known any more."""
    try:
        return settings_of(match_flops(request, request.configs(name)[0], shape, num_classes))
    except KeyError:
        return None


def settings_of(config: Config) -> dict[str, Any]:
    """The settings of a row: those of its runs but for the seed and where things lie."""
    return {k: v for k, v in config.to_json().items() if k not in ("seed", "workdir", "data_dir", "resume")}


def _same_question(
    earlier: Sequence[dict[str, Any]], row: Mapping[str, Any], say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Those earlier rows whose models began and were attacked as this one's; the others are left out."""
    mine = row["runs"][0]
    kept = []
    for other in earlier:
        its = other["runs"][0]
        if its["asked"] != mine["asked"]:
            say(f"{other['name']}: an earlier row, of other images or attacks; left out")
        elif not _same(its.get("begun_with"), mine.get("begun_with")):
            say(f"{other['name']}: an earlier row, begun with other weights; left out")
        else:
            kept.append(other)
    return kept


def _same(one: object, other: object) -> bool:
    """Whether two are the same initial weights, as far as both are known."""
    return one is None or other is None or one == other


def row_of(name: str, config: Config, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What is shown of an entry: means over its runs, its settings, and the runs themselves."""
    row: dict[str, Any] = {"name": name, "settings": settings_of(config)}
    for which in runs[0]["asked"]["checkpoints"]:
        clean, robust = ([run[which][key] for run in runs] for key in ("clean", "robust"))
        spread = {"lowest": min(robust), "highest": max(robust), "steps": [run[which]["step"] for run in runs]}
        row[which] = {"clean": float(np.mean(clean)), "robust": float(np.mean(robust)), **spread}
    return {**row, "train_seconds": float(np.mean([run["train_seconds"] for run in runs])), "runs": list(runs)}
