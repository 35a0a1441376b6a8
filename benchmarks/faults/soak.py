"""Whether a long run stays as small as it began: memory, open files, threads and compilations over many steps.

python -m benchmarks.faults.soak --steps=50000 --results=results/reliability

One run of e2SAD on the embedded digits, made small (7x7) for a network of under a thousand parameters, through the same code
as every other: checkpoints, each attacked on held-out images, metrics and TensorBoard files all along. Exits with 1 if the
second half of the run grows.
"""

import dataclasses
import functools
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from e2sad_jax import cli, data, networks
from e2sad_jax._io import write_bytes, write_json, write_text
from e2sad_jax.errors import Error, Stopped
from e2sad_jax.reporting import provenance
from e2sad_jax.runs.metrics import METRICS
from e2sad_jax.runs.opening import open_run
from e2sad_jax.runs.signals import stopping
from e2sad_jax.runs.trainer import train
from e2sad_jax.training.config import Config

FLAGS = flags.FLAGS
SECONDS = 2.0  # between samples
WARM = 0.1  # share of the run in which everything is compiled and opened for the first time
# By how much the second half may lie above the first one, once that is warm: medians, for a checkpoint that is written
# has files and threads of its own; of compilations the most.
BOUNDS = {"memory_mb": 8.0, "open_files": 1, "threads": 2, "compilations": 0}
TITLES = {
    "memory_mb": "memory of its own, MB",
    "open_files": "open files",
    "threads": "threads",
    "compilations": "compilations",
}
NARROW = functools.partial(networks.MnistCNN, features=(2, 4), hidden=16)


class Soak(Error):
    """Something grew."""


def main() -> None:
    (compiled := Compilations()).listen()
    networks.NETWORKS["digits_cnn"] = NARROW  # type: ignore[index]
    digits = data.load("digits")
    # Every fourth pixel, of a quarter of the images: the steps are what there is to be many of.
    small = {name: getattr(digits, name)[::4, 2::4, 2::4] for name in ("x_train", "x_test")}
    dataset = dataclasses.replace(
        digits, name="digits 7x7", y_train=digits.y_train[::4], y_test=digits.y_test[::4], **small
    )
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            data="digits",
            model="digits_cnn",
            steps=FLAGS.steps,
            batch_size=8,
            validation_examples=40,
            eval_batch_size=40,
            checkpoint_every=max(1, FLAGS.steps // 100),
            log_every=max(1, FLAGS.steps // 2000),
            workdir=folder,
        )
        with open_run(config, dataset) as run, stopping() as stop:
            with Samples(run.workdir, compiled) as samples:
                state, _ = train(run, stop)
            if number := stop():
                raise Stopped("stopped; nothing was kept", number)
        parameters = networks.count_parameters(state.params)
    result: dict[str, Any] = {
        "steps": int(state.step),
        "seconds": round(time.monotonic() - began, 1),
        "parameters": parameters,
        "settings": {
            name: getattr(config, name) for name in ("defense", "batch_size", "checkpoint_every", "log_every")
        },
        "grown": growth(samples.taken),
        "bounds": BOUNDS,
        "samples": samples.taken,
        "command": provenance.command(),
        "environment": provenance.environment(),
    }
    results = pathlib.Path(FLAGS.results)
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "soak.json", result)
    write_text(results / "soak.md", markdown(result))
    plot(results / "soak.png", result)
    print(markdown(result))
    if wrong := [TITLES[name] for name, grown in result["grown"].items() if grown["by"] > BOUNDS[name]]:
        raise Soak(
            f"{', '.join(wrong)} grew in the second half of {result['steps']:,} steps: see {results / 'soak.md'}"
        )


class Compilations:
    """How many programs XLA has compiled in this process."""

    def __init__(self) -> None:
        self.count = 0

    def listen(self) -> None:
        def note(event: str, duration_secs: float, **kwargs: str | int) -> None:
            self.count += event == "/jax/core/compile/backend_compile_duration"

        jax.monitoring.register_event_duration_secs_listener(note)


