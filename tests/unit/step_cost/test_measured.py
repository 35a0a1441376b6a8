"""What experiments.step_cost measures, how it takes turns, and what it says."""

import importlib.util
import json
import pathlib
import re
import statistics
import time
from typing import Any

import jax
import numpy as np
import pytest

from e2sad_jax.defenses import DEFENSES
from e2sad_jax.errors import ConfigError, Stopped
from experiments.step_cost import measure, peers, run, show, targets
from experiments.step_cost.request import OURS, Kind, Request
from experiments.step_cost.step import in_turn, no_compilation_cache, timer

ROOT = pathlib.Path(__file__).resolve().parents[3]
TIMES = ("milliseconds", "fastest", "lower_quartile", "upper_quartile", "slowest")


# --- the steps themselves


def test_numbers_of_a_row_follow_from_its_seconds(made_up):
    """Of steps of known cost: medians, quartiles, ratios within a round, and shares of what the device can do."""
    asked, results = made_up[0], []
    request = Request(defense=("fgsm",), batch_size=8, rounds=3)
    measured = measure.measure(request, lambda result: results.append(result["rounds_done"]))
    assert results == [1, 2, 3]
    assert asked == ["natural", "fgsm"] * 3
    natural, fgsm = measured["rows"]
    assert natural["time_natural"] == natural["flops_natural"] == natural["time_float32"] == 1
    assert (fgsm["time_natural"], fgsm["time_ifgsm_30"], fgsm["error"]) == (2.0, None, None), (
        "the latter was not asked for"
    )
    assert (fgsm["compile_seconds"], fgsm["images_per_second"], fgsm["flops_per_second"]) == (2.0, 4.0, 1e9)
    assert fgsm["share_of_ceiling"] == 1e9 / 8e9
    json.dumps(measured, allow_nan=False)
    seconds = [1.0, 2.0, 6.0, 7.0]
    kind = Kind(OURS, "natural", 0, "float32")
    rows = {kind: {**natural}}
    measure.summarise(rows, [{kind: one} for one in seconds], {}, 8)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    assert [rows[kind][name] for name in TIMES] == [1e3 * value for value in (middle, 1.0, low, high, 7.0)]


def test_compiling_is_not_reading_from_a_disk(monkeypatch, tmp_path):
    read = []
    from jax._src import compilation_cache

    monkeypatch.setattr(compilation_cache, "get_executable_and_time", lambda *a, **k: read.append(a) or (None, None))
    with no_compilation_cache():
        jax.jit(lambda x: x + 1234.5).lower(1.0).compile()
    assert read == []
    jax.jit(lambda x: x + 1234.6).lower(1.0).compile()
    assert len(read) == 1, "as before"


# --- taking turns


def test_every_step_is_timed_once_a_round():
    asked = []
    timers = {name: lambda name=name: asked.append(name) or float(len(asked)) for name in "abc"}
    rounds = list(in_turn(timers, 3))
    assert asked == list("abc") * 3
    assert rounds == [{"a": 1, "b": 2, "c": 3}, {"a": 4, "b": 5, "c": 6}, {"a": 7, "b": 8, "c": 9}]


def test_one_call_before_each_block_is_not_timed(monkeypatch):
    now, ran = [0.0], []

    def work(dispatches):
        ran.append(dispatches)
        now[0] += 0.25 * dispatches + (1 if len(ran) == 1 else 0)  # the first is slow

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    timed = timer(work, 1.0, at_once=2)
    assert ran == [1, 1]
    assert timed() == 0.125
    assert ran[2:] == [1, 4], "one to warm up, then at least a second"


def test_a_step_that_fails_is_left_out_and_the_others_stay():
    failures, calls = [], iter([1.0, 2.0, None, 3.0])

    def sometimes():
        if (value := next(calls)) is None:
            raise RuntimeError("gone")
        return value

    timers = {"a": sometimes, "b": lambda: 9.0}
    rounds = list(in_turn(timers, 4, failed=lambda name, error: failures.append((name, str(error)))))
    assert failures == [("a", "gone")]
    assert rounds == [{"a": 1, "b": 9}, {"a": 2, "b": 9}, {"b": 9}, {"b": 9}]
    calls = iter([None])
    with pytest.raises(RuntimeError, match="gone"):
        list(in_turn({"a": sometimes}, 1))


