"""Deterministic DDIM sampling (Song et al. 2021, arXiv 2010.02502) of one latent: the baseline, and an optional start.

    for t in timesteps(1000, steps):
        z = step(unet, z, t, 1000 // steps, ...)

The loop is the caller's: within one, XLA:CPU works at less than half its speed.
"""

from collections.abc import Iterator

import jax.numpy as jnp
from jax import Array

from referee_jax.method import sds
from referee_jax.models import unet as unet_lib


def timesteps(total: int, steps: int) -> Iterator[int]:
    """`steps` evenly spaced ones of `total`, the noisiest first.

    diffusers' "leading" spacing with steps_offset 1, the published Stable Diffusion configs' choice.
    """
    return (min(n * (total // steps) + 1, total - 1) for n in reversed(range(steps)))


def step(
    unet: unet_lib.UNet,
    z: Array,
    t: Array,
    stride: Array,
    *,
    cond: Array,
    uncond: Array | None,
    alphas_cumprod: Array,
    prediction_type: str,
    guidance: Array,
) -> Array:
    """Scaled latents `[h, w, C]` from timestep `t` to `t - stride`, by equation (12) with eta = 0.

    `cond`, `uncond` are text states `[T, D]` of the prompt and of the empty (or negative) prompt.
    """
    abar = alphas_cumprod[t]
    before = alphas_cumprod[jnp.maximum(t - stride, 0)]
    eps = sds.predict_noise(unet, z, t, cond, uncond, guidance=guidance, abar=abar, prediction_type=prediction_type)
    clean = (z - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
    return jnp.sqrt(before) * clean + jnp.sqrt(1 - before) * eps
