"""What the diffusion transformers of SD3 (sd3.py) and FLUX (flux.py) share: adaptive norms, joint attention, embeddings.

Image and text are two streams with weights of their own, which attend to each other (Esser et al. 2024, arXiv
2403.03206). Time and pooled text act on each block by the shift, scale and gate of its parts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, layers
from referee_jax.models.diffusion.unet import TimeEmbedding, timestep_features

SINUSOIDS = 256  # of a timestep
EPSILON = 1e-6  # of all norms


class Embedding(nnx.Module):
    """Timesteps, pooled text and, where a network has it, the scale of guidance, to what acts on all blocks."""

    def __init__(self, pooled: int, width: int, *, has_guidance: bool = False, rngs: nnx.Rngs):
        self.timestep_embedder = TimeEmbedding(SINUSOIDS, width, rngs=rngs)
        self.guidance_embedder = TimeEmbedding(SINUSOIDS, width, rngs=rngs) if has_guidance else None
        self.text_embedder = TimeEmbedding(pooled, width, rngs=rngs)

    def __call__(self, timesteps: Array, pooled: Array, guidance: Array | float = 0.0) -> Array:
        """`[B]` in 0 to 1000 and `[B, P]` to `[B, D]`."""
        embed = lambda network, x: network(
            timestep_features(x, SINUSOIDS, flip_sin_to_cos=True, freq_shift=0).astype(pooled.dtype)
        )
        condition = embed(self.timestep_embedder, timesteps) + self.text_embedder(pooled)
        if self.guidance_embedder is None:
            return condition
        guidance = jnp.broadcast_to(jnp.asarray(guidance, jnp.float32), timesteps.shape)
        return condition + embed(self.guidance_embedder, 1000 * guidance)


class Modulation(nnx.Module):
    """What acts on a stream: so many vectors `[B, 1, D]` each, from what acts on all blocks, `[B, D]`."""

    def __init__(self, width: int, count: int, *, rngs: nnx.Rngs):
        self.linear = layers.Linear(width, count * width, rngs=rngs)
        self.count = count

    def __call__(self, condition: Array) -> list[Array]:
        return jnp.split(self.linear(jax.nn.silu(condition))[:, None], self.count, axis=-1)


class LastModulation(Modulation):
    """A norm whose scale and shift, in this order, are a `Modulation`: of a stream that no later block reads."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        super().__init__(width, 2, rngs=rngs)

    def normalised(self, x: Array, condition: Array) -> Array:
        """The stream `[B, T, D]`, normalised, scaled and shifted."""
        scale, shift = self(condition)
        return modulated(normalised(x), shift, scale)


def normalised(x: Array) -> Array:
    """`[B, T, D]` with mean 0 and variance 1 over the last axis."""
    ones, zeros = jnp.ones(x.shape[-1], x.dtype), jnp.zeros(x.shape[-1], x.dtype)
    return layers.normalise(layers.of_features, EPSILON, x, ones, zeros)


def modulated(x: Array, shift: Array, scale: Array) -> Array:
    """A normalised stream, scaled by `1 + scale`, and shifted."""
    return x * (1 + scale) + shift


class GELU(nnx.Module):
    """A linear layer and a GELU by tanh."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.proj = layers.Linear(inputs, outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return jax.nn.gelu(self.proj(x), approximate=True)


class FeedForward(nnx.Module):
    """Two linear layers, numbered as in the checkpoint, where 1 is dropout."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([GELU(width, 4 * width, rngs=rngs), None, layers.Linear(4 * width, width, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class Attention(nnx.Module):
    """Multi-head attention of one stream to itself; of two, with `has_text`, to both.

    Args:
        width: of the streams.
        heads: number of heads.
        has_norm: whether queries and keys are normalised, each head by itself.
        has_text: whether there is a second stream.
        has_out: whether the first stream's result goes through a last layer; `has_text_out`: the second's.
        rngs: of the weights.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        has_norm: bool,
        has_text: bool = False,
        has_out: bool = True,
        has_text_out: bool = True,
        rngs: nnx.Rngs,
    ):
        linear = lambda: layers.Linear(width, width, rngs=rngs)
        norm = lambda: layers.RMSNorm(width // heads, epsilon=EPSILON, rngs=rngs) if has_norm else None
        self.to_q, self.to_k, self.to_v, self.norm_q, self.norm_k = linear(), linear(), linear(), norm(), norm()
        self.to_out = nnx.List([linear()]) if has_out else None
        if has_text:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = linear(), linear(), linear()
            self.norm_added_q, self.norm_added_k = norm(), norm()
            self.to_add_out = linear() if has_text_out else None
        self.heads, self.hardware = heads, chips.Hardware()

    def _heads(self, x: Array, norm: nnx.Module | None) -> Array:
        y = attention.split_heads(x, self.heads)
        return y if norm is None else norm(y)

    def _attend(self, q: Array, k: Array, v: Array, angles: np.ndarray | None) -> Array:
        if angles is not None:
            q, k = rotate_pairs(q, angles), rotate_pairs(k, angles)
        return attention.merge_heads(attention.attend(q, k, v, self.hardware))

    def __call__(self, x: Array, angles: np.ndarray | None = None) -> Array:
        """`[B, T, D]` to the same; `angles` `[T, D / 2 / heads]` are of rotary positions."""
        q, k = self._heads(self.to_q(x), self.norm_q), self._heads(self.to_k(x), self.norm_k)
        y = self._attend(q, k, self._heads(self.to_v(x), None), angles)
        return y if self.to_out is None else self.to_out[0](y)

    def joint(self, x: Array, text: Array, angles: np.ndarray | None = None) -> tuple[Array, Array]:
        """An image's and a text's stream to theirs; `angles` are of the text's tokens, then of the image's."""
        q, k = self._heads(self.to_q(x), self.norm_q), self._heads(self.to_k(x), self.norm_k)
        q_text = self._heads(self.add_q_proj(text), self.norm_added_q)
        k_text = self._heads(self.add_k_proj(text), self.norm_added_k)
        v, v_text = self._heads(self.to_v(x), None), self._heads(self.add_v_proj(text), None)
        both = lambda first, second: jnp.concatenate([first, second], axis=1)
        y = self._attend(both(q_text, q), both(k_text, k), both(v_text, v), angles)
        y_text, y = y[:, : text.shape[1]], y[:, text.shape[1] :]
        return self.to_out[0](y), y_text if self.to_add_out is None else self.to_add_out(y_text)


def rotate_pairs(x: Array, angles: np.ndarray) -> Array:
    """Rotary positions: elements 2 i and 2 i + 1 of each head of `[B, T, N, D]` turned by `angles [T, D / 2]`."""
    cos, sin = (np.repeat(f(angles), 2, axis=-1).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    # A product, which is exact, puts the other of each pair beside it: an axis of 2 is slow on TPUs, whose tiles are of 8
    # or 128.
    quarter_turn = np.kron(np.eye(angles.shape[1]), [[0, 1], [-1, 0]]).astype(x.dtype)
    turned = jnp.einsum("btnd,de->btne", x, quarter_turn, precision=jax.lax.Precision.HIGHEST)
    return (x.astype(jnp.float32) * cos + turned.astype(jnp.float32) * sin).astype(x.dtype)
