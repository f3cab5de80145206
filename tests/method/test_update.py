"""What an iteration does with given gradients and losses: the best latents, the phase of the referees, what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method import inversion, objective
from referee_jax.method import state as state_lib
from referee_jax.method.ways import optim

SHAPE = (2, 2, 1)
PLAN = state_lib.Plan(latent=SHAPE, views=())
HYPER = state_lib.Hyperparameters(
    referee=objective.Hyper(weight=2.0, weight_final=2.0, start=1, stop=4, balance_epsilon=0.0),
    update=optim.Hyper(lr=0.5, lr_final=0.5, warmup=0, noise=0.1, tail_noise=0.01, ema_start=100),
)
update = jax.jit(inversion.update)


def noise(value):
    zero, drawn = jnp.zeros(SHAPE), jnp.full(SHAPE, value)
    return state_lib.Noise(t=jnp.int32(0), eps=zero, n1=drawn, n2=2 * drawn, views=(), referee=())


def gradients(state, loss, prior=3.0, referee=4.0):
    both = jnp.full(SHAPE, prior), jnp.full(SHAPE, referee)
    return state_lib.Gradients(*both, {"loss": jnp.float32(loss)}, state.latents, state.carry)


def test_latents_with_the_lowest_loss_are_kept():
    """As they were before the update that followed their loss; the first of equal ones."""
    state, before = inversion.init(None, jnp.zeros(SHAPE), PLAN, HYPER), []
    for i, loss in enumerate((np.nan, 3.0, 1.0, 1.0, 2.0)):
        before.append(np.asarray(state.latents))
        if i:  # the referees begin at 1
            state, _ = update(HYPER, PLAN, state, jnp.int32(i), noise(0.0), gradients(state, loss))
    np.testing.assert_array_equal(state.best, before[2])
    assert float(state.best_loss) == 1.0 and not state.frozen


@pytest.mark.parametrize(("i", "is_active"), [(0, False), (1, True), (3, True), (4, False)])
def test_a_step_is_the_sum_of_its_parts(i, is_active):
    """z - lr (weight r gv + noise n1) - lr gs + noise n2 with referees, z - lr gs + tail_noise n2 without."""
    state = inversion.init(None, jnp.ones(SHAPE), PLAN, HYPER)
    new, metrics = update(HYPER, PLAN, state, jnp.int32(i), noise(0.3), gradients(state, 1.0))
    ratio = 3 / 4  # of the gradients' lengths
    step = -0.5 * (2 * ratio * 4 + 0.1 * 0.3) - 0.5 * 3 + 0.1 * 0.6 if is_active else -0.5 * 3 + 0.01 * 0.6
    np.testing.assert_allclose(new.latents, 1 + step, rtol=1e-6)
    assert float(metrics["ratio"]) == pytest.approx(ratio if is_active else 0.0)


@pytest.mark.parametrize("broken", [{"loss": np.nan}, {"loss": 1.0, "prior": np.inf}, {"loss": 1.0, "referee": np.nan}])
def test_what_is_not_finite_freezes_the_latents_before_it(broken):
    state = inversion.init(None, jnp.ones(SHAPE), PLAN, HYPER)
    for values in (broken, {"loss": 1.0}):
        state, _ = update(HYPER, PLAN, state, jnp.int32(1), noise(0.0), gradients(state, **values))
        assert state.frozen
        np.testing.assert_array_equal(state.latents, np.ones(SHAPE))
