"""What an accelerator should run: timed trainings, step costs, comparisons, the paper at full scale. One command after another.

python -m benchmarks.accelerator --list
python -m benchmarks.accelerator --mnist=mnist.npz --svhn=svhn.npz --cifar10=cifar10 --minutes=9
python -m benchmarks.accelerator --mnist=mnist.npz --minutes=9 --first=compare_defenses

Each command resumes by itself or measures again. If one ends early, the message names it and the flag to resume with.
"""

import dataclasses
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

FLAGS = flags.FLAGS
LEAST = 60.0  # seconds below which nothing is begun
GRACE = 40.0  # seconds from the signal to the end: one program may compile for longer
FAILED_IN_PART = {1: ("step_cost",), 3: ("train", "compare", "paper")}  # exit codes of a whole table with a failed row
OUT_OF_TIME = 4  # of this program, as of experiments.paper

STEP_COSTS = {
    "eager_torch": ("--defense=natural,fgsm,e2sad", "--peer=torch", "--compile_seconds=60"),
    "ifgsm": ("--defense=natural,ifgsm", "--attack_steps=1,2,5,10,20,30,40"),
    "precisions": ("--defense=natural,fgsm,hamm,e2sad", "--precision=float32,tf32,bf16"),
}
COMPARISONS = {  # robust accuracy under the worst case, and its price
    "defenses": ("--steps=6000",),
    "defenses_flops": ("--steps=6000", "--equal_flops"),
    "long": ("--steps=30000", "--entry=e2SAD, robust", "--entry=PGD-3"),
    "ablation": ("--steps=6000", "--parts"),
}
THROUGHPUTS = {"mnist": (), "preact_resnet18": ("--model=preact_resnet18",)}
PAPER = {
    "tables": ("--table=1,2",),
    "second_step": ("--study=second_step",),
    "figures": ("--figure=all",),
    "svhn": ("--table=3",),
    "studies": ("--study=lam,labels,alpha",),
    "bf16": ("--table=1", "--precision=bf16"),
}


@dataclasses.dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
      name: what `--first` and `--only` call it.
      words: the module and its flags.
      budget: whether it takes `--time_budget_minutes` and ends by itself.
    """

    name: str
    words: tuple[str, ...]
    budget: bool = False

    @property
    def kind(self) -> str:
        """The part of the name before the first underscore, two words for a step's cost."""
        return "step_cost" if self.name.startswith("step_cost") else self.name.partition("_")[0]

    def line(self, seconds: float) -> list[str]:
        """The words with what remains of the time, in minutes, where the command knows a budget."""
        return [*self.words, *([f"--time_budget_minutes={seconds / 60:.2f}"] if self.budget else [])]


def commands(mnist: str, svhn: str, cifar10: str, runs: str, results: str, torch: bool = True) -> list[Command]:
    """Returns the commands in their order.

    Args:
      mnist: the data set's name, or a file.
      svhn: the same; "" leaves the paper's Table 3 out.
      cifar10: the same; "" leaves the table of FastAT Benchmark out.
      runs: folder for runs.
      results: folder for results.
      torch: whether PyTorch is installed and timed too.
    """
    found = []
    for precision in ("float32", "tf32", "bf16"):
        flags_ = (
            "--defense=e2sad",
            f"--data={mnist}",
            f"--precision={precision}",
            f"--workdir={runs}/e2sad-{precision}",
        )
        found.append(Command(f"train_{precision}", ("experiments.mnist", *flags_)))
    for name, own in STEP_COSTS.items():
        own = tuple(flag for flag in own if torch or not flag.startswith("--peer"))
        words = ("experiments.step_cost", "--rounds=5", f"--results={results}/step_cost/{name}", *own)
        found.append(Command(f"step_cost_{name}", words))
    for name, own in THROUGHPUTS.items():
        found.append(
            Command(f"throughput_{name}", ("benchmarks.throughput", f"--results={results}/throughput/{name}", *own))
        )
    for name, own in COMPARISONS.items():
        size = ("--model=mnist_cnn", "--batch_size=256", "--seeds=3", "--examples=10000")
        effort = ("--queries=5000", "--apgd_steps=100")
        where = (f"--data={mnist}", f"--workdir={runs}/compare", f"--results={results}/compare_{name}")
        found.append(Command(f"compare_{name}", ("experiments.compare", *size, *effort, *where, *own)))
    if cifar10:
        where = (f"--data={cifar10}", f"--workdir={runs}/compare", f"--results={results}/compare_fastat")
        found.append(Command("compare_fastat", ("experiments.compare", "--recipe=fastat", "--seeds=3", *where)))
    for name, own in PAPER.items():
        data = svhn if name == "svhn" else mnist
        folder = f"{results}/paper_bf16" if name == "bf16" else f"{results}/paper"
        where = (f"--data={data}", f"--workdir={runs}/paper", f"--results={folder}")
        if data:
            found.append(Command(f"paper_{name}", ("experiments.paper", "--scale=full", *where, *own), budget=True))
    return found


