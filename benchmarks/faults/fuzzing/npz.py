"""Data sets in one file."""

import contextlib
import io
import pathlib
import pickle
import random
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.faults.fuzz import Refused, Wrong
from benchmarks.faults.fuzzing.damage import INTERESTING, ODD, Canary, Target, damage_bytes, refusing
from e2sad_jax.data import Dataset, load_npz, write_npz
from e2sad_jax.data.dataset import ARRAYS


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
            for name in ARRAYS:
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
