"""Rectified flows: the same ways in other words, against diffusers' scheduler and by arithmetic."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method.ways import ddim, guided, sds
from referee_jax.method.ways import prior as prior_lib
from referee_jax.method.ways.prior import Prior
from referee_jax.models.diffusion.text import Text
from referee_jax.weights import config_json
from tests.conftest import relative_l2
from tests.lazy import diffusers, torch

TEXT = {"cond": Text(jnp.full((1, 1), 0.3)), "uncond": None, "guidance": 1.0}


def network(latents, timesteps, states, pooled=None):
    """Anything that is not linear; timesteps are 1000 times the share of noise."""
    t = timesteps.reshape(-1, 1, 1, 1).astype(latents.dtype) / 1000
    return jnp.sin(2 * latents + 3 * t) * (0.5 + t) + states.reshape(-1, 1, 1, 1)


def noise(seed=0):
    return np.random.default_rng(seed).standard_normal((4, 4, 4)).astype(np.float32)


def sampled(timesteps, prior=None):
    prior = prior or Prior(network, None, "flow")
    x = jnp.asarray(noise())
    step = jax.jit(lambda x, t, after: ddim.step(prior, x, t, after, **TEXT))
    for t, after in itertools.pairwise(timesteps):
        x = step(x, jnp.float32(t), jnp.float32(after))
    return x


@pytest.mark.parametrize(("shift", "steps", "last_is_step"), [(3.0, 28, False), (1.0, 4, True), (1.0, 1, True)])
def test_the_published_sampler(shift, steps, last_is_step):
    """Timesteps and latents of SD3's and of FLUX.1-schnell's sampler; the first's end is shifted twice."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    if last_is_step:
        theirs.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        theirs.set_timesteps(steps)
        assert theirs.sigmas[[1, 2, -3, -2]].numpy() == pytest.approx([0.98738, 0.97411, 0.11091, 0.00893], abs=1e-5)
    values = json.loads(theirs.to_json_string()) | ({"last_is_step": True} if last_is_step else {})
    timesteps = config_json.schedule(values, where="").timesteps(steps)
    np.testing.assert_allclose(timesteps[:-1], theirs.timesteps.numpy(), rtol=1e-6)
    assert timesteps[-1] == -1
    x = torch.from_numpy(noise())
    for t in theirs.timesteps:
        v = torch.sin(2 * x + 3 * t / 1000) * (0.5 + t / 1000) + 0.3
        x = theirs.step(v, t, x).prev_sample
    assert relative_l2(sampled(timesteps), x.numpy()) < 1e-5


def test_one_step_is_noise_less_velocity():
    made = ddim.generate(Prior(network, None, "flow"), jnp.asarray(noise()), (1000.0,), **TEXT)
    wanted = noise() - network(noise()[None], np.array([1000.0]), np.array([[0.3]]))[0]
    np.testing.assert_allclose(made, wanted, atol=1e-5)


def test_without_a_pull_guided_is_the_sampler():
    prior, levels = Prior(network, None, "flow", shift=3.0), guided.levels(20, 999, 20)
    times = [prior.time(jnp.int32(t)) for t in levels]
    z, k = guided.begin(jnp.asarray(noise()), prior, times[0])
    assert relative_l2(prior.levels(times[0])[1] * k, noise()) < 1e-6
    for t in times:
        moved, k = guided.prior_move(prior, z, k, t, **TEXT)
        z = z - moved
    wanted = sampled([*map(float, times), -1.0], prior)
    assert relative_l2(z, wanted) < 1e-5


def test_noise_keeps_its_variance():
    prior = Prior(network, None, "flow")
    of = lambda k, xi, t, after, eta: float(guided.renoised(jnp.float32(k), prior, t, after, eta, jnp.float32(xi)))
    for t, after, eta in ((500.0, 450.0, 1.0), (1000.0, 900.0, 0.5), (400.0, 480.0, 0.0)):
        keep, new = of(1, 0, t, after, eta), of(0, 1, t, after, eta)
        assert keep**2 + new**2 == pytest.approx(1, abs=1e-5)
    # The posterior's, by hand: .5 x .45 / (.55 x .5) = .81818, sqrt(1 - .81818^2) = .57496; and up: .52 / .6 x .4 / .48.
    assert of(0, 1, 500.0, 450.0, 1.0) == pytest.approx(0.57496, abs=1e-4)
    assert of(1, 0, 100.0, 50.0, 1.0) == pytest.approx(0.9 * 0.05 / (0.95 * 0.1), abs=1e-4)
    assert of(1, 0, 400.0, 480.0, 0.0) == pytest.approx(0.72222, abs=1e-4)


def test_score_distillation_is_of_velocities():
    prior, hyper = Prior(network, None, "flow"), sds.Hyper(weight=2.0, weight_final=2.0, guidance=1.0, sigma_power=1.0)
    z, n, t = noise(1), noise(2), 600.0
    found = sds.gradient(prior, z, t=jnp.float32(t), eps=n, cond=TEXT["cond"], uncond=None, hyper=hyper, i=jnp.int32(0))
    v = network((0.4 * z + 0.6 * n)[None], np.array([t]), np.array([[0.3]]))[0]
    np.testing.assert_allclose(found, 2 * 2 * 0.6 * (v - (n - z)) / 16, atol=1e-5)


def test_estimates_of_the_exact_velocity():
    z, n = noise(1), noise(2)
    prior = Prior(lambda x, t, states, pooled: jnp.asarray(n - z)[None], None, "flow")
    clean, found = prior_lib.estimates(prior, 0.3 * z + 0.7 * n, jnp.float32(700), **TEXT)
    np.testing.assert_allclose(clean, z, atol=1e-5)
    np.testing.assert_allclose(found, n, atol=1e-5)