def test_a_row_says_that_its_step_ran_out_of_memory(made_up, tmp_path, capsys):
    request = Request(defense=("fgsm", "hamm", "ifgsm"), attack_steps=(30,), rounds=2, results=str(tmp_path / "r"))
    with pytest.raises(run.StepsFailedError, match=r"1 steps could not be measured: hamm"):
        run.run(request)
    result = json.loads((tmp_path / "r" / "step_cost.json").read_text())
    natural, fgsm, hamm, ifgsm = result["rows"]
    assert hamm["error"].startswith("out of memory; JaxRuntimeError: RESOURCE_EXHAUSTED")
    assert "\n" not in hamm["error"]
    assert hamm["milliseconds"] is None
    assert (fgsm["time_natural"], ifgsm["time_natural"], fgsm["time_ifgsm_30"]) == (2.0, 30.0, 2 / 30)
    assert natural["peak_bytes"] == 5 + 7 + 4 - 3
    assert made_up[0] == ["natural", "fgsm", "ifgsm-30"] * 2
    out = capsys.readouterr().out
    assert "Hamm (failed)" in out
    assert "Hamm: failed: out of memory" in out


def test_ctrl_c_keeps_the_rounds_that_were_done(made_up, tmp_path):
    asked, raised = made_up
    raised += [None, None, None, KeyboardInterrupt()]
    with pytest.raises(Stopped, match="the 1 rounds that were done") as stopped:
        run.run(Request(defense=("fgsm",), rounds=5, results=str(tmp_path)))
    assert stopped.value.exit_code == 130
    result = json.loads((tmp_path / "step_cost.json").read_text())
    assert result["rounds_done"] == 1
    assert asked == ["natural", "fgsm"] * 2


def test_each_round_is_written_when_it_is_done(made_up, tmp_path):
    """A process that is killed in the third leaves two behind."""
    asked, raised = made_up
    raised += [None] * 4 + [SystemExit()]
    with pytest.raises(SystemExit):
        run.run(Request(defense=("fgsm",), rounds=3, results=str(tmp_path)))
    result = json.loads((tmp_path / "step_cost.json").read_text())
    assert (result["rounds_done"], result["complete"], len(asked)) == (2, False, 5)
    assert result["rows"][1]["seconds"] == [2.0, 2.0]
    assert "Median of 2 rounds" in (tmp_path / "step_cost.md").read_text()
    raised.clear()
    run.run(Request(defense=("fgsm",), rounds=3, results=str(tmp_path)))
    assert json.loads((tmp_path / "step_cost.json").read_text())["complete"]


def test_ctrl_c_before_the_first_round_writes_nothing(made_up, tmp_path):
    made_up[1].append(KeyboardInterrupt())
    with pytest.raises(Stopped, match="nothing was written"):
        run.run(Request(defense=("fgsm",), results=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (4, 4), (0, 8)])
def test_the_ceiling_of_several_devices_is_so_many_times_that_of_one(devices, count, made_up, tmp_path):
    run.run(Request(defense=("fgsm",), devices=devices, rounds=2, results=str(tmp_path)))
    result = json.loads((tmp_path / "step_cost.json").read_text())
    assert result["ceiling"]["float32"]["flops_per_second"] == 4e9 / 0.5, "of one device"
    natural, fgsm = result["rows"]
    assert natural["share_of_ceiling"] == pytest.approx(2e9 / 1.0 / (count * 8e9))
    assert fgsm["share_of_ceiling"] == pytest.approx(2e9 / 2.0 / (count * 8e9))


