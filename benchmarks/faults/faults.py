"""The faults themselves, a method a kind, and what became of each."""

import collections
import contextlib
import pathlib
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

import e2sad_jax
from benchmarks.faults import phases, runs
from benchmarks.faults.damage import flip, truncate
from benchmarks.faults.runs import COMPARE, EVALUATE, KILLED, TRAIN, Ended, Runs
from e2sad_jax._io import LOCK
from e2sad_jax.errors import Error
from e2sad_jax.runs.checkpoint import digest
from e2sad_jax.runs.folder import steps_in

GRACE = 10.0  # seconds in which a run ends that is asked to stop
CHAIN = (  # what is killed in turn, in one run
    *(phases.START, phases.FIRST, phases.STEP, phases.VALIDATION, phases.CHECKPOINT, phases.CHECKPOINT),
    *(phases.STEP, phases.EVALUATION, phases.RESULTS),
)


class Torture:
    """All faults, one method a kind, and what became of each."""

    def __init__(self, folder: pathlib.Path, seed: int):
        self.folder, self.seed, self.runs = folder, seed, Runs(folder)
        self.outcomes: dict[str, collections.Counter[str]] = {}
        self.kills: collections.Counter[str] = collections.Counter()  # that landed, by phase
        self.missed = 0  # that came after the end
        self._names = iter(range(1_000_000))

    def prepare(self) -> None:
        """The runs that nothing befalls, which fill the cache of compiled programs too."""
        self.whole = self.folder / "whole"
        first = self.runs.call(*TRAIN, f"--workdir={self.whole}")
        assert first.code == 0, first.err
        self.expected = runs.left(self.whole)
        shutil.rmtree(self.whole)
        self.usual = self.runs.call(*TRAIN, f"--workdir={self.whole}")  # with all programs compiled before
        assert not runs.differing(runs.left(self.whole), self.expected)
        self.stopped = self.folder / "stopped"  # with a last checkpoint that is not the best
        for _ in range(5):
            process = self.runs.start(*TRAIN, f"--workdir={self.stopped}")
            process.reach(phases.STEP, 2)
            process.send_signal(signal.SIGTERM)
            ended = process.end()
            if len(steps_in(self.stopped)) == 2:
                break
            shutil.rmtree(self.stopped)
        assert ended.code == 143, ended.err

    def note(self, fault: str, outcome: str, right: bool, said: str = "") -> None:
        """Counts an outcome of a fault, and prints one that is not right."""
        self.outcomes.setdefault(fault, collections.Counter())[outcome if right else f"WRONG: {outcome}"] += 1
        print(f"{'' if right else 'WRONG: '}{fault}: {outcome}{'' if right else chr(10) + said}", flush=True)

    def taken(self) -> dict[str, Any]:
        """What there is to say so far, which is then forgotten."""
        rows: list[dict[str, Any]] = [
            {"fault": fault, "outcome": outcome, "times": times}
            for fault, outcomes in self.outcomes.items()
            for outcome, times in outcomes.most_common()
        ]
        wrong = sum(row["times"] for row in rows if row["outcome"].startswith("WRONG"))
        kills = {"kills": dict(+self.kills), "landed": self.kills.total(), "missed": self.missed}
        self.outcomes, self.kills, self.missed = {}, collections.Counter(), 0
        return {"rows": rows, "wrong": wrong, **kills}

    def kill(self, fault: str, command: Sequence[str], phase: str, usual: Ended, rng: random.Random) -> None:
        """Kills a command at a moment drawn from its first time in a phase, by what an undisturbed run computed there."""
        process = self.runs.start(*command)
        process.reach(phase, 1, rng.random() * rng.choice(usual.lasted(phase) or [0.0]))
        process.kill()
        ended = process.end()
        where = ended.phases[-1][0]
        if where in (phases.STEP, phases.VALIDATION) and runs.writing(command):
            where = phases.CHECKPOINT  # in the background
        landed = ended.code == KILLED and where != phases.END
        self.kills[where] += landed
        self.missed += not landed
        outcome = f"killed: {where}" if landed else "ended before the kill"
        self.note(fault, outcome, ended.code in (KILLED, 0), ended.err)

    def random(self, name: str) -> random.Random:
        return random.Random(f"{self.seed} {name}")

    def new(self, like: pathlib.Path | None = None) -> pathlib.Path:
        """A folder of its own, a copy of another if there is one."""
        folder = self.folder / f"w{next(self._names)}"
        if like:
            shutil.copytree(like, folder)
        return folder

    def again(self, fault: str, workdir: pathlib.Path, words: str = "", validated: bool = True) -> Ended:
        """The same command once more: it must end with the numbers of the run that nothing befell.

        Args:
          fault: what befell it.
          workdir: its folder.
          words: what must be said of that.
          validated: whether all checkpoints were, so that the best must be the same too.
        """
        done = self.runs.call(*TRAIN, f"--workdir={workdir}")
        if done.code or "Traceback" in done.err:
            self.note(fault, f"the same command ended with {done.code}", False, done.err)
        elif words not in done.err:
            self.note(fault, f"not a word of it: {words!r}", False, done.err)
        elif different := runs.differing(*(runs.left(w, validated) for w in (workdir, self.whole))):
            self.note(fault, f"other numbers than an uninterrupted run: {different}", False, done.err)
        else:
            self.note(
                fault, f"{'warned; ' if words else ''}the same command ended with the numbers of a whole run", True
            )
        shutil.rmtree(workdir, ignore_errors=True)
        return done

    # Faults.

    def kill_training(self, chains: int) -> None:
        """Several kills of one run, each in another phase, then to its end."""
        for chain in range(chains):
            rng, workdir = self.random(f"kill {chain}"), self.new()
            for phase in CHAIN:
                had = {*steps_in(workdir)}
                self.kill("kill -9 in training", (*TRAIN, f"--workdir={workdir}"), phase, self.usual, rng)
                kept = steps_in(workdir)
                lost = had - {*kept} and not (kept and kept[-1] > max(had))
                self.note(
                    "kill -9 in training, checkpoints", "LOST" if lost else "none lost", not lost, f"{had} {kept}"
                )
                if kept:
                    assert e2sad_jax.load(workdir).step == kept[-1]
            self.again("kill -9 in training, then to the end", workdir)

    def kill_comparison(self, times: int) -> None:
        rng, whole, folder = self.random("comparison"), self.new(), self.new()
        usual = self.runs.call(*COMPARE, f"--workdir={whole}")
        assert usual.code == 0, usual.err
        order = (phases.STEP, phases.EVALUATION, phases.STEP, phases.EVALUATION, phases.RESULTS)
        for i in range(times):
            command = (*COMPARE, f"--workdir={folder}")
            self.kill("kill -9 in experiments.compare", command, order[i % len(order)], usual, rng)
        done = self.runs.call(*COMPARE, f"--workdir={folder}")
        same = done.code == 0 and runs.compared(folder) == runs.compared(whole)
        outcome = "the same command ended with the numbers of a whole one"
        self.note("kill -9 in experiments.compare, then to the end", outcome, same, done.err)
        for path, how in zip(sorted(folder.glob("*/auto-*.json")), (flip, truncate), strict=True):
            how(path, rng)
            done = self.runs.call(*COMPARE, f"--workdir={folder}")
            same = done.code == 0 and "its attacks run again" in done.err
            same = same and runs.compared(folder) == runs.compared(whole)
            outcome = "warned; attacked again, same numbers"
            self.note("outcome of experiments.compare damaged", outcome, same, done.err)

    def kill_evaluation(self, times: int) -> None:
        rng, workdir = self.random("evaluation"), self.new(self.whole)
        command = (*EVALUATE, f"--workdir={workdir}")
        done = self.runs.call(*command)
        assert done.code == 0, done.err
        expected = runs.evaluated(workdir / "evaluation")
        usual = self.runs.call(*command)  # with all programs compiled before
        for _ in range(times):
            self.kill("kill -9 in experiments.evaluate", command, phases.EVALUATION, usual, rng)
        done = self.runs.call(*command)
        same = done.code == 0 and runs.evaluated(workdir / "evaluation") == expected
        self.note("kill -9 in experiments.evaluate, then to the end", "the same numbers", same, done.err)

    def kill_preparation(self, times: int) -> None:
        rng, folder, whole = self.random("preparation"), self.new(), self.new()
        folder.mkdir()
        whole.mkdir()
        usual = self.runs.call("-c", PREPARE, str(whole))
        assert usual.code == 0, usual.err
        order = (phases.DOWNLOAD, phases.DOWNLOAD, phases.DECODING, phases.COPY)
        for i in range(times):
            command = ("-c", PREPARE, str(folder))
            self.kill("kill -9 in data preparation", command, order[i % len(order)], usual, rng)
            if i % len(order) == len(order) - 1 or i + 1 == times:
                done = self.runs.call(*command)
                same = done.code == 0 and done.out == usual.out
                fault = "kill -9 in data preparation, then again"
                self.note(fault, "the data of an undisturbed one", same, done.err)
                if i + 1 < times:
                    shutil.rmtree(folder / "data")
        copy = folder / "data/decoded/mnist.npz"
        for how in (flip, truncate, flip, truncate):
            how(copy, rng)
            done = self.runs.call("-c", PREPARE, str(folder))
            same = done.code == 0 and done.out == usual.out
            outcome = "made anew, or not in the data: the same data"
            self.note("decoded copy of the data damaged", outcome, same, done.err)

    def full_disk(self, times: int) -> None:
        rng = self.random("full")
        size = sum(path.stat().st_size for path in self.whole.rglob("*") if path.is_file()) // 1024
        for i in range(times):
            with mounted(self.new(), f"size={int(size * (i + rng.random()) * 1.6 / times) + 8}k") as disk:
                ended = self.runs.call(*TRAIN, f"--workdir={disk / 'w'}", timeout=200)
                names = {p.name for p in (disk / "w").glob("*")} if (disk / "w").exists() else set()
                reached = max([0, *steps_in(disk / "w")])
                when = "after the results" if "results.json" in names else f"with the checkpoint of step {reached}"
                full = "No space left" in ended.last or "ENOSPC" in ended.last
                if ended.code == 0:
                    self.note("disk full", "it sufficed", True)
                else:
                    right = ended.code in (1, 2) and full  # above it TensorStore may report a late write
                    self.note("disk full", f"exit code {ended.code} {when}", right, f"{ended.code} {ended.err}")
                subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
                self.again("disk full, then room again", disk / "w")

    def read_only(self) -> None:
        for what in ("a new workdir", "a stopped run"):
            with mounted(self.new(), "size=1g") as disk:
                if what == "a stopped run":
                    shutil.copytree(self.stopped, disk / "w")
                subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
                ended = self.runs.call(*TRAIN, f"--workdir={disk / 'w'}")
                right = ended.code == 2 and ended.clear and "Read-only file system" in ended.last
                self.note("read-only disk", f"refused with exit code {ended.code}", right, ended.err)
                subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
                self.again("read-only disk, then writable", disk / "w")

    def deleted(self) -> None:
        for name in (phases.STEP, phases.VALIDATION, phases.EVALUATION):
            workdir = self.new()
            process = self.runs.start(*TRAIN, f"--workdir={workdir}")
            process.reach(name)
            shutil.rmtree(workdir, ignore_errors=True)
            shutil.rmtree(workdir, ignore_errors=True)
            ended = process.end()
            right = ended.code == 1 and ended.clear
            self.note(f"workdir deleted in a run ({name})", f"exit code {ended.code}, in one line", right, ended.err)
            if workdir.exists():
                left = sorted(str(p.relative_to(workdir)) for p in workdir.rglob("*"))
                begun = all(path.startswith("checkpoints") for path in left)  # a write in another thread, then
                what = "left: what a checkpoint's write had begun" if left else "nothing made anew"
                self.note(f"workdir deleted in a run ({name})", what, begun, str(left) + ended.err)
                shutil.rmtree(workdir)
            self.again("workdir deleted, then again", workdir)

    def damaged(self, times: int) -> None:
        """Flipped bits and truncations in every file that is read back, one at a time."""
        rng = self.random("damage")
        whole = {which: e2sad_jax.load(self.stopped, which) for which in ("last", "best")}
        expected = {which: (digest(c.params), c.step, c.config) for which, c in whole.items()}
        files = [p for p in (self.stopped / "checkpoints").rglob("*") if p.is_file()] + [self.stopped / "config.json"]
        for i in range(times):
            path = files[i % len(files)]
            kind = "config.json" if path.name == "config.json" else f"checkpoint file {path.name}"
            kind = "checkpoint array data" if path.parent.name == "d" else kind
            before = path.read_bytes()
            how = rng.choice([flip, flip, flip, truncate])
            how(path, rng)
            for which in ("last", "best"):
                try:
                    found = e2sad_jax.load(self.stopped, which)
                    same = (digest(found.params), found.step, found.config) == expected[which]
                    self.note(f"{kind} damaged, read by load", "the right network" if same else "A WRONG ONE", same)
                except Error as error:
                    self.note(f"{kind} damaged, read by load", "refused", "\n" not in str(error), str(error))
                except Exception as error:
                    self.note(f"{kind} damaged, read by load", f"{type(error).__name__}: {error}", False)
            path.write_bytes(before)

    def damaged_commands(self) -> None:
        """The same through the command line: what it does about each."""
        rng = self.random("damaged commands")
        last, best = sorted(steps_in(self.stopped), reverse=True)

        def largest(workdir: pathlib.Path, step: int) -> pathlib.Path:
            return max((workdir / f"checkpoints/{step}").rglob("*"), key=lambda p: p.stat().st_size * p.is_file())

        for how in (flip, truncate):
            for what in ("array", "metrics/metrics", "default/_METADATA"):
                workdir = self.new(self.stopped)
                path = largest(workdir, last) if what == "array" else workdir / f"checkpoints/{last}/{what}"
                how(path, rng)
                words = (
                    f"the checkpoint of step {last} is damaged"
                    if what != "default/_METADATA" or how == truncate
                    else ""
                )
                self.again(f"last checkpoint damaged ({what}), an earlier one whole", workdir, words)
            for step, only in ((best, False), (last, True)):
                workdir = self.new(self.stopped)
                if only:
                    shutil.rmtree(workdir / f"checkpoints/{best}")
                how(largest(workdir, step), rng)
                ended = self.runs.call(*TRAIN, f"--workdir={workdir}")
                right = (
                    ended.code == 2 and ended.clear and f"checkpoints/{step}" in ended.last and "delete" in ended.last
                )
                fault = "the only checkpoint damaged" if only else "best checkpoint damaged, not the last"
                self.note(fault, "refused, saying what to do", right, ended.err)
                shutil.rmtree(workdir / f"checkpoints/{step}")
                if only:
                    self.again(f"{fault}, then deleted", workdir)
            workdir = self.new(self.stopped)
            how(workdir / "config.json", rng)
            ended = self.runs.call(*TRAIN, f"--workdir={workdir}")
            self.note("config.json damaged", "refused", ended.code == 2 and ended.clear, ended.err)
            for name in ("metrics.jsonl", "training.json", "results.json", "outcomes.npz"):
                workdir = self.new(self.whole if name in ("results.json", "outcomes.npz") else self.stopped)
                how(workdir / name, rng)
                if name == "metrics.jsonl":  # a log, whose numbers nothing is computed from
                    done = self.runs.call(*TRAIN, f"--workdir={workdir}")
                    found = {k: v for k, v in runs.left(workdir).items() if k != "metrics"} if done.code == 0 else {}
                    same = found == {k: v for k, v in self.expected.items() if k != "metrics"}
                    self.note("metrics.jsonl damaged", "the same results", same, done.err)
                else:
                    self.again(f"{name} damaged", workdir)

    def two_runs(self) -> None:
        workdir = self.new()
        command = (*TRAIN, "--preset=paper", f"--workdir={workdir}")  # without a schedule: steps may change
        process = self.runs.start(*command, "--steps=100000")
        process.reach(phases.STEP, 2)
        ended = self.runs.call(*command, "--steps=100000")
        named = f"process {process.pid} on {socket.gethostname()}" in ended.last
        self.note("second run in a workdir", "refused, naming the first", ended.code == 2 and named, ended.err)
        self.note("second run in a workdir", "the first goes on", process.poll() is None)
        process.kill()
        process.end()
        owner = (workdir / LOCK).read_text()
        self.note("lock of a killed process", "names it", str(process.pid) in owner, owner)
        ended = self.runs.call(*command, f"--steps={max(steps_in(workdir)) + 10}")
        self.note("lock of a killed process", "taken over", ended.code == 0, ended.err)

    def told_to_stop(self) -> None:
        """SIGTERM and Ctrl-C in every phase of a run, and in the other commands."""
        rng, longest = self.random("signals"), 0.0
        for number in (signal.SIGTERM, signal.SIGINT):
            for name in dict.fromkeys(CHAIN[:-1]):
                workdir = self.new()
                process = self.runs.start(*TRAIN, f"--workdir={workdir}")
                process.reach(name, 1, rng.random() * rng.choice(self.usual.lasted(name)))
                process.send_signal(number)
                ended = process.end(60)
                seconds = ended.seconds
                right = ended.code in (128 + number, -number, 0) and seconds < GRACE and "Traceback" not in ended.err
                code = {0: "had finished", -number: "ended by the signal"}.get(ended.code, f"exit code {ended.code}")
                self.note(f"{number.name} in {name}", code, right, f"{seconds:.1f} s, {ended.code}, {ended.err}")
                longest = max(longest, seconds)
                self.again(f"{number.name}, then the same command", workdir, validated=False)
        self.note("SIGTERM and SIGINT, all of these", f"at most {longest:.1f} s from the signal to the end", True)

    def broken(self) -> None:
        """A loss that is not finite, memory that does not suffice, a device that fails."""
        for what, (code, error, words) in ERRORS.items():
            for where, (patch, kept) in PATCHES.items():
                workdir, fault = self.new(), f"{what} in {where} (raised on purpose)"
                ended = self.runs.call(*TRAIN, f"--workdir={workdir}", patch=patch.format(error=error))
                right = ended.code == code and ended.clear and all(word in ended.last for word in (*words, *kept))
                self.note(fault, f"exit code {ended.code}, naming step, checkpoint, remedy", right, ended.err)
                self.again(f"{what}, then without it", workdir)
        workdir = self.new()
        ended = self.runs.call(*TRAIN, f"--workdir={workdir}", "--learning_rate=1e35")
        right = ended.code == 3 and ended.clear and "--learning_rate" in ended.last
        self.note("loss not finite", "exit code 3, naming the flag", right, ended.err)
        for gigabytes in (3, 2):
            command = (*TRAIN, "--batch_size=1400", "--model=mnist_cnn", "--steps=2", f"--workdir={self.new()}")
            fault, ended = f"address space of {gigabytes} GiB", self.runs.call(*command, limit=gigabytes * 2**30)
            # XLA's own threads may end the process before Python learns of it: docs/running.md has that bound.
            aborted = ended.code == -signal.SIGABRT and "std::bad_alloc" in ended.err
            right = aborted or ended.code == 0 or (ended.code == 6 and ended.clear)
            self.note(fault, f"exit code {ended.code}", right, ended.err)
            if ended.code:
                ended = self.runs.call(*command)
                self.note(f"{fault}, then without it", "the same command ends well", ended.code == 0, ended.err)


