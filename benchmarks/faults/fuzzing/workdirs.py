"""What a workdir holds: settings, notes, checkpoints."""

import contextlib
import functools
import io
import json
import pathlib
import random
import shutil
import tempfile
from typing import Any

import jax
import numpy as np

import e2sad_jax
from benchmarks.faults.fuzz import Refused, Wrong
from benchmarks.faults.fuzzing.damage import ODD, Target, damage_bytes, damage_json, refusing
from e2sad_jax import networks, training
from e2sad_jax._io import sealed
from e2sad_jax.comparison.evaluate_model import known_outcome
from e2sad_jax.comparison.run import row_of
from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.runs import folder, metrics
from e2sad_jax.runs.checkpoint import Checkpoints
from e2sad_jax.training import Config, configure
from experiments.paper import cache, cost

SHAPE = (8, 8, 1)


def a_config() -> dict[str, Any]:
    """config.json as a run writes it."""
    about = {"name": "tiny", "version": "", "sha256": "0" * 64, "source_sha256": {}, "train_examples": 40}
    dataset = {**about, "test_examples": 9, "image_shape": list(SHAPE), "num_classes": 3}
    config = Config(data="tiny.npz", model="digits_cnn", steps=4, batch_size=8)
    return {"format": 1, "config": config.to_json(), "dataset": dataset}


