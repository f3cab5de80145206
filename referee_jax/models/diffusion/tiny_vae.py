"""Tiny decoders of latents, distilled from the autoencoders' own: TAESD, TAESDXL, TAESD3 and TAEF1.

Of github.com/madebyollin/taesd; laid out as diffusers' `AutoencoderTiny`, without the encoder. They
take latents as the U-Nets and transformers have them: the published scaling_factor is 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import layers
from referee_jax.models.diffusion import vae

LIMIT = 3.0  # latents are bent into (-LIMIT, LIMIT)

# What config.json may say without a field below: key -> the values that are implemented.
REFUSED = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "upsampling_scaling_factor": (2,)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of an `AutoencoderTiny`; the defaults are diffusers', which are TAESD's.

    Attributes:
        num_decoder_blocks: residual blocks at each resolution, the latents' first.
    """

    out_channels: int = 3
    decoder_block_out_channels: tuple[int, ...] = (64, 64, 64, 64)
    num_decoder_blocks: tuple[int, ...] = (3, 3, 3, 1)
    latent_channels: int = 4
    scaling_factor: float = 1.0
    shift_factor: float = 0.0

    def __post_init__(self):
        widths, levels = self.decoder_block_out_channels, len(self.num_decoder_blocks)
        if len(widths) != levels or len(set(widths)) != 1:
            raise ValueError(
                f"decoder_block_out_channels={widths} is not implemented; supported here: one number, {levels} times, "
                "as often as there are num_decoder_blocks"
            )

    @property
    def downscale(self) -> int:
        """Image pixels per latent, along each axis."""
        return 2 ** (len(self.num_decoder_blocks) - 1)


def _run(modules: nnx.List, x: Array) -> Array:
    """One after the other; None is a ReLU, as it has a number in the checkpoint."""
    for module in modules:
        x = jax.nn.relu(x) if module is None else module(x)
    return x


def _conv(inputs: int, outputs: int, rngs: nnx.Rngs, *, use_bias: bool = True) -> nnx.Conv:
    return nnx.Conv(inputs, outputs, (3, 3), padding=1, use_bias=use_bias, rngs=rngs)


class Block(nnx.Module):
    """Three convolutions with a skip connection."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        first, second, third = (_conv(channels, channels, rngs) for _ in range(3))
        self.conv = nnx.List([first, None, second, None, third])

    def __call__(self, x: Array) -> Array:
        return jax.nn.relu(x + _run(self.conv, x))


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling by 2."""

    def __init__(self):
        self.hardware = chips.Hardware()

    def __call__(self, x: Array) -> Array:
        return vae.double(x, is_dense=self.hardware.dense)


class Decoder(nnx.Module):
    """Latents to images in [0, 1], about."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        width = config.decoder_block_out_channels[0]
        modules = [_conv(config.latent_channels, width, rngs), None]
        *others, last = config.num_decoder_blocks
        for count in others:
            modules += [Block(width, rngs=rngs) for _ in range(count)]
            modules += [Upsample(), _conv(width, width, rngs, use_bias=False)]
        modules += [Block(width, rngs=rngs) for _ in range(last)]
        self.layers = nnx.List([*modules, _conv(width, config.out_channels, rngs)])

    def __call__(self, x: Array) -> Array:
        return _run(self.layers, x)


class AutoencoderTiny(nnx.Module):
    """The decoder of diffusers' `AutoencoderTiny`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.decoder = Decoder(config, rngs=rngs)
        self.config = config

    @jax.named_scope("tiny_vae_decoder")
    def decode(self, latents: Array) -> Array:
        """Scaled latents `[B, h, w, C]` to float32 images `[B, H, W, 3]`, not clamped to [0, 1]."""
        x = latents / self.config.scaling_factor + self.config.shift_factor
        x = LIMIT * jnp.tanh(x / LIMIT)
        return self.decoder(x.astype(layers.float_dtype(self))).astype(jnp.float32)
