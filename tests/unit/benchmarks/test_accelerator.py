"""benchmarks.accelerator: which commands, in which order, and how a call ends."""

import dataclasses
import importlib
import types

import pytest
from absl import flags

from benchmarks import accelerator, throughput
from e2sad_jax import cli
from e2sad_jax.runs.recipes import RECIPES

ALL = accelerator.commands("mnist.npz", "svhn.npz", "cifar10.npz", "runs", "out")


@pytest.fixture
def values(monkeypatch):
    """The flags of a command's module, as it would read them."""

    def parse(command):
        module, *words = command.words
        own = flags.FlagValues()
        with monkeypatch.context() as patch:
            patch.setattr(flags, "FLAGS", own)
            for name in ("DEFINE_string", "DEFINE_integer", "DEFINE_float", "DEFINE_bool", "DEFINE_list"):
                define = getattr(flags, name)
                patch.setattr(flags, name, lambda *a, define=define, **k: define(*a, flag_values=own, **k))
            for kind, define in cli.DEFINE.items():
                patch.setitem(cli.DEFINE, kind, lambda *a, define=define, **k: define(*a, flag_values=own, **k))
            patch.setattr(cli, "FLAGS", own)
            name = module.partition(".")[2]
            if name in RECIPES:
                cli.define_flags(RECIPES[name])
            elif name in cli.REQUESTS:
                cli.define_request(name)
            elif name == "throughput":
                for field in dataclasses.fields(throughput.Request):
                    cli.define_flag(field)
            else:
                importlib.import_module(f"{module}.__main__").define_flags()
            assert own(["program", *words]) == ["program"], "nothing but flags"
        return own

    return parse


def test_every_command_is_one_that_its_module_reads(values):
    for command in ALL:
        own = values(dataclasses.replace(command, words=tuple(command.line(90.0))))
        if command.budget:
            assert own["time_budget_minutes"].value == 1.5


def test_all_commands_in_their_order():
    assert [command.name for command in ALL] == [
        *("train_float32", "train_tf32", "train_bf16"),
        *("step_cost_eager_torch", "step_cost_ifgsm", "step_cost_precisions"),
        *("throughput_mnist", "throughput_preact_resnet18"),
        *("compare_defenses", "compare_defenses_flops", "compare_long", "compare_ablation", "compare_fastat"),
        *("paper_tables", "paper_second_step", "paper_figures", "paper_svhn", "paper_studies", "paper_bf16"),
    ]
    for command in ALL:
        if command.kind not in ("step_cost", "throughput"):
            other = {"paper_svhn": "svhn", "compare_fastat": "cifar10"}
            assert f"--data={other.get(command.name, 'mnist')}.npz" in command.words
    folders = [word for command in ALL for word in command.words if word.startswith("--results=")]
    assert len(set(folders)) == len(folders) - 4, "the paper's five parts share one"
    without = accelerator.commands("mnist", "", "", "runs", "out", torch=False)
    assert len(without) == len(ALL) - 2
    assert not [word for command in without for word in command.words if "torch" in word and word.startswith("--peer")]


def test_a_part_is_chosen_by_name():
    assert [c.name for c in accelerator.chosen(ALL, "paper_studies", ())] == ["paper_studies", "paper_bf16"]
    assert [c.name for c in accelerator.chosen(ALL, "", ("train_tf32", "compare_long"))] == [
        "train_tf32",
        "compare_long",
    ]
    with pytest.raises(ValueError, match="'tables': must be of train_float32, "):
        accelerator.chosen(ALL, "tables", ())


class Machine:
    """Commands that take a minute each, and end as `codes` say."""

    def __init__(self, **codes):
        self.codes, self.now, self.lines = codes, 0.0, []

    def call(self, words, seconds):
        self.lines.append(list(words))
        self.now += 60.0
        return next((code for name, code in self.codes.items() if any(name in word for word in words)), 0)

    def run(self, seconds=1e6, found=ALL):
        return accelerator.run(found, seconds, self.call, lambda: self.now)


