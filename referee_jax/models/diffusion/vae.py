"""The decoder of the autoencoders of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752), SDXL, SD3 and FLUX.

Laid out as diffusers' `AutoencoderKL`, without the encoder, which the method does not need. The
U-Net shares `ResnetBlock` and `Upsample`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, layers

# Names in checkpoints saved before diffusers 0.17 (SD 1.5, sd-vae-ft-mse), as weights.convert's
# `renames`.
RENAMES: tuple[tuple[str, str], ...] = (
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)


# What config.json may say without a field below: key -> the values that are implemented.
REFUSED = {
    "act_fn": ("silu", "swish"),
    "latents_mean": (None,),
    "latents_std": (None,),
    "mid_block_add_attention": (True,),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of an `AutoencoderKL`; the defaults are Stable Diffusion's."""

    out_channels: int = 3
    down_block_types: tuple[str, ...] | None = None  # None: as many as block_out_channels
    up_block_types: tuple[str, ...] | None = None
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None  # of the latents, before they are scaled
    use_post_quant_conv: bool = True  # whether a layer comes before the decoder

    @property
    def downscale(self) -> int:
        """Image pixels per latent, along each axis."""
        return 2 ** (len(self.block_out_channels) - 1)

    def __post_init__(self):
        for name, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            value, kinds = getattr(self, name), (kind,) * len(self.block_out_channels)
            if value not in (None, kinds):
                raise ValueError(f"{name}={value!r} is not implemented; supported here: {kinds}")
            object.__setattr__(self, name, kinds)


class ResnetBlock(nnx.Module):
    """Two convolutions with a skip connection.

    With `time_width`, a projection of the time embedding is added between them.
    """

    def __init__(
        self, inputs: int, outputs: int, *, groups: int, epsilon: float, time_width: int | None = None, rngs: nnx.Rngs
    ):
        self.norm1 = layers.GroupNorm(groups, inputs, epsilon=epsilon, rngs=rngs)
        self.conv1 = nnx.Conv(inputs, outputs, (3, 3), padding=1, rngs=rngs)
        self.time_emb_proj = None if time_width is None else layers.Linear(time_width, outputs, rngs=rngs)
        self.norm2 = layers.GroupNorm(groups, outputs, epsilon=epsilon, rngs=rngs)
        self.conv2 = nnx.Conv(outputs, outputs, (3, 3), padding=1, rngs=rngs)
        self.conv_shortcut = None if inputs == outputs else nnx.Conv(inputs, outputs, (1, 1), rngs=rngs)

    def __call__(self, x: Array, time: Array | None = None) -> Array:
        y = self.conv1(jax.nn.silu(self.norm1(x)))
        if self.time_emb_proj is not None:
            y = y + self.time_emb_proj(jax.nn.silu(time))[:, None, None]
        y = self.conv2(jax.nn.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by 2, then a convolution."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), padding=1, rngs=rngs)
        self.hardware = chips.Hardware()

    def __call__(self, x: Array, size: tuple[int, int] | None = None) -> Array:
        """`size`: rows and columns of the result, twice the input's or one less."""
        x = double(x, is_dense=self.hardware.dense)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])


def double(x: Array, *, is_dense: bool) -> Array:
    """Nearest-neighbour upsampling, `[B, H, W, C] -> [B, 2 H, 2 W, C]`.

    With `is_dense` columns are copied by a product, which is exact: each row of the matrix holds a
    single 1.
    """
    b, h, w, c = x.shape
    if is_dense:
        rows = jnp.broadcast_to(x[:, :, None], (b, h, 2, w, c)).reshape(b, 2 * h, w, c)
        columns = jnp.asarray(np.repeat(np.eye(w), 2, axis=0), x.dtype)
        return jnp.einsum("vw,bhwc->bhvc", columns, rows, precision="highest")
    return jnp.broadcast_to(x[:, :, None, :, None], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


class Attention(nnx.Module):
    """Self-attention of one head over all pixels, with a skip connection."""

    def __init__(self, channels: int, *, groups: int, rngs: nnx.Rngs):
        self.group_norm = layers.GroupNorm(groups, channels, epsilon=1e-6, rngs=rngs)
        self.to_q = layers.Linear(channels, channels, rngs=rngs)
        self.to_k = layers.Linear(channels, channels, rngs=rngs)
        self.to_v = layers.Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([layers.Linear(channels, channels, rngs=rngs)])
        self.hardware = chips.Hardware()

    def __call__(self, x: Array) -> Array:
        y = self.group_norm(x).reshape(x.shape[0], -1, x.shape[-1])
        q, k, v = (attention.split_heads(p(y), 1) for p in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out[0](attention.merge_heads(attention.attend(q, k, v, self.hardware))).reshape(x.shape)


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, channels: int, *, groups: int, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [ResnetBlock(channels, channels, groups=groups, epsilon=1e-6, rngs=rngs) for _ in range(2)]
        )
        self.attentions = nnx.List([Attention(channels, groups=groups, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class UpBlock(nnx.Module):
    """Residual blocks at one resolution, then (except in the last level) upsampling by 2."""

    def __init__(self, inputs: int, outputs: int, *, depth: int, groups: int, is_last: bool, rngs: nnx.Rngs):
        widths = [inputs] + [outputs] * (depth - 1)
        self.resnets = nnx.List([ResnetBlock(w, outputs, groups=groups, epsilon=1e-6, rngs=rngs) for w in widths])
        self.upsamplers = nnx.List([] if is_last else [Upsample(outputs, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        for block in (*self.resnets, *self.upsamplers):
            x = block(x)
        return x


class Decoder(nnx.Module):
    """Latents to images in [-1, 1]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels[::-1], config.norm_num_groups
        self.conv_in = nnx.Conv(config.latent_channels, widths[0], (3, 3), padding=1, rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups=groups, rngs=rngs)
        last, depth = len(widths) - 1, config.layers_per_block + 1
        self.up_blocks = nnx.List(
            [
                UpBlock(widths[max(i - 1, 0)], w, depth=depth, groups=groups, is_last=i == last, rngs=rngs)
                for i, w in enumerate(widths)
            ]
        )
        self.conv_norm_out = layers.GroupNorm(groups, widths[-1], epsilon=1e-6, rngs=rngs)
        self.conv_out = nnx.Conv(widths[-1], config.out_channels, (3, 3), padding=1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class AutoencoderKL(nnx.Module):
    """The decoder of diffusers' `AutoencoderKL`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        latent = config.latent_channels
        self.post_quant_conv = nnx.Conv(latent, latent, (1, 1), rngs=rngs) if config.use_post_quant_conv else None
        self.decoder = Decoder(config, rngs=rngs)
        self.config = config

    @jax.named_scope("vae_decoder")
    def decode(self, latents: Array) -> Array:
        """Scaled latents `[B, h, w, C]` to float32 images `[B, H, W, 3]`, not clamped to [0, 1]."""
        raw = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        x = raw.astype(layers.float_dtype(self))
        x = x if self.post_quant_conv is None else self.post_quant_conv(x)
        return self.decoder(x).astype(jnp.float32) / 2 + 0.5
