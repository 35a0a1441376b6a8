"""Data sets: MNIST, SVHN, the embedded digits, and a user's own npz files.

`load` gives images and labels as numpy arrays in host memory; no JAX device is touched. A prepared data set becomes one
file, for a machine without network or tensorflow-datasets, with

    python -m e2sad_jax.data mnist --to=mnist.npz [--data_dir=DIR] [--overwrite]

`digits` are the handwritten digits that scikit-learn distributes: the test part of "Optical Recognition of Handwritten
Digits" by E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, licence CC BY
4.0. They come with this package, so that everything runs without any download.
"""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Sequence

import numpy as np

from e2sad_jax.data import npz
from e2sad_jax.data.npz import Dataset, load_npz, write_npz
from e2sad_jax.errors import DataError

__all__ = ["NAMES", "Dataset", "default_data_dir", "load", "load_npz", "main", "write_npz"]

NAMES = ("mnist", "svhn", "digits")

_DIGITS_FILE = pathlib.Path(__file__).with_name("digits.npz")


def default_data_dir() -> pathlib.Path:
    """Returns the folder for prepared data sets: $E2SAD_DATA_DIR, else $XDG_CACHE_HOME/e2sad_jax (~/.cache/e2sad_jax)."""
    if folder := os.environ.get("E2SAD_DATA_DIR"):
        return _expand(folder)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (pathlib.Path(cache) if os.path.isabs(cache) else _expand("~/.cache")) / "e2sad_jax"


def _expand(folder: str | os.PathLike[str]) -> pathlib.Path:
    try:
        return pathlib.Path(folder).expanduser()
    except RuntimeError as err:
        raise DataError(f"{os.fspath(folder)}: there is no home folder; set --data_dir or E2SAD_DATA_DIR") from err


def load(data: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set.

    Args:
        data: `mnist`, `svhn` (cropped, without its extra split), `digits`, or the path of a file ending in .npz, which
            `load_npz` describes.
        data_dir: Where `mnist` and `svhn` are prepared and found again; None or "" for `default_data_dir()`. Original
            files in its folder `downloads/manual` are used instead of a download.

    Returns:
        The data set: images [N, H, W, C] (uint8; float32 in [0, 1] from a user's file of floats), labels [N] int32.

    Raises:
        DataError: An unknown name, files that are missing with no network to fetch them, or damaged or invalid data.
    """
    data = os.fspath(data)
    if data == "digits":
        return _load_digits()
    if data in NAMES:
        return _load_prepared(data, _expand(data_dir) if data_dir else default_data_dir())
    if data.lower().endswith(".npz"):
        return load_npz(_expand(data))
    raise DataError(f"--data={data!r} is not a data set; choose {', '.join(NAMES)}, or the path of a .npz file")


def _load_prepared(name: str, root: pathlib.Path) -> Dataset:
    from absl import logging

    copy = root / "decoded" / f"{name}.npz"
    if copy.exists():
        try:
            dataset = load_npz(copy)
            if dataset.name != name:
                raise DataError(f"{copy}: holds {dataset.name!r} instead of {name!r}")
            return dataset
        except DataError as err:
            logging.warning("%s: the decoded copy is unusable and will be rebuilt from the records: %s", name, err)
    else:
        logging.info("%s: no decoded copy at %s; it will be built from the records", name, copy)
    try:
        from e2sad_jax.data import tfds
    except ImportError as err:
        raise DataError(
            f"{name}: not decoded in {root}, and preparing it needs tensorflow-datasets with array_record, which cannot be "
            f"imported ({npz.one_line(err)}); install them (pip install 'e2sad_jax[data]'), or export the "
            f"data where they are (python -m e2sad_jax.data {name} --to={name}.npz) and use --data={name}.npz, or use "
            "--data=digits"
        ) from err
    return tfds.prepare(name, root)


def _load_digits() -> Dataset:
    """Returns the embedded digits as 28x28x1 images, so that networks for MNIST take them.

    The 8x8 images (values 0..16) are resampled with cubic splines (`scipy.ndimage.zoom`, pixels as areas), clipped to
    their range and stored as 0..255. Of each class every fifth image, in the original order, is a test image: 1,442
    train and 355 test images, with the same proportions of classes, and no random numbers.
    """
    import scipy.ndimage

    members = npz.read_members(_DIGITS_FILE, ("images", "labels"))
    small, labels = members["images"], members["labels"].astype(np.int32)
    big = scipy.ndimage.zoom(small.astype(np.float64), (1, 3.5, 3.5), order=3, mode="reflect", grid_mode=True)
    # Rounded to 6 digits first: a last-bit difference between machines must not flip a pixel.
    images = np.rint(np.round(np.clip(big, 0, 16) * (255 / 16), 6)).astype(np.uint8)[..., np.newaxis]
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[4::5]] = True
    return Dataset("digits", "", images[~test], labels[~test], images[test], labels[test], num_classes=10)


def _export(data: str, to: str, data_dir: str | None, overwrite: bool) -> str:
    path = _expand(to)
    if path.suffix.lower() != ".npz":
        raise DataError(f"--to={to!r} must end in .npz")
    if not path.parent.is_dir():
        raise DataError(f"--to={to!r}: the folder {path.parent} does not exist")
    if path.exists() and not overwrite:
        raise DataError(f"--to={to!r} exists; give another name, or --overwrite to replace it")
    dataset = load(data, data_dir)
    write_npz(dataset, path)
    shape = "x".join(str(size) for size in dataset.image_shape)
    return (
        f"wrote {path}: {' '.join(filter(None, (dataset.name, dataset.version)))}, {len(dataset.x_train)} train and "
        f"{len(dataset.x_test)} test images of {shape} {dataset.x_train.dtype}, {dataset.num_classes} classes, "
        f"{path.stat().st_size / 1e6:.1f} MB, content sha256 {dataset.sha256}"
    )


_USAGE = """\
Writes a data set as one .npz file that trains anywhere with --data=FILE.npz, under its own name.

usage: python -m e2sad_jax.data DATA --to=FILE.npz [--data_dir=DIR] [--overwrite]

DATA is mnist, svhn, digits, or the path of a .npz file.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 for bad usage and for data that cannot be had."""
    from absl import flags

    # Flags of its own: a program that imports this module may define the same names.
    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    values.set_gnu_getopt(True)
    flags.DEFINE_string("to", None, "the .npz file to write (required)", flag_values=values)
    flags.DEFINE_string(
        "data_dir",
        None,
        "where mnist and svhn are prepared; original files in its folder downloads/manual are used instead of a\n"
        "      download (default: $E2SAD_DATA_DIR, else ~/.cache/e2sad_jax)",
        flag_values=values,
    )
    flags.DEFINE_bool("overwrite", False, "replace an existing file", flag_values=values)
    flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=values)
    try:
        positional = values(["e2sad_jax.data", *(sys.argv[1:] if argv is None else argv)])[1:]
    except flags.Error as err:
        print(f"error: {npz.one_line(err)}; see python -m e2sad_jax.data --help", file=sys.stderr)
        return 2
    if values.help:
        print(_USAGE)
        for name in ("to", "data_dir", "overwrite", "help"):
            print(f"  --{name}\n      {values[name].help}")
        return 0
    if len(positional) != 1 or not values.to:
        problem = "--to=FILE.npz is missing" if len(positional) == 1 else f"expected one DATA, got {len(positional)}"
        print(f"error: {problem}; see python -m e2sad_jax.data --help", file=sys.stderr)
        return 2
    try:
        print(_export(positional[0], values.to, values.data_dir, values.overwrite))
    except DataError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    return 0
