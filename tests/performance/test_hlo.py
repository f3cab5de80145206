"""The reader of compiled programs, on a text written by hand and on what XLA writes here."""

import jax
import jax.numpy as jnp
import pytest

from referee_jax.performance import hlo

# A loop of seven trips, in which a branch is taken or not and another loop says its trips itself; a fusion has its estimate at
# its call, so what is within it is not counted again.
PROGRAM = """HloModule jit_f, is_scheduled=true

%fused (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  ROOT %t = f32[8]{0} tanh(%a), backend_config={"window_config":{"estimated_cycles":"999"}}
}

%cheap (b: f32[8]) -> f32[8] {
  %b = f32[8]{0} parameter(0)
  ROOT %copy.1 = f32[8]{0} copy(%b), backend_config={"window_config":{"estimated_cycles":"2"}}
}

%dear (c: f32[8]) -> f32[8] {
  %c = f32[8]{0} parameter(0)
  ROOT %f.1 = f32[8]{0} fusion(%c), kind=kLoop, calls=%fused, backend_config={"window_config":{"estimated_cycles":"30"}}
}

%helper (d: f32[8]) -> f32[8] {
  %d = f32[8]{0} parameter(0)
  ROOT %f.2 = f32[8]{0} copy(%d), backend_config={"window_config":{"estimated_cycles":"4"}}
}

%inner_body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  ROOT %n.1 = (s32[], f32[8]{0}) negate(%p), backend_config={"window_config":{"estimated_cycles":"100"}}
}

%inner_condition (p2: (s32[], f32[8])) -> pred[] {
  %p2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt.1 = pred[] compare(%g.1, %g.2), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]{0}) parameter(0)
  %cond.1 = f32[8]{0} conditional(%i, %x, %y), branch_computations={%cheap, %dear}, metadata={op_name="a(b)"}
  %call.1 = f32[8]{0} call(%cond.1), to_apply=%helper
  %while.2 = (s32[], f32[8]{0}) while(%t.1), condition=%inner_condition, body=%inner_body, INNER
  ROOT %all-reduce.1 = f32[8]{0} all-reduce(%call.1), to_apply=%helper, backend_config={"estimated_cycles":"5"}
}

%condition (r: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7), metadata={op_name="x"}
  %r = (s32[], f32[8]{0}) parameter(0)
  ROOT %lt.2 = pred[] compare(%g.3, %limit), direction=LT
}

ENTRY %main (s: f32[8]) -> f32[8] {
  %s = f32[8]{0} parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%t.2), condition=%condition, body=%body, metadata={op_name="jit(f)/while"}
  %gather = f32[16]{0} all-gather-start(%s), dimensions={0}
  ROOT %r.1 = f32[8]{0} reduce(%while.1), dimensions={0}, to_apply=%helper, backend_config={"estimated_cycles":"1000"}
}
"""
KNOWN = 'backend_config={"known_trip_count":{"n":"3"}}'


def test_cycles_of_loops_branches_and_calls():
    text = PROGRAM.replace("INNER", KNOWN)
    assert hlo.cycles(text) == hlo.Cycles(1000 + 7 * (30 + 4 + 3 * 100 + 5), ())


def test_a_loop_whose_trips_are_not_said_is_named():
    assert hlo.cycles(PROGRAM.replace("INNER", "x=y")) == hlo.Cycles(1000 + 7 * (30 + 4 + 100 + 5), ("inner_body",))


def test_collectives():
    assert hlo.collectives(PROGRAM) == ["all-reduce", "all-gather"]
    assert hlo.collectives(PROGRAM.replace("all-", "none-")) == []


def test_what_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry"):
        hlo.cycles("HloModule jit_f")


def test_reads_what_xla_writes():
    """On a CPU there are no estimates, but loops and their trips are written as for a TPU."""

    def fn(x):
        return jax.lax.scan(lambda c, _: (jnp.sin(c @ c), None), x, None, length=5)[0]

    text = jax.jit(fn).lower(jnp.ones((64, 64))).compile().as_text()
    assert " while(" in text
    assert hlo.cycles(text) == hlo.Cycles(0, ())


