"""What a fast program should not contain, on a text written by hand and on what JAX lowers."""

import jax
import jax.numpy as jnp
import pytest

from tests.tools import hlo_surprises

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
    found = {x.kind: x for x in hlo_surprises.surprises(SURPRISING)}
    dot, convolution = 2 * 64 * 64 * 2000, 2 * (2 * 6 * 2 * 8 * 4000)
    assert found[hlo_surprises.FLOAT32] == hlo_surprises.Surprise(
        hlo_surprises.FLOAT32, 1, dot, "f32[64,64]", dot / (dot + convolution)
    )
    assert found["copy for a product"] == hlo_surprises.Surprise("copy for a product", 2, 2 * 24000, "bf16[1,3,2,4000]")
    assert found["transpose for a product"] == hlo_surprises.Surprise(
        "transpose for a product", 1, 128000, "f32[2000,64]"
    )
    assert found["gather"] == hlo_surprises.Surprise("gather", 1, 20000, "f32[10,2000]")
    assert found["scatter"] == hlo_surprises.Surprise("scatter", 1, 128000, "f32[64,2000]")
    assert len(found) == 5
    assert found["gather"].line() == "1 x gather, 2e+04 elements, most of it f32[10,2000]"
    assert (
        found[hlo_surprises.FLOAT32]
        .line()
        .startswith("1 x product in float32, 91.43% of all products' work, most of it f32[64,64]")
    )
    # What is in order already is only prefetched, and what is small is no matter.
    assert "copy for a product" not in {
        x.kind for x in hlo_surprises.surprises(SURPRISING.replace("{1,2,3,0", "{3,2,1,0"))
    }
    text = "ENTRY %main (a: f32[]) -> f32[] {\n  %g = f32[10000,2]{1,0} gather(%b, %i), offset_dims={1}\n}\n"
    assert [x.line() for x in hlo_surprises.surprises(text)] == ["1 x gather, 2e+04 elements, most of it f32[10000,2]"]
    with pytest.raises(ValueError, match="no entry"):
        hlo_surprises.surprises("HloModule jit_g")


def test_surprises_of_what_jax_lowers():
    """Before XLA for CPUs makes float32 of bfloat16: an image by channels first, convolved, cropped and multiplied."""

    def fn(image, kernel, rows, matrix):
        found = jax.lax.conv(image.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME")
        return found[:, :, rows].sum(), (matrix @ matrix).sum()

    image, kernel = jnp.zeros((1, 64, 64, 3), "bfloat16"), jnp.zeros((8, 3, 3, 3), "bfloat16")
    rows = jnp.arange(40)

    def found(dtype):
        lowered = jax.jit(fn).lower(image, kernel, rows, jnp.zeros((32, 32), dtype))
        return {x.kind: x for x in hlo_surprises.surprises(lowered.as_text("hlo"))}

    good = found("bfloat16")
    assert set(good) == {"transpose for a product", "gather"}
    assert good["gather"].amount == 8 * 40 * 64 and good["transpose for a product"].most == "bf16[1,3,64,64]"
    bad = found("float32")
    # Of 64 rows by 3 taps 190 meet the image.
    assert bad[hlo_surprises.FLOAT32].share == pytest.approx(32**3 / (32**3 + 8 * 3 * 190**2), rel=1e-6)
    assert set(bad) == set(good) | {hlo_surprises.FLOAT32}
