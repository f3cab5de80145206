"""FLUX.1's transformer (Black Forest Labs 2024), of schnell and dev; laid out as diffusers' `FluxTransformer2DModel`.

First blocks with two streams, as SD3's, then blocks with one, of text and image, in which attention and feed-forward
read the same and are added together. Positions are rotary, along rows and columns of the image.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from referee_jax.models import layers
from referee_jax.models.diffusion import dit

THETA = 10000.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a `FluxTransformer2DModel`; the defaults are FLUX.1-schnell's."""

    patch_size: int = 1
    in_channels: int = 64  # of a token: two by two latents
    out_channels: int | None = None
    num_layers: int = 19
    num_single_layers: int = 38
    attention_head_dim: int = 128
    num_attention_heads: int = 24
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 768
    guidance_embeds: bool = False
    axes_dims_rope: tuple[int, ...] = (16, 56, 56)

    def __post_init__(self):
        for name, values in (("patch_size", (1,)), ("out_channels", (None, self.in_channels))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name}={getattr(self, name)!r} is not implemented; supported: {values}")
        axes = self.axes_dims_rope
        if len(axes) != 3 or sum(axes) != self.attention_head_dim or any(n % 2 for n in axes):
            raise ValueError(
                f"axes_dims_rope={axes!r} is not implemented; supported: three even numbers whose sum is "
                f"attention_head_dim={self.attention_head_dim}"
            )
        if self.in_channels % 4:
            raise ValueError(f"in_channels={self.in_channels} is not implemented; supported: multiples of 4")

    @property
    def latents_a_token(self) -> int:
        """Along each side."""
        return 2

    @property
    def width(self) -> int:
        """Of the streams."""
        return self.attention_head_dim * self.num_attention_heads


def angles(text: int, rows: int, columns: int, axes: tuple[int, ...]) -> np.ndarray:
    """Rotary angles of `text` tokens, which have no position, then of an image's, rows first: float64 `[T, D / 2]`."""
    row, column = np.divmod(np.arange(rows * columns), columns)
    places = np.stack([np.zeros_like(row), row, column], axis=1)
    places = np.concatenate([np.zeros((text, 3)), places])
    return np.concatenate(
        [place[:, None] * THETA ** (-np.arange(0, n, 2) / n) for place, n in zip(places.T, axes, strict=True)], axis=1
    )


class DoubleBlock(nnx.Module):
    """Joint attention and a feed-forward of each stream."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, heads = config.width, config.num_attention_heads
        self.norm1 = dit.Modulation(width, 6, rngs=rngs)
        self.norm1_context = dit.Modulation(width, 6, rngs=rngs)
        self.attn = dit.Attention(width, heads, has_norm=True, has_text=True, rngs=rngs)
        self.ff = dit.FeedForward(width, rngs=rngs)
        self.ff_context = dit.FeedForward(width, rngs=rngs)

    def __call__(self, streams: tuple[Array, Array], condition: Array, places: np.ndarray) -> tuple[Array, Array]:
        """Image `[B, T, D]` and text `[B, S, D]`."""
        x, text = streams
        changes, text_changes = self.norm1(condition), self.norm1_context(condition)
        y, text_y = self.attn.joint(_before(x, changes), _before(text, text_changes), places)
        return _after(x, y, changes, self.ff), _after(text, text_y, text_changes, self.ff_context)


def _before(x: Array, changes: list[Array]) -> Array:
    return dit.modulated(dit.normalised(x), changes[0], changes[1])


def _after(x: Array, attended: Array, changes: list[Array], transform: dit.FeedForward) -> Array:
    _, _, gate, shift, scale, gate_ff = changes
    x = x + gate * attended
    return x + gate_ff * transform(dit.modulated(dit.normalised(x), shift, scale))


class SingleBlock(nnx.Module):
    """Attention and feed-forward beside each other."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.width
        self.norm = dit.Modulation(width, 3, rngs=rngs)
        self.attn = dit.Attention(width, config.num_attention_heads, has_norm=True, has_out=False, rngs=rngs)
        self.proj_mlp = layers.Linear(width, 4 * width, rngs=rngs)
        self.proj_out = layers.Linear(5 * width, width, rngs=rngs)

    def __call__(self, x: Array, condition: Array, places: np.ndarray) -> Array:
        """Text and image `[B, S + T, D]`."""
        shift, scale, gate = self.norm(condition)
        y = dit.modulated(dit.normalised(x), shift, scale)
        hidden = jax.nn.gelu(self.proj_mlp(y), approximate=True)
        return x + gate * self.proj_out(jnp.concatenate([self.attn(y, places), hidden], axis=-1))


class Flux(nnx.Module):
    """diffusers' `FluxTransformer2DModel`: predicts noise minus latents from noisy latents, timestep and text."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.width
        self.time_text_embed = dit.Embedding(
            config.pooled_projection_dim, width, has_guidance=config.guidance_embeds, rngs=rngs
        )
        self.context_embedder = layers.Linear(config.joint_attention_dim, width, rngs=rngs)
        self.x_embedder = layers.Linear(config.in_channels, width, rngs=rngs)
        double, single = (lambda rngs, block=block: block(config, rngs=rngs) for block in (DoubleBlock, SingleBlock))
        self.transformer_blocks = layers.stack(double, config.num_layers, rngs)
        self.single_transformer_blocks = layers.stack(single, config.num_single_layers, rngs)
        self.norm_out = dit.LastModulation(width, rngs=rngs)
        self.proj_out = layers.Linear(width, config.in_channels, dtype=jnp.float32, rngs=rngs)
        self.config = config

    @jax.named_scope("flux")
    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        pooled: Array,
        guidance: Array | float = 3.5,
    ) -> Array:
        """Predicts n - z, of noise n and latents z: float32 `[B, h, w, C]`.

        Args:
            latents: `[B, h, w, C]`, scaled, with even sides. Two by two are a token, channels outermost.
            timesteps: `[B]`, in 0 to 1000; diffusers' class takes a thousandth of them.
            encoder_hidden_states: `[B, T, D]`, T5's states.
            pooled: `[B, P]`, CLIP's pooled text.
            guidance: scale, a number or `[B]`, of a network with `guidance_embeds`; without effect in others.
        """
        dtype, (b, h, w, channels) = layers.float_dtype(self), latents.shape
        condition = self.time_text_embed(timesteps, pooled.astype(dtype), guidance)
        packed = latents.reshape(b, h // 2, 2, w // 2, 2, channels).transpose(0, 1, 3, 5, 2, 4)
        x = self.x_embedder(packed.reshape(b, h // 2 * (w // 2), -1).astype(dtype))
        text = self.context_embedder(encoder_hidden_states.astype(dtype))
        places = angles(text.shape[1], h // 2, w // 2, self.config.axes_dims_rope)
        x, text = layers.scan_layers(self.transformer_blocks, (x, text), condition, places, remat=True)
        both = jnp.concatenate([text, x], axis=1)
        both = layers.scan_layers(self.single_transformer_blocks, both, condition, places, remat=True)
        x = self.norm_out.normalised(both[:, text.shape[1] :], condition)
        x = self.proj_out(x.astype(jnp.float32)).reshape(b, h // 2, w // 2, channels, 2, 2)
        return x.transpose(0, 1, 4, 2, 5, 3).reshape(b, h, w, channels)
