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


def test_cycles_of_the_kernel_of_attention():
    """By its logits, of queries with 4480 tokens and keys with 4608, forward and back; other kernels have no estimate."""
    arrays = "s8[1,5,6]{2,1,0}, bf16[2,24,4480,65]{3,2,1,0}, bf16[2,24,4608,65]{3,2,1,0}, bf16[2,24,4608,64]{3,2,1,0}"
    call = '%NAME = (f32[2,8]{1,0}) custom-call(%a), custom_call_target="tpu_custom_call", operand_layout_constraints={ARRAYS}'
    lines = [f"  {call}, frontend_attributes={{}}".replace("ARRAYS", arrays).replace("NAME", name)
             for name in ("splash_mha_fwd_residuals.1", "splash_mha_dkv_no_residuals.3", "another.2")]  # fmt: skip
    text = PROGRAM.replace("INNER", KNOWN).replace("  %while.2", "\n".join([*lines, "  %while.2"]))
    logits = 2 * 24 * 4480 * 4608
    more = hlo.cycles(text, (3.0, 6.0)).total - hlo.cycles(text).total
    assert more == pytest.approx(7 * logits * (3.0 + 6.0) / 1000, rel=1e-6)


def test_collectives():
    assert hlo.collectives(PROGRAM) == ["all-reduce", "all-gather"]
    assert hlo.collectives(PROGRAM.replace("all-", "none-")) == []


@pytest.mark.parametrize(
    ("said", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", {(0, 1), (2, 3)}),
        ("replica_groups=[4,2]<=[8]", {(0, 1), (2, 3), (4, 5), (6, 7)}),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", {(0, 2, 4, 6), (1, 3, 5, 7)}),
        ("source_target_pairs={{1,0},{3,2}}", {(1, 0), (3, 2)}),
        ("replica_groups={}", {(0, 1, 2, 3)}),
    ],
)
def test_who_exchanges(said, groups):
    head = "HloModule jit_f, is_scheduled=true, num_partitions=4\n"
    assert (
        hlo.exchanging(f"{head}  %r = f32[8]{{0}} all-gather-start(%s), channel_id=3, {said}, dimensions={{0}}")
        == groups
    )


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