class ConfigFile(Target):
    """config.json, and settings by name."""

    name, share = "config", 0.4

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.good = a_config()
        self.text = json.dumps(sealed(self.good), indent=2).encode()

    def input(self, rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.3:
            how, content = damage_bytes(rng, self.text)
            return f"bytes: {how}", content
        if rng.random() < 0.3:
            odd = {name: rng.choice(ODD) for name in rng.sample(sorted(self.good["config"]), rng.choice((1, 2, 5)))}
            return "settings", json.dumps(sealed({**self.good, "config": odd})).encode()
        how, content = damage_json(rng, self.good)
        with contextlib.suppress(ValueError, RecursionError):  # else all would be refused for their digest
            values = json.loads(content)
            content = json.dumps(sealed(values)).encode() if isinstance(values, dict) else content
        return f"JSON: {how}", content

    def run(self, given: bytes) -> Any:
        (self.folder / "config.json").write_bytes(given)
        got = refusing(lambda: folder.read_config(self.folder))
        with contextlib.suppress(ValueError, RecursionError):
            loose: Any = json.loads(given)
            values: Any = loose.get("config") if isinstance(loose, dict) else loose
            made = refusing(lambda: Config.from_json(values), ConfigError)
            if isinstance(made, Config):
                made.default_workdir(), refusing(lambda: made.total_steps(60_000), ConfigError)
        if isinstance(got, Refused):
            return got
        config, dataset = got
        said = json.loads(given)
        if config != configure(**said["config"]) or dataset != said["dataset"]:
            raise Wrong("it is not what the file says")
        if Config.from_json(json.loads(json.dumps(config.to_json()))) != config:
            raise Wrong("its own settings are refused")
        return got


class Notes(Target):
    """What commands keep in a run's folder so as not to do it again: unreadable ones count as none."""

    name, share = "notes", 0.196

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        place = {"hardware": "CPU", "date": "2026-11-25", "commit": None}
        segment = {"from_step": 0, "to_step": 4, "seconds": 1.5, "runs_together": 1, **place}
        evaluated = {"step": 4, "clean": 0.9, "robust": 0.5, "after": {"clean": 0.9}}
        known = {"asked": {"data": "x"}, "seed": 0, "eps": 0.3, "images": 5, "last": evaluated, "best": evaluated}
        known |= {"chosen_on": "40 images", "flops": 1e9, "train_seconds": 2.5, "workdir": "runs/x"}
        step = {
            "flops": 1.0,
            "milliseconds": 2.0,
            "fastest": 1.0,
            "slowest": 3.0,
            "time_natural": 1.0,
            "flops_natural": 1.0,
        }
        costs = {"steps": {"natural": step}, "rounds": 7, "command": "python", "environment": place}
        self.labels = np.arange(5, dtype=np.int32)
        found = {"attack": {}, "tested": {}, "provenance": place, "predictions": [[0, 1, 2, 3, 9]]}
        self.good: dict[str, Any] = {
            "training.json": [sealed(segment), sealed({**segment, "from_step": 2})],
            "auto-0.json": sealed(known),
            "cost.json": sealed(costs),
            "outcome.json": sealed(found),
            "metrics.jsonl": {"step": 3, "loss": 0.5},
        }

    def input(self, rng: random.Random) -> tuple[str, tuple[str, bytes]]:
        name = rng.choice(list(self.good))
        if rng.random() < 0.3:
            return f"{name}, bytes", (name, damage_bytes(rng, json.dumps(self.good[name]).encode())[1])
        return f"{name}, JSON", (name, damage_json(rng, self.good[name])[1])

    def run(self, given: tuple[str, bytes]) -> Any:
        name, content = given
        path = self.folder / name
        path.write_bytes(content)
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            result = self._read(name, path)
        for line in printed.getvalue().split("\n"):
            if line and not (line.startswith("warning: ") and line.isprintable()):
                raise Wrong(f"said {line!r:.200}")
        return result

    def _read(self, name: str, path: pathlib.Path) -> Any:
        match name:
            case "training.json":
                segments = folder.read_training(self.folder)
                if segments:
                    folder.note_training(self.folder, {**segments[-1], "from_step": 1, "to_step": 7})
                    if folder.read_training(self.folder)[-1]["to_step"] != 7:
                        raise Wrong("what was noted behind it cannot be read")
                return segments or Refused(Error("none"))
            case "auto-0.json":
                known = known_outcome(path, {"data": "x"}, 4)
                if "best" in known:
                    row_of("x", training.configure(), [known])
                return known or Refused(Error("none"))
            case "cost.json":
                return cost._known(path, ["natural"]) or Refused(Error("none"))
            case "outcome.json":
                found = cache.read(path, self.labels)
                if found and any(o.prediction.shape != (5,) or o.correct.dtype != bool for o in found.outcomes):
                    raise Wrong("predictions of another shape")
                return found or Refused(Error("none"))
            case _:
                metrics._drop_lines_after(path, 5)
                kept = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n") if line]
                if any(step > 5 for step in kept):
                    raise Wrong("a line beyond the step is kept")
                return kept or Refused(Error("none"))


class Checkpoint(Target):
    """A whole workdir, and the network in it."""

    name, share = "checkpoint", 0.004

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        networks.NETWORKS = {
            **networks.NETWORKS,
            "digits_cnn": functools.partial(networks.MnistCNN, features=(2, 2), hidden=4),
        }  # type: ignore[misc]
        good, config = folder / "good", Config.from_json(a_config()["config"])
        good.mkdir()
        (good / "config.json").write_text(json.dumps(sealed(a_config())))
        state = training.init_state(config, networks.create("digits_cnn", 3, SHAPE), SHAPE)
        with Checkpoints(good) as checkpoints:
            checkpoints.save(4, state.replace(step=state.step + 4), {"score": 1.5, "seconds": 2.0})
            checkpoints.wait()
        self.files = {p.relative_to(good).as_posix(): p.read_bytes() for p in good.rglob("*") if p.is_file()}
        self.params = jax.device_get(e2sad_jax.load(good).params)

    def input(self, rng: random.Random) -> tuple[str, tuple[str, str, bytes]]:
        name = rng.choice(sorted(self.files))
        if rng.random() < 0.3:
            how = rng.choice(("delete", "folder", "rename", "many", "exchange"))
            return f"files: {how}", (how, name, rng.choice(sorted(self.files)).encode())
        how, content = damage_bytes(rng, self.files[name], list(self.files.values()))
        return f"bytes: {how}", ("file", name, content)

    def run(self, given: tuple[str, str, bytes]) -> Any:
        where = pathlib.Path(tempfile.mkdtemp(dir=self.folder))
        try:
            for name, content in self.files.items():
                (where / name).parent.mkdir(parents=True, exist_ok=True)
                (where / name).write_bytes(content)
            self._damage(where, *given)
            got = refusing(lambda: e2sad_jax.load(where))
            if isinstance(got, Refused):
                return got
            if not all(jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(got.params), self.params))):
                raise Wrong("parameters are not those that were saved")
            return got
        finally:
            shutil.rmtree(where)

    def _damage(self, where: pathlib.Path, how: str, name: str, content: bytes) -> None:
        path = where / name
        if how == "file":
            path.write_bytes(content)
        elif how == "many":
            for i in range(50):
                (path.parent / f"{path.name}{i}").write_bytes(b"")
        elif how == "exchange":
            path.write_bytes(self.files[content.decode()])
        else:
            path.unlink()
            if how == "folder":
                path.mkdir()
            elif how == "rename":
                (path.parent / f"{path.name}x").write_bytes(self.files[name])
