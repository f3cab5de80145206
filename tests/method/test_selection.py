"""Selection of particles by known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method import selection


def test_halving():
    assert [selection.survivors("halve", 8, n) for n in range(5)] == [8, 4, 2, 1, 1]
    assert [selection.survivors("halve", 5, n) for n in range(4)] == [5, 3, 2, 1]
    assert selection.survivors("none", 8, 3) == selection.survivors("smc", 8, 3) == 8
    np.testing.assert_array_equal(selection.ranked(jnp.array([1.0, 3.0, 2.0, 3.0]), 3), [1, 3, 2])


def test_one_particle_is_itself():
    parents, log_w = selection.resampled(jnp.ones(1), jnp.zeros(1), jnp.zeros(1), jax.random.key(0), 10.0)
    assert parents.tolist() == [0] and np.isfinite(log_w).all()
    assert selection.ranked(jnp.ones(1), 1).tolist() == [0]


def test_equal_particles_stay():
    parents, log_w = selection.resampled(jnp.full(4, 2.0), jnp.full(4, 1.0), jnp.zeros(4), jax.random.key(0), 10.0)
    assert parents.tolist() == [0, 1, 2, 3] and np.ptp(log_w) == 0


def test_one_that_is_far_better_is_all_of_them():
    values = jnp.array([0.0, 5.0, 0.0, 0.0])
    parents, log_w = selection.resampled(values, jnp.zeros(4), jnp.zeros(4), jax.random.key(0), 10.0)
    assert parents.tolist() == [1] * 4 and log_w.tolist() == [0.0] * 4


def test_systematic_resampling_copies_by_weight():
    """Each as often as K w says, rounded up or down, and on average exactly."""
    w = np.array([0.72, 0.05, 0.2, 0.03])
    keys = jax.random.split(jax.random.key(0), 4000)
    draw = jax.vmap(lambda key: selection.resampled(jnp.log(w), jnp.zeros(4), jnp.zeros(4), key, 1.0)[0])
    counts = (np.asarray(jax.jit(draw)(keys))[:, :, None] == np.arange(4)).sum(1)
    assert ((counts == np.floor(4 * w)) | (counts == np.ceil(4 * w))).all()
    assert counts.mean(0) == pytest.approx(4 * w, abs=0.03)


@pytest.mark.parametrize("broken", [np.nan, -np.inf])
def test_what_is_broken_is_dropped(broken):
    """And does not keep the others from being chosen among."""
    parents, _ = selection.resampled(
        jnp.array([broken, 5.0, 0.0, 0.0]), jnp.zeros(4), jnp.zeros(4), jax.random.key(0), 10.0
    )
    assert parents.tolist() == [1] * 4
    parents, log_w = selection.resampled(
        jnp.array([broken, 1.0, 1.0, 1.0]), jnp.zeros(4), jnp.zeros(4), jax.random.key(0), 1.0
    )
    assert parents.tolist() == [0, 1, 2, 3] and log_w.tolist() == [-np.inf, 1.0, 1.0, 1.0]  # 3 of 4 are effective
