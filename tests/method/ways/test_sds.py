"""Score distillation by arithmetic: its gradient with a U-Net of one number a side, and how its numbers change over a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from referee_jax.method.ways import prior as prior_lib
from referee_jax.method.ways import sds
from referee_jax.method.ways.prior import Prior
from referee_jax.models.diffusion.text import Text


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


ALPHAS_CUMPROD = jnp.linspace(0.99, 0.01, 100)


def unet(noisy, t, states, pooled=None):
    """A network whose prediction differs by side of the guidance, by latent and by timestep: `[b, h, w, C]`."""
    return noisy * states.mean((1, 2))[:, None, None, None] + 0.01 * t[:, None, None, None]


def drawn(seed):
    return np.random.default_rng(seed).normal(size=(2, 3, 4)).astype(np.float32)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("guided", [True, False])
def test_gradient(prediction_type, guided):
    """Equations (1) to (3) written out in float64: signs, the side that guidance starts from, and each factor."""
    latents, eps, t, i = drawn(0), drawn(1), 70, 30
    cond, uncond = (Text(np.full((5, 2), x, np.float32)) for x in (0.7, -0.4))
    hyper = sds.Hyper(weight=8.0, weight_final=2.0, weight_steps=120, guidance=3.0, alpha_power=1.0, sigma_power=0.5)
    prior = Prior(unet, ALPHAS_CUMPROD, prediction_type)
    gradient = sds.gradient(
        prior,
        latents,
        t=jnp.int32(t),
        eps=eps,
        cond=cond,
        uncond=uncond if guided else None,
        hyper=hyper,
        i=jnp.int32(i),
    )

    alpha, sigma = np.sqrt(float(ALPHAS_CUMPROD[t])), np.sqrt(1 - float(ALPHAS_CUMPROD[t]))
    noisy = alpha * latents.astype(np.float64) + sigma * eps
    sides = [noisy * states + 0.01 * t for states in ((-0.4, 0.7) if guided else (0.7,))]
    if prediction_type == "v_prediction":  # v = alpha eps - sigma z: the noise is alpha v + sigma z_t
        sides = [alpha * side + sigma * noisy for side in sides]
    predicted = sides[0] + 3.0 * (sides[-1] - sides[0])
    weight = 2.0 + (8.0 - 2.0) * (1 + np.cos(np.pi * 30 / 120)) / 2
    np.testing.assert_allclose(gradient, weight * 2 * alpha * sigma**0.5 * (predicted - eps) / 6, rtol=2e-5, atol=1e-6)


def test_what_is_predicted_makes_the_noise_of_a_known_latent():
    """The exact v of a latent and its noise gives that noise back."""
    latents, eps, t = drawn(2), drawn(3), jnp.int32(40)
    alpha, sigma = jnp.sqrt(ALPHAS_CUMPROD[t]), jnp.sqrt(1 - ALPHAS_CUMPROD[t])
    exact = {"epsilon": eps, "v_prediction": alpha * eps - sigma * latents}
    for prediction_type, prediction in exact.items():
        prior = Prior(lambda noisy, t, states, pooled, x=prediction: x[None], ALPHAS_CUMPROD, prediction_type)
        text = {"cond": Text(jnp.zeros((1, 1))), "uncond": None, "guidance": 7.0}
        clean, noise = prior_lib.estimates(prior, alpha * latents + sigma * eps, t, **text)
        np.testing.assert_allclose(clean, latents, atol=1e-5)
        np.testing.assert_allclose(noise, eps, atol=1e-5)
