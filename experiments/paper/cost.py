"""What a training step costs: FLOPs by XLA's count, and time, all defenses side by side in one process."""

import hashlib
import json
import math
import pathlib
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from e2sad_jax import training
from e2sad_jax._io import read_sealed, sealed, write_json
from e2sad_jax.reporting import provenance
from e2sad_jax.training.config import Config
from experiments.step_cost.step import Step, in_turn

ROUNDS = 7
SECONDS = 0.1  # a timing is of so many steps that it takes at least this long


def key(config: Config) -> str:
    """Names the step of a run: settings that change neither its operations nor their sizes are left out."""
    c = config
    parts = [c.defense, c.model, f"batch {c.batch_size}", c.precision]
    if "attack_steps" in c.settings:
        parts.append(f"k={c.settings['attack_steps']}")
    if "second_step" in c.settings:
        parts.append(c.settings["second_step"])
    return ", ".join(parts)


def measure(
    configs: Sequence[Config],
    image_shape: tuple[int, ...],
    num_classes: int,
    cache: pathlib.Path,
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Cost of a step of each configuration's kind, and of a natural one.

    In each round every step is timed once, in turn, and held against the natural step of the same round, so that what
    else the machine does meanwhile touches all alike. On accelerators FLOPs are counted for the CPU, where no loop hides
    an attack's steps from XLA's count.

    Args:
      configs: settings of runs on the same data.
      image_shape: (H, W, C).
      num_classes: number of classes K.
      cache: folder for what was measured; found again there for the same steps, hardware, versions and commit.
      progress: called with what is measured next.

    Returns:
      `steps`: for each `key`: `flops` and `flops_natural` (in natural steps; None where JAX has no CPU
      backend), `milliseconds` (median), `fastest`, `slowest`, `time_natural` (median ratio). `environment`, `command`: of the
      measurement.
    """
    natural = _natural(configs[0])
    kinds = {key(c): c for c in [natural, *configs]}
    environment = provenance.environment()
    who = {k: environment[k] for k in ("hardware", "jax", "jaxlib", "commit")}
    digest = hashlib.sha256(json.dumps([sorted(kinds), image_shape, num_classes, who]).encode()).hexdigest()[:12]
    path = cache / f"cost-{digest}.json"
    if known := _known(path, kinds):
        return known
    times = _times(kinds, image_shape, num_classes, progress)
    steps: dict[str, Any] = {}
    for name, config in kinds.items():
        progress(f"count {name}")
        counted = training.step_counts(config, image_shape, num_classes)
        flops = counted["flops"] if counted else None
        own, reference = times[name], times[key(natural)]
        steps[name] = {
            "flops": flops,
            "milliseconds": 1e3 * statistics.median(own),
            "fastest": 1e3 * min(own),
            "slowest": 1e3 * max(own),
            "time_natural": statistics.median(a / b for a, b in zip(own, reference, strict=True)),
        }
    reference_flops = steps[key(natural)]["flops"]
    for step in steps.values():
        step["flops_natural"] = step["flops"] / reference_flops if reference_flops else None
    result = {"steps": steps, "rounds": ROUNDS, "command": provenance.command(), "environment": environment}
    cache.mkdir(parents=True, exist_ok=True)
    write_json(path, sealed(result))
    return result


def _known(path: pathlib.Path, kinds: Collection[str]) -> dict[str, Any] | None:
    """What `measure` has written; None where nothing readable says so."""
    needed = ("milliseconds", "fastest", "slowest", "time_natural")
    try:
        known = read_sealed(path)
        right = isinstance(known["environment"], dict) and isinstance(known["command"], str)
        for step in (known["steps"][name] for name in kinds):
            right &= all(type(step[key]) in (int, float) for key in needed)
            right &= all(step[key] is None or type(step[key]) in (int, float) for key in ("flops", "flops_natural"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return known if right else None


def _natural(config: Config) -> Config:
    return Config(
        defense="natural",
        model=config.model,
        transform=config.transform,
        batch_size=config.batch_size,
        precision=config.precision,
    )


def _times(
    kinds: Mapping[str, Config],
    image_shape: tuple[int, ...],
    num_classes: int,
    progress: Callable[[str], None],
) -> dict[str, list[float]]:
    """Seconds of one step, `ROUNDS` of each kind, taken in turn."""
    timers = {}
    for name, config in kinds.items():
        progress(f"time {name}")
        timers[name] = Step(config, image_shape, num_classes).timer(SECONDS)

    def begins(i: int, name: str) -> None:
        if name == next(iter(timers)):
            progress(f"round {i + 1} of {ROUNDS}")

    rounds = list(in_turn(timers, ROUNDS, progress=begins))
    return {name: [seconds[name] for seconds in rounds] for name in kinds}


def faster_together(
    config: Config, image_shape: tuple[int, ...], num_classes: int, runs: int, cache: pathlib.Path
) -> bool:
    """Whether this device trains `runs` runs of a kind faster in one step than one after another.

    Both are tried, once: the answer is kept in `cache` for this kind, hardware and version. Runs that do not fit into the
    device's memory together are not faster.
    """
    environment = provenance.environment()
    question = [key(config), image_shape, num_classes, runs, environment["hardware"], environment["jaxlib"]]
    path = cache / f"together-{hashlib.sha256(json.dumps(question).encode()).hexdigest()[:12]}.json"
    try:
        return bool(read_sealed(path)["faster"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    try:
        one = Step(config, image_shape, num_classes).timer(SECONDS)
        together = Step(config, image_shape, num_classes, runs=runs).timer(SECONDS)
        ratios = [b / a for a, b in [(one(), together()) for _ in range(3)]]
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        ratios = [math.inf]
    ratio = statistics.median(ratios)
    cache.mkdir(parents=True, exist_ok=True)
    about = {"kind": key(config), "runs": runs, "time_of_one_step": ratio if math.isfinite(ratio) else None}
    write_json(path, sealed({**about, "faster": ratio < runs, **environment}))
    return ratio < runs
