"""The diffusion model as the ways to move a picture see it: what it makes of a noisy latent.

At timestep t a noisy latent is x = alpha_t z + sigma_t n, of a clean latent z and noise n:

    prediction_type   alpha_t          sigma_t              the network predicts
    epsilon           sqrt(abar_t)     sqrt(1 - abar_t)     n
    v_prediction      the same         the same             alpha_t n - sigma_t z
    flow              1 - t / 1000     t / 1000             n - z

The first two are of diffusion (Ho et al. 2020, arXiv 2006.11239; Salimans & Ho 2022, arXiv 2202.00512), the third is of
rectified flow (Liu et al. 2022, arXiv 2209.03003), whose timesteps may be fractions. Networks read t as it is.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from referee_jax.models.diffusion.text import Text

FLOW_TIMESTEPS = 1000


class Prior(struct.PyTreeNode):
    """The diffusion model.

    Attributes:
        denoiser: `(latents [B, h, w, C], timesteps [B], *text) -> [B, h, w, C]`, of models.diffusion.
        alphas_cumprod: abar_t, float32 `[timesteps]`; None of "flow".
        prediction_type: what it predicts, see the table above.
        shift: of "flow", how far training moves timesteps towards noise.
    """

    denoiser: Any
    alphas_cumprod: Array | None
    prediction_type: str = struct.field(pytree_node=False, default="epsilon")
    shift: float = struct.field(pytree_node=False, default=1.0)

    @property
    def is_flow(self) -> bool:
        """Whether it is a rectified flow."""
        return self.prediction_type == "flow"

    @property
    def timesteps(self) -> int:
        """How many timesteps training had."""
        return FLOW_TIMESTEPS if self.is_flow else len(self.alphas_cumprod)

    def time(self, t: Array) -> Array:
        """The timestep where training, without its shift, would be at `t`: `t` itself but for "flow"."""
        if not self.is_flow:
            return t
        share = jnp.asarray(t, jnp.float32) / FLOW_TIMESTEPS
        return FLOW_TIMESTEPS * self.shift * share / (1 + (self.shift - 1) * share)

    def levels(self, t: Array) -> tuple[Array, Array]:
        """alpha_t and sigma_t; a timestep below 0 is the end, without noise."""
        if self.is_flow:
            share = jnp.maximum(jnp.asarray(t, jnp.float32), 0) / FLOW_TIMESTEPS
            return 1 - share, share
        abar = jnp.where(t < 0, jnp.ones((), self.alphas_cumprod.dtype), self.alphas_cumprod[jnp.maximum(t, 0)])
        return jnp.sqrt(abar), jnp.sqrt(1 - abar)


def predict(prior: Prior, noisy: Array, t: Array, cond: Text, uncond: Text | None, *, guidance: Array) -> Array:
    """What the network predicts of one noisy latent, with classifier-free guidance: u + guidance (c - u).

    Args:
        prior: the diffusion model.
        noisy: `[h, w, C]`, the noisy latent x.
        t: the timestep.
        cond: the prompt's text, without an axis of a batch.
        uncond: that of the empty or negative prompt. If None there is no guidance, and one pass
            through the network instead of two.
        guidance: its scale.

    Returns:
        float32 `[h, w, C]`.
    """
    texts = [cond] if uncond is None else [uncond, cond]
    text = jax.tree.map(lambda *x: jnp.stack(x), *texts)
    noisy_batch = jnp.broadcast_to(noisy, (len(texts), *noisy.shape))
    out = prior.denoiser(noisy_batch, jnp.broadcast_to(t, (len(texts),)), *text)
    out = out.astype(jnp.promote_types(out.dtype, jnp.float32))
    return out[0] if uncond is None else out[0] + guidance * (out[1] - out[0])


def estimates(prior: Prior, noisy: Array, t: Array, **text: Any) -> tuple[Array, Array]:
    """The clean latent and the noise that the prior finds in a noisy latent, both float32 `[h, w, C]`.

    Arguments as of `predict`.
    """
    out, (alpha, sigma) = predict(prior, noisy, t, **text), prior.levels(t)
    if prior.is_flow:
        return noisy - sigma * out, noisy + alpha * out
    eps = alpha * out + sigma * noisy if prior.prediction_type == "v_prediction" else out
    return (noisy - sigma * eps) / alpha, eps


def residual(prior: Prior, z: Array, noise: Array, t: Array, **text: Any) -> Array:
    """How much the prior's noise differs from that in x = alpha_t z + sigma_t noise; of "flow", how much its n - z does.

    Args:
        prior: the diffusion model.
        z: `[h, w, C]`, the clean latent.
        noise: as `z`.
        t: the timestep.
        text: as of `predict`.

    Returns:
        float32 `[h, w, C]`.
    """
    alpha, sigma = prior.levels(t)
    noisy = alpha * z + sigma * noise
    if prior.is_flow:
        return predict(prior, noisy, t, **text) - (noise - z)
    return estimates(prior, noisy, t, **text)[1] - noise