ERRORS = {  # exit code; what XLA says; what must be said of it
    "out of memory": (
        6,
        "RESOURCE_EXHAUSTED: Out of memory allocating 5 bytes",
        ("out of memory", "--eval_batch_size"),
    ),
    "dead device": (
        7,
        "INTERNAL: an illegal memory access was encountered",
        ("the device failed", "JAX_PLATFORMS=cpu"),
    ),
}
PATCHES = {  # where it is raised; what must be said of that
    "a step": (
        """
import jax
from e2sad_jax.runs import trainer
real = trainer.Recorder.__call__
def call(self, step, *rest):
    if step == 25:
        raise jax.errors.JaxRuntimeError("{error}")
    return real(self, step, *rest)
trainer.Recorder.__call__ = call
""",
        ("after step 2", "the checkpoint of step 20 is intact"),
    ),
    "evaluation": (
        """
import jax
from e2sad_jax.runs.opening import Run
real = Run.attack
def attack(run, params, dataset, *rest, **more):
    if dataset is not run.validation_set:
        raise jax.errors.JaxRuntimeError("{error}")
    return real(run, params, dataset, *rest, **more)
Run.attack = attack
""",
        ("in the attacks on step 40", "the checkpoints are intact"),
    ),
}
PREPARE = """
import os, pathlib, sys
import pytest
from e2sad_jax import data
from tests.unit.data.test_data_prepare import Mini

folder = pathlib.Path(sys.argv[1])
mini = Mini("mnist", folder / f"origin{os.getpid()}", pytest.MonkeyPatch())
mini.place(folder / "data")
dataset = data.load("mnist", folder / "data")
print(dataset.sha256)
"""


@contextlib.contextmanager
def mounted(folder: pathlib.Path, options: str) -> Iterator[pathlib.Path]:
    """A small disk of its own."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
