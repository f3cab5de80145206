"""Losses of the latents alone, of a user's own: terms of the step beside the prior and the referees.

    @latent_losses.register("rough")
    def rough(latents):  # [h, w, C] to a scalar
        return jnp.square(jnp.diff(latents, axis=0)).sum()

Their weighted gradients are added to the prior's, after the balance with the referees', and act in
all iterations.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from referee_jax.method.registry import Registry

LATENT_LOSSES = Registry("latent_losses.register", {})
register = LATENT_LOSSES.register


def gradient(names: Sequence[str], weights: Sequence[Array | float], latents: Array) -> tuple[Array, dict[str, Array]]:
    """Of latents `[h, w, C]`: the gradient of the weighted sum, and the losses as "latents/rough"."""

    def total(latents: Array) -> tuple[Array, dict[str, Array]]:
        losses = {name: jnp.float32(LATENT_LOSSES[name](latents)) for name in names}
        weighted = (weight * losses[name] for name, weight in zip(names, weights, strict=True))
        return sum(weighted), {f"latents/{name}": loss for name, loss in losses.items()}

    slope, losses = jax.grad(total, has_aux=True)(latents)
    return slope, losses