def test_everything_is_run_once():
    machine = Machine()
    assert machine.run() == (0, "")
    assert len(machine.lines) == len(ALL)


def test_when_time_is_up_the_next_command_is_named():
    machine = Machine()
    assert machine.run(200.0) == (4, "step_cost_eager_torch")
    assert len(machine.lines) == 3, "nothing is begun in the last minute"
    assert Machine().run(59.0) == (4, "train_float32")
    machine = Machine(tf32=4)
    assert machine.run() == (4, "train_tf32"), "cut off in the middle"


def test_the_papers_command_is_told_how_many_minutes_are_left():
    machine = Machine()
    machine.run(60.0 * 20, accelerator.chosen(ALL, "paper_tables", ()))
    assert [line[-1] for line in machine.lines[:2]] == ["--time_budget_minutes=20.00", "--time_budget_minutes=19.00"]


@pytest.mark.parametrize(
    ("where", "code", "goes_on"),
    [
        *(("e2sad-tf32", 3, True), ("compare_long", 3, True), ("step_cost/ifgsm", 1, True)),
        *(("e2sad-tf32", 1, False), ("step_cost/ifgsm", 3, False), ("compare_long", 2, False)),
    ],
)
def test_a_run_that_diverged_or_a_step_that_failed_keeps_nothing_else(where, code, goes_on):
    machine = Machine(**{where: code})
    ended, name = machine.run()
    assert ended == code
    if goes_on:
        assert (len(machine.lines), name) == (len(ALL), "")
    else:
        assert where in " ".join(machine.lines[-1])
        assert name == ALL[len(machine.lines) - 1].name


@pytest.mark.parametrize(
    ("codes", "code", "said"),
    [
        ({"tf32": 4}, 4, "train_tf32: time is up; resume with --first=train_tf32"),
        ({"compare_long": 2}, 2, "compare_long: it ended with exit code 2; resume with --first=compare_long"),
        ({"compare_long": 3}, 3, "all is done; some rows failed (exit code 3), and their tables say why"),
        ({}, 0, ""),
    ],
)
def test_the_last_line_says_how_to_resume(codes, code, said, monkeypatch, capsys):
    given = dict(mnist="mnist.npz", svhn="", cifar10="", runs="runs", results="out", minutes=60.0, only=[], list=False)
    machine = Machine(**codes)
    monkeypatch.setattr(accelerator, "call", machine.call)
    monkeypatch.setattr(accelerator, "FLAGS", types.SimpleNamespace(**given, first=""))
    with pytest.raises(SystemExit) as ended:
        accelerator.main([])
    assert (ended.value.code, capsys.readouterr().err.strip()) == (code, said)
    if "--first=" in said:
        resumed = Machine()
        monkeypatch.setattr(accelerator, "call", resumed.call)
        monkeypatch.setattr(accelerator, "FLAGS", types.SimpleNamespace(**given, first=said.partition("--first=")[2]))
        with pytest.raises(SystemExit):
            accelerator.main([])
        assert resumed.lines[0][:-1] == machine.lines[-1][:-1]


def test_a_command_is_told_to_stop_when_its_time_is_up(monkeypatch):
    told = []

    class Process:
        def __init__(self, words, env):
            told.append((words[1:], env.get("XLA_PYTHON_CLIENT_PREALLOCATE")))

        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *error: None  # noqa: E731

        def wait(self, seconds):
            told.append(seconds)
            raise accelerator.subprocess.TimeoutExpired("it", seconds)

        def send_signal(self, number):
            told.append(number)

        def kill(self):
            told.append("kill")

    monkeypatch.setattr(accelerator.subprocess, "Popen", Process)
    assert accelerator.call(("experiments.step_cost", "--rounds=1"), 90.0) == 4
    line = ["-m", "experiments.step_cost", "--rounds=1"]
    assert told == [(line, "false"), 90.0, accelerator.signal.SIGTERM, accelerator.GRACE, "kill"]
