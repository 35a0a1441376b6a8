"""XLA's text of compiled programs is read as it is written."""

import types

import jax
import jax.numpy as jnp
import pytest

from experiments.step_cost import ahead
from experiments.step_cost.compiled import Program, size
from experiments.step_cost.targets import CHIPS, Target

LOOP = """\
HloModule jit_f, is_scheduled=true

%fused (param_0.1: f32[4,8], param_1.1: s32[]) -> f32[1,8] {
  %param_0.1 = f32[4,8]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  %bitcast.1 = f32[4,8]{1,0} bitcast(%param_0.1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,8]{1,0} dynamic-slice(%bitcast.1, %param_1.1, %zero), dynamic_slice_sizes={1,8}
}

%body (t: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %t = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4,8]{1,0} get-tuple-element(%t), index=1
  %row = f32[1,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %y = f32[4,8]{1,0} dynamic-update-slice(%x, %row, %i, %i)
  ROOT %next = (s32[], f32[4,8]{1,0}) tuple(%i, %y)
}

%cond (t.1: (s32[], f32[4,8])) -> pred[] {
  %t.1 = (s32[], f32[4,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main.1 (a: f32[4,8]) -> f32[4,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %held = f32[4,8]{1,0:T(8,128)S(1)} copy(%a)
  %zero.1 = s32[] constant(0)
  %init = (s32[], f32[4,8]{1,0}) tuple(%zero.1, %held)
  %loop = (s32[], f32[4,8]{1,0}) while(%init), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"29"}}
  %read = s32[] custom-call(%zero.1), custom_call_target="xla_python_gpu_callback"
  ROOT %out = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def program(*lines: str) -> Program:
    body = "\n".join(f"  {line}" for line in lines)
    return Program.read(f"HloModule m\n\nENTRY %main (x: f32[8]) -> f32[8] {{\n{body}\n}}\n")


def test_a_loop_counts_as_often_as_it_turns():
    read = Program.read(LOOP)
    assert read.kernels == 29 * 2 + 2
    assert read.transfers == 1
    assert read.unknown_loops == 0
    unknown = Program.read(LOOP.replace("known_trip_count", "other"))
    assert (unknown.kernels, unknown.unknown_loops, unknown.loops) == (2 + 2, 1, True)
    assert read.loops
    assert not program("%x = f32[8]{0} parameter(0)").loops


@pytest.mark.parametrize(
    ("change", "turns"),
    [
        ((), 29),
        (("constant(29)", "constant(5)"), 5),
        (("constant(0)", "constant(28)"), 1),
        (("constant(0)", "constant(30)"), 0),
        (("direction=LT", "direction=NE"), None),
        (("constant(1)", "constant(2)"), None),
        (("s32[] add(%i", "s32[] multiply(%i"), None),
        (("s32[] add(%i", "s32[] add(%other"), None),
        (("s32[] add(%i", "s32[] add(%elsewhere"), None),
        (("%i.1 = s32[] get-tuple-element(%t.1), index=0", "%i.1 = s32[] get-tuple-element(%t.1), index=1"), None),
        (("copy(%zero.1)", "custom-call(%zero.1)"), None),
    ],
)
def test_the_turns_of_a_tpus_loop_are_read_from_its_counter(change, turns):
    """Its text has no trip count."""
    text = LOOP.replace(', backend_config={"known_trip_count":{"n":"29"}}', "")
    text = text.replace("%true = pred[] constant(true)", "%less = pred[] compare(%i.1, %last), direction=LT")
    more = "%i.1 = s32[] get-tuple-element(%t.1), index=0\n  %last = s32[]{:T(128)} constant(29)\n"
    text = text.replace("  ROOT %less", f"  {more}  ROOT %less")
    adds = (
        "%one = s32[] constant(1)\n  %other = s32[] get-tuple-element(%t), index=10\n"
        "  %elsewhere = s32[] get-tuple-element(%y), index=0\n  %more = s32[] add(%i, %one)\n"
    )
    text = text.replace("  ROOT %next", f"  {adds}  ROOT %next").replace("tuple(%i, %y)", "tuple(%more, %y)")
    text = text.replace("%init = ", "%start = s32[] copy(%zero.1)\n  %init = ").replace(
        "(%zero.1, %held)", "(%start, %held)"
    )
    assert "compare" in text
    read = Program.read(text.replace(*change) if change else text)
    (loop,) = (one for one, _ in read.run if one.opcode == "while")
    assert read.turns(loop) == turns
    assert read.loops == (turns != 1)
    assert read.kernels == 3 + 3 * (1 if turns is None else turns), "a fusion, an update and a sum in each turn"
    after = text.replace("direction=LT", "direction=LT\n  %unused = s32[] constant(7)")
    assert Program.read(after).turns(loop) == 29, "the root need not be last"


@pytest.mark.parametrize(("text", "seconds", "shown"), [(LOOP, 1.0, None), ("", 0.5, 0.5), ("", -1.0, None)])
def test_the_compilers_estimate_is_not_taken_of_loops(text, seconds, shown):
    compiled = types.SimpleNamespace(
        as_text=lambda: text or "ENTRY %m (x: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} parameter(0)\n}\n",
        cost_analysis=lambda: {"optimal_seconds": seconds},
        memory_analysis=lambda: None,
    )
    assert ahead.read(compiled, 1e9, Target("v5e", CHIPS["v5e"], 1), "bf16")["estimate"] == shown


def test_bytes_are_those_of_kernels_in_the_memory_of_the_device():
    """A slice is read as it is, an update written in place, and what lies in a TPU core is not counted."""
    copied, index = 4 * 8 * 4, 4
    row = 8 * 4
    a_turn = (row + row + index) + 2 * row
    assert Program.read(LOOP).bytes_moved == copied + 29 * a_turn + index + index


@pytest.mark.parametrize(
    ("shape", "count"),
    [
        ("f32[2,3]{1,0}", 24),
        ("bf16[5]", 10),
        ("pred[7]{0}", 7),
        ("s4[3]{0}", 2),
        ("f8e4m3fn[4]{0}", 4),
        ("(f32[2]{0}, (s32[], u8[3]{0}))", 15),
        ("f32[2]{0:T(128)S(1)}", 0),
        ("token[]", 0),
    ],
)
def test_size_of_a_shape(shape, count):
    assert size(shape) == count


def test_a_program_that_was_compiled_here():
    compiled = jax.jit(lambda x: jax.lax.fori_loop(0, 7, lambda i, y: jnp.sin(y @ y), x)).lower(jnp.eye(64)).compile()
    read, once = Program.read(compiled.as_text()), 64 * 64 * 4
    assert read.unknown_loops == 0
    assert 7 * 4 * once <= read.bytes_moved <= 7 * 8 * once, "a product and a sine a turn"
    with pytest.raises(ValueError, match="no ENTRY"):
        Program.read("HloModule nothing")


@pytest.mark.parametrize(
    ("line", "sent"),
    [
        ("%a = f32[8,3]{1,0} all-gather(f32[1,3]{1,0} %x), dimensions={0}", {"all-gather": 8 * 3 * 4}),
        (
            "%a = (f32[1,3]{1,0:T(8,128)}, f32[8,3]{1,0:T(8,128)}) all-gather-start(f32[1,3]{1,0} %x), dimensions={0}",
            {"all-gather": 8 * 3 * 4},
        ),
        (
            "%a = ((f32[1,3]{1,0}, bf16[2]{0}), (f32[8,3]{1,0}, /*index=1*/bf16[16]{0})) all-gather-start(%x, %y)",
            {"all-gather": 8 * 3 * 4 + 16 * 2},
        ),
        (
            "%p = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(f32[5]{0} %x)",
            {"collective-permute": 5 * 4},
        ),
        ("%r = ((f32[8]{0}), f32[1]{0}, u32[]) reduce-scatter-start(f32[8]{0} %x)", {"reduce-scatter": 4}),
        ("%r = (f32[5]{0}, f32[7]{0}) all-reduce-start(%x, %y), to_apply=%add", {"all-reduce": 12 * 4}),
        ("%d = f32[8,3]{1,0} all-gather-done((f32[1,3]{1,0}, f32[8,3]{1,0}) %a)", {}),
    ],
)
def test_bytes_of_a_collective_are_those_of_its_result(line, sent):
    """As XLA prints them: what begins an asynchronous one carries its operands along, except of a sum."""
    assert {kind: size for kind, (_, size) in program(line).collectives().items()} == sent
