"""What a compiled program does, read from XLA's text of it: kernels, collectives, and the bytes that it moves.

The text is that of `jax.stages.Compiled.as_text`, for any platform. A loop counts as often as it turns, by the compiler's own
note or by its counter; one whose turns neither tells counts once.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import jax

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Instructions that start nothing on the device.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier", "after-all", "partition-id"),
    *("replica-id", "while", "call", "conditional", "async-start", "async-update", "async-done"),
}
_TO_HOST = ("infeed", "outfeed", "send", "recv")
_SLICES = ("dynamic-slice", "gather", "slice")  # read as much as they give


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
      name: what others call its result.
      shape: of its result, as XLA writes it.
      opcode: as "fusion".
      arguments: what stands in brackets after it.
      attributes: what stands after the operands.
      root: whether its result is that of its computation.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str
    root: bool = False

    @property
    def operands(self) -> Sequence[str]:
        """Names of the instructions whose results it takes."""
        return re.findall(r"%([\w.\-]+)", self.arguments)

    def called(self, attribute: str) -> Sequence[str]:
        """The computations that an attribute names, as `body=%b` or `branch_computations={%a, %b}`."""
        found = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.attributes)
        return re.findall(r"[\w.\-]+", found.group(1)) if found else []


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: the instructions of each, by its name.
      entry: the computation that is run.
    """

    computations: Mapping[str, Sequence[Instruction]]
    entry: str

    @classmethod
    def read(cls, text: str) -> "Program":
        """Reads XLA's text."""
        computations: dict[str, list[Instruction]] = {}
        entry, inside = "", ""
        for line in text.splitlines():
            if opened := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
                inside = opened.group(2)
                computations[inside] = []
                entry = inside if opened.group(1) else entry
            elif found := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line):
                computations[inside].append(_instruction(found.group(2), found.group(3), bool(found.group(1))))
        if not entry:
            raise ValueError("not the text of a compiled program: it has no ENTRY computation")
        return cls(computations, entry)

    @functools.cached_property
    def run(self) -> Sequence[tuple[Instruction, int]]:
        """What is run and how often, loops and branches followed."""
        return list(self._run(self.entry, 1))

    def _run(self, computation: str, times: int) -> Iterator[tuple[Instruction, int]]:
        for one in self.computations[computation]:
            yield one, times
            turns = self.turns(one) if one.opcode == "while" else 1
            inner = times * (1 if turns is None else turns)
            for attribute in _FOLLOWED.get(one.opcode, ()):
                for name in one.called(attribute):
                    yield from self._run(name, inner)

    def turns(self, loop: Instruction) -> int | None:
        """How often a loop turns, by the compiler's note or by its counter; None where neither tells."""
        found = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
        return int(found.group(1)) if found else self._counted(loop)

    def _counted(self, loop: Instruction) -> int | None:
        """The turns of a loop that counts in ones from a constant up to another, as a TPU's program has it."""
        (condition,), (body,) = (loop.called(name) for name in ("condition", "body"))
        test, end, first = self._root(condition), self._root(body), self._named[loop.operands[0]]
        if test.opcode != "compare" or "direction=LT" not in test.attributes or {end.opcode, first.opcode} != {"tuple"}:
            return None
        place = self._place(test.operands[0], condition)
        if place is None:
            return None
        step = self._named[end.operands[place]]
        others = [name for name in step.operands if self._constant(name) != 1]
        if step.opcode != "add" or [self._place(name, body) for name in others] != [place]:
            return None
        start, last = self._constant(first.operands[place]), self._constant(test.operands[1])
        return None if start is None or last is None else max(last - start, 0)

    def _root(self, computation: str) -> Instruction:
        return next(one for one in self.computations[computation] if one.root)

    def _place(self, name: str, computation: str) -> int | None:
        """Which element of the argument of a computation an instruction takes, or None."""
        one = self._named[name]
        arguments = [other.name for other in self.computations[computation] if other.opcode == "parameter"]
        found = re.search(r"\bindex=(\d+)", one.attributes)
        takes = one.opcode == "get-tuple-element" and list(one.operands) == arguments
        return int(found.group(1)) if takes and found else None

    def _constant(self, name: str) -> int | None:
        """The whole number that an instruction is, copies followed."""
        one = self._named[name]
        if one.opcode == "copy":
            return self._constant(one.operands[0])
        return int(one.arguments) if one.opcode == "constant" and re.fullmatch(r"-?\d+", one.arguments) else None

    @property
    def loops(self) -> bool:
        """Whether there is a loop, but for those of one turn."""
        return any(one.opcode == "while" and self.turns(one) != 1 for one, _ in self.run)

    @property
    def kernels(self) -> int:
        """Instructions that start something on the device."""
        return sum(times for one, times in self.run if one.opcode not in _FREE and not one.opcode.endswith("-done"))

    @property
    def unknown_loops(self) -> int:
        """Loops of which nothing tells how often they turn: a GPU's host has to read after each turn whether to go on."""
        return sum(one.opcode == "while" and self.turns(one) is None for one, _ in self.run)

    @property
    def transfers(self) -> int:
        """Exchanges with the host."""
        return sum(times for one, times in self.run if one.opcode in _TO_HOST or _CALLBACK.search(one.attributes))

    def collectives(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the results of what a device exchanges with others, by kind, as "all-reduce"."""
        total: dict[str, tuple[int, int]] = {}
        for one, times in self.run:
            kind = one.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                # What begins one has the operands with the result, `(operands, result, ...)`; a sum's has the result alone.
                shape = one.shape if kind == "all-reduce" or kind == one.opcode else parts(one.shape)[1]
                number, sent = total.get(kind, (0, 0))
                total[kind] = number + times, sent + times * size(shape)
        return total

    @property
    def bytes_moved(self) -> int:
        """Bytes that kernels read from the device's memory and write to it; what a TPU holds in its core does not count."""
        return sum(times * self._moved(one) for one, times in self.run)

    def _moved(self, one: Instruction) -> int:
        if one.opcode in _FREE or one.opcode.endswith("-done"):
            return 0
        if one.opcode in _SLICES:
            return 2 * size(one.shape)
        if one.opcode == "dynamic-update-slice":
            return 2 * size(self._named[one.operands[1]].shape)
        inner: Sequence[Instruction] = ()
        written = size(one.shape)
        if one.opcode == "fusion":
            (fused,) = one.called("calls")
            inner, root = self.computations[fused], self._root(fused)
            if root.opcode == "dynamic-update-slice":  # in place
                written = size({i.name: i.shape for i in inner}[root.operands[1]])
        return written + sum(_read(inner, k, self._named[name].shape) for k, name in enumerate(one.operands))

    @functools.cached_property
    def _named(self) -> Mapping[str, Instruction]:
        return {one.name: one for computation in self.computations.values() for one in computation}


_CALLBACK = re.compile(r'custom_call_target="[^"]*(callback|Host)')
_FOLLOWED = {
    "while": ("body",),
    "call": ("to_apply",),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "async-start": ("calls",),
}


def collective_bytes(program: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of the results of a compiled program's collectives, by kind, as "all-reduce"."""
    return {kind: sent for kind, (_, sent) in Program.read(program.as_text() or "").collectives().items()}


def size(shape: str) -> int:
    """Bytes of an array or a tuple of arrays as XLA writes its shape; those in a TPU core's own memory are left out."""
    total = 0
    for dtype, bits, sizes, layout in re.findall(r"(pred|[a-z]+?)(\d*)(?:e\d+m\d+\w*)?\[([\d,]*)\](\{[^}]*\})?", shape):
        if dtype != "token" and not re.search(r"S\([1-9]\d*\)", layout):
            each = 1 if dtype == "pred" else int(bits) / 8
            total += math.ceil(each * math.prod(int(n) for n in sizes.split(",") if n))
    return total


def parts(shape: str) -> list[str]:
    """Splits the shape of a tuple as XLA writes it, `(f32[2,3]{1,0}, (s32[], f32[2]))`; inner tuples stay whole."""
    found, depth = [""], 0
    for character in re.sub(r"/\*.*?\*/", "", shape)[1:-1]:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and not depth:
            found.append("")
        else:
            found[-1] += character
    return [part.strip() for part in found]


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opened = rest.index("(")
    closed = opened + _closing(rest[opened:])
    return Instruction(name, shape, rest[:opened], rest[opened + 1 : closed], rest[closed + 1 :], root)


def _closing(text: str) -> int:
    """Where the bracket closes with which a text begins."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced brackets: {text[:80]}")


def _read(inner: Sequence[Instruction], k: int, shape: str) -> int:
    """Bytes that a kernel reads of its operand number k: of one from which it only takes slices, the slices."""
    own = next((one.name for one in inner if one.opcode == "parameter" and one.arguments == str(k)), None)
    names, users = {own}, []
    for one in inner:
        if one.opcode == "bitcast" and one.operands[0] in names:
            names.add(one.name)
        elif names.intersection(one.operands):
            users.append(one)
    if users and all(one.opcode in _SLICES and one.operands[0] in names for one in users):
        return sum(size(one.shape) for one in users)
    if users and all(one.opcode == "dynamic-update-slice" and one.operands[0] in names for one in users):
        return 0  # written in place
    return size(shape)
