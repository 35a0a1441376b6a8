"""A trained model for programs that know nothing of this library: as StableHLO, and its parameters as safetensors.

The first is the function that `e2sad_jax.load` gives up to its softmax, transform included: from images
`[N, H, W, C]`, float32 in [0, 1], to logits `[N, K]`, float32, for any N. What is written is read back before, and must
give the network's own logits.
"""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from e2sad_jax import networks
from e2sad_jax._compile import jit
from e2sad_jax._io import check_folder, write_bytes, write_json
from e2sad_jax.errors import ConfigError, Error
from e2sad_jax.reporting import provenance
from e2sad_jax.runs.classifier import CHOICES, Classifier, load
from e2sad_jax.runs.parameters import NEEDS, about, packages, to_safetensors
from e2sad_jax.runs.parameters import load_safetensors as load_safetensors
from e2sad_jax.training.config import check, setting

CARD = "export.json"
FILES = {name: f"model.{name}" for name in ("stablehlo", "safetensors")}
PLATFORMS = ("cpu", "cuda", "tpu")

# How far logits that are read back may be from the network's own, as a share of the largest.
CLOSE = {"float32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to export; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range, or a package that a format needs is missing.
    """

    workdir: str = setting("", "folder of the run to export")
    which: str = setting("last", "weights of the run", choices=CHOICES)
    to: str = setting("", "folder for the files; empty: WORKDIR/export")
    format: str = setting(",".join(FILES), f"what to write; of {', '.join(FILES)}, several with commas")
    overwrite: bool = setting(False, "replace what an earlier export left in the folder")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        if not self.workdir:
            raise ConfigError("--workdir: must be given, the folder of a run")
        if not set(self.formats) <= set(FILES):
            raise ConfigError(f"--format={self.format}: must be of {', '.join(FILES)}, several with commas")
        for name in self.formats:
            packages(name)

    @property
    def formats(self) -> list[str]:
        """The formats asked for, each once."""
        return list(dict.fromkeys(self.format.split(",")))


def run(request: Request) -> dict[str, Any]:
    """Exports a run's classifier; prints a line for each file.

    Returns:
      What `export.json` holds.

    Raises:
      ConfigError, WorkdirError: before anything is written.
    """
    folder = pathlib.Path(request.to or pathlib.Path(request.workdir) / "export").expanduser()
    there = [name for name in (CARD, *FILES.values()) if (folder / name).exists()]
    if there and not request.overwrite:
        raise ConfigError(
            f"--to={folder}: holds {', '.join(there)} of an earlier export; choose another folder, or add --overwrite"
        )
    classifier = load(request.workdir, request.which)
    contents = {name: WRITERS[name](classifier) for name in request.formats}
    differences = {name: _read_back(name, content, classifier) for name, content in contents.items()}
    card = _card(classifier, request, contents, differences)
    check_folder(folder, f"--to={folder}", make=True)
    for name in there:  # of another export perhaps: a card describes every file of its folder
        (folder / name).unlink()
    for name, content in contents.items():
        write_bytes(folder / FILES[name], content)
    write_json(folder / CARD, card)
    for path in [folder / FILES[name] for name in contents] + [folder / CARD]:
        print(f"{path}  {path.stat().st_size:,} bytes")
    return card


def to_stablehlo(classifier: Classifier) -> bytes:
    """The classifier and its gradient as StableHLO, for all of `PLATFORMS`: what `jax.export.deserialize` reads."""
    return bytes(exported(classifier).serialize(vjp_order=1))


def exported(classifier: Classifier, platforms: Sequence[str] = PLATFORMS, **settings: Any) -> jax.export.Exported:
    """The classifier as JAX exports it; `settings` are those of `jax.export.export`."""
    n = jax.export.symbolic_shape("N")
    images = jax.ShapeDtypeStruct((*n, *classifier.dataset["image_shape"]), jnp.float32)
    return jax.export.export(jax.jit(_function(classifier)), platforms=platforms, **settings)(images)


WRITERS: Mapping[str, Callable[[Classifier], bytes]] = {
    "stablehlo": to_stablehlo,
    "safetensors": to_safetensors,
}


def _function(classifier: Classifier) -> Callable[[jax.Array], jax.Array]:
    """Images to logits, the parameters a part of it; a new function each time, so that nothing traced before is taken."""
    logits = networks.logits_fn(classifier.model, jax.tree.map(np.asarray, classifier.params))
    return lambda images: logits(classifier.transform.apply(images))


def _read_back(name: str, content: bytes, classifier: Classifier) -> float:
    """The largest difference of logits between what is to be written and the network, on three images of noise.

    Raises:
      Error: if it is too large.
    """
    images = np.random.default_rng(0).random((3, *classifier.dataset["image_shape"]), np.float32)
    precision = classifier.config.precision
    if name == "stablehlo":
        got = jax.export.deserialize(bytearray(content)).call(jnp.asarray(images))
    else:
        from safetensors import numpy as safetensors

        params = traverse_util.unflatten_dict(safetensors.load(content), sep=".")
        got = jit(_function(dataclasses.replace(classifier, params=params)))(jnp.asarray(images))
    want = np.asarray(jit(_function(classifier))(jnp.asarray(images)))
    difference = float(np.abs(got - want).max())
    if not difference <= CLOSE[precision] * np.abs(want).max():  # NaN is neither
        raise Error(
            f"--format={name}: what was to be written gives logits that are {difference:.3g} from the network's, "
            f"of up to {np.abs(want).max():.3g}; nothing is written. Leave {name} out of --format"
        )
    return difference


def _card(
    classifier: Classifier, request: Request, contents: Mapping[str, bytes], differences: Mapping[str, float]
) -> dict[str, Any]:
    """export.json: what the files are, so that whoever has them need not ask."""
    return {
        **about(classifier),
        "checkpoint": request.which,
        "input": {
            "name": "images",
            "dtype": "float32",
            "shape": ["N", *classifier.dataset["image_shape"]],
            "range": [0, 1],
        },
        "output": {"name": "logits", "dtype": "float32", "shape": ["N", classifier.dataset["num_classes"]]},
        "files": {
            FILES[name]: {
                "sha256": hashlib.sha256(content).hexdigest(),
                "bytes": len(content),
                "largest_difference": differences[name],
                "written_by": {package: metadata.version(package) for package in NEEDS[name]},
            }
            for name, content in contents.items()
        },
        "platforms": list(PLATFORMS) if "stablehlo" in contents else [],
        "environment": provenance.environment(),
    }
