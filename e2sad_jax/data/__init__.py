"""Data sets: those known by name, any of tensorflow-datasets' images, and a user's own npz files.

`load` gives images and labels as numpy arrays, large ones in their file; no JAX device is touched.
`python -m e2sad_jax.data mnist --to=mnist.npz` writes a data set as one file, for a machine without network or
tensorflow-datasets.
"""

from __future__ import annotations

import os
import pathlib

from e2sad_jax.data import prepared
from e2sad_jax.data.dataset import Dataset, hold_out, sample, sample_tests, subset
from e2sad_jax.data.known import KNOWN, Known
from e2sad_jax.data.npz import load_npz, write_npz
from e2sad_jax.errors import DataError, close_to, first_line

__all__ = [
    "KNOWN",
    "Dataset",
    "Known",
    "default_data_dir",
    "hold_out",
    "load",
    "load_npz",
    "sample",
    "sample_tests",
    "subset",
    "write_npz",
]


def default_data_dir() -> pathlib.Path:
    """Returns the folder for prepared data sets: $E2SAD_DATA_DIR, else $XDG_CACHE_HOME/e2sad_jax (~/.cache/e2sad_jax)."""
    if folder := os.environ.get("E2SAD_DATA_DIR"):
        return expand(folder)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative paths ignored.
    return (pathlib.Path(cache) if os.path.isabs(cache) else expand("~/.cache")) / "e2sad_jax"


def expand(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns a path with `~` replaced by the home folder.

    Raises:
      DataError: if there is no home folder.
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as err:
        raise DataError(f"{os.fspath(path)}: there is no home folder; set --data_dir or E2SAD_DATA_DIR") from err


def load(data: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Loads a data set.

    Args:
      data: a name of `KNOWN` (`svhn` is cropped, without its extra split; `svhn_extra` trains on that too);
        `tfds:NAME/CONFIG:VERSION@TRAIN,TEST`, a set of tensorflow-datasets, where all but NAME may be left out and the
        splits are `train` and `test` then, or `validation` where there is no `test`; or the path of a file ending in .npz,
        which `load_npz` describes.
      data_dir: where data sets are prepared and found again; None or "" for `default_data_dir()`. Original files in its
        folder `downloads/manual` are used instead of a download. Sets that tensorflow-datasets has prepared are looked for
        in its folder `array_record`, then in `$TFDS_DATA_DIR`, or else in `~/tensorflow_datasets`.

    Returns:
      The data set: images `[N, H, W, C]` (uint8; float32 in [0, 1] from a user's file of floats), labels `[N]` int32.

    Raises:
      DataError: if the name is unknown, files are missing with no network to fetch them, or data are damaged or invalid.
    """
    data = os.fspath(data)
    if data == "digits":
        from e2sad_jax.data.embedded import load_digits

        return load_digits()
    root = expand(data_dir) if data_dir else default_data_dir()
    if data in KNOWN:
        return _load_prepared(data, root, None)
    if data.startswith(prepared.PREFIX):
        wanted = prepared.parse(data)
        return _load_prepared(data, root, wanted)
    if data.lower().endswith(".npz"):
        return load_npz(expand(data))
    raise DataError(
        f"--data={data!r} is not a data set; {close_to(data, KNOWN)}choose {', '.join(KNOWN)}, tfds:NAME of "
        "tensorflow-datasets, or the path of a .npz file"
    )


def _load_prepared(data: str, root: pathlib.Path, wanted: prepared.Wanted | None) -> Dataset:
    """Reads the decoded copy of a data set of tensorflow-datasets, or has that decode or prepare it."""
    from absl import logging

    name = wanted.reported if wanted else data
    copy = wanted.copy(root) if wanted else root / "decoded" / f"{name}.npz"
    if copy.exists():
        try:
            dataset = load_npz(copy)
            if dataset.name != name:
                raise DataError(f"{copy}: holds {dataset.name!r} instead of {name!r}")
            folder = wanted and prepared.find(wanted, prepared.folders(root))
            if folder and dataset.source_sha256 != prepared.source(folder):
                raise DataError(f"{copy}: is of other records than those in {folder}")
            return dataset
        except DataError as err:
            logging.warning("%s: the decoded copy is unusable and will be rebuilt from the records: %s", name, err)
    try:
        from e2sad_jax.data import tfds
    except ImportError as err:
        file = f"{prepared.stem(data)}.npz"
        raise DataError(
            f"{data}: not decoded in {root}, and preparing it needs tensorflow-datasets with array_record, which cannot be "
            f"imported ({first_line(err)}); install them (pip install 'e2sad_jax[data]'), or export the "
            f"data where they are (python -m e2sad_jax.data {data} --to={file}) and use --data={file}, or use --data=digits"
        ) from err
    return tfds.read(wanted, root, copy) if wanted else tfds.prepare(name, root, copy)
