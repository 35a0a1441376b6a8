"""What `benchmarks.fuzz` damages, how, and what must become of it: taken as it is, or refused by an error of ours."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import struct
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import tensorstore as ts
from absl import flags

import e2sad_jax
from benchmarks.fuzz import Refused, Wrong
from e2sad_jax import _npz, comparison, models, progress, train, workdir
from e2sad_jax.checkpoint import Checkpoints
from e2sad_jax.config import Config
from e2sad_jax.data import Dataset, load_npz, write_npz
from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.reproduction import cost, outcomes, runner
from e2sad_jax.step_cost import run as step_cost_run
from experiments import common

SHAPE = (8, 8, 1)
INTERESTING = (0, 1, 2, 127, 128, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
ODD: Sequence[Any] = (
    *(None, True, False, -1, 0, 1, 2, 255, 10**6, 2**31, 2**53 + 1, 2**63, 2**64, -(2**63) - 1, 10**30, 10**400),
    *(0.0, -0.0, 1e-320, 0.5, 1e300, 1.7e308, float("nan"), float("inf"), -float("inf")),
    *("", "a", "0", "e2sad", "mnist", "../../x", "/etc/passwd", "\x00", "\x1b[2J", "\ud800", "é", "x" * 5000, "\n"),
    *([], {}, [[]], [1, 2, 3], {"": 0}, {"a": {"b": {}}}),
)


class Canary:
    """Whoever unpickles it is found out."""

    def __reduce__(self) -> Any:
        return os.getenv, ("UNPICKLED",)


def refusing(call: Callable[[], Any], ours: type[Error] = Error) -> Any:
    """What `call` returns, or how it refused."""
    try:
        return call()
    except ours as error:
        return Refused(error)


def damage_bytes(rng: random.Random, content: bytes, others: Sequence[bytes] = ()) -> tuple[str, bytes]:
    """Flips, cuts and splices anywhere; returns what was done, and the outcome."""
    data = bytearray(content)
    kind = rng.choice(("flip", "set", "integer", "truncate", "extend", "delete", "repeat", "splice", "swap"))
    at = rng.randrange(len(data) + 1)
    length = min(rng.choice((1, 2, 4, 16, 64, 512)), len(data))
    if kind == "flip" and data:
        for _ in range(rng.choice((1, 1, 2, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "set" and data:
        for _ in range(rng.choice((1, 4))):
            data[rng.randrange(len(data))] = rng.choice((0, 0xFF, 0x20, rng.randrange(256)))
    elif kind == "integer":
        size = rng.choice("BHIQ")
        packed = struct.pack(f"<{size}", rng.choice(INTERESTING) % 2 ** (8 * struct.calcsize(size)))
        data[at : at + len(packed)] = packed
    elif kind == "truncate":
        del data[at:]
    elif kind == "extend":
        data += rng.randbytes(length)
    elif kind == "delete":
        del data[at : at + length]
    elif kind == "repeat":
        data[at:at] = data[max(0, at - length) : at] * rng.choice((1, 2, 50))
    elif kind == "splice":
        other = rng.choice(list(others) or [content])
        data[at:] = other[rng.randrange(len(other) + 1) :]
    elif kind == "swap":
        there = rng.randrange(len(data) + 1)
        data[at : at + length], data[there : there + length] = data[there : there + length], data[at : at + length]
    return kind, bytes(data)


def damage_json(rng: random.Random, value: Any) -> tuple[str, bytes]:
    """An odd value, a lost or foreign or doubled name somewhere in a JSON tree, or a text that is none."""
    value = json.loads(json.dumps(value))
    kind = rng.choice(("replace", "replace", "replace", "remove", "add", "move", "double", "deep", "text", "bytes"))
    places: list[tuple[Any, Any]] = []

    def collect(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            collect(node[key])

    collect(value)
    node, key = rng.choice(places) if places else ([value], 0)
    if kind == "replace":
        node[key] = rng.choice(ODD)
    elif kind == "remove":
        del node[key]
    elif kind == "add":
        node, _ = rng.choice([p for p in places if isinstance(p[0], dict)] or [({}, "")])
        node[rng.choice(("extra", "", "__class__", "\ud800", "steps"))] = rng.choice(ODD)
    elif kind == "move":
        other, name = rng.choice(places)
        node[key] = other[name]
        with contextlib.suppress(ValueError):
            json.dumps(value)  # refuses one that now holds itself
            return kind, json.dumps(value).encode()
        return kind, b"[]"
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice((None, 2)))
    if kind == "double" and isinstance(value, dict) and value:
        name = rng.choice(list(value))
        text = f"{{{json.dumps(name)}: {json.dumps(rng.choice(ODD))}, {text[1:]}"
    elif kind == "deep":
        opening, closing = rng.choice((("[", "]"), ('{"a":', "}")))
        depth = rng.choice((10, 900, 1100, 100_000))
        text = text.replace("0", opening * depth + closing * rng.choice((depth, 0)), 1)
    elif kind == "text":
        text = rng.choice(("", "null", "[]", "0", '"a"', "NaN", "\ufeff" + text, text + text, text[: len(text) // 2]))
    content = text.encode("utf-8", "surrogatepass")
    return (kind, content) if kind != "bytes" else ("bytes", damage_bytes(rng, content)[1])


class Target:
    """Something that reads what others may have written.

    Attributes:
      name: in tables, and of its random numbers.
      share: of all inputs.
    """

    name: str
    share: float

    def __init__(self, folder: pathlib.Path):
        """Makes what is to be damaged, in `folder`."""
        self.folder = folder

    def input(self, rng: random.Random) -> tuple[str, Any]:
        """A kind of damage, and a damaged input; of bytes, or what `save` writes."""
        raise NotImplementedError

    def run(self, given: Any) -> Any:
        """What became of it: `Refused`, or anything else where it was taken.

        Raises:
          Wrong: if it was taken for something that it is not.
        """
        raise NotImplementedError

    def save(self, given: Any, path: pathlib.Path) -> None:
        """Writes an input for people to look at."""
        path.write_bytes(given if isinstance(given, bytes) else repr(given).encode("utf-8", "backslashreplace"))


class Npz(Target):
    """Data sets in one file."""

    name, share = "npz", 0.3

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        rs = np.random.RandomState(0)
        images, labels = rs.randint(0, 256, (12, 4, 3, 1)).astype(np.uint8), np.arange(12, dtype=np.int64) % 3
        plain: dict[str, np.ndarray] = {
            "x_train": images,
            "y_train": labels,
            "x_test": images[:5],
            "y_test": labels[:5],
        }
        floats = {k: (v / 255).astype(np.float32) if k.startswith("x") else v for k, v in plain.items()}
        self.arrays = [plain, floats, {**plain, "num_classes": np.array(7)}]
        self.files = [self._write(arrays, compressed) for arrays in self.arrays for compressed in (False, True)]
        write_npz(Dataset(name="mine", version="1", **plain, num_classes=3, source_sha256={}), folder / "mine.npz")
        self.files.append((folder / "mine.npz").read_bytes())
        self.path = folder / "input.npz"

    @staticmethod
    def _write(arrays: Mapping[str, Any], compressed: bool) -> bytes:
        stream = io.BytesIO()
        (np.savez_compressed if compressed else np.savez)(stream, **arrays)
        return stream.getvalue()

    def input(self, rng: random.Random) -> tuple[str, bytes]:
        kind = rng.choice(("bytes", "bytes", "zip", "zip", "header", "header", "array"))
        if kind == "bytes":
            how, content = damage_bytes(rng, rng.choice(self.files), self.files)
            return f"bytes: {how}", content
        if kind == "array":
            return "array", self._write(self._odd_arrays(rng), rng.random() < 0.5)
        stream = io.BytesIO(rng.choice(self.files))
        with zipfile.ZipFile(stream) as archive:
            members = [(name.removesuffix(".npy"), archive.read(name)) for name in archive.namelist()]
        at = rng.randrange(len(members))
        if kind == "header":
            members[at] = (members[at][0], self._odd_header(rng, members[at][1]))
            return "header", self._zip(rng, members)
        how = rng.choice(("announce", "method", "double", "drop", "rename", "order", "inflate", "field", "comment"))
        if how == "double":
            members.insert(rng.randrange(len(members)), members[at])
        elif how == "drop":
            del members[at]
        elif how == "rename":
            odd = ("../../x_train", "/x_train", "", "X_TRAIN", "x_train\x00", "\x1b[31m", "é" * 300, "metadata")
            members[at] = (rng.choice(odd), members[at][1])
        elif how == "order":
            rng.shuffle(members)
        elif how == "inflate":
            big = io.BytesIO()
            np.lib.format.write_array(big, np.zeros(rng.choice((2**20, 2**22)), np.uint8))
            members[at] = (members[at][0], big.getvalue())
        damaged = bytearray(self._zip(rng, members, rng.choice((0, 8, 12, 14)) if how == "method" else None))
        if how in ("announce", "field"):
            # Sizes lie at 18 and 22 of a local header and at 20 and 24 of the directory's, method and flags before them.
            signature, sizes, others = rng.choice(
                ((b"PK\x03\x04", (18, 22), range(4, 30)), (b"PK\x01\x02", (20, 24), range(4, 46)))
            )
            starts = [i for i in range(len(damaged)) if damaged.startswith(signature, i)]
            for start in starts if rng.random() < 0.5 else [rng.choice(starts)]:
                offset = start + rng.choice(sizes if how == "announce" else list(others))
                damaged[offset : offset + 4] = struct.pack("<I", rng.choice(INTERESTING) % 2**32)
        elif how == "comment":
            damaged[-2:] = struct.pack("<H", 40)
            damaged += rng.choice((b"PK\x05\x06" * 10, bytes(40), rng.randbytes(39)))
        return f"zip: {how}", bytes(damaged)

    @staticmethod
    def _zip(rng: random.Random, members: Sequence[tuple[str, bytes]], method: int | None = None) -> bytes:
        stream = io.BytesIO()
        with warnings.catch_warnings(), zipfile.ZipFile(stream, "w") as archive:
            warnings.simplefilter("ignore")  # of doubled names
            for name, content in members:
                archive.writestr(f"{name}.npy", content, rng.choice((0, 8)) if method is None else method)
        return stream.getvalue()

    def _odd_arrays(self, rng: random.Random) -> dict[str, Any]:
        arrays = dict(rng.choice(self.arrays))
        name = rng.choice((*arrays, "metadata", "num_classes"))
        array = np.asarray(arrays.get(name, np.array(3)))
        value = rng.choice([v for v in ODD if isinstance(v, (int, float))])
        dtypes = ("?", "u1", ">u2", "<i8", "<u8", "<f2", ">f4", "<f8", "<f16", "<c8", "<U4", "S3", "<M8[s]", "V5", "O")
        with warnings.catch_warnings(), np.errstate(all="ignore"), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            match rng.randrange(5):
                case 0:
                    array = array.astype(rng.choice(dtypes))
                case 1:
                    array = np.where(rng.randrange(2), array, value)
                case 2:
                    array = array.reshape(rng.choice((-1, (1, *array.shape), (*array.shape, 1), array.shape[::-1])))
                case 3:
                    array = array[: rng.randrange(3)]
                case 4:
                    array = np.frombuffer(rng.randbytes(array.nbytes), array.dtype).reshape(array.shape)
        arrays[name] = np.array([Canary()], object) if array.dtype.hasobject else array
        return arrays

    @staticmethod
    def _odd_header(rng: random.Random, content: bytes) -> bytes:
        length = int.from_bytes(content[8:10], "little")
        text, rest = content[10 : 10 + length].decode("latin1"), content[10 + length :]
        version, how = content[6:8], rng.randrange(8)
        if how == 0:
            types = (
                "|O",
                "|V1000000000",
                "<f16",
                "|S0",
                ">i4",
                "<M8[ns]",
                "(2,)u1",
                "|u1" * 99,
                "()",
                "\\x41",
                "<U99999999",
            )
            text = text.replace(text.split("'")[3], rng.choice(types))
            rest = pickle.dumps(Canary()) if "|O" in text else rest
        elif how == 1:
            shapes = (
                "(-1,)",
                "(99999999999,)",
                "(0, 10**9)",
                "()",
                "(1.5,)",
                "(2**70,)",
                "(12L,)",
                "(True, 9)",
                "(" * 200,
                "[3]",
            )
            start, end = text.index("("), text.index(")") + 1
            text = text[:start] + rng.choice(shapes) + text[end:]
        elif how == 2:
            text = text.replace("False", rng.choice(("True", "0", "None", "__import__('os').getenv('RUN')", "1e999")))
        elif how == 3:
            version = bytes(rng.choice(((1, 0), (2, 0), (3, 0), (0, 0), (255, 255))))
        elif how == 4:
            rest = rest[: rng.randrange(len(rest) + 1)] + rng.randbytes(rng.choice((0, 1, 100)))
        elif how == 5:
            text = damage_bytes(rng, text.encode("latin1"))[1].decode("latin1")
        elif how == 6:
            text = text.rstrip() + " " * rng.choice((9_000, 11_000, 70_000))
        else:
            text = text.replace("'descr'", rng.choice(("'descr', 'more'", "'descr': 1, 'descr'", "b'descr'", "'x'")))
        encoded = text.encode("latin1", "replace")
        packed = struct.pack("<H", len(encoded) % 2**16) if version != b"\x02\x00" else struct.pack("<I", len(encoded))
        return content[:6] + version + packed + encoded + rest

    def run(self, given: bytes) -> Any:
        self.path.write_bytes(given)
        got = refusing(lambda: load_npz(self.path))
        if isinstance(got, Refused):
            return got
        with warnings.catch_warnings(), np.load(self.path, allow_pickle=False) as members:  # by another reader
            warnings.simplefilter("ignore")
            for name in _npz.ARRAYS:
                ours, theirs = getattr(got, name), members[f"{name}.npy"]
                if name.startswith("x") and theirs.dtype != np.uint8:
                    theirs = theirs.astype(np.float32)
                if ours.dtype not in (np.uint8, np.float32, np.int32) or not np.array_equal(
                    ours.ravel(), theirs.ravel()
                ):
                    raise Wrong(f"{name} is not what numpy reads")
        for name in ("y_train", "y_test"):
            if not (getattr(got, name).min() >= 0 and getattr(got, name).max() < got.num_classes):
                raise Wrong(f"{name} has labels that are no classes")
        for name in ("x_train", "x_test"):
            if not (
                getattr(got, name).min() >= 0
                and getattr(got, name).max() <= (255 if got.x_test.dtype == np.uint8 else 1)
            ):
                raise Wrong(f"{name} has pixels that are out of range")
        return got


def a_config() -> dict[str, Any]:
    """config.json as a run writes it."""
    about = {"name": "tiny", "version": "", "sha256": "0" * 64, "source_sha256": {}, "train_examples": 40}
    dataset = {**about, "test_examples": 9, "image_shape": list(SHAPE), "num_classes": 3}
    config = Config(data="tiny.npz", model="digits_cnn", steps=4, batch_size=8)
    return {"format": 1, "config": dataclasses.asdict(config), "dataset": dataset}


class ConfigFile(Target):
    """config.json, and settings by name."""

    name, share = "config", 0.4

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.good = a_config()
        self.text = json.dumps(self.good, indent=2).encode()

    def input(self, rng: random.Random) -> tuple[str, bytes]:
        if rng.random() < 0.3:
            how, content = damage_bytes(rng, self.text)
            return f"bytes: {how}", content
        if rng.random() < 0.3:
            odd = {name: rng.choice(ODD) for name in rng.sample(sorted(self.good["config"]), rng.choice((1, 2, 5)))}
            return "settings", json.dumps({**self.good, "config": odd}).encode()
        how, content = damage_json(rng, self.good)
        return f"JSON: {how}", content

    def run(self, given: bytes) -> Any:
        (self.folder / "config.json").write_bytes(given)
        got = refusing(lambda: workdir.read_config(self.folder))
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
        if dataclasses.asdict(config) != dataclasses.asdict(Config()) | said["config"] or dataset != said["dataset"]:
            raise Wrong("it is not what the file says")
        if Config.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) != config:
            raise Wrong("its own settings are refused")
        return got


class Notes(Target):
    """What commands keep beside a run so as not to do it again: unreadable ones count as none."""

    name, share = "notes", 0.196

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        place = {"hardware": "CPU", "date": "2026-11-25", "commit": None}
        segment = {"from_step": 0, "to_step": 4, "seconds": 1.5, "runs_together": 1, "weights": "00", **place}
        judged = {"step": 4, "clean": 0.9, "robust": 0.5, "after": {"clean": 0.9}}
        known = {"asked": {"data": "x"}, "seed": 0, "eps": 0.3, "images": 5, "last": judged, "best": judged}
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
            "training.json": [segment, {**segment, "from_step": 2}],
            "auto.json": known,
            "cost.json": costs,
            "outcome.json": found,
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
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            result = self._read(name, path)
        for line in told.getvalue().split("\n"):
            if line and not (line.startswith("warning: ") and line.isprintable()):
                raise Wrong(f"said {line!r:.200}")
        return result

    def _read(self, name: str, path: pathlib.Path) -> Any:
        match name:
            case "training.json":
                segments = workdir.read_training(self.folder)
                if segments:
                    workdir.note_training(self.folder, {**segments[-1], "from_step": 1, "to_step": 7})
                    if workdir.read_training(self.folder)[-1]["to_step"] != 7:
                        raise Wrong("what was noted behind it cannot be read")
                return segments or Refused(Error("none"))
            case "auto.json":
                known = comparison._known(path, {"data": "x"}, 4)
                if "best" in known:
                    comparison._row("x", [known])
                return known or Refused(Error("none"))
            case "cost.json":
                return cost._known(path, ["natural"]) or Refused(Error("none"))
            case "outcome.json":
                found = outcomes.read(path, self.labels)
                if found and any(o.prediction.shape != (5,) or o.correct.dtype != bool for o in found.outcomes):
                    raise Wrong("predictions of another shape")
                return found or Refused(Error("none"))
            case _:
                progress._drop_lines_after(path, 5)
                kept = [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n") if line]
                if any(step > 5 for step in kept):
                    raise Wrong("a line beyond the step is kept")
                return kept or Refused(Error("none"))


class Checkpoint(Target):
    """A whole workdir, and the network in it."""

    name, share = "checkpoint", 0.004

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        models.MODELS = {**models.MODELS, "digits_cnn": functools.partial(models.MnistCNN, features=(2, 2), hidden=4)}  # type: ignore[misc]
        good, config = folder / "good", Config.from_json(a_config()["config"])
        good.mkdir()
        (good / "config.json").write_text(json.dumps(a_config()))
        state = train.init_state(config, models.create("digits_cnn", 3, SHAPE), SHAPE)
        with Checkpoints(good) as checkpoints:
            checkpoints.save(4, state.replace(step=state.step + 4), {"score": 1.5, "seconds": 2.0})
            checkpoints.wait()
        self.files = {p.relative_to(good).as_posix(): p.read_bytes() for p in good.rglob("*") if p.is_file()}
        self.params = jax.device_get(e2sad_jax.load(good).params)
        self.item = "checkpoints/4/default"
        store = self._store(good)
        self.keys = {key.decode(): store.read(key).result().value for key in store.list().result()}

    def _store(self, where: pathlib.Path) -> ts.KvStore:
        base = {"driver": "file", "path": f"{where / self.item}/"}
        return ts.KvStore.open({"driver": "ocdbt", "base": base}).result()

    def input(self, rng: random.Random) -> tuple[str, tuple[str, str, bytes]]:
        name = rng.choice(sorted(self.files))
        kind = rng.choice(("bytes", "bytes", "bytes", "JSON", "JSON", "JSON", "array", "array", "chunk", "files"))
        if kind == "JSON":
            name = rng.choice([n for n in sorted(self.files) if self.files[n][:1] in (b"{", b"[")])
            how, content = damage_json(rng, json.loads(self.files[name]))
            return f"JSON: {how}", ("file", name, content)
        if kind == "array":
            key = rng.choice([k for k in sorted(self.keys) if k.endswith(".zarray")])
            how, content = damage_json(rng, json.loads(self.keys[key]))
            if rng.random() < 0.3:
                value = json.loads(self.keys[key])
                odd = {
                    "shape": [10**6, 10**6],
                    "chunks": [10**5, 10**5],
                    "dtype": "<f8",
                    "compressor": {"id": "gzip", "level": 1},
                }
                field = rng.choice(sorted(odd))
                how, content = field, json.dumps({**value, field: odd[field]}).encode()
            return f"array: {how}", ("key", key, content)
        if kind == "chunk":
            key = rng.choice([k for k in sorted(self.keys) if not k.endswith(".zarray")])
            return "chunk", ("key", key, damage_bytes(rng, self.keys[key], list(self.keys.values()))[1])
        if kind == "files":
            how = rng.choice(("delete", "link", "pipe", "folder", "rename", "many", "exchange"))
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
            # What a key holds may be another array of the same shape, for nobody signs it.
            params = jax.device_get(got.params)
            same = jax.tree.map(
                lambda a, b: a.shape == b.shape and (given[0] == "key" or np.array_equal(a, b)), params, self.params
            )
            if not all(jax.tree.leaves(same)):
                raise Wrong("parameters are not those that were saved")
            return got
        finally:
            shutil.rmtree(where)

    def _damage(self, where: pathlib.Path, how: str, name: str, content: bytes) -> None:
        path = where / name
        if how == "file":
            path.write_bytes(content)
        elif how == "key":
            self._store(where).write(name, content).result()
        elif how == "many":
            for i in range(50):
                (path.parent / f"{path.name}{i}").write_bytes(b"")
        elif how == "exchange":
            path.write_bytes(self.files[content.decode()])
        else:
            path.unlink()
            if how == "link":
                path.symlink_to(self.folder / "good" / name)
            elif how == "pipe":
                os.mkfifo(path)
            elif how == "folder":
                path.mkdir()
            elif how == "rename":
                (path.parent / f"{path.name}x").write_bytes(self.files[name])


class _Reached(Exception):
    """The flags are right; from here on a run would begin."""


class Flags(Target):
    """Command lines, up to where a run would begin."""

    name, share = "flags", 0.1

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        from experiments import compare, evaluate, paper, step_cost

        by_defense = {"trades": {"attack_steps": 40}}
        self.binaries: dict[str, tuple[Any, Callable[[], None]]] = {}
        for module in (common, compare, evaluate, paper, step_cost):
            name = module.__name__.rpartition(".")[2]
            if module is common:
                common.define_flags({}, by_defense, "")
                run = functools.partial(common._run, "mnist", by_defense)
            else:
                module.define_flags()
                run = module._run
            own = flags.FlagValues()  # type: ignore[no-untyped-call]
            for flag in flags.FLAGS.get_flags_for_module(sys.argv[0]):
                own[flag.name] = flag
                delattr(flags.FLAGS, flag.name)
            own["verbosity"] = flags.FLAGS["verbosity"]
            self.binaries[name] = (module, run)
            setattr(self, name, own)
        values: list[str] = [str(value)[:100] for value in ODD if not isinstance(value, float) or value == value]
        self.values = [value for value in values if "\x00" not in value and "\ud800" not in value]
        self.values += [
            "nan",
            "-inf",
            "1e999",
            "0x10",
            "1_000",
            "\uff11",
            "9" * 5000,
            "\udcff",
            "1,2",
            ",",
            "--",
            "natural,e2sad",
            "all",
        ]

    def input(self, rng: random.Random) -> tuple[str, tuple[str, list[str]]]:
        name = rng.choice(list(self.binaries))
        known = sorted(getattr(self, name))
        arguments = []
        for _ in range(rng.choice((1, 1, 2, 4))):
            flag = rng.choice(known)
            how = rng.randrange(6)
            default = getattr(self, name)[flag].default
            value = rng.choice(self.values) if rng.random() < 0.7 else str(default)
            if how == 0:
                flag = damage_bytes(rng, flag.encode())[1].decode("utf-8", "surrogateescape").replace("\x00", "")
            arguments.append(
                rng.choice(
                    (f"--{flag}={value}", f"--{flag}", f"-{flag}={value}", f"--no{flag}", flag, f"--{flag}={value}")
                )
            )
        return name, (name, arguments)

    def run(self, given: tuple[str, list[str]]) -> Any:
        name, arguments = given
        module, run = self.binaries[name]
        own = getattr(self, name)
        for flag in own:
            own[flag].value, own[flag].present = own[flag].default, 0
        own.unparse_flags()
        try:
            with _until_a_run_begins(module, own), contextlib.redirect_stderr(io.StringIO()) as told:
                common._parse([name, *arguments])
                run()
        except _Reached:
            return arguments
        except Error as error:
            return Refused(Error(common._told(error)))
        except SystemExit as error:
            if error.code != 2 or len(told.getvalue().splitlines()) != 1:
                raise Wrong(f"exit code {error.code}, {told.getvalue()!r}") from error
            return Refused(Error(told.getvalue().strip()))
        raise Wrong("it came to an end without a run")


@contextlib.contextmanager
def _until_a_run_begins(module: Any, own: Any) -> Iterator[None]:
    def reached(*args: Any, **kwargs: Any) -> None:
        raise _Reached

    from e2sad_jax import run, sharding
    from e2sad_jax.diagnosis import run as diagnosis_run
    from experiments import watched

    places: list[tuple[Any, str, Any]] = [
        (common, "FLAGS", own),
        (module, "FLAGS", own),
        (run, "run_beside", reached),
        (run, "describe", reached),
        (sharding, "connect", lambda *args: None),
        (watched, "run_again", reached),
        (comparison, "run", reached),
        (diagnosis_run, "run", reached),
        (step_cost_run, "run", reached),
        (runner, "Reproduction", reached),
    ]
    before = [(place, name, getattr(place, name)) for place, name, _ in places]
    for place, name, value in places:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


TARGETS: Mapping[str, type[Target]] = {t.name: t for t in (Npz, ConfigFile, Notes, Checkpoint, Flags)}
