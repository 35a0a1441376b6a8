"""Measures the steps of all defenses side by side in one process."""

import contextlib
import dataclasses
import math
import os
import signal
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

from e2sad_jax import distributed, training
from e2sad_jax._compile import platform
from e2sad_jax.errors import Error, Stopped, first_line
from e2sad_jax.reporting import provenance
from e2sad_jax.reporting.progress import Bar
from e2sad_jax.runs.signals import Interrupted
from experiments.step_cost import counts, peers
from experiments.step_cost.request import NUM_CLASSES, OURS, Kind, Request
from experiments.step_cost.step import Step, Timer, in_turn, timer

FORMAT = 1  # of step_cost.json
# How far, of itself, a peer's loss may be from ours in each step that is compared before anything is timed. Both compute in
# float32 and sum in another order. A pixel whose gradient is smaller than that error may be attacked the other way, which
# barely moves the first loss. It moves the parameters, though, for Adam's first updates are as long for a tiny gradient
# as for a large one, so the second and third depart further.
# So this catches another step, not a slightly other one; on a small network, where less comes together, the tests hold
# PyTorch's losses to 2e-5 in all three.
TOLERANCES = (5e-5, 5e-3, 5e-3)
ITERATED_TOLERANCES = (5e-4, 3e-2, 3e-2)  # each step of an attack turns the signs of a few pixels more
CEILING = "ceiling"

Rows = dict[Kind, dict[str, Any]]


class PeerError(Error):
    """Another library's step does something else than ours, so what it costs says nothing; its row says so."""


