"""Deterministic DDIM sampling (Song et al. 2021, arXiv 2010.02502) of one latent: the baseline, and an optional start.

    for t, after in itertools.pairwise((*timesteps, -1)):
        z = step(prior, z, t, after, ...)

The loop is the caller's: within one, XLA:CPU works at less than half its speed. Euler's method, with which published
samplers of SDXL and of rectified flows go, takes the same steps in other words.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax.method.ways.prior import Prior, estimates
from referee_jax.models.diffusion.text import Text

END = -1  # in a timestep's place: the latent without noise


def trailing(first: int, steps: int) -> tuple[int, ...]:
    """`steps` evenly spaced timesteps, from `first` on: diffusers' "trailing" spacing, of generators of few steps."""
    return tuple(round((first + 1) * (1 - n / steps)) - 1 for n in range(steps))


def generate(
    prior: Prior, noisy: Array, timesteps: Sequence[float], *, cond: Text, uncond: Text | None, guidance: Array
) -> Array:
    """The clean latent that the prior makes of a noisy one `[h, w, C]` at static timesteps, the noisiest first.

    Differentiable; each step is recomputed in the backward pass. Arguments as of `step`.
    """

    @jax.checkpoint
    def one(x: Array, t: Array, after: Array) -> Array:
        return step(prior, x, t, after, cond=cond, uncond=uncond, guidance=guidance)

    x = noisy
    for t, after in zip(timesteps, (*timesteps[1:], END), strict=True):
        x = one(x, jnp.asarray(t), jnp.asarray(after, jnp.asarray(t).dtype))
    return x


def step(prior: Prior, z: Array, t: Array, after: Array, *, cond: Text, uncond: Text | None, guidance: Array) -> Array:
    """Equation (12) with eta = 0: a latent from timestep `t` to another.

    Args:
        prior: the diffusion model.
        z: `[h, w, C]`, scaled.
        t: the timestep.
        after: the next one, or END.
        cond: the prompt's text.
        uncond: that of the empty or negative prompt, or None.
        guidance: the scale of classifier-free guidance.

    Returns:
        float32 `[h, w, C]`.
    """
    clean, noise = estimates(prior, z, t, cond=cond, uncond=uncond, guidance=guidance)
    alpha, sigma = prior.levels(after)
    return alpha * clean + sigma * noise
