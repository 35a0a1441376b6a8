"""Damaged files and odd command lines by the ten thousand: each is taken as what it is, or refused in one line.

python -m benchmarks.faults.fuzz --inputs=100000 --results=results/reliability

Anything else is a finding: another exception, a warning, a hang, memory beyond a bound, code that runs, a file opened
elsewhere, anything printed, a message that is not one printable line. Findings are listed in fuzz.md and fuzz.json, each
with what makes it again (`--only=TARGET:NUMBER`) and its input in a folder `fuzz/`; the exit code is then 1.
"""

import collections
import dataclasses
import io
import multiprocessing
import os
import pathlib
import random
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # of address space that nobody uses, threads would take gigabytes
LIMIT_SECONDS = 10.0
LIMIT_BYTES = 1536 * 2**20  # beyond what the worker has when it begins
GROWTH_BYTES = 512 * 2**20  # of its resident memory, by one input
READABLE = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/localtime", "/usr/")  # by Python and its libraries


@dataclasses.dataclass(frozen=True)
class Finding:
    """What should not have happened.

    Attributes:
      target, index: which input: with the seed they make it again.
      kind: of damage.
      what: what happened.
    """

    target: str
    index: int
    kind: str
    what: str


class Refused(NamedTuple):
    """How an input was refused, by which error of ours."""

    error: BaseException


class Wrong(Exception):
    """An input was taken, but not as what it is."""


class Watch:
    """What the interpreter reports while a target runs: code, processes, files that have no business there."""

    def __init__(self, folder: pathlib.Path):
        self.on, self.seen, self.printed = False, list[str](), io.StringIO()
        self._allowed = (
            str(folder),
            *READABLE,
            sys.prefix,
            os.path.realpath(sys.prefix),
            sys.base_prefix,
            str(pathlib.Path(__file__).parents[1]),
        )
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event in (
            "pickle.find_class",
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "subprocess.Popen",
            "socket.connect",
        ):
            self.seen.append(f"{event} {arguments!r:.100}")
        elif event == "exec" and not str(getattr(arguments[0], "co_filename", "")).startswith(self._allowed):
            self.seen.append(f"exec {arguments!r:.100}")
        elif event == "open" and isinstance(arguments[0], str | bytes):
            path = os.path.realpath(os.path.abspath(os.fsdecode(arguments[0])))
            if not path.startswith(self._allowed):
                self.seen.append(f"open {path:.100}")


def _of_orbax(text: str) -> bool:
    """Whether a text is what Orbax's threads say now and then, later than the error that we report, when a read fails.

    It leaves other reads unawaited, and TensorStore's callbacks find its event loop closed; the tests know both too.
    """
    return "_read_array_index_and_device_put" in text or ("asyncio" in text and "_check_closed" in text)