def test_precisions_are_held_against_their_own_natural_step_and_float32(made_up, tmp_path):
    run.run(Request(defense=("e2sad",), precision=("float32", "bf16"), rounds=1, results=str(tmp_path)))
    rows = json.loads((tmp_path / "step_cost.json").read_text())["rows"]
    assert [(r["name"], r["precision"]) for r in rows] == [
        (name, precision)
        for precision in ("float32", "bf16")
        for name in ("natural", "e2sad", "e2sad, robust", "e2sad, robust2")
    ]
    assert [r["time_natural"] for r in rows] == 2 * [1.0, 4.0, 30.0, 30.0]
    assert [r["time_float32"] for r in rows] == [1.0] * 8
    text = (tmp_path / "step_cost.md").read_text()
    assert "time / float32" in text
    assert "e2SAD bf16" in text


# --- a peer's losses


KIND = Kind("torch", "fgsm", 0, "float32")


def test_a_peer_with_other_losses_is_refused():
    ours = [2.5, 2.4, 2.0]
    measure.check_losses(KIND, ours, [2.5 * (1 + 1e-5), 2.401, 2.001])
    with pytest.raises(measure.PeerError, match=r"fgsm: torch has loss 2.42 in step 2 where ours is 2.4;"):
        measure.check_losses(KIND, ours, [2.5, 2.42, 2.0])
    for wrong in (2.501, float("nan")):
        with pytest.raises(measure.PeerError, match="in step 1"):
            measure.check_losses(KIND, ours, [wrong, 2.4, 2.0])


@pytest.fixture
def made_up_peer(monkeypatch):
    """PyTorch of made-up cost, whose compiled steps fail; in it, to be set: losses of a defense, seconds of `sleep`."""
    losses: dict[str, Any] = {}

    class Peer:
        note, compile_seconds, at_once = "as it is", None, 1

        def __init__(self, by, config):
            self.by, self.config = by, config

        def losses(self, steps):
            if self.by == "torch.compile":
                time.sleep(losses.get("sleep", 0.0))
                raise RuntimeError("no double backward")
            return losses.get(self.config.defense, [1.0] * steps)

        def run(self, steps):
            pass

    monkeypatch.setattr(peers, "check_installed", lambda name: None)
    monkeypatch.setattr(peers, "build", lambda by, config, *_: Peer(by, config))
    monkeypatch.setattr(measure, "timer", lambda *_: lambda: 8.0)
    monkeypatch.setattr(measure, "_peer_versions", lambda request: {"torch": "1", "threads": "torch 2, JAX 2"})
    return losses


def test_a_peer_that_does_something_else_fails_its_row_and_the_others_stay(made_up, made_up_peer, tmp_path, capsys):
    made_up_peer["fgsm"] = [1.0, 1.5, 1.0]
    request = Request(defense=("fgsm", "e2sad"), rounds=2, peer=("torch",), results=str(tmp_path))
    with pytest.raises(run.StepsFailedError, match=r"^1 steps of others .* than ours: fgsm by torch \(see") as failed:
        run.run(request)
    assert failed.value.exit_code == 1
    rows = {(r["name"], r["by"]): r for r in json.loads((tmp_path / "step_cost.json").read_text())["rows"]}
    why = "fgsm: torch has loss 1.5 in step 2 where ours is 1"
    assert rows["fgsm", "torch"]["error"].startswith(why)
    assert rows["fgsm", "torch"]["milliseconds"] is None
    for kept in (("fgsm", OURS), ("natural", "torch"), ("e2sad", OURS), ("e2sad", "torch")):
        assert len(rows[kept]["seconds"]) == 2
        assert rows[kept]["error"] is None
    assert why in " ".join(capsys.readouterr().out.split())
    assert why in (tmp_path / "step_cost.md").read_text()


