"""Faults done to real runs on purpose, each followed by the same command again: what becomes of them.

python -m benchmarks.faults --results=results/reliability

Linux, as root (a full disk and a read-only one are mounted). Ends after `--minutes` at the latest. Exits with 1 if a fault led
to anything but a clear word, or the numbers of a run that nothing befell; if too few kills came while the process lived; or if
time was up before all was done. Results are written after each kind, and `--only` renews its kinds there alone.
"""

import collections
import json
import pathlib
import signal
import sys
import tempfile
import time
import traceback
from typing import Any, NoReturn

from absl import app, flags, logging

from benchmarks.faults.faults import Torture
from e2sad_jax._io import write_json, write_text
from e2sad_jax.reporting import provenance

FLAGS = flags.FLAGS
ALL = {  # how often, where that may be chosen
    **{"kill_training": 3, "kill_comparison": 5, "kill_evaluation": 3, "kill_preparation": 4, "full_disk": 8},
    **{"read_only": 0, "deleted": 0, "damaged": 300, "damaged_commands": 0, "two_runs": 0, "told_to_stop": 0},
    "broken": 0,
}
PROMISED = 30  # kills -9 of living processes, where none of the kinds is left out or done less often
LANDED = 0.75  # of all kills, at least


class OutOfTime(BaseException):
    """`--minutes` are over."""


def markdown(kinds: dict[str, Any]) -> str:
    """torture.md: each fault, how often, what became of it, where kills landed, and by which command."""
    rows = [(kind, *row.values()) for kind in kinds for row in kinds[kind]["rows"]]
    kills: collections.Counter[str] = collections.Counter()
    for kind in kinds.values():
        kills.update(kind["kills"])
    missed, wrong = (sum(kind[name] for kind in kinds.values()) for name in ("missed", "wrong"))
    lines = [
        "# Faults, and what became of the runs",
        "",
        "Real processes on the embedded digits, forked from one that has imported all; a `digits_cnn` of 4 and 8 filters, "
        f"40 steps of 16, three attacks. {sum(row[-1] for row in rows):,} outcomes, {wrong:,} of them wrong.",
        "",
    ]
    if left := [name for name in ALL if name not in kinds]:
        lines += [f"Not done: {', '.join(left)}.", ""]
    lines += ["| kind | fault | outcome | times |", "| --- | --- | --- | ---: |"]
    lines += [f"| {' | '.join(map(str, row[:-1]))} | {row[-1]:,} |" for row in rows]
    lines += [
        "",
        f"Where `kill -9` found the process: {kills.total():,} kills while it lived, {missed:,} after its end.",
        "",
        "| phase | kills |",
        "| --- | ---: |",
        *(f"| {phase} | {times:,} |" for phase, times in kills.most_common()),
        "",
    ]
    for name, kind in kinds.items():
        e = kind["environment"]
        lines += [
            f"- {name}: `{kind['command']}`, {e['date']}, {e['hardware']}, {kind['seconds'] / 60:.1f} minutes; "
            f"Python {e['python']}, JAX {e['jax']}; commit {e['commit']}."
        ]
    return "\n".join(lines) + "\n"


def wrong(kinds: dict[str, Any], share: float) -> list[str]:
    """What is not as it must be, where kinds of faults were done that share of the usual number of times."""
    found = [f"{name}: {kind['wrong']} wrong" for name, kind in kinds.items() if kind["wrong"]]
    landed, missed = (sum(kind[what] for kind in kinds.values()) for what in ("landed", "missed"))
    if landed < LANDED * (landed + missed) or (share >= 1 and set(kinds) >= set(ALL) and landed < PROMISED):
        found += [f"kills: {landed} while the process lived, {missed} after its end: they prove too little"]
    return found


def main(argv: list[str]) -> None:
    from benchmarks.faults import preload  # noqa: F401  # makes networks small, so not where tests import this

    provenance.commit()
    logging.set_verbosity(logging.WARNING)
    results = pathlib.Path(FLAGS.results) if FLAGS.results else None
    kinds: dict[str, Any] = {}
    if results and FLAGS.only and (results / "torture.json").exists():
        kinds = json.loads((results / "torture.json").read_text())

    def out_of_time(number: int, frame: Any) -> NoReturn:
        raise OutOfTime

    signal.signal(signal.SIGALRM, out_of_time)
    signal.setitimer(signal.ITIMER_REAL, 60 * FLAGS.minutes)
    done: list[str] = []
    with tempfile.TemporaryDirectory(prefix="torture_", ignore_cleanup_errors=True) as folder:
        torture = Torture(pathlib.Path(folder), FLAGS.seed)
        try:
            torture.prepare()
            for name in FLAGS.only or ALL:
                began = time.monotonic()
                times = [max(1, round(ALL[name] * FLAGS.share))] if ALL[name] else []
                try:
                    getattr(torture, name)(*times)
                except Exception:  # of this suite: the other kinds have their turn
                    traceback.print_exc()
                    torture.taken()
                    continue
                kinds[name] = {
                    **torture.taken(),
                    "seed": FLAGS.seed,
                    "seconds": round(time.monotonic() - began, 1),
                    "command": provenance.command(),
                    "environment": provenance.environment(),
                }
                kinds = {name: kinds[name] for name in ALL if name in kinds}
                done.append(name)
                if results:
                    results.mkdir(parents=True, exist_ok=True)
                    write_json(results / "torture.json", kinds)
                    write_text(results / "torture.md", markdown(kinds))
        except OutOfTime:
            print(f"--minutes={FLAGS.minutes}: over", file=sys.stderr)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            torture.runs.kill()
    print("\n" + markdown(kinds))
    left = [f"not done: {name}" for name in FLAGS.only or ALL if name not in done]
    sys.exit("\n".join(left + wrong(kinds, FLAGS.share)) or 0)


if __name__ == "__main__":
    flags.DEFINE_string("results", "", "folder for torture.md and .json, empty: only print")
    flags.DEFINE_integer("seed", 0, "of moments and damage")
    flags.DEFINE_float("share", 1.0, "of the usual number of times")
    flags.DEFINE_float("minutes", 60.0, "after so many it ends, whatever is left to do", lower_bound=0)
    flags.DEFINE_multi_enum("only", None, list(ALL), "one of these alone, may be given several times")
    app.run(main)
