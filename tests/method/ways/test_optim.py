"""The update's schedules and the restart, by arithmetic."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from referee_jax.method import objective
from referee_jax.method.ways import optim, sds
from tests.conftest import relative_l2


def test_published_schedules():
    """The figures of the paper's settings: coefficient on (e - eps) at 512 px, and the noise of a step."""
    weights = [float(sds.weight_at(sds.Hyper(), i)) * 2 / 4096 for i in (0, 40, 80, 100, 160, 1000)]
    np.testing.assert_allclose(weights, [0.391, 0.362, 0.293, 0.256, 0.195, 0.195], atol=6e-4)
    rates = np.array([float(optim.referee_rate(optim.Hyper(), i, 160)) for i in range(160)])
    np.testing.assert_allclose(rates[:10], (np.arange(10) + 1) / 10, rtol=1e-6)
    assert rates[10] == 1.0 and rates[-1] == pytest.approx(0.5, abs=1e-3)
    assert (np.diff(rates[10:]) < 0).all()
    np.testing.assert_allclose([0.2 * math.hypot(1, rates[i]) for i in (0, 9, 159)], [0.20, 0.28, 0.22], atol=5e-3)


def test_referee_weight_and_phase():
    hyper = objective.Hyper(weight=2.0, weight_final=30.0, start=10, stop=110)
    assert [float(hyper.weight_at(i)) for i in (0, 10, 60, 110, 500)] == pytest.approx([2, 2, 16, 30, 30])
    assert [bool(hyper.is_active(i)) for i in (9, 10, 109, 110)] == [False, True, True, False]


@pytest.mark.parametrize("alias", [False, True])
@pytest.mark.parametrize(("stop", "expected"), [(2, []), (3, [3]), (4, [3]), (5, [3, 5]), (6, [3, 5]), (7, [3, 5, 7])])
def test_restart(alias, stop, expected):
    """Averages and restarts of a scalar walk, written out; `start` and `stop` are both included."""
    decay, start, every = 0.8, 3, 2
    moves = [1.0, -2.0, 0.5, 3.0, 1.5, -1.0, 2.0, 4.0]
    optimizer = optim.ema_restart(optax.identity(), decay=decay, start=start, every=every, stop=stop, alias=alias)
    z, average, shared = 5.0, None, False
    params = jnp.float32(5.0)
    state, update, restarts = optimizer.init(params), jax.jit(optimizer.update), []
    for i, move in enumerate(moves):
        z += move
        if alias and shared:
            average += 0.25 * move
        average = z if average is None else decay * average + (1 - decay) * z
        k = i + 1
        shared = k >= start and (k - start) % every == 0 and k <= stop
        if shared:
            z = average
            restarts.append(k)
        updates, state = update(jnp.float32(move), state, params, step=jnp.int32(i), moved=jnp.float32(0.25 * move))
        params = optax.apply_updates(params, updates)
        assert float(params) == pytest.approx(z, rel=1e-5)
        assert float(optax.tree.get(state, "average")) == pytest.approx(average, rel=1e-5)
    assert restarts == expected


def test_paper_restarts():
    """Defaults give restarts after 40 and 100 iterations, no more: the referees stop at 150."""
    optimizer = optim.build(optim.Hyper(noise=0.0, tail_noise=0.0), stop=150)
    params = jnp.float32(1.0)

    def step(carry, i):
        params, state = carry
        updates, state = optimizer.update(
            jnp.float32(-1.0), state, params, step=i, noise=jnp.float32(0), moved=jnp.float32(0)
        )
        return (optax.apply_updates(params, updates), state), updates

    updates = np.asarray(jax.lax.scan(step, (params, optimizer.init(params)), jnp.arange(160))[1])
    assert list(np.flatnonzero(np.abs(updates - 1) > 1e-4) + 1) == [40, 100]


def test_balance():
    prior, referee = jnp.array([3.0, 4.0]), jnp.array([0.0, 2.0])
    assert float(objective.balance(prior, referee, 0.0)) == 2.5
    assert float(objective.balance(prior, referee, 3.0)) == 1.0
    assert float(objective.balance(jnp.zeros(2), referee, 0.0)) == 1.0
    assert float(objective.balance(prior, jnp.zeros(2), 1e-8)) == pytest.approx(5e8)
    assert float(objective.balance(prior, jnp.zeros(2), 0.0)) == 1.0  # a referee that is content: nothing to scale


@pytest.mark.parametrize("how", ["hard", "straight_through"])
def test_clamp(how):
    x, g = jnp.array([-0.5, -0.5, 0.0, 0.3, 1.0, 1.5, 1.5]), jnp.array([1.0, -1.0, 1.0, 1.0, 1.0, 1.0, -1.0])
    y, pullback = jax.vjp(lambda x: objective.clamp(x, how), x)
    np.testing.assert_array_equal(y, np.clip(x, 0, 1))
    # A descent step moves against g: from below 0 back inside for g < 0, from above 1 for g > 0.
    outside = [0, -1, 1, 0] if how == "straight_through" else [0, 0, 0, 0]
    np.testing.assert_array_equal(pullback(g)[0], [outside[0], outside[1], 1, 1, 1, outside[2], outside[3]])


def test_optimizers_differ():
    gradient = jnp.array([1.0, -4.0])
    made = {}
    for name in optim.OPTIMIZERS:
        optimizer = optim.build(optim.Hyper(lr=0.5), stop=0, name=name)
        state = optimizer.init(jnp.zeros(2))
        made[name], _ = optimizer.update(gradient, state, jnp.zeros(2), step=jnp.int32(0), noise=jnp.zeros(2))
    assert relative_l2(made["sgd"], [-0.5, 2.0]) < 1e-6
    assert relative_l2(made["adam"], [-0.5, 0.5]) < 1e-4