def chosen(found: Sequence[Command], first: str, only: Sequence[str]) -> list[Command]:
    """Returns the commands from the one named `first` on, or those of `only`.

    Raises:
      ValueError: for a name that none of them has.
    """
    names = [command.name for command in found]
    for name in filter(None, (first, *only)):
        if name not in names:
            raise ValueError(f"{name!r}: must be of {', '.join(names)}")
    rest = found[names.index(first) :] if first else found
    return [command for command in rest if not only or command.name in only]


def run(
    found: Sequence[Command],
    seconds: float,
    call: Callable[[Sequence[str], float], int],
    clock: Callable[[], float] = time.monotonic,
) -> tuple[int, str]:
    """Runs one command after another until time is up or one fails.

    Args:
      found: the commands.
      seconds: for all of them.
      call: runs the words of a command for so many seconds at most and returns its exit code, `OUT_OF_TIME` if it did
        not end before.
      clock: in seconds.

    Returns:
      The exit code, 0 if all was done, 1 or 3 if all was done but a row of a table, and the name of the command to go on
      with, "" if there is none.
    """
    end, worst = clock() + seconds, 0
    for command in found:
        if (left := end - clock()) < LEAST:
            return OUT_OF_TIME, command.name
        code = call(command.line(left), left)
        if code and command.kind not in FAILED_IN_PART.get(code, ()):
            return code, command.name
        worst = max(worst, code)
    return worst, ""


def call(words: Sequence[str], seconds: float) -> int:
    """Runs `python -m` with these words; after so many seconds a SIGTERM lets it save and end."""
    print(f"\n$ python -m {shlex.join(words)}", flush=True)
    # JAX would take most of a GPU's memory, and PyTorch needs some.
    environment = os.environ | ({"XLA_PYTHON_CLIENT_PREALLOCATE": "false"} if "step_cost" in words[0] else {})
    with subprocess.Popen([sys.executable, "-m", *words], env=environment) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
    return OUT_OF_TIME


def main(argv: list[str]) -> None:
    torch = importlib.util.find_spec("torch") is not None
    found = commands(FLAGS.mnist, FLAGS.svhn, FLAGS.cifar10, FLAGS.runs, FLAGS.results, torch)
    try:
        found = chosen(found, FLAGS.first, FLAGS.only)
    except ValueError as error:
        sys.exit(f"--first or --only={error}")
    if FLAGS.list:
        for command in found:
            print(f"{command.name}: python -m {shlex.join(command.words)}")
        return
    code, name = run(found, 60 * FLAGS.minutes, call)
    if name:
        why = "time is up" if code == OUT_OF_TIME else f"it ended with exit code {code}"
        print(f"{name}: {why}; resume with --first={name}", file=sys.stderr)
    elif code:
        print(f"all is done; some rows failed (exit code {code}), and their tables say why", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    flags.DEFINE_string("mnist", "mnist", "data set, or a file PATH.npz")
    flags.DEFINE_string("svhn", "", "the same; empty: without Table 3 of the paper")
    flags.DEFINE_string("cifar10", "", "the same; empty: without the table of FastAT Benchmark")
    flags.DEFINE_string("runs", "runs/accelerator", "folder for runs")
    flags.DEFINE_string("results", "results/accelerator", "folder for results")
    flags.DEFINE_float("minutes", 9.0, "for all commands", lower_bound=2.0)
    flags.DEFINE_string("first", "", "command to begin with")
    flags.DEFINE_list("only", [], "commands to run, with commas")
    flags.DEFINE_bool("list", False, "print the commands and stop")
    app.run(main)