def test_what_compiles_for_too_long_is_given_up(made_up, made_up_peer, tmp_path):
    made_up_peer["sleep"] = 30.0
    request = Request(defense=("natural",), rounds=1, peer=("torch",), compile_seconds=0.2, results=str(tmp_path))
    run.run(request)
    rows = json.loads((tmp_path / "step_cost.json").read_text())["rows"]
    assert [row["error"] for row in rows] == [None, None, "TimeoutError: took longer than 0.2 s"]
    assert rows[1]["milliseconds"] is not None


@pytest.mark.usefixtures("made_up_peer")
def test_a_peer_stands_below_ours(made_up, tmp_path, capsys):
    run.run(Request(defense=("fgsm",), rounds=1, peer=("torch",), results=str(tmp_path)))
    rows = {(r["name"], r["by"]): r for r in json.loads((tmp_path / "step_cost.json").read_text())["rows"]}
    assert list(rows) == [(n, by) for n in ("natural", "fgsm") for by in (OURS, "torch", "torch.compile")]
    assert rows["fgsm", "torch"]["ours_over_peer"] == 2 / 8
    assert rows["fgsm", "torch"]["time_natural"] == 1.0, "of its own natural step"
    assert rows["fgsm", "torch"]["time_our_natural"] == 8.0
    assert rows["fgsm", OURS]["ours_over_peer"] is None
    out = capsys.readouterr().out
    assert "natural, FGSM: torch.compile: failed: RuntimeError: no double backward." in out
    assert "torch 1" in out
    assert (tmp_path / "step_cost.png").stat().st_size > 10_000


# --- what it measures


def test_every_defense_is_measured_unless_some_are_named():
    names = [kind.name for kind in Request().kinds()]
    assert names[:2] == ["natural", "fgsm"]
    assert {re.split("-|, ", name)[0] for name in names} == set(DEFENSES)
    assert [name for name in names if name.startswith("e2sad")] == ["e2sad", "e2sad, robust", "e2sad, robust2"]
    assert [name for name in names if "-" in name] == [
        *(f"ifgsm-{k}" for k in (1, 2, 5, 10, 20, 30, 40)),
        *("pgd-2", "pgd-10", "trades-2", "trades-10", "atta-2", "atta-10"),
    ]


def test_steps_that_are_named_are_those_of_each_attack_that_takes_steps():
    names = [kind.name for kind in Request(defense=("trades", "e2sad", "pgd"), attack_steps=(7, 3)).kinds()]
    presets = ["e2sad", "e2sad, robust", "e2sad, robust2"]
    assert names == ["natural", "trades-3", "trades-7", *presets, "pgd-3", "pgd-7"]
    request = Request(defense=("e2sad",))
    assert [request.config(kind).settings["memory"] for kind in request.kinds()[1:]] == ["none", "int8", "int8"]