# Two turns of a loop, each a convolution of 9 of 16 places (a border of one row and column is padding) in a fusion, whose input
# another fusion has put into another order; the weight's order is only that of a small array. Then a product of float32.
SURPRISING = """HloModule jit_g, is_scheduled=true

%reordered (a: bf16[1,3,2,4000]) -> bf16[1,3,2,4000] {
  %a = bf16[1,3,2,4000]{3,2,1,0} parameter(0)
  ROOT %copy.1 = bf16[1,3,2,4000]{1,2,3,0:T(8,128)} copy(%a)
}

%convolved (w: bf16[2,1,4000,8], x: bf16[1,3,2,4000]) -> bf16[1,4,2,8] {
  %w = bf16[2,1,4000,8]{3,2,1,0} parameter(0)
  %x = bf16[1,3,2,4000]{1,2,3,0:T(8,128)} parameter(1)
  %bitcast.1 = bf16[1,3,2,4000]{1,2,3,0} bitcast(%x)
  ROOT %conv.1 = bf16[1,4,2,8]{3,2,1,0} convolution(%bitcast.1, %w), window={size=2x1 pad=1_1x0_0}, dim_labels=b01f_01io->b01f
}

%body (p: (s32[], bf16[1,3,2,4000])) -> (s32[], bf16[1,3,2,4000]) {
  %p = (s32[], /*index=1*/bf16[1,3,2,4000]{3,2,1,0:T(8,128)}) parameter(0)
  %x.1 = bf16[1,3,2,4000]{3,2,1,0} get-tuple-element(%p), index=1
  %w.1 = bf16[2,1,4000,8]{3,2,1,0} constant({...})
  %fusion.1 = bf16[1,3,2,4000]{1,2,3,0:T(8,128)} fusion(%x.1), kind=kLoop, calls=%reordered
  ROOT %fusion.2 = bf16[1,4,2,8]{3,2,1,0} fusion(%w.1, %fusion.1), kind=kOutput, calls=%convolved
}

%condition (r: (s32[], bf16[1,3,2,4000])) -> pred[] {
  %limit = s32[] constant(2)
  ROOT %lt.1 = pred[] compare(%g.3, %limit), direction=LT
}

ENTRY %main (s: f32[64,2000], i: s32[10]) -> f32[2000,64] {
  %s = f32[64,2000]{1,0} parameter(0)
  %i = s32[10]{0} parameter(1)
  %while.1 = (s32[], bf16[1,3,2,4000]{3,2,1,0:T(8,128)}) while(%t.1), condition=%condition, body=%body
  %transpose.1 = f32[2000,64]{1,0} transpose(%s), dimensions={1,0}
  %dot.1 = f32[64,64]{1,0} dot(%s, %transpose.1), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  %gather.1 = f32[10,2000]{1,0} gather(%s, %i), offset_dims={1}, slice_sizes={1,2000}
  %small = f32[10,20]{1,0} gather(%s, %i), offset_dims={1}, slice_sizes={1,20}
  ROOT %scatter.1 = f32[64,2000]{1,0} scatter(%s, %i, %gather.1), update_window_dims={1}
}
"""


def test_surprises():
    """A convolution's padding is no work: six of eight pairs of a row of the result and a tap meet a row of the input."""
    found = {x.kind: x for x in hlo.surprises(SURPRISING)}
    dot, convolution = 2 * 64 * 64 * 2000, 2 * (2 * 6 * 2 * 8 * 4000)
    assert found[hlo.FLOAT32] == hlo.Surprise(hlo.FLOAT32, 1, dot, "f32[64,64]", dot / (dot + convolution))
    assert found["copy for a product"] == hlo.Surprise("copy for a product", 2, 2 * 24000, "bf16[1,3,2,4000]")
    assert found["transpose for a product"] == hlo.Surprise("transpose for a product", 1, 128000, "f32[2000,64]")
    assert found["gather"] == hlo.Surprise("gather", 1, 20000, "f32[10,2000]")
    assert found["scatter"] == hlo.Surprise("scatter", 1, 128000, "f32[64,2000]")
    assert len(found) == 5
    assert found["gather"].line() == "1 x gather, 2e+04 elements, most of it f32[10,2000]"
    assert (
        found[hlo.FLOAT32]
        .line()
        .startswith("1 x product in float32, 91.43% of all products' work, most of it f32[64,64]")
    )
    # What is in order already is only prefetched, and what is small is no matter.
    assert "copy for a product" not in {x.kind for x in hlo.surprises(SURPRISING.replace("{1,2,3,0", "{3,2,1,0"))}
    with pytest.raises(ValueError, match="no entry"):
        hlo.surprises("HloModule jit_g")


def test_surprises_of_what_jax_lowers():
    """Before XLA for CPUs makes float32 of bfloat16: an image by channels first, convolved, cropped and multiplied."""

    def fn(image, kernel, rows, matrix):
        found = jax.lax.conv(image.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME")
        return found[:, :, rows].sum(), (matrix @ matrix).sum()

    image, kernel = jnp.zeros((1, 64, 64, 3), "bfloat16"), jnp.zeros((8, 3, 3, 3), "bfloat16")
    rows = jnp.arange(40)

    def found(dtype):
        lowered = jax.jit(fn).lower(image, kernel, rows, jnp.zeros((32, 32), dtype))
        return {x.kind: x for x in hlo.surprises(lowered.as_text("hlo"))}

    good = found("bfloat16")
    assert set(good) == {"transpose for a product", "gather"}
    assert good["gather"].amount == 8 * 40 * 64 and good["transpose for a product"].most == "bf16[1,3,64,64]"
    bad = found("float32")
    # Of 64 rows by 3 taps 190 meet the image.
    assert bad[hlo.FLOAT32].share == pytest.approx(32**3 / (32**3 + 8 * 3 * 190**2), rel=1e-6)
    assert set(bad) == set(good) | {hlo.FLOAT32}
