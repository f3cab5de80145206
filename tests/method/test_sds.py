"""What the oracle does not hold: how the numbers of score distillation change over a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method import sds


@pytest.mark.parametrize(("i", "top"), [(0, 950), (50, 625), (100, 300), (150, 300)])
def test_timesteps_reach_down_to_t_min_and_up_to_a_falling_top(i, top):
    """From t_min to t_max - 2, both included; halfway along a cosine the top is the mean of its ends."""
    hyper = sds.Hyper(weight_steps=100, t_min=50, t_max=950, t_max_final=300)
    draw = jax.jit(jax.vmap(lambda key: sds.sample_timestep(key, hyper, jnp.int32(i), 1000)))
    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 20_000)))
    assert drawn.dtype == np.int32 and (drawn.min(), drawn.max()) == (50, top - 2)
    assert abs(drawn.mean() - (50 + top - 2) / 2) < 8


def test_timesteps_end_with_the_schedule():
    hyper = sds.Hyper(t_min=50, t_max=950, t_max_final=950)
    drawn = [int(sds.sample_timestep(jax.random.key(n), hyper, jnp.int32(0), 100)) for n in range(300)]
    assert max(drawn) == 98 and min(drawn) >= 50


def test_weight_falls_along_a_cosine():
    hyper = sds.Hyper(weight=800.0, weight_final=400.0, weight_steps=160)
    assert [round(float(sds.weight_at(hyper, jnp.int32(i)))) for i in (0, 40, 80, 160, 500)] == [
        800,
        741,
        600,
        400,
        400,
    ]
