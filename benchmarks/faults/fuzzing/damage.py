"""Damage to bytes and to JSON, odd values, and what a target of `benchmarks.fuzz` is."""

import abc
import contextlib
import json
import os
import pathlib
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.faults.fuzz import Refused
from e2sad_jax.errors import Error

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


class Target(abc.ABC):
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

    @abc.abstractmethod
    def input(self, rng: random.Random) -> tuple[str, Any]:
        """A kind of damage, and a damaged input; of bytes, or what `save` writes."""

    @abc.abstractmethod
    def run(self, given: Any) -> Any:
        """What became of it: `Refused`, or anything else where it was taken.

        Raises:
          Wrong: if it was taken for something that it is not.
        """

    def save(self, given: Any, path: pathlib.Path) -> None:
        """Writes an input for people to look at."""
        path.write_bytes(given if isinstance(given, bytes) else repr(given).encode("utf-8", "backslashreplace"))
