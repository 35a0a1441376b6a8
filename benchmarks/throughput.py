"""How fast training images come: on the device, from the host, from a file, and how fast the host reads them.

python -m benchmarks.throughput [--model=preact_resnet18 --width=16] [--defense=natural] [--results=results/throughput]

Trains the same steps with `--resident=device` and `--resident=host`, and reads the batches of as many steps alone: from memory,
and from a file of which the system's memory holds nothing at first. Where the host reads faster than steps train, images on the
host cost little. Prints a Markdown page, and writes throughput.md and .json.
"""

import contextlib
import dataclasses
import functools
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from e2sad_jax import cli, networks, training
from e2sad_jax._io import check_folder, write_json, write_text
from e2sad_jax.data import KNOWN, Dataset
from e2sad_jax.defenses import DEFENSES
from e2sad_jax.errors import ConfigError
from e2sad_jax.networks import NETWORKS
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.table import Table
from e2sad_jax.training import Config, fit, init_state
from e2sad_jax.training.config import check, setting
from e2sad_jax.training.loop import steps_at_once
from e2sad_jax.training.step import epoch_order
from e2sad_jax.training.stream import Stream

# The data set whose images a network takes; others take CIFAR-10's.
SHAPES = {"mnist_cnn": "mnist", "digits_cnn": "mnist"}
READING = ALONE, FROM_FILE = "reading alone", "reading alone, from a file"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """What to measure; each field is the flag of that name.

    Raises:
      ConfigError: if a value is out of range.
    """

    model: str = setting("mnist_cnn", "network", choices=NETWORKS)
    width: int = setting(0, "filters of a residual network's first convolution, 0: its own number", lower=0)
    defense: str = setting("natural", "defense", choices=DEFENSES)
    batch_size: int = setting(128, "images a step", lower=1)
    images: int = setting(50_000, "training images, made at random", lower=1)
    steps: int = setting(200, "steps that are timed, after as many that start at once", lower=1)
    results: str = setting("", "folder for throughput.md and .json, empty: none")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check(field, getattr(self, field.name))
        if self.images < self.batch_size:
            raise ConfigError(f"--images={self.images}: must be at least --batch_size={self.batch_size}")
        if DEFENSES[self.defense].learns:
            raise ConfigError(f"--defense={self.defense}: needs a teacher; choose one that needs none")

    def config(self, resident: str) -> Config:
        """The settings of a run."""
        own = {"model": self.model, "width": self.width, "defense": self.defense, "batch_size": self.batch_size}
        return training.configure(**own, resident=resident, validation_examples=0, checkpoint_every=10**6)


def random_images(asked: Request) -> Dataset:
    """Images as the network takes them, and labels."""
    known = KNOWN[SHAPES.get(asked.model, "cifar10")]
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (asked.images, *known.image_shape), np.uint8)
    labels = rng.integers(0, known.num_classes, asked.images).astype(np.int32)
    return Dataset("random", "", images, labels, images[:1], labels[:1], known.num_classes)


def training_rate(config: Config, dataset: Dataset, steps: int) -> float:
    """Images a second, the compilation and the first dispatch left out."""
    model = networks.create(num_classes=dataset.num_classes, image_shape=dataset.image_shape, **config.network())
    state = init_state(config, model, dataset.image_shape, len(dataset.x_train))
    warm, began = steps_at_once(), 0.0

    def record(step: int, metrics: Any, count: int) -> None:
        nonlocal began
        if step == warm:
            jax.block_until_ready(metrics)
            began = time.perf_counter()

    jax.block_until_ready(
        fit(config, model, dataset, state, record=record, checkpoint=lambda *_: None, steps=warm + steps)
    )
    return steps * config.batch_size / (time.perf_counter() - began)


def reading_rate(config: Config, dataset: Dataset, steps: int) -> float:
    """Images a second that are read in their order and sent, with nothing to train between."""
    n, at_once = len(dataset.x_train), steps_at_once()
    order_of = functools.partial(epoch_order, jax.random.key(0), n=n)
    starts = range(0, steps, at_once)
    orders = {
        epoch: jax.device_get(order_of(epoch=np.uint32(epoch)))
        for epoch in {s * config.batch_size // n for s in starts}
    }
    with Stream(config, dataset.x_train, at_once, None) as stream:
        began = time.perf_counter()
        for first in starts:
            stream.ask(first, at_once, orders[first * config.batch_size // n])
            jax.block_until_ready(stream.take()[0])
    return len(starts) * at_once * config.batch_size / (time.perf_counter() - began)


@contextlib.contextmanager
def in_a_file(dataset: Dataset, folder: pathlib.Path) -> Iterator[Dataset]:
    """The data set with its training images in a file that the system's memory does not hold."""
    with tempfile.TemporaryFile(dir=folder) as file:
        np.asarray(dataset.x_train).tofile(file)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        images = np.memmap(file, dataset.x_train.dtype, "r", shape=dataset.x_train.shape)
        yield dataclasses.replace(dataset, x_train=images)


def measure(asked: Request) -> dict[str, Any]:
    """Images a second of each path, for JSON."""
    dataset = random_images(asked)
    rates = {f"--resident={r}": training_rate(asked.config(r), dataset, asked.steps) for r in ("device", "host")}
    rates[ALONE] = reading_rate(asked.config("host"), dataset, asked.steps)
    if hasattr(os, "posix_fadvise"):  # where the system can be told to forget a file
        with in_a_file(dataset, pathlib.Path(asked.results or ".").expanduser()) as there:
            rates[FROM_FILE] = reading_rate(asked.config("host"), there, asked.steps)
    return {
        "command": provenance.command(),
        "environment": provenance.environment(),
        "request": dataclasses.asdict(asked),
        "image_bytes": int(np.prod(dataset.image_shape)),
        "images_per_second": rates,
    }


def page(result: dict[str, Any]) -> str:
    """What throughput.json holds, in Markdown."""
    asked, rates, about = result["request"], result["images_per_second"], result["environment"]
    width = f" of width {asked['width']}" if asked["width"] else ""
    table = Table(
        columns=["training images", "images per s", "MB per s"],
        rows=[[name, f"{rate:,.0f}", f"{rate * result['image_bytes'] / 1e6:,.1f}"] for name, rate in rates.items()],
    )
    return "\n".join(
        [
            "# How fast training images come\n",
            f"{asked['defense']}, `{asked['model']}`{width}, {asked['steps']:,} steps of {asked['batch_size']}, "
            f"{asked['images']:,} images of {result['image_bytes']:,} bytes.\n",
            table.markdown(),
            "- Where the host reads faster than steps train, images from the host cost little. Each rate is one measurement.",
            f"- `{result['command']}`, {about['hardware']}, {about['date']}, commit {about['commit']}; JAX {about['jax']}",
            "",
        ]
    )


def run(asked: Request) -> None:
    """Measures, prints the page and writes it."""
    folder = pathlib.Path(asked.results).expanduser()
    if asked.results:
        check_folder(folder, f"--results={folder}", make=True)
    result = measure(asked)
    print(page(result), flush=True)
    if asked.results:
        write_text(folder / "throughput.md", page(result))
        write_json(folder / "throughput.json", result)


if __name__ == "__main__":
    for flag in dataclasses.fields(Request):
        cli.define_flag(flag)
    cli.launch(lambda: run(cli.from_flags(Request)), "nothing is written before the end", resumes=False)
