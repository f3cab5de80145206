"""SD3's transformer, MMDiT, and SD3.5's, MMDiT-X (Esser et al. 2024, arXiv 2403.03206).

For SD3-medium, SD3.5-medium and SD3.5-large; laid out as diffusers' `SD3Transformer2DModel`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.models import layers
from referee_jax.models.diffusion import dit


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of an `SD3Transformer2DModel`; the defaults are diffusers'.

    Attributes:
        dual_attention_layers: blocks in which the image also attends to itself alone; the first ones, if any.
        qk_norm: "rms_norm" where queries and keys are normalised.
    """

    patch_size: int = 2
    in_channels: int = 16
    out_channels: int | None = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = None

    def __post_init__(self):
        if self.caption_projection_dim != self.width:
            raise ValueError(
                f"caption_projection_dim={self.caption_projection_dim} is not implemented; supported here: {self.width}, "
                "attention_head_dim x num_attention_heads"
            )
        if self.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={self.qk_norm!r} is not implemented; supported: None, rms_norm")
        duals = self.dual_attention_layers
        if duals != tuple(range(len(duals))) or len(duals) >= self.num_layers:
            raise ValueError(
                f"dual_attention_layers={duals!r} is not implemented; supported: the first of {self.num_layers} blocks"
            )

    @property
    def latents_a_token(self) -> int:
        """Along each side."""
        return self.patch_size

    @property
    def width(self) -> int:
        """Of the streams."""
        return self.attention_head_dim * self.num_attention_heads


class Patches(nnx.Module):
    """Latents to tokens, with a table of positions, of which the middle is for smaller pictures."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        side, size = config.patch_size, config.pos_embed_max_size
        self.proj = layers.Patches(config.in_channels, config.width, side, rngs=rngs)
        self.pos_embed = nnx.Param(jnp.zeros((1, size * size, config.width)))
        self.size = size

    def __call__(self, latents: Array) -> Array:
        """`[B, h, w, C] -> [B, T, D]`, rows first. Raises ValueError where there are more patches than positions."""
        x = self.proj(latents)
        h, w = x.shape[1:3]
        if max(h, w) > self.size:
            raise ValueError(f"{h} x {w} patches, but SD3 has {self.size} x {self.size} positions")
        top, left = (self.size - h) // 2, (self.size - w) // 2
        table = self.pos_embed[...].reshape(self.size, self.size, -1)[top : top + h, left : left + w]
        return (x + table).astype(x.dtype).reshape(len(x), h * w, -1)


class Block(nnx.Module):
    """Joint attention and a feed-forward of each stream; the last block ends the text's with its keys and values."""

    def __init__(self, config: Config, *, is_dual: bool = False, is_last: bool = False, rngs: nnx.Rngs):
        width, heads, has_norm = config.width, config.num_attention_heads, config.qk_norm is not None
        self.norm1 = dit.Modulation(width, 9 if is_dual else 6, rngs=rngs)
        self.norm1_context = dit.LastModulation(width, rngs=rngs) if is_last else dit.Modulation(width, 6, rngs=rngs)
        self.attn = dit.Attention(width, heads, has_norm=has_norm, has_text=True, has_text_out=not is_last, rngs=rngs)
        self.attn2 = dit.Attention(width, heads, has_norm=has_norm, rngs=rngs) if is_dual else None
        self.ff = dit.FeedForward(width, rngs=rngs)
        self.ff_context = None if is_last else dit.FeedForward(width, rngs=rngs)

    def __call__(self, streams: tuple[Array, Array], condition: Array) -> tuple[Array, Array]:
        """Image `[B, T, D]` and text `[B, S, D]`, which the last block leaves as it is."""
        x, text = streams
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *dual = self.norm1(condition)
        y = dit.normalised(x)
        if self.ff_context is None:
            attended, _ = self.attn.joint(
                dit.modulated(y, shift, scale), self.norm1_context.normalised(text, condition)
            )
        else:
            s, c, g, s_ff, c_ff, g_ff = self.norm1_context(condition)
            read = dit.modulated(dit.normalised(text), s, c)
            attended, text_attended = self.attn.joint(dit.modulated(y, shift, scale), read)
            text = text + g * text_attended
            text = text + g_ff * self.ff_context(dit.modulated(dit.normalised(text), s_ff, c_ff))
        x = x + gate * attended
        if dual:
            shift_2, scale_2, gate_2 = dual
            x = x + gate_2 * self.attn2(dit.modulated(y, shift_2, scale_2))
        return x + gate_ff * self.ff(dit.modulated(dit.normalised(x), shift_ff, scale_ff)), text


class SD3(nnx.Module):
    """diffusers' `SD3Transformer2DModel`: predicts noise minus latents from noisy latents, timestep and text."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width, patch = config.width, config.patch_size
        self.pos_embed = Patches(config, rngs=rngs)
        self.time_text_embed = dit.Embedding(config.pooled_projection_dim, width, rngs=rngs)
        self.context_embedder = layers.Linear(config.joint_attention_dim, width, rngs=rngs)
        duals = len(config.dual_attention_layers)
        counts = {True: duals, False: config.num_layers - 1 - duals}
        self.transformer_blocks = layers.Row(
            [
                *(_blocks(config, is_dual, count, rngs) for is_dual, count in counts.items() if count),
                Block(config, is_last=True, rngs=rngs),
            ]
        )
        self.norm_out = dit.LastModulation(width, rngs=rngs)
        channels = config.out_channels or config.in_channels
        self.proj_out = layers.Linear(width, patch * patch * channels, dtype=jnp.float32, rngs=rngs)
        self.config = config

    @jax.named_scope("sd3")
    def __call__(self, latents: Array, timesteps: Array, encoder_hidden_states: Array, pooled: Array) -> Array:
        """Predicts n - z, of noise n and latents z: float32 `[B, h, w, C]`.

        Args:
            latents: `[B, h, w, C]`, scaled, with even sides.
            timesteps: `[B]`, in 0 to 1000.
            encoder_hidden_states: `[B, T, D]`, the text encoders' states.
            pooled: `[B, P]`, their pooled texts.
        """
        dtype, patch = layers.float_dtype(self), self.config.patch_size
        condition = self.time_text_embed(timesteps, pooled.astype(dtype))
        x = self.pos_embed(latents.astype(dtype))
        text = self.context_embedder(encoder_hidden_states.astype(dtype))
        for part in self.transformer_blocks:
            if isinstance(part, layers.Stack):
                x, text = layers.scan_layers(part, (x, text), condition, remat=True)
            else:
                x, text = part((x, text), condition)
        x = self.proj_out(self.norm_out.normalised(x, condition).astype(jnp.float32))
        b, h, w, _ = latents.shape
        x = x.reshape(b, h // patch, w // patch, patch, patch, -1)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, -1)


def _blocks(config: Config, is_dual: bool, count: int, rngs: nnx.Rngs) -> layers.Stack:
    return layers.stack(lambda rngs: Block(config, is_dual=is_dual, rngs=rngs), count, rngs)
