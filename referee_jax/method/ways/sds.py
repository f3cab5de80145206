"""Score distillation (Poole et al. 2022, arXiv 2209.14988) with classifier-free guidance, for one latent.

With the noise schedule abar_t, alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t) and noise eps:

    z_t  = alpha_t z + sigma_t eps                                  (1)
    e    = e_uncond + guidance (e_text - e_uncond)                  (2)
    grad = weight(i) w_t (e - eps) / (h w),  w_t = 2 alpha_t^a sigma_t^b    (3)

The factor 2, the division by the number of latent pixels h w and the schedule weight(i) are those of "Referee Can Play"
(arXiv 2402.16305). No gradient passes through the U-Net: (3) is the closed form.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from referee_jax.method import schedules
from referee_jax.models.diffusion import unet as unet_lib


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


class Prior(struct.PyTreeNode):
    """The diffusion model: its U-Net, abar_t as float32 `[timesteps]`, and what the U-Net predicts.

    `prediction_type` is "epsilon" (the noise) or "v_prediction" (alpha_t eps - sigma_t z).
    """

    unet: unet_lib.UNet
    alphas_cumprod: Array
    prediction_type: str = struct.field(pytree_node=False, default="epsilon")


def weight_at(hyper: Hyper, i: Array) -> Array:
    """weight(i) of (3) at iteration `i`."""
    return schedules.cosine(hyper.weight, hyper.weight_final, i / hyper.weight_steps)


def sample_timestep(key: Array, hyper: Hyper, i: Array, timesteps: int) -> Array:
    """The timestep of iteration `i`, int32."""
    t_max = jnp.round(schedules.cosine(hyper.t_max, hyper.t_max_final, i / hyper.weight_steps)).astype(jnp.int32)
    return jax.random.randint(key, (), hyper.t_min, jnp.minimum(t_max, timesteps) - 1)


def predict_noise(prior: Prior, noisy: Array, t: Array, cond: Array, uncond: Array | None, *, guidance: Array) -> Array:
    """(2): the guided noise of one noisy latent.

    Args:
        prior: the diffusion model.
        noisy: `[h, w, C]`, the latent z_t.
        t: the timestep, int32.
        cond: text states `[T, D]` of the prompt.
        uncond: those of the empty or negative prompt. If None there is no guidance, and one pass
            through the U-Net instead of two.
        guidance: the scale of (2).

    Returns:
        float32 `[h, w, C]`.
    """
    states = cond[None] if uncond is None else jnp.stack([uncond, cond])
    noisy_batch = jnp.broadcast_to(noisy, (len(states), *noisy.shape))
    out = prior.unet(noisy_batch, jnp.broadcast_to(t, (len(states),)), states)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    guided = out[0] if uncond is None else out[0] + guidance * (out[1] - out[0])
    if prior.prediction_type == "v_prediction":  # affine in the output, so it may follow the guidance
        abar = prior.alphas_cumprod[t]
        return jnp.sqrt(abar) * guided + jnp.sqrt(1 - abar) * noisy
    return guided


def gradient(
    prior: Prior,
    latents: Array,
    *,
    t: Array,
    eps: Array,
    cond: Array,
    uncond: Array | None,
    hyper: Hyper,
    i: Array,
) -> Array:
    """(3) for one latent.

    Args:
        prior: the diffusion model.
        latents: `[h, w, C]`, scaled.
        t: the timestep, int32.
        eps: the noise, as `latents`.
        cond: text states `[T, D]` of the prompt.
        uncond: as of `predict_noise`.
        hyper: the numbers of the term.
        i: the iteration, int32.

    Returns:
        float32 `[h, w, C]`.
    """
    abar = prior.alphas_cumprod[t]
    noisy = jnp.sqrt(abar) * latents + jnp.sqrt(1 - abar) * eps
    predicted = predict_noise(prior, noisy, t, cond, uncond, guidance=hyper.guidance)
    scale = weight_at(hyper, i) * 2 * abar ** (hyper.alpha_power / 2) * (1 - abar) ** (hyper.sigma_power / 2)
    return scale * (predicted - eps) / (latents.shape[0] * latents.shape[1])
