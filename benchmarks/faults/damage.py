"""Damage to files: a bit, or what comes after some place."""

import pathlib
import random


def flip(path: pathlib.Path, rng: random.Random) -> None:
    """Flips one bit."""
    content = bytearray(path.read_bytes())
    if content:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: pathlib.Path, rng: random.Random) -> None:
    """Cuts a file off, anywhere."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(max(1, len(content)))])