# --- what it refuses


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"defense": ("mart",)}, "--defense=mart: must be of natural, fgsm"),
        ({"defense": ("x" * 9999,)}, "--defense=" + "x" * 100 + ": must be of"),
        ({"defense": ()}, "--defense=: must name at least one of natural"),
        ({"attack_steps": (5, 0)}, "--attack_steps=5,0: must be at least 1 each"),
        ({"batch_size": 0}, "--batch_size=0: must be at least 1"),
        ({"model": "resnet"}, "--model=resnet: must be one of mnist_cnn, svhn_cnn, digits_cnn"),
        ({"image_size": -1}, "--image_size=-1: must be at least 0"),
        ({"image_size": 3}, "--image_size=3: images of 3x3 are too small for mnist_cnn"),
        ({"precision": ("half",)}, "--precision=half: must be of float32, tf32, bf16"),
        ({"rounds": 0}, "--rounds=0: must be at least 1"),
        ({"seconds": float("nan")}, "--seconds=nan: must be finite and at least 0"),
        ({"compile_seconds": 0.0}, "--compile_seconds=0.0: must be finite and above 0"),
        ({"peer": ("keras",)}, "--peer=keras: must be of xla, torch, art"),
        ({"peer": ("torch",), "precision": ("bf16",)}, "--precision=bf16: must have float32 in it for --peer=torch"),
        ({"steps_per_dispatch": -1}, "--steps_per_dispatch=-1: must be at least 0"),
    ],
)
def test_a_bad_value_is_refused_with_its_remedy(values, words):
    with pytest.raises(ConfigError) as error:
        Request(**values)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_target_is_chips_and_how_many(monkeypatch):
    monkeypatch.setattr(targets, "importable", lambda package: True)
    counts = {name: targets.Target.named(name).count for name in ("v5e", "v5e:4x4", "v6e:2x2", "h100", "h100x16")}
    assert counts == {"v5e": 1, "v5e:4x4": 16, "v6e:2x2": 4, "h100": 1, "h100x16": 16}
    for name in ("v4", "v5e:0x2", "h100x", "h100:2x2", "v5e:2x2x2"):
        with pytest.raises(ConfigError, match=f"--target={name}: must be of v5e"):
            targets.Target.named(name)
    with pytest.raises(ConfigError, match="at most 8 chips or whole hosts of 8"):
        targets.Target.named("h100x12")
    with pytest.raises(ConfigError, match="--batch_size=12: must be a multiple of the 8 devices"):
        Request(target=("h100x8",), batch_size=12)
    with pytest.raises(ConfigError, match="leave out --peer and --devices"):
        Request(target=("h100",), devices=2)
    monkeypatch.setattr(targets, "importable", lambda package: False)
    with pytest.raises(
        ConfigError, match=r"--target=v5e: needs libtpu, not installed here: pip install -e '\.\[aot\]'"
    ):
        Request(target=("v5e",))


def test_a_bound_is_the_work_at_the_peak_of_the_chip(monkeypatch):
    """Of a sum of n chips each sends 2 (n - 1) / n times its bytes; beyond a host, as fast as hosts are connected."""
    monkeypatch.setattr(targets, "importable", lambda package: True)
    bounds = targets.Target.named("h100x8").bound(989.4e9, 3.35e9, 450e6, "bf16")
    np.testing.assert_allclose(list(bounds.values()), [1e-3, 1e-3, 2 * 7 / 8 * 1e-3])
    assert targets.Target.named("h100").bound(1e9, 1e9, 1e9, "tf32")["links"] == 0
    far = targets.Target.named("h100x16").bound(1e9, 1e9, 50e6, "tf32")["links"]
    np.testing.assert_allclose(far, 2 * 15 / 16 * 1e-3)
    v5e = targets.CHIPS["v5e"].peak
    np.testing.assert_allclose(v5e["bf16"], [6 * v5e["float32"]])


def test_a_missing_peer_is_named_with_what_installs_it(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("torch", "art") else found(name))
    with pytest.raises(ConfigError, match=r"--peer=torch: needs the package torch, .*pip install -e '\.\[bench\]'"):
        Request(peer=("torch",))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "art" else object())
    with pytest.raises(ConfigError, match="--peer=art: needs the package adversarial-robustness-toolbox"):
        Request(peer=("art",))


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_measured(made_up, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--results=.*file/r: cannot be written .*choose another folder"):
        run.run(Request(results=str(tmp_path / "file" / "r")))
    assert made_up[0] == []


def test_the_widest_table_fits_a_terminal(made_up):
    """Numbers as an accelerator may have them, peers and precisions at once."""
    results = []
    request = Request(defense=("ifgsm",), attack_steps=(30,), precision=("float32", "bf16"), rounds=1)
    measure.measure(request, results.append)
    (result,) = results
    for row in result["rows"]:
        row |= dict.fromkeys(TIMES, 123.456) | {"images_per_second": 1234567.0, "compile_seconds": 123.4}
        row |= {"time_natural": 31.25, "time_ifgsm_30": 0.123, "ours_over_peer": 12.25, "flops": 123.4e9}
        row |= {"bytes_accessed": 123.4e9, "peak_bytes": 12345e6, "share_of_ceiling": 0.5, "flops_natural": 29.6}
    assert max(map(len, show.text(result).splitlines())) <= 120
