"""Deterministic DDIM sampling (Song et al. 2021, arXiv 2010.02502) of one latent: the baseline, and an optional start.

    for t in timesteps(1000, steps):
        z = step(prior, z, t, 1000 // steps, ...)

The loop is the caller's: within one, XLA:CPU works at less than half its speed.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax.method.ways import sds


def timesteps(total: int, steps: int) -> Iterator[int]:
    """`steps` evenly spaced ones of `total`, the noisiest first.

    diffusers' "leading" spacing with steps_offset 1, the published Stable Diffusion configs' choice.
    """
    return (min(n * (total // steps) + 1, total - 1) for n in reversed(range(steps)))


def trailing(first: int, steps: int) -> tuple[int, ...]:
    """`steps` evenly spaced ones, from `first` on: diffusers' "trailing" spacing, of generators of few steps."""
    return tuple(round((first + 1) * (1 - n / steps)) - 1 for n in range(steps))


def generate(
    prior: sds.Prior, noisy: Array, levels: Sequence[int], *, cond: Array, uncond: Array | None, guidance: Array
) -> Array:
    """The clean latent that the prior makes of a noisy one `[h, w, C]` at static timesteps, the noisiest first.

    Differentiable; each step is recomputed in the backward pass. Arguments as of `step`.
    """

    @jax.checkpoint
    def one(x: Array, abar: Array, after: Array, t: Array) -> tuple[Array, Array]:
        eps = sds.predict_noise(prior, x, t, cond, uncond, guidance=guidance)
        clean = (x - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
        return jnp.sqrt(after) * clean + jnp.sqrt(1 - after) * eps, clean

    x = clean = noisy
    for t, following in zip(levels, (*levels[1:], levels[-1]), strict=True):
        x, clean = one(x, prior.alphas_cumprod[t], prior.alphas_cumprod[following], jnp.int32(t))
    return clean


def step(
    prior: sds.Prior, z: Array, t: Array, stride: Array, *, cond: Array, uncond: Array | None, guidance: Array
) -> Array:
    """Equation (12) with eta = 0: a latent from timestep `t` to `t - stride`.

    Args:
        prior: the diffusion model.
        z: `[h, w, C]`, scaled.
        t: the timestep, int32.
        stride: how many timesteps to go, int32.
        cond: text states `[T, D]` of the prompt.
        uncond: those of the empty or negative prompt, or None.
        guidance: the scale of classifier-free guidance.

    Returns:
        float32 `[h, w, C]`.
    """
    abar = prior.alphas_cumprod[t]
    before = prior.alphas_cumprod[jnp.maximum(t - stride, 0)]
    eps = sds.predict_noise(prior, z, t, cond, uncond, guidance=guidance)
    clean = (z - jnp.sqrt(1 - abar) * eps) / jnp.sqrt(abar)
    return jnp.sqrt(before) * clean + jnp.sqrt(1 - before) * eps
