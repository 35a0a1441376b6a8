"""What a compiled program sends between devices, read from XLA's text of it."""

import math
import re

import jax

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


def collective_bytes(program: jax.stages.Compiled) -> dict[str, int]:
    """Counts the bytes that a compiled program sends: of the results of its collective operations, by kind.

    Operations inside of a loop count once.

    Args:
      program: the compiled program, as `jax.jit(f).lower(...).compile()` returns it.

    Returns:
      Bytes by kind of operation, as "all-reduce"; kinds that are not there are left out.
    """
    total: dict[str, int] = {}
    text = re.sub(r"\{[^{}\n]*\}|/\*.*?\*/", "", program.as_text() or "")  # layouts and comments, which have commas too
    for shapes, kind, start in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(", text):
        # What begins one has the operands with the result, `(operands, result, ...)`; a sum's has the result alone.
        result = _parts(shapes)[1] if start and kind != "all-reduce" else shapes
        for dtype, bits, sizes in re.findall(r"(pred|[a-z]+?)(\d*)\[([\d,]*)\]", result):
            each = 1 if dtype == "pred" else int(bits) // 8
            total[kind] = total.get(kind, 0) + each * math.prod(int(n) for n in sizes.split(",") if n)
    return total


def _parts(shapes: str) -> list[str]:
    """Splits the shapes of a tuple as XLA prints it, `(f32[2,3], (s32[], f32[2]))`; inner tuples stay whole."""
    parts, depth = [""], 0
    for character in shapes[1:-1]:
        depth += (character in "([") - (character in ")]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts
