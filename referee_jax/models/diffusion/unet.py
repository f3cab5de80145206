"""The U-Net of Stable Diffusion (Rombach et al. 2022, arXiv 2112.10752) and SDXL (Podell et al. 2023, arXiv 2307.01952).

For SD 1.x, 2.x (base and v), SDXL, and what is distilled from them; laid out as diffusers' `UNet2DConditionModel`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, layers
from referee_jax.models.diffusion import vae

_DOWN_HAS_ATTENTION = {"CrossAttnDownBlock2D": True, "DownBlock2D": False}
_UP_HAS_ATTENTION = {"CrossAttnUpBlock2D": True, "UpBlock2D": False}
SIZES = 6  # of a picture, that SDXL reads: height and width before its crop, top and left of the crop, height and width


# What config.json may say without a field below: key -> the values that are implemented.
REFUSED = {
    "act_fn": ("silu", "swish"),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "mid_block_only_cross_attention": (None, False),
    "attention_type": ("default",),
    "resnet_time_scale_shift": ("default",),
    "time_embedding_type": ("positional",),
}
REFUSED |= dict.fromkeys(("mid_block_scale_factor", "resnet_out_scale_factor"), (1.0,))
REFUSED |= {"downsample_padding": (1,), "conv_in_kernel": (3,), "conv_out_kernel": (3,)}
REFUSED |= dict.fromkeys(
    ("only_cross_attention", "dual_cross_attention", "class_embeddings_concat", "resnet_skip_time_act"), (False,)
)
REFUSED |= dict.fromkeys(
    (
        "reverse_transformer_layers_per_block", "num_attention_heads", "cross_attention_norm",
        "encoder_hid_dim", "encoder_hid_dim_type", "class_embed_type", "num_class_embeds",
        "time_embedding_dim", "time_embedding_act_fn", "timestep_post_act", "time_cond_proj_dim",
    ),
    (None,),
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a `UNet2DConditionModel`; the defaults are Stable Diffusion 1.x's."""

    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers_per_block: int | tuple[int, ...] = 1  # of all levels, or of each
    cross_attention_dim: int = 768
    addition_embed_type: str | None = None  # "text_time": SDXL's, of the pooled text and sizes of the picture
    addition_time_embed_dim: int | None = None  # sinusoids of each of the six sizes
    projection_class_embeddings_input_dim: int | None = None  # the pooled text and these sinusoids
    # The NUMBER of heads, of all levels or of each; the name is an old mistake of diffusers'.
    attention_head_dim: int | tuple[int, ...] = 8
    use_linear_projection: bool = False
    upcast_attention: bool | None = False  # no effect: the softmax is in float32 always
    norm_num_groups: int = 32
    norm_eps: float = 1e-5

    def __post_init__(self):
        widths = self.block_out_channels
        for name, kinds in (("down_block_types", _DOWN_HAS_ATTENTION), ("up_block_types", _UP_HAS_ATTENTION)):
            value = getattr(self, name)
            if len(value) != len(widths) or not set(value) <= set(kinds):
                raise ValueError(
                    f"{name}={value!r} is not implemented; supported: as many as block_out_channels, "
                    f"{len(widths)}, each one of {', '.join(kinds)}"
                )
        if len(self.depths) != len(widths):
            raise ValueError(
                f"transformer_layers_per_block={self.transformer_layers_per_block!r} must be one integer or {len(widths)}"
            )
        if self.addition_embed_type not in (None, "text_time"):
            raise ValueError(
                f"addition_embed_type={self.addition_embed_type!r} is not implemented; supported: None, text_time"
            )
        added = self.addition_time_embed_dim, self.projection_class_embeddings_input_dim
        if self.addition_embed_type and not (all(added) and added[1] > SIZES * added[0]):
            raise ValueError(
                f"projection_class_embeddings_input_dim={added[1]!r} is not implemented; supported: "
                f"more than {SIZES} x addition_time_embed_dim={added[0]!r}"
            )
        heads = self.heads
        if len(heads) != len(widths) or any(width % n for width, n in zip(widths, heads, strict=True)):
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim!r} is a number of heads and must be one "
                f"integer or {len(widths)}, dividing block_out_channels={widths}"
            )

    @property
    def heads(self) -> tuple[int, ...]:
        """Attention heads of each level."""
        return self._of_levels(self.attention_head_dim)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks of each transformer of each level."""
        return self._of_levels(self.transformer_layers_per_block)

    @property
    def pooled_width(self) -> int:
        """Width of the pooled text; 0: none is read."""
        if not self.addition_embed_type:
            return 0
        return self.projection_class_embeddings_input_dim - SIZES * self.addition_time_embed_dim

    def _of_levels(self, value: int | tuple[int, ...]) -> tuple[int, ...]:
        return value if isinstance(value, tuple) else (value,) * len(self.block_out_channels)


def timestep_features(timesteps: Array, width: int, *, flip_sin_to_cos: bool, freq_shift: int) -> Array:
    """Sinusoids of the timesteps, `[B] -> float32[B, width]`, `width` even.

    Sines first unless flipped.
    """
    half = width // 2
    # In float64, then rounded once: timesteps of up to 1000 multiply a frequency's error.
    frequencies = np.exp(-math.log(10000) * np.arange(half) / (half - freq_shift)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies
    parts = [jnp.sin(angles), jnp.cos(angles)]
    return jnp.concatenate(parts[::-1] if flip_sin_to_cos else parts, axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids to the time embedding."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.linear_1 = layers.Linear(inputs, outputs, rngs=rngs)
        self.linear_2 = layers.Linear(outputs, outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class Attention(nnx.Module):
    """Multi-head attention of tokens to a context; for self-attention the context is the tokens."""

    def __init__(self, width: int, context: int, heads: int, *, rngs: nnx.Rngs):
        self.to_q = layers.Linear(width, width, use_bias=False, rngs=rngs)
        self.to_k = layers.Linear(context, width, use_bias=False, rngs=rngs)
        self.to_v = layers.Linear(context, width, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([layers.Linear(width, width, rngs=rngs)])
        self.heads, self.hardware = heads, chips.Hardware()

    def __call__(self, x: Array, context: Array) -> Array:
        q, k, v = (attention.split_heads(y, self.heads) for y in (self.to_q(x), self.to_k(context), self.to_v(context)))
        return self.to_out[0](attention.merge_heads(attention.attend(q, k, v, self.hardware)))


class GEGLU(nnx.Module):
    """Linear layer gated by an exact GELU (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, inputs: int, outputs: int, *, rngs: nnx.Rngs):
        self.proj = layers.Linear(inputs, 2 * outputs, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        y, gate = jnp.split(self.proj(x), 2, axis=-1)
        return y * layers.exact_gelu(gate)


class FeedForward(nnx.Module):
    """A gated layer and a linear one, numbered as in the checkpoint, where 1 is dropout."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.net = nnx.List([GEGLU(width, 4 * width, rngs=rngs), None, layers.Linear(4 * width, width, rngs=rngs)])

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Pre-norm self-attention, cross-attention to the text, and feed-forward."""

    def __init__(self, width: int, context: int, heads: int, *, rngs: nnx.Rngs):
        self.norm1 = layers.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(width, width, heads, rngs=rngs)
        self.norm2 = layers.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(width, context, heads, rngs=rngs)
        self.norm3 = layers.LayerNorm(width, epsilon=1e-5, rngs=rngs)
        self.ff = FeedForward(width, rngs=rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        y = self.norm1(x)
        x = x + self.attn1(y, y)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Transformer(nnx.Module):
    """Transformer blocks over the pixels of a feature map, with a skip connection.

    Several are recomputed in the backward pass from their inputs.
    """

    def __init__(self, width: int, heads: int, depth: int, config: Config, *, rngs: nnx.Rngs):
        self.norm = layers.GroupNorm(config.norm_num_groups, width, epsilon=1e-6, rngs=rngs)
        if config.use_linear_projection:
            self.proj_in, self.proj_out = (layers.Linear(width, width, rngs=rngs) for _ in range(2))
        else:
            self.proj_in, self.proj_out = (nnx.Conv(width, width, (1, 1), rngs=rngs) for _ in range(2))
        build = lambda rngs: TransformerBlock(width, config.cross_attention_dim, heads, rngs=rngs)
        self.transformer_blocks = nnx.List([build(rngs)]) if depth == 1 else layers.stack(build, depth, rngs)

    def __call__(self, x: Array, context: Array) -> Array:
        y = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, x.shape[-1])
        blocks = self.transformer_blocks
        y = (
            layers.scan_layers(blocks, y, context, remat=True)
            if isinstance(blocks, layers.Stack)
            else blocks[0](y, context)
        )
        return x + self.proj_out(y.reshape(x.shape))


class Level(nnx.Module):
    """Residual blocks, `inputs[i] -> width` channels each, and transformers."""

    def __init__(self, inputs: list[int], width: int, config: Config, *, level: int, transformers: int, rngs: nnx.Rngs):
        heads, depth = config.heads[level], config.depths[level]
        groups, eps, time = config.norm_num_groups, config.norm_eps, 4 * config.block_out_channels[0]
        self.resnets = nnx.List(
            [vae.ResnetBlock(n, width, groups=groups, epsilon=eps, time_width=time, rngs=rngs) for n in inputs]
        )
        self.attentions = nnx.List([Transformer(width, heads, depth, config, rngs=rngs) for _ in range(transformers)])


class Downsample(nnx.Module):
    """A convolution of stride 2."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs):
        self.conv = nnx.Conv(channels, channels, (3, 3), (2, 2), padding=1, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.conv(x)


class DownBlock(Level):
    """One resolution on the way down.

    Every residual block and the downsampling give a skip connection.
    """

    def __init__(
        self, inputs: list[int], width: int, config: Config, *, level: int, attends: bool, is_last: bool, rngs: nnx.Rngs
    ):
        super().__init__(inputs, width, config, level=level, transformers=len(inputs) * attends, rngs=rngs)
        self.downsamplers = nnx.List([] if is_last else [Downsample(width, rngs=rngs)])

    def __call__(self, x: Array, time: Array, context: Array) -> tuple[Array, list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if len(self.attentions):
                x = self.attentions[i](x, context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class MidBlock(Level):
    """The lowest resolution: residual block, transformer, residual block."""

    def __init__(self, width: int, config: Config, *, rngs: nnx.Rngs):
        super().__init__([width, width], width, config, level=-1, transformers=1, rngs=rngs)

    def __call__(self, x: Array, time: Array, context: Array) -> Array:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, time), context), time)


class UpBlock(Level):
    """One resolution on the way up; every residual block reads a skip connection."""

    def __init__(
        self, inputs: list[int], width: int, config: Config, *, level: int, attends: bool, is_last: bool, rngs: nnx.Rngs
    ):
        super().__init__(inputs, width, config, level=level, transformers=len(inputs) * attends, rngs=rngs)
        self.upsamplers = nnx.List([] if is_last else [vae.Upsample(width, rngs=rngs)])

    def __call__(self, x: Array, skips: list[Array], time: Array, context: Array, size: tuple | None) -> Array:
        """`skips` are in the order of use.

        `size` is the next resolution's `(h, w)`, None after the last.
        """
        for i, (resnet, skip) in enumerate(zip(self.resnets, skips, strict=True)):
            x = resnet(jnp.concatenate([x, skip], axis=-1), time)
            if len(self.attentions):
                x = self.attentions[i](x, context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNet(nnx.Module):
    """diffusers' `UNet2DConditionModel`: predicts noise or v from latents, timestep and text."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        widths, last = config.block_out_channels, len(config.block_out_channels) - 1
        self.conv_in = nnx.Conv(config.in_channels, widths[0], (3, 3), padding=1, rngs=rngs)
        self.time_embedding = TimeEmbedding(widths[0], 4 * widths[0], rngs=rngs)
        added = config.projection_class_embeddings_input_dim if config.addition_embed_type else None
        self.add_embedding = TimeEmbedding(added, 4 * widths[0], rngs=rngs) if added else None

        skips, down = [widths[0]], []
        for i, (width, kind) in enumerate(zip(widths, config.down_block_types, strict=True)):
            inputs = [skips[-1]] + [width] * (config.layers_per_block - 1)
            attends, is_last = _DOWN_HAS_ATTENTION[kind], i == last
            down.append(DownBlock(inputs, width, config, level=i, attends=attends, is_last=is_last, rngs=rngs))
            skips += [width] * (config.layers_per_block + (not is_last))
        self.down_blocks = nnx.List(down)

        self.mid_block = MidBlock(widths[-1], config, rngs=rngs)

        up, before = [], widths[-1]
        for i, kind in zip(range(last, -1, -1), config.up_block_types, strict=True):
            mains = [before] + [widths[i]] * config.layers_per_block
            inputs = [main + skips.pop() for main in mains]
            attends, before = _UP_HAS_ATTENTION[kind], widths[i]
            up.append(UpBlock(inputs, before, config, level=i, attends=attends, is_last=i == 0, rngs=rngs))
        self.up_blocks = nnx.List(up)

        self.conv_norm_out = layers.GroupNorm(config.norm_num_groups, widths[0], epsilon=config.norm_eps, rngs=rngs)
        # In float32: a generator of one step multiplies what is rounded here by 15.
        self.conv_out = nnx.Conv(widths[0], config.out_channels, (3, 3), padding=1, dtype=jnp.float32, rngs=rngs)
        self.config = config

    @jax.named_scope("unet")
    def __call__(
        self,
        latents: Array,
        timesteps: Array,
        encoder_hidden_states: Array,
        pooled: Array | None = None,
        time_ids: Array | None = None,
    ) -> Array:
        """Predicts noise or v, whichever the checkpoint's scheduler names: float32 `[B, h, w, C]`.

        Args:
            latents: `[B, h, w, C]`, scaled.
            timesteps: `[B]`, in [0, 1000).
            encoder_hidden_states: `[B, T, D]`, the text encoder's states.
            pooled: `[B, P]`, SDXL's pooled text.
            time_ids: `[B, 6]`, SDXL's sizes in pixels, SIZES; None: those of a whole picture of the latents' size.
        """
        config, dtype = self.config, layers.float_dtype(self)
        width, how = (
            config.block_out_channels[0],
            {"flip_sin_to_cos": config.flip_sin_to_cos, "freq_shift": config.freq_shift},
        )
        time = self.time_embedding(timestep_features(timesteps, width, **how).astype(dtype))
        if self.add_embedding is not None:
            if time_ids is None:
                h, w = (8 * n for n in latents.shape[1:3])
                time_ids = jnp.broadcast_to(jnp.array([h, w, 0, 0, h, w], jnp.float32), (len(latents), SIZES))
            sizes = timestep_features(time_ids.reshape(-1), config.addition_time_embed_dim, **how)
            added = jnp.concatenate([pooled.astype(jnp.float32), sizes.reshape(len(latents), -1)], axis=-1)
            time = time + self.add_embedding(added.astype(dtype))
        context = encoder_hidden_states.astype(dtype)

        x = self.conv_in((2 * latents - 1 if config.center_input_sample else latents).astype(dtype))
        skips = [x]
        for block in self.down_blocks:
            x, block_skips = block(x, time, context)
            skips += block_skips
        x = self.mid_block(x, time, context)
        for block in self.up_blocks:
            skips, block_skips = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
            x = block(x, block_skips[::-1], time, context, skips[-1].shape[1:3] if skips else None)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x.astype(jnp.float32))))
