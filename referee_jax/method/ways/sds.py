"""Score distillation (Poole et al. 2022, arXiv 2209.14988) with classifier-free guidance, for one latent.

With alpha_t, sigma_t of prior.py and noise eps:

    z_t  = alpha_t z + sigma_t eps                                  (1)
    e    = e_uncond + guidance (e_text - e_uncond)                  (2)
    grad = weight(i) w_t (e - eps) / (h w),  w_t = 2 alpha_t^a sigma_t^b    (3)

Of a rectified flow e is the predicted v, and eps - z stands for eps in (3). The factor 2, the division by the number of
latent pixels h w and the schedule weight(i) are those of "Referee Can Play" (arXiv 2402.16305). No gradient passes through
the network: (3) is the closed form.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from referee_jax.method import schedules
from referee_jax.method.ways.prior import Prior, residual
from referee_jax.models.diffusion.text import Text


class Hyper(struct.PyTreeNode):
    """Numbers of the term, all traced. `weight` and `t_max` go along a cosine to their finals in `weight_steps` iterations.

    Timesteps, of 0..999, are drawn from `t_min` to `t_max - 2`, both included: the authors' range, kept. They keep it to
    the end; a `t_max` that falls draws the outlines first and then the details (DreamTime, arXiv 2306.12422).
    """

    weight: Array | float = 800.0
    weight_final: Array | float = 400.0
    weight_steps: Array | int = 160
    guidance: Array | float = 30.0
    t_min: Array | int = 50
    t_max: Array | int = 950
    t_max_final: Array | int = 950
    alpha_power: Array | float = 0.0
    sigma_power: Array | float = 0.0


def weight_at(hyper: Hyper, i: Array) -> Array:
    """weight(i) of (3) at iteration `i`."""
    return schedules.cosine(hyper.weight, hyper.weight_final, i / hyper.weight_steps)


def sample_timestep(key: Array, hyper: Hyper, i: Array, timesteps: int) -> Array:
    """The timestep of iteration `i`, int32."""
    t_max = jnp.round(schedules.cosine(hyper.t_max, hyper.t_max_final, i / hyper.weight_steps)).astype(jnp.int32)
    return jax.random.randint(key, (), hyper.t_min, jnp.minimum(t_max, timesteps) - 1)


def gradient(
    prior: Prior,
    latents: Array,
    *,
    t: Array,
    eps: Array,
    cond: Text,
    uncond: Text | None,
    hyper: Hyper,
    i: Array,
) -> Array:
    """(3) for one latent.

    Args:
        prior: the diffusion model.
        latents: `[h, w, C]`, scaled.
        t: the timestep, int32.
        eps: the noise, as `latents`.
        cond: the prompt's text.
        uncond: as of `prior.predict`.
        hyper: the numbers of the term.
        i: the iteration, int32.

    Returns:
        float32 `[h, w, C]`.
    """
    alpha, sigma = prior.levels(t)
    found = residual(prior, latents, eps, t, cond=cond, uncond=uncond, guidance=hyper.guidance)
    scale = weight_at(hyper, i) * 2 * alpha**hyper.alpha_power * sigma**hyper.sigma_power
    return scale * found / (latents.shape[0] * latents.shape[1])
