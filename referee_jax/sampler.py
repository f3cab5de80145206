"""Deterministic DDIM sampling (Song et al. 2021, arXiv 2010.02502) of one latent: the baseline, and an optional start."""

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax import sds
from referee_jax.models import unet as unet_lib


def ddim(
    unet: unet_lib.UNet,
    noise: Array,
    *,
    cond: Array,
    uncond: Array | None,
    alphas_cumprod: Array,
    prediction_type: str,
    guidance: Array,
    steps: int = 50,
) -> Array:
    """Noise `[h, w, C]` to scaled latents by equation (12) with eta = 0, at `steps` evenly spaced timesteps.

    `cond`, `uncond` are text states `[T, D]` of the prompt and of the empty (or negative) prompt.
    """
    total = len(alphas_cumprod)
    stride = total // steps
    # diffusers' "leading" spacing with steps_offset 1, the published Stable Diffusion configs' choice.
    timesteps = jnp.minimum(jnp.arange(steps)[::-1] * stride + 1, total - 1)

    def body(z: Array, t: Array) -> tuple[Array, None]:
        abar = alphas_cumprod[t]
        before = jnp.where(t >= stride, alphas_cumprod[jnp.maximum(t - stride, 0)], alphas_cumprod[0])
        eps = sds.predict_noise(unet, z, t, cond, uncond, guidance=guidance, abar=abar, prediction_type=prediction_type)
        clean = (z - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
        return jnp.sqrt(before) * clean + jnp.sqrt(1 - before) * eps, None

    return jax.lax.scan(body, noise, timesteps)[0]
