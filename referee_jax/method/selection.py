"""Selection among K pictures of one prompt that are made beside each other ("particles").

Between two stretches of iterations each has a value, the higher the better, and

    none     all go on; the best is taken at the end (best of K)
    halve    the better half goes on (successive halving)
    smc      each is copied or dropped by its weight: log w += lambda (value - value before), with systematic
             resampling where the effective sample size 1 / sum w^2 is below K / 2, after which log w = 0 (FK steering,
             Singhal et al. 2025, arXiv 2501.06848)

Particles that are copies of one part ways only by what is random after it: Langevin's noise, `guided.eta`, views.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

RULES = ("none", "halve", "smc")


def survivors(rule: str, particles: int, selections: int) -> int:
    """How many go on after so many selections."""
    for _ in range(selections if rule == "halve" else 0):
        particles = (particles + 1) // 2
    return particles


def ranked(values: ArrayLike, keep: int) -> np.ndarray:
    """The numbers of the `keep` best of K values `[K, ...]`, best first, int32 `[keep, ...]`; of equal ones the first."""
    return np.argsort(-np.asarray(values), axis=0, kind="stable")[:keep].astype(np.int32)


def resampled(values: Array, before: Array, log_w: Array, key: Array, scale: Array | float) -> tuple[Array, Array]:
    """Parents of the K particles, int32 `[K]`, and their logarithmic weights, as of "smc".

    Args:
        values: `[K]`, now.
        before: `[K]`, at the selection before.
        log_w: `[K]`.
        key: of this selection.
        scale: lambda.
    """
    count = len(values)
    gain = scale * (values - before)
    log_w = log_w + jnp.where(jnp.isfinite(gain), gain, -jnp.inf)  # what is broken is dropped
    w = jax.nn.softmax(log_w)
    places = (jax.random.uniform(key) + jnp.arange(count)) / count
    parents = jnp.clip(jnp.searchsorted(jnp.cumsum(w), places), 0, count - 1).astype(jnp.int32)
    is_uneven = 1 / jnp.square(w).sum() < count / 2
    return jnp.where(is_uneven, parents, jnp.arange(count)), jnp.where(is_uneven, 0.0, log_w)
