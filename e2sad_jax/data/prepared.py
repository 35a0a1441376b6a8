"""Names of tensorflow-datasets' sets, and where prepared ones lie. It reads folders, and imports no tensorflow-datasets."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import urllib.parse
from collections.abc import Sequence
from typing import NamedTuple

from e2sad_jax.errors import DataError, quoted

PREFIX = "tfds:"
FORM = "tfds:NAME, tfds:NAME/CONFIG, tfds:NAME:VERSION or tfds:NAME/CONFIG:VERSION, and @TRAIN,TEST after it for other splits"
INFO = "dataset_info.json"  # written last, so that a folder with it is whole
_VERSION = r"\d+\.\d+\.\d+"
_WANTED = re.compile(rf"{PREFIX}([A-Za-z]\w*)(?:/(\w[\w.+-]*))?(?::({_VERSION}))?(?:@([^@,]+),([^@,]+))?", re.ASCII)


class Wanted(NamedTuple):
    """What `--data=tfds:NAME/CONFIG:VERSION@TRAIN,TEST` asks for; "" is what is left out.

    Attributes:
      name: of the set.
      config: of the set; "" for its default one.
      version: "X.Y.Z"; "" for the newest that is prepared.
      train: split of the training images, as the library spells splits, such as `train[:80%]`.
      test: split of the test images; both are given or none.
    """

    name: str
    config: str
    version: str
    train: str
    test: str

    @property
    def asked(self) -> str:
        """NAME/CONFIG:VERSION, as the library spells it."""
        return f"{self.name}{'/' * bool(self.config)}{self.config}{':' * bool(self.version)}{self.version}"

    @property
    def splits(self) -> str:
        """@TRAIN,TEST if they are given."""
        return f"@{self.train},{self.test}" if self.train else ""

    @property
    def reported(self) -> str:
        """The name in reports, beside which the version stands: NAME/CONFIG@TRAIN,TEST."""
        return self._replace(version="").asked + self.splits

    def copy(self, root: pathlib.Path) -> pathlib.Path:
        """The file of the decoded copy in a data folder."""
        name = urllib.parse.quote(self.asked + self.splits, safe="")
        if len(name) > 200:  # a file's name has at most 255 bytes
            name = f"{name[:100]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
        return root / "decoded" / "tfds" / f"{name}.npz"


def stem(data: str) -> str:
    """What stands for a `--data` in the name of a folder: the stem of a file; of the library's sets all that is asked for."""
    if data.startswith(PREFIX):
        return re.sub(r"[^\w.]+", "-", data.removeprefix(PREFIX)).strip("-")
    return pathlib.PurePath(data).stem


def parse(text: str) -> Wanted:
    """Returns what a text asks for.

    Raises:
      DataError: if it has not the form `FORM`.
    """
    if match := _WANTED.fullmatch(text):
        wanted = Wanted(*(part or "" for part in match.groups()))
        if not re.fullmatch(_VERSION, wanted.config):
            return wanted
        raise DataError(
            f"--data={quoted(text)}: a version follows a colon, as in {PREFIX}{wanted.name}:{wanted.config}"
        )
    raise DataError(f"--data={quoted(text)}: must be {FORM}, such as tfds:imagenette/160px:1.0.0@train,validation")


def folders(root: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where prepared sets are looked for: in the data folder, then in the library's own, $TFDS_DATA_DIR."""
    own = os.environ.get("TFDS_DATA_DIR") or os.path.join("~", "tensorflow_datasets")
    return root / "array_record", pathlib.Path(os.path.expanduser(own))


def find(wanted: Wanted, places: Sequence[pathlib.Path]) -> pathlib.Path | None:
    """Returns the folder of a prepared set: of its newest version unless one is named, in the first place that has one."""
    for place in places:
        base = place / wanted.name
        versions = {path.parent.name: path.parent for path in (base / _config(wanted, base)).glob(f"*/{INFO}")}
        if wanted.version:
            versions = {wanted.version: versions[wanted.version]} if wanted.version in versions else {}
        numbered = [version for version in versions if re.fullmatch(_VERSION, version)]
        if numbered:
            return versions[max(numbered, key=lambda version: tuple(map(int, version.split("."))))]
    return None


def _config(wanted: Wanted, base: pathlib.Path) -> str:
    """The configuration asked for, else the default one, which the library keeps beside the configurations."""
    if wanted.config:
        return wanted.config
    try:
        default = json.loads((base / ".config" / "metadata.json").read_text())["default_config_name"]
    except (OSError, ValueError, LookupError, TypeError):  # most sets have no configurations
        return ""
    return default if isinstance(default, str) else ""


def found(places: Sequence[pathlib.Path]) -> list[str]:
    """Returns the sets that are prepared, as NAME:VERSION or NAME/CONFIG:VERSION."""
    names = set()
    for place in places:
        for path in (*place.glob(f"*/*/{INFO}"), *place.glob(f"*/*/*/{INFO}")):
            *name, version = path.parent.relative_to(place).parts
            names.add(f"{'/'.join(name)}:{version}")
    return sorted(names)


def source(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of the file that describes a prepared set, with the number and the bytes of its records, by its name."""
    return {INFO: hashlib.sha256((folder / INFO).read_bytes()).hexdigest()}