class Samples:
    """What this process holds, taken by a thread of its own while the run goes on."""

    def __init__(self, workdir: pathlib.Path, compiled: Compilations):
        self.taken: list[dict[str, float]] = []
        self._workdir, self._compiled = workdir, compiled
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def __enter__(self) -> "Samples":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._end.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._end.wait(SECONDS):
            if step := last_step(self._workdir / METRICS):
                self.taken.append({"step": step, **held(), "compilations": self._compiled.count})


def last_step(path: pathlib.Path) -> int:
    """The last step that a run has written metrics of, 0 for none."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return int(lines[-1].split(",")[0].split(":")[1]) if lines else 0


def held() -> dict[str, float]:
    """What Linux says that this process holds."""
    status = pathlib.Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    values = dict(line.split(":", 1) for line in status)
    files = len(list(pathlib.Path("/proc/self/fd").iterdir()))
    memory = sum(int(values[name].split()[0]) for name in ("RssAnon", "VmSwap")) / 1024  # not the pages of files
    return {"memory_mb": memory, "open_files": files, "threads": int(values["Threads"])}


def growth(samples: Sequence[dict[str, float]]) -> dict[str, dict[str, float]]:
    """The median of each half, the first one warm, and the difference; of compilations the most."""
    last = samples[-1]["step"]
    grown = {}
    for name in BOUNDS:
        middle = max if name == "compilations" else statistics.median
        first = middle([s[name] for s in samples if WARM * last <= s["step"] < last / 2])
        second = middle([s[name] for s in samples if s["step"] >= last / 2])
        grown[name] = {"first_half": first, "second_half": second, "by": second - first}
    return grown


def markdown(result: dict[str, Any]) -> str:
    """soak.md: each half, and by which command."""
    s, e = result["settings"], result["environment"]
    lines = [
        f"# {result['steps']:,} steps in one process",
        "",
        f"{s['defense']}, {result['parameters']:,} parameters, batches of {s['batch_size']}, a checkpoint every "
        f"{s['checkpoint_every']:,} steps, each attacked with PGD-10 on 40 held-out images, metrics every {s['log_every']:,} "
        f"steps; {result['seconds']:,.0f} s, {len(result['samples']):,} samples.",
        "",
        f"| median (of compilations the most) | first half, after {WARM:.0%} | second half | growth | allowed |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, grown in result["grown"].items():
        digits = ".1f" if name == "memory_mb" else ".0f"
        cells = [grown["first_half"], grown["second_half"], grown["by"], result["bounds"][name]]
        lines.append(f"| {TITLES[name]} | " + " | ".join(f"{cell:{digits}}" for cell in cells) + " |")
    lines += [
        "",
        "![Samples over the run](soak.png)",
        "",
        f"- Command: `{result['command']}`",
        f"- Measured {e['date']} on {e['hardware']}; Python {e['python']}, JAX {e['jax']}; commit {e['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def plot(path: pathlib.Path, result: dict[str, Any]) -> None:
    """soak.png: each quantity over the steps."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    steps = np.array([s["step"] for s in result["samples"]])
    for axes, name in zip(figure.subplots(2, 2).flat, BOUNDS, strict=True):
        values = np.array([s[name] for s in result["samples"]])
        axes.plot(steps, values, ".-", markersize=2, linewidth=0.8)
        axes.axvline(result["steps"] / 2, color="grey", linewidth=0.8, linestyle=":")
        axes.set(title=TITLES[name], xlabel="step", ylim=(0, 1.15 * values.max()))
    figure.suptitle(f"{result['steps']:,} steps in one process; {result['environment']['hardware']}", fontsize=10)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=100)
    write_bytes(path, content.getvalue())


if __name__ == "__main__":
    flags.DEFINE_integer("steps", 50_000, "training steps", lower_bound=100)
    flags.DEFINE_string("results", "results", "folder for soak.md, .json and .png")
    cli.launch(main, "nothing is kept", resumes=False)
