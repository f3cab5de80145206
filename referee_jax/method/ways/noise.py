"""The starting noise n of a sampler as what is moved: the clean latent is z = G(n), the loss L(n) that of its picture.

The sampler begins with sigma_t n at its first timestep t; one step is z = (sigma_t / alpha_t) (n - e(sigma_t n, t)).

A rule, one of RULES, moves n along g = grad L(n); d is the number of elements of n, xi standard normal:

    reno      g <- clip(g + w grad K(n));  b <- m b + g;  n <- n - lr (g + m b)                (1)
    sphere    b <- m b + g / |g|;  n <- n - lr b, put back to |n| = sqrt(d)                    (2)
    gper      n <- P(Adam(n, P(clip(g))))                                                      (3)
    langevin  n <- sqrt(1 - s) n - eta s g + sqrt(s) xi + drift,  s = gamma G(-L)              (4)

(1) is ReNO (Eyring et al. 2024, arXiv 2406.04312), K(n) = |n|^2 / 2 - (d - 1) log |n| being minus the logarithm of the
density of |n|; (3) GPER (arXiv 2602.08646), P of `gaussian_like`; (4) ORIGEN (arXiv 2503.22194), whose step is larger
where the loss is, with the drift that a step which depends on the place needs (its published code has the other sign).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax import Array

from referee_jax.method.registry import Registry

BLOCK = 16  # neighbouring frequencies in gaussian_like
LEAST, MOST, SLOPE = 1 / 3, 4 / 3, 0.3  # of G in (4), as published


class Hyper(struct.PyTreeNode):
    """Numbers of the rules, all traced.

    Attributes:
        lr: of (1) to (3).
        momentum: m of (1) and (2).
        clip: the largest norm of g in (1), the largest element in (3); 0: none.
        norm_weight: w of (1).
        gamma, eta: of (4).
        guidance: of the sampler.
    """

    lr: Array | float = 5.0
    momentum: Array | float = 0.9
    clip: Array | float = 0.1
    norm_weight: Array | float = 0.01
    gamma: Array | float = 0.3
    eta: Array | float = 0.8
    guidance: Array | float = 1.0


class Rule(NamedTuple):
    """`start(n)` gives what a rule carries; `move(hyper, n, gradient, loss, carry, xi)` the next n, and that."""

    start: Any
    move: Any


def norm_gradient(n: Array) -> Array:
    """grad K(n) of (1); 0 on the sphere |n|^2 = d - 1."""
    return n * (1 - (n.size - 1) / jnp.square(n).sum())


def clipped(gradient: Array, norm: Array) -> Array:
    """The gradient, at most of this length; as it is where `norm` is 0."""
    length = jnp.linalg.norm(gradient)
    return gradient * jnp.where((norm > 0) & (length > norm), norm / jnp.where(length > 0, length, 1), 1)


def on_sphere(n: Array) -> Array:
    """`n` scaled to the length of standard normal noise, sqrt(d)."""
    return n * jnp.sqrt(n.size / jnp.square(n).sum())


def gaussian_like(v: Array) -> Array:
    """P of (3): the nearest to `v` whose spectrum has, in each block of BLOCK frequencies, the norms of Gaussian noise.

    That is sum |y| = sqrt(pi) / 2 BLOCK and sum |y|^2 = BLOCK, of the orthonormal spectrum y; so |P v|^2 is the number of
    elements, which must be a multiple of 2 BLOCK. It whitens: a smooth `v` comes out nearly as noise.
    """
    size, share = v.size, np.pi / 4
    if size % (2 * BLOCK):
        raise ValueError(f"{size} elements are not a multiple of {2 * BLOCK}")
    f = jnp.fft.rfft(v.reshape(-1), norm="ortho")
    # The first and the last are real, and make one complex number.
    first = (f[:1].real + 1j * f[-1:].real) / np.sqrt(2)
    y = jnp.concatenate([first, f[1:-1]]).reshape(-1, BLOCK)
    size_of = jnp.abs(y)
    w = -jnp.sort(-size_of, axis=1)
    s1, s2 = jnp.cumsum(w, 1), jnp.cumsum(jnp.square(w), 1)
    counts = np.arange(int(share * BLOCK) + 1, BLOCK + 1)
    a, b = s1[:, counts - 1], s2[:, counts - 1]
    root = jnp.sqrt(jnp.maximum(share * BLOCK * (counts * b - jnp.square(a)) / (counts - share * BLOCK), 0))
    level = (a - root) / counts
    below = jnp.pad(w, ((0, 0), (0, 1)), constant_values=-jnp.inf)[:, counts]
    fits = (w[:, counts - 1] > level) & (level >= below)
    # Exactly one fits; with ties none may, and then all count.
    place = jnp.where(fits.any(1), fits.argmax(1), len(counts) - 1)
    rest = jax.nn.relu(size_of - jnp.take_along_axis(level, place[:, None], 1))
    rest = jnp.where(rest.sum(1, keepdims=True) > 0, rest, 1.0)
    direction = jnp.where(size_of > 0, y / jnp.where(size_of > 0, size_of, 1), 1)
    y = (np.sqrt(share) * BLOCK * rest / rest.sum(1, keepdims=True) * direction).reshape(-1)
    ends = np.sqrt(2) * jnp.stack([y[0].real, y[0].imag]).astype(y.dtype)
    return jnp.fft.irfft(jnp.concatenate([ends[:1], y[1:], ends[1:]]), n=size, norm="ortho").reshape(v.shape)


def _reno(hyper: Hyper, n: Array, gradient: Array, loss: Array, b: Array, xi: Array) -> tuple[Array, Array]:
    g = clipped(gradient + hyper.norm_weight * norm_gradient(n), hyper.clip)
    b = hyper.momentum * b + g
    return n - hyper.lr * (g + hyper.momentum * b), b


def _sphere(hyper: Hyper, n: Array, gradient: Array, loss: Array, b: Array, xi: Array) -> tuple[Array, Array]:
    length = jnp.linalg.norm(gradient)
    b = hyper.momentum * b + gradient / jnp.where(length > 0, length, 1)
    return on_sphere(n - hyper.lr * b), b


def _gper(hyper: Hyper, n: Array, gradient: Array, loss: Array, adam: Any, xi: Array) -> tuple[Array, Any]:
    bound = jnp.where(hyper.clip > 0, hyper.clip, jnp.inf)
    updates, adam = optax.scale_by_adam().update(gaussian_like(jnp.clip(gradient, -bound, bound)), adam)
    return gaussian_like(n - hyper.lr * updates), adam


def _langevin(hyper: Hyper, n: Array, gradient: Array, loss: Array, carry: tuple, xi: Array) -> tuple[Array, tuple]:
    step = hyper.gamma * (LEAST + (MOST - LEAST) * jnp.tanh(SLOPE * loss))
    drift = 0.5 * hyper.gamma * SLOPE * (MOST - LEAST) / jnp.square(jnp.cosh(SLOPE * loss)) * gradient
    return jnp.sqrt(1 - step) * n - hyper.eta * step * gradient + jnp.sqrt(step) * xi + drift, carry


# Name -> how n moves.
RULES = Registry(
    "noise.register",
    {
        "reno": Rule(jnp.zeros_like, _reno),
        "sphere": Rule(jnp.zeros_like, _sphere),
        "gper": Rule(optax.scale_by_adam().init, _gper),
        "langevin": Rule(lambda n: (), _langevin),
    },
)
register = RULES.register