def attempt(target: Any, seed: int, index: int, watch: Watch | None = None) -> tuple[str, bool, str, Any]:
    """One input: its kind, whether it was taken, what is wrong (empty: nothing), and the input."""
    kind, given = target.input(random.Random(f"{seed} {target.name} {index}"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        if watch:
            watch.seen.clear()
            watch.printed.seek(0)
            watch.printed.truncate()
            watch.on = True
        try:
            got = target.run(given)
        except (KeyboardInterrupt, GeneratorExit):
            raise
        except BaseException as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{pathlib.Path(place.filename).name}:{place.lineno}"
            return kind, False, f"{type(error).__name__}: {error!s:.300} ({where})", given
        finally:
            if watch:
                watch.on = False
    printed = watch.printed.getvalue() if watch else ""
    if target.name == "checkpoint":
        warned = [w for w in warned if not _of_orbax(str(w.message))]
        printed = "" if _of_orbax(printed) else printed
    if warned:
        return kind, False, f"warning: {warned[0].message!s:.300}", given
    if watch and watch.seen:
        return kind, False, watch.seen[0], given
    if printed:
        return kind, False, f"printed: {printed!r:.300}", given
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if grown > GROWTH_BYTES:
        return kind, False, f"took {grown:,} bytes of memory", given
    if not isinstance(got, Refused):
        return kind, True, "", given
    for cause in _chain(got.error):
        if isinstance(cause, MemoryError):
            return kind, False, f"ran out of memory: {got.error!s:.300}", given
    message = str(got.error)
    if not message.isprintable() or len(message) > 2000:
        return kind, False, f"message: {message!r:.300}", given
    return kind, False, "", given


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _work(
    work: Sequence[tuple[str, int, int]], targets: Mapping[str, type[Any]], seed: int, keep: str, at: Any, results: Any
) -> None:
    """Runs inputs `first` to `last` of targets in this process; `at` says which is under way."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary).resolve()
        os.chdir(folder)
        watch = Watch(folder)
        sys.stderr = watch.printed  # before anything sets up logging
        for place, (name, first, last) in enumerate(work):
            at[0], at[1] = place, -1
            own = folder / f"{name}-{place}"
            own.mkdir()
            target = targets[name](own)
            attempt(target, seed, -1)  # imports what it needs
            taken = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (taken + LIMIT_BYTES, resource.RLIM_INFINITY))
            counts: collections.Counter[tuple[str, str]] = collections.Counter()
            for index in range(first, last):
                at[1] = index
                kind, accepted, wrong, given = attempt(target, seed, index, watch)
                counts[kind, "found" if wrong else "accepted" if accepted else "refused"] += 1
                if wrong:
                    pathlib.Path(keep).mkdir(parents=True, exist_ok=True)
                    target.save(given, pathlib.Path(keep) / f"{name}-{index}")
                    results.send(Finding(name, index, kind, wrong))
                if (index + 1 - first) % 500 == 0 or index + 1 == last or wrong:
                    results.send((name, counts, index + 1))
                    counts = collections.Counter()
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    results.send(None)


def plan(inputs: int, shares: Mapping[str, float]) -> list[tuple[str, int, int]]:
    """The first and last input of each target, of so many in all."""
    counts = {name: int(inputs * share / sum(shares.values())) for name, share in shares.items()}
    counts[next(iter(shares))] += inputs - sum(counts.values())
    return [(name, 0, count) for name, count in counts.items()]


def fuzz(
    work: Sequence[tuple[str, int, int]],
    targets: Mapping[str, type[Any]],
    *,
    seed: int = 0,
    keep: pathlib.Path,
    say: Callable[[str], None] = print,
    limit: float = LIMIT_SECONDS,
) -> tuple[dict[str, collections.Counter[tuple[str, str]]], list[Finding]]:
    """Counts by target, of kind and outcome, and findings; in one worker process at a time, a new one where one was lost."""
    context = multiprocessing.get_context("spawn")
    counts: dict[str, collections.Counter[tuple[str, str]]] = {name: collections.Counter() for name, _, _ in work}
    findings: list[Finding] = []
    left, counted = list(work), {name: first for name, first, _ in work}
    while left:
        at = context.Array("q", [-1, -1], lock=False)
        ours, theirs = context.Pipe(duplex=False)
        worker = context.Process(
            target=_work, args=(left, targets, seed, str(keep.absolute()), at, theirs), daemon=True
        )
        worker.start()
        theirs.close()
        seen, taken, done, lost = (-1, -1), 0.0, False, ""
        while not done and not lost:
            before = time.monotonic()
            try:
                while ours.poll(0.2):
                    message = ours.recv()
                    if message is None:
                        done = True
                    elif isinstance(message, Finding):
                        findings.append(message)
                        say(f"{message.target}:{message.index} ({message.kind}): {message.what}")
                    else:
                        counts[message[0]] += message[1]
                        counted[message[0]] = message[2]
                        say(f"{message[0]}: {counts[message[0]].total():,} inputs")
            except EOFError:
                worker.join()
                lost = "" if done else f"the process ended with code {worker.exitcode}"
            now = (at[0], at[1])
            taken += min(time.monotonic() - before, 1.0)  # who stops both processes for a while loses no input
            if now != seen:
                seen, taken = now, 0.0
            elif now[1] >= 0 and taken > limit:
                lost = f"not done after {limit:g} s"
        worker.kill()
        worker.join()
        ours.close()
        if done:
            break
        place, index = seen
        if index < 0:
            raise RuntimeError(f"the first input was never reached: {lost}")
        name, _, last = left[place]
        findings.append(Finding(name, index, "", lost))
        say(f"{name}:{index}: {lost}")
        counts[name]["lost", "found"] += 1
        again = [(name, counted[name], index)] if counted[name] < index else []  # what is in no count yet
        left = [*again, (name, index + 1, last), *left[place + 1 :]]
    return counts, findings


def markdown(result: Mapping[str, Any]) -> str:
    """The table, the findings, and how both came about."""
    lines = ["# Damaged inputs", ""]
    lines += ["| target | damage | inputs | taken as what it is | refused in one line | findings |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for name, kinds in result["targets"].items():
        for kind, c in [("all", result["totals"][name]), *kinds.items()]:
            lines.append(
                f"| {name} | {kind} | {c['inputs']:,} | {c['accepted']:,} | {c['refused']:,} | {c['found']:,} |"
            )
    total = result["inputs"]
    lines += ["", f"{total:,} inputs, {len(result['findings']):,} findings, {result['seconds']:,.0f} s."]
    lines += [f"- {f['target']}:{f['index']} ({f['kind']}): {f['what']}" for f in result["findings"]]
    e = result["environment"]
    lines += [
        "",
        f"`{result['command']}`, {e['date']}, {e['hardware']}; Python {e['python']}, JAX {e['jax']}; commit {e['commit']}.",
    ]
    return "\n".join(lines) + "\n"


def _row(counts: collections.Counter[tuple[str, str]], kind: str | None = None) -> dict[str, int]:
    row = {o: sum(n for (k, outcome), n in counts.items() if outcome == o and kind in (None, k)) for o in OUTCOMES}
    return {"inputs": sum(row.values()), **row}


OUTCOMES = ("accepted", "refused", "found")


def main(argv: Sequence[str]) -> int:
    from absl import flags

    from benchmarks.faults.fuzzing import TARGETS

    values = flags.FlagValues()  # type: ignore[no-untyped-call]
    flags.DEFINE_integer("inputs", 100_000, "inputs in all", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("seed", 0, "of all inputs", flag_values=values)
    flags.DEFINE_list("target", list(TARGETS), f"of {', '.join(TARGETS)}", flag_values=values)
    flags.DEFINE_string("only", "", "TARGET:NUMBER of one input, run in this process", flag_values=values)
    flags.DEFINE_string("results", "runs", "folder for fuzz.md and fuzz.json", flag_values=values)
    values(list(argv))
    folder = pathlib.Path(values.results)
    if values.only:
        name, _, number = values.only.partition(":")
        return _again(name, int(number), values.seed)

    from e2sad_jax._io import write_json, write_text
    from e2sad_jax.reporting import provenance

    provenance.commit()
    began = time.monotonic()
    work = plan(values.inputs, {name: TARGETS[name].share for name in values.target})
    counts, findings = fuzz(work, TARGETS, seed=values.seed, keep=folder / "fuzz")
    result = {
        "inputs": sum(c.total() for c in counts.values()),
        "seed": values.seed,
        "totals": {name: _row(c) for name, c in counts.items()},
        "targets": {name: {kind: _row(c, kind) for kind in sorted({k for k, _ in c})} for name, c in counts.items()},
        "findings": [dataclasses.asdict(f) for f in findings],
        "seconds": round(time.monotonic() - began, 1),
        "command": provenance.command(),
        "environment": provenance.environment(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "fuzz.json", result)
    write_text(folder / "fuzz.md", markdown(result))
    print(folder / "fuzz.md")
    return 1 if findings else 0


def _again(name: str, index: int, seed: int) -> int:
    from benchmarks.faults.fuzzing import TARGETS

    with tempfile.TemporaryDirectory() as temporary:
        target = TARGETS[name](pathlib.Path(temporary).resolve())
        kind, given = target.input(random.Random(f"{seed} {name} {index}"))
        print(f"{kind}: {given!r:.2000}")
        print(target.run(given))
    return 0


if __name__ == "__main__":
    from benchmarks.faults import fuzz as this  # what its targets import, not a second module of other classes

    sys.exit(this.main(sys.argv))