def measure(request: Request, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Builds every step, times them in turn, and sums up after each round.

    A step that fails says so in its row; the others stay. So does a peer's whose losses are not ours.

    Args:
      request: what to measure.
      write: called with the result of the rounds so far, after each of them.

    Returns:
      What step_cost.json holds (docs/speed.md).

    Raises:
      Stopped: after Ctrl-C, or a SIGTERM that `signals.stopping` has made one.
    """
    rows: Rows = {kind: _row(kind) for kind in request.kinds()}
    rounds: list[dict[Any, float]] = []
    ceilings: dict[str, float] = {}
    result: dict[str, Any] = {}
    with Bar("step cost", len(rows) + request.rounds * (len(rows) + len(set(request.precision))), "timings") as bar:
        try:
            timers = _build(request, rows, ceilings, bar)
            about = {
                "command": provenance.command(),
                "environment": {**provenance.environment(), **_peer_versions(request)},
            }

            def failed(key: Any, error: Exception) -> None:
                if not isinstance(key, Kind):
                    raise error
                _fail(rows[key], error)

            for one in in_turn(
                timers, request.rounds, progress=lambda i, key: bar.update(1, f"round {i + 1}"), failed=failed
            ):
                rounds.append(one)
                result = _result(request, rows, rounds, ceilings) | about
                write(result)
        except KeyboardInterrupt as interrupt:
            kept = "nothing was written"
            if rounds:  # once more, for it may have cut the writing short
                write(_result(request, rows, rounds, ceilings) | about)
                kept = f"the {len(rounds)} rounds that were done are in {request.results}"
            number = interrupt.number if isinstance(interrupt, Interrupted) else signal.SIGINT
            raise Stopped(f"interrupted; {kept}", number) from None
    return result


def _result(
    request: Request, rows: Rows, rounds: Sequence[Mapping[Any, float]], ceilings: Mapping[str, float]
) -> dict[str, Any]:
    """What there is to say after so many rounds."""
    mesh = distributed.mesh(request.devices, request.batch_size)
    ceiling = {
        precision: {"flops": flops, "flops_per_second": flops / min(seconds), "seconds": seconds}
        for precision, flops in ceilings.items()
        if (seconds := [r[CEILING, precision] for r in rounds])
    }
    summarise(rows, rounds, ceiling, request.batch_size, mesh.size if mesh else 1)
    return {
        "format": FORMAT,
        "settings": {
            **{name: getattr(request, name) for name in ("batch_size", "model", "devices", "rounds", "seconds")},
            "image_shape": list(request.image_shape),
            "steps_per_dispatch": next(
                (r["steps_per_dispatch"] for r in rows.values() if r["steps_per_dispatch"]), None
            ),
        },
        "rounds_done": len(rounds),
        "complete": len(rounds) == request.rounds,
        "ceiling": ceiling,
        "rows": list(rows.values()),
        "device_peak_bytes": (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def _row(kind: Kind) -> dict[str, Any]:
    return {
        "name": kind.name,
        "by": kind.by,
        "defense": kind.defense,
        "attack_steps": kind.attack_steps or None,
        "preset": kind.preset,
        "precision": kind.precision,
        "error": None,
        "differs": False,
        "note": "",
        "steps_per_dispatch": None,
        "compile_seconds": None,
        "flops": None,
        "bytes_accessed": None,
        "peak_bytes": None,
    }


def _build(request: Request, rows: Rows, ceilings: dict[str, float], bar: Bar) -> dict[Any, Timer]:
    """A warm timer of each step, and of the product that is the ceiling, which opens each round."""
    timers: dict[Any, Timer] = {}
    for precision in dict.fromkeys(request.precision):
        timers[CEILING, precision], ceilings[precision] = counts.product(precision)
    parameters: Any = None
    losses: dict[tuple[str, int], list[float]] = {}
    for kind, row in rows.items():
        bar.update(1, f"{kind.name} by {kind.by}: compile and warm up")
        try:
            if kind.by == OURS:
                step = _ours(request, kind)
                row.update(
                    steps_per_dispatch=step.at_once,
                    compile_seconds=step.compile_seconds,
                    peak_bytes=counts.peak_bytes(step.compiled),
                )
                parameters = step.parameters()
                if request.peer and kind.precision == "float32" and kind.preset == "paper":  # peers have no others
                    losses[kind.defense, kind.attack_steps] = step.losses(len(TOLERANCES))
                timers[kind] = step.timer(request.seconds)
                if counted := training.step_counts(request.config(kind), request.image_shape, NUM_CLASSES):
                    row.update(flops=counted["flops"], bytes_accessed=counted["bytes"])
            elif (kind.defense, kind.attack_steps) not in losses:
                row["note"] = "not measured without ours"
            else:
                timers[kind] = _peer(request, kind, row, parameters, losses[kind.defense, kind.attack_steps])
        except PeerError as error:
            _fail(row, error)
        except Error:
            raise
        except Exception as error:
            timers.pop(kind, None)
            _fail(row, error)
    return timers


def _ours(request: Request, kind: Kind) -> Step:
    """The one place where a step of ours is built."""
    return Step(request.config(kind), request.image_shape, NUM_CLASSES, steps_per_dispatch=request.steps_per_dispatch)


def _peer(request: Request, kind: Kind, row: dict[str, Any], parameters: Any, losses: Sequence[float]) -> Timer:
    """A warm timer of a peer's step, after it has shown that its losses are ours."""
    with peers.time_limit(request.compile_seconds) if kind.by == "torch.compile" else contextlib.nullcontext():
        step = peers.build(
            kind.by, request.config(kind), request.image_shape, NUM_CLASSES, parameters, request.steps_per_dispatch
        )
        theirs = step.losses(len(TOLERANCES))
        if theirs is not None:
            check_losses(kind, losses, theirs)
            row["losses"], row["our_losses"] = theirs, list(losses)
        row.update(note=step.note, compile_seconds=step.compile_seconds)
        return timer(step.run, request.seconds, step.at_once)


def check_losses(kind: Kind, ours: Sequence[float], theirs: Sequence[float], tolerances: Sequence[float] = ()) -> None:
    """Makes sure that two steps that began with equal parameters do the same.

    Raises:
      PeerError: naming the first step whose losses differ by more than its share in `tolerances`.
    """
    tolerances = tolerances or (ITERATED_TOLERANCES if kind.attack_steps > 1 else TOLERANCES)
    for i, (a, b, tolerance) in enumerate(zip(ours, theirs, tolerances, strict=True)):
        if not math.isclose(a, b, rel_tol=tolerance):
            raise PeerError(
                f"{kind.name}: {kind.by} has loss {b:.7g} in step {i + 1} where ours is {a:.7g}; they may differ by "
                f"{tolerance:g} of it, so these are not the same steps and are not compared"
            )


def _fail(row: dict[str, Any], error: Exception) -> None:
    """Notes in a row why its step has no times."""
    if isinstance(error, peers.NotOfferedError):
        row["note"] = str(error)
        return
    row["differs"] = isinstance(error, PeerError)
    row["error"] = str(error) if row["differs"] else f"{type(error).__name__}: {first_line(error)}"[:200]
    if "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower():
        row["error"] = f"out of memory; {row['error']}"


def summarise(
    rows: Rows, rounds: Sequence[Mapping[Any, float]], ceiling: Mapping[str, Any], batch_size: int, devices: int = 1
) -> None:
    """Fills in what follows from the seconds of each round; ratios are medians over the rounds, each within its round.

    The ceiling is that of one device; a step on several is held against so many of it.
    """

    def ratio(kind: Kind, other: Kind) -> float | None:
        pairs = [r[kind] / r[other] for r in rounds if kind in r and other in r]
        return statistics.median(pairs) if pairs else None

    for kind, row in rows.items():
        seconds = [r[kind] for r in rounds if kind in r]
        natural = Kind(kind.by, "natural", 0, kind.precision)
        ours = Kind(OURS, kind.defense, kind.attack_steps, kind.precision)
        row["seconds"] = seconds
        times = dict.fromkeys(("milliseconds", "fastest", "lower_quartile", "upper_quartile", "slowest"))
        row |= times
        middle = statistics.median(seconds) if seconds else None
        if middle is not None:
            low, _, high = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else 3 * seconds
            values = (middle, min(seconds), low, high, max(seconds))
            row |= {name: 1e3 * value for name, value in zip(times, values, strict=True)}
        row["images_per_second"] = batch_size / middle if middle else None
        row["flops_per_second"] = row["flops"] / middle if middle and row["flops"] else None
        most = ceiling.get(kind.precision)
        reached = row["flops_per_second"]
        row["share_of_ceiling"] = reached / (devices * most["flops_per_second"]) if most and reached else None
        row["time_natural"] = ratio(kind, natural)
        row["time_our_natural"] = ratio(kind, Kind(OURS, "natural", 0, kind.precision))
        row["time_ifgsm_30"] = ratio(kind, Kind(kind.by, "ifgsm", 30, kind.precision))
        row["time_float32"] = ratio(kind, dataclasses.replace(kind, precision="float32"))
        row["ours_over_peer"] = ratio(ours, kind) if kind.by != OURS else None
        flops = (rows.get(natural) or {}).get("flops")
        row["flops_natural"] = row["flops"] / flops if flops and row["flops"] else None


def _peer_versions(request: Request) -> dict[str, str]:
    """Versions of the peers' packages, and with how many threads PyTorch computes."""
    shipped = dict.fromkeys(peers.SHIPPED_BY[p] for name in request.peer for p in peers.PACKAGES[name])
    versions = {name: metadata.version(name) for name in shipped}
    if not versions:
        return {}
    import torch

    policy = os.environ.get("OMP_WAIT_POLICY", "unset")
    threads = f"torch {torch.get_num_threads()} (OMP_WAIT_POLICY={policy}), JAX {os.cpu_count()}"
    threads = threads if platform() == "cpu" else ""
    return versions | ({"threads": threads} if threads else {})
