"""Schedules of numbers over the iterations."""

import jax.numpy as jnp
from jax import Array


def cosine(start: Array, end: Array, share: Array) -> Array:
    """Half a cosine from `start` at share 0 to `end` at share 1, constant outside."""
    return end + 0.5 * (start - end) * (1 + jnp.cos(jnp.pi * jnp.clip(share, 0, 1)))
