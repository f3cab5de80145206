"""DDIM in the space of clean latents, pulled by the referees: "from noise" without the sampler's loss of accuracy.

Between two iterations there is a clean latent z and the noise k that the prior has found in it. At timestep t, with
alpha_t and sigma_t of prior.py:

    x = alpha_t z + sigma_t k
    e = guided noise prediction at (x, t)
    z <- z - (sigma_t / alpha_t) (e - k),  k <- e                                        (1)
    z <- z - beta r grad L(z)          in the window of timesteps, r of objective.balance    (2)

Without (2) this is DDIM (Song et al. 2021, arXiv 2010.02502), exactly. (2) is a step along the gradient of the predicted
clean latent, as in MPGD (arXiv 2311.16424), whose length is beta times the prior's own step. Before (1) k changes where
it has to:

    one level down, stochastic:  k <- sqrt(1 - c^2) k + c xi,
                                 c = eta sqrt(1 - (alpha_t sigma_t' / (alpha_t' sigma_t))^2)   (3)
    back up (time travel):       k <- a k + sqrt(1 - a^2) xi,  a = alpha_t+ sigma_t / (alpha_t sigma_t+)         (4)

(4) is the forward process from t to t+ (FreeDoM, arXiv 2303.09833) with z as it is.
"""

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax.method.ways.prior import Prior, residual
from referee_jax.models.diffusion.text import Text


class Hyper(struct.PyTreeNode):
    """Numbers, all traced.

    Attributes:
        guidance: of the noise prediction.
        eta: of (3); 0 is deterministic, 1 ancestral sampling.
    """

    guidance: Array | float = 7.5
    eta: Array | float = 0.0


def levels(
    steps: int, first: int, last: int, travels: int = 0, back: int = 1, low: int = 0, high: int = 1000
) -> np.ndarray:
    """The timestep of each of `steps` iterations, int32 `[steps]`, evenly from `first` down to `last`.

    With `travels`, each stretch of `back` levels within the window `low..high` is gone through so many times more.
    """
    lengths = range(steps, 1, -1)
    for count in lengths:  # the finest grid whose way has as many iterations
        grid = np.round(np.linspace(first, last, count)).astype(np.int32)
        way, n, travelled = [], 0, False
        while n < count:
            stretch = grid[n : n + back]
            inside = len(stretch) == back and low <= stretch.min() and stretch.max() <= high and n > 0
            way += list(stretch) * (1 + travels * inside)
            travelled |= inside
            n += len(stretch)
        if len(way) <= steps and (travelled or not travels):
            return np.array(way + [last] * (steps - len(way)), np.int32)
    raise ValueError(f"{steps} iterations are too few for {travels} travels between {low} and {high}")


def begin(noise: Array, prior: Prior, first: Array) -> tuple[Array, Array]:
    """z and k before the first iteration, at which x is the noise."""
    return jnp.zeros_like(noise), noise / prior.levels(first)[1]


def renoised(k: Array, prior: Prior, before: Array, t: Array, eta: Array, xi: Array) -> Array:
    """(3) or (4): the noise on the way from timestep `before` to `t`; as it is where they are equal."""
    (old_alpha, old_sigma), (alpha, sigma) = prior.levels(before), prior.levels(t)
    ratio = old_alpha * sigma / (alpha * old_sigma)
    down = eta * jnp.sqrt(jnp.maximum(1 - jnp.square(ratio), 0))
    share = jnp.where(t > before, 1 / ratio, jnp.sqrt(jnp.maximum(1 - jnp.square(down), 0)))
    share = jnp.where(t == before, 1.0, share)
    return share * k + jnp.sqrt(jnp.maximum(1 - jnp.square(share), 0)) * xi


def prior_move(
    prior: Prior, z: Array, k: Array, t: Array, *, cond: Text, uncond: Text | None, guidance: Array
) -> tuple[Array, Array]:
    """(1): how far the clean latent moves, and the noise that the prior finds. Of a flow they are of its own estimates."""
    alpha, sigma = prior.levels(t)
    found = residual(prior, z, k, t, cond=cond, uncond=uncond, guidance=guidance)
    if prior.is_flow:
        return sigma * found, k + alpha * found
    return sigma / alpha * found, k + found
