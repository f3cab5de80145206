"""DDIM against diffusers' scheduler, with the U-Net replaced by a function that both sides can compute."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method.ways import ddim
from referee_jax.method.ways.prior import Prior
from referee_jax.models.diffusion.text import Text
from referee_jax.weights import config_json
from tests.conftest import relative_l2
from tests.lazy import diffusers, torch


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [10, 50])
def test_ddim(prediction_type, steps):
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading", prediction_type=prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(steps)
    start = np.random.default_rng(0).normal(size=(4, 4, 4)).astype(np.float32)
    # Text states stand for a bias: what is said moves the prediction.
    cond, uncond, guidance = np.float32(0.3), np.float32(-0.1), 3.0

    def predict(xp, z, t, text):
        return xp.sin(2 * z) * (0.5 + t / 2000) + text

    z = torch.from_numpy(start)
    for t in scheduler.timesteps:
        low, high = (predict(torch, z, float(t), text) for text in (uncond, cond))
        z = scheduler.step(low + guidance * (high - low), t, z).prev_sample

    def unet(latents, timesteps, states, pooled=None):
        shape = (-1, 1, 1, 1)
        return predict(jnp, latents, timesteps.astype(jnp.float32).reshape(shape), states.reshape(shape))

    timesteps = config_json.schedule(json.loads(scheduler.to_json_string()), where="").timesteps(steps)
    assert timesteps == [*scheduler.timesteps.tolist(), 0]

    @jax.jit
    def step(z, t, after, uncond):
        prior = Prior(unet, jnp.asarray(scheduler.alphas_cumprod.numpy()), prediction_type)
        states = {"cond": Text(jnp.full((1, 1), cond)), "uncond": uncond}
        return ddim.step(prior, z, t, after, **states, guidance=jnp.float32(guidance))

    ours = unguided = jnp.asarray(start)
    for t, after in itertools.pairwise(timesteps):
        ours, unguided = step(ours, t, after, Text(jnp.full((1, 1), uncond))), step(unguided, t, after, None)
    assert relative_l2(ours, z.numpy()) < 1e-4
    assert relative_l2(z.numpy(), start) > 0.1
    assert relative_l2(unguided, ours) > 1e-2
