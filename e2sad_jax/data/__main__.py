"""Writes a data set as one .npz file that trains anywhere with --data=FILE.npz, under its own name."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from e2sad_jax import data
from e2sad_jax.errors import ConfigError, DataError, Error


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(argv: Sequence[str] | None = None, prog: str = "python -m e2sad_jax.data") -> int:
    """Runs the command line.

    Args:
      argv: the arguments; None for those of the process.
      prog: the command that the messages name.

    Returns:
      The exit code: 0, or 2 for invalid arguments and for data that cannot be had.
    """
    parser = _Parser(prog=prog, description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "DATA", help=f"{', '.join(data.KNOWN)}, tfds:NAME of tensorflow-datasets, or the path of a .npz file"
    )
    parser.add_argument("--to", required=True, metavar="FILE.npz", help="the file to write, in an existing folder")
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        help="where data sets are prepared; original files in its folder downloads/manual are used instead of a "
        "download (default: $E2SAD_DATA_DIR, else $XDG_CACHE_HOME/e2sad_jax, else ~/.cache/e2sad_jax)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    try:
        arguments = parser.parse_args(argv)
        print(export(arguments.DATA, arguments.to, arguments.data_dir, arguments.overwrite))
    except Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def export(name: str, to: str, data_dir: str | None = None, overwrite: bool = False) -> str:
    """Writes a data set as one .npz file.

    Args:
      name: the data set, as `data.load` takes it.
      to: the file to write.
      data_dir: where prepared data sets are, as `data.load` takes it.
      overwrite: whether to replace an existing file.

    Returns:
      A line that says what was written.

    Raises:
      DataError: if the data cannot be had, or the file cannot be written.
    """
    path = data.expand(to)
    if path.suffix.lower() != ".npz":
        raise DataError(f"--to={to!r} must end in .npz")
    if not path.parent.is_dir():
        raise DataError(f"--to={to!r}: the folder {path.parent} does not exist; make it, or name another")
    if path.exists() and not overwrite:
        raise DataError(f"--to={to!r} exists; give another name, or --overwrite to replace it")
    dataset = data.load(name, data_dir)
    data.write_npz(dataset, path)
    shape = "x".join(map(str, dataset.image_shape))
    return (
        f"wrote {path}: {' '.join(filter(None, (dataset.name, dataset.version)))}, {len(dataset.x_train)} train and "
        f"{len(dataset.x_test)} test images of {shape} {dataset.x_train.dtype}, {dataset.num_classes} classes, "
        f"{path.stat().st_size / 1e6:.1f} MB, content sha256 {dataset.sha256}"
    )


if __name__ == "__main__":
    sys.exit(main())
