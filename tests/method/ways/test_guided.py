"""Guided DDIM in the space of clean latents: without a pull it is DDIM, and its noise has the forward process' variances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method.ways import guided
from referee_jax.method.ways.prior import Prior
from referee_jax.models.diffusion.text import Text

ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def unet(latents, timesteps, states, pooled=None):
    """Anything that is not linear."""
    t = timesteps.reshape(-1, 1, 1, 1).astype(latents.dtype) / 1000
    return jnp.sin(2 * latents + 3 * t) * (0.5 + t) + states.reshape(-1, 1, 1, 1) * jnp.tanh(jnp.roll(latents, 1, 1))


def ddim(x, levels, text):
    """Equation (12) of the paper with eta = 0, in float64, to the clean latent at the last level."""
    for n, t in enumerate(levels):
        e = np.asarray(unet(x[None], jnp.asarray([float(t)]), jnp.asarray([[text]])))[0]
        clean = (x - np.sqrt(1 - ABAR[t]) * e) / np.sqrt(ABAR[t])
        if n + 1 < len(levels):
            after = ABAR[levels[n + 1]]
            x = np.sqrt(after) * clean + np.sqrt(1 - after) * e
    return clean


@pytest.mark.parametrize(("dtype", "bound"), [("float64", 1e-12), ("float32", 1e-5)])
def test_without_a_pull_it_is_ddim(dtype, bound):
    noise, text = np.random.default_rng(0).standard_normal((4, 4, 4)), 0.3
    levels = guided.levels(40, 980, 20)
    with jax.enable_x64(True):
        prior = Prior(unet, jnp.asarray(ABAR, dtype))
        states = {"cond": Text(jnp.full((1, 1), text, dtype)), "uncond": None}
        move = jax.jit(lambda z, k, t: guided.prior_move(prior, z, k, t, **states, guidance=1.0))
        z, k = guided.begin(jnp.asarray(noise, dtype), prior, levels[0])
        for t in levels:
            moved, k = move(z, k, t)
            z = z - moved
        wanted = ddim(noise, levels, text)
        assert z.dtype == dtype
    assert np.linalg.norm(z - wanted) / np.linalg.norm(wanted) < bound


def shares(before, t, eta):
    """How much of the old noise is kept, and how much is new."""
    prior = Prior(unet, jnp.asarray(ABAR, jnp.float32))
    of = lambda k, xi: float(guided.renoised(jnp.float32(k), prior, before, t, eta, jnp.float32(xi)))
    return of(1, 0), of(0, 1)


def test_known_answers():
    assert shares(500, 450, 1.0)[1] == pytest.approx(0.53062, abs=2e-5)
    assert shares(100, 60, 1.0)[1] == pytest.approx(0.68465, abs=2e-5)
    assert shares(400, 480, 0.0)[0] == pytest.approx(0.76898, abs=2e-5)
    for before, t, eta in ((500, 450, 1.0), (500, 450, 0.4), (400, 480, 0.0)):
        keep, new = shares(before, t, eta)
        assert keep**2 + new**2 == pytest.approx(1, abs=1e-5)
    assert shares(500, 450, 0.0) == (1.0, 0.0) and shares(500, 500, 1.0) == (1.0, 0.0)
    assert guided.begin(np.ones(1), Prior(unet, jnp.asarray(ABAR)), 999)[1][0] == pytest.approx(1 / 0.997667, abs=1e-5)


def test_levels():
    plain = guided.levels(40, 980, 20)
    assert (plain[0], plain[-1], len(plain)) == (980, 20, 40) and (np.diff(plain) < 0).all()
    travelled = guided.levels(40, 980, 20, travels=1, back=3, low=200, high=800)
    assert (travelled[0], travelled[-1], len(travelled)) == (980, 20, 40)
    up = np.flatnonzero(np.diff(travelled) > 0)
    assert 3 <= len(up) and all(200 <= travelled[n] <= travelled[n + 1] <= 800 for n in up)
    with pytest.raises(ValueError, match="3 iterations are too few"):
        guided.levels(3, 980, 20, travels=5, back=1, low=0, high=1000)
