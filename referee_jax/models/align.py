"""ALIGN (Jia et al. 2021, arXiv 2102.05918): EfficientNet and BERT.

Laid out as transformers' `AlignModel`. The image tower is EfficientNet-B7 (Tan and Le 2019, arXiv
1905.11946; table 1 scaled by 2.0 in width and 3.1 in depth) without its last convolution, so that
its last stage has the width of the common space. Images may have any size. Batch norms are frozen,
with the statistics of the training.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.models import bert, layers

_STEM = 32  # channels after the first convolution, before they are scaled


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(bert.Config):
    """`text_config` of an ALIGN checkpoint; the defaults are transformers' (BERT-base)."""

    type_vocab_size: int = 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of an ALIGN checkpoint; the defaults are transformers' (B7).

    Tuples have one entry per stage.
    """

    width_coefficient: float = 2.0
    depth_coefficient: float = 3.1
    depth_divisor: int = 8
    kernel_sizes: tuple[int, ...] = (3, 3, 5, 3, 5, 5, 3)
    in_channels: tuple[int, ...] = (32, 16, 24, 40, 80, 112, 192)
    out_channels: tuple[int, ...] = (16, 24, 40, 80, 112, 192, 320)
    depthwise_padding: tuple[int, ...] = ()  # numbers of the blocks with equal padding on all sides
    strides: tuple[int, ...] = (1, 2, 2, 2, 1, 2, 1)
    num_block_repeats: tuple[int, ...] = (1, 2, 2, 3, 3, 4, 1)
    expand_ratios: tuple[int, ...] = (1, 6, 6, 6, 6, 6, 6)
    squeeze_expansion_ratio: float = 0.25
    hidden_act: str = "swish"
    batch_norm_eps: float = 1e-3

    def __post_init__(self):
        layers.check_activation(self)
        stages = len(self.out_channels)
        for name in ("kernel_sizes", "strides", "num_block_repeats", "expand_ratios"):
            if len(getattr(self, name)) != stages:
                raise ValueError(
                    f"{name}={getattr(self, name)} is not implemented; supported: as many as out_channels, {stages}"
                )
        if self.in_channels != (_STEM, *self.out_channels[:-1]):
            raise ValueError(
                f"in_channels={self.in_channels} is not implemented; "
                f"supported: {(_STEM, *self.out_channels[:-1])}, as out_channels says"
            )
        if set(self.strides) - {1, 2}:
            raise ValueError(f"strides={self.strides} is not implemented; supported: 1 and 2")
        if any(size % 2 == 0 for size in self.kernel_sizes):
            raise ValueError(f"kernel_sizes={self.kernel_sizes} is not implemented; supported: odd sizes")

    def channels(self, base: int) -> int:
        """`base` times the width, rounded to a multiple of the divisor, at most 10 % down."""
        scaled, divisor = base * self.width_coefficient, self.depth_divisor
        rounded = max(divisor, int(scaled + divisor / 2) // divisor * divisor)
        return int(rounded + divisor if rounded < 0.9 * scaled else rounded)

    def depth(self, stage: int) -> int:
        """Number of blocks of a stage, scaled by the depth."""
        return math.ceil(self.depth_coefficient * self.num_block_repeats[stage])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of an `AlignModel`."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()
    projection_dim: int = 640
    temperature_init_value: float = 1.0

    def __post_init__(self):
        width = self.vision_config.channels(self.vision_config.out_channels[-1])
        if self.projection_dim != width:
            raise ValueError(
                f"projection_dim={self.projection_dim} is not implemented; supported: {width}, the image tower's width"
            )


class BatchNorm(nnx.Module):
    """Normalisation by the statistics of training (torch.nn.BatchNorm2d in eval mode).

    The result is always float32; callers round it after the activation or the skip connection that
    follows.
    """

    def __init__(self, features: int, *, epsilon: float, rngs: nnx.Rngs):
        self.weight = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.running_mean = nnx.BatchStat(jnp.zeros(features))
        self.running_var = nnx.BatchStat(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        leaves = (self.weight, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, variance = (leaf[...].astype(jnp.float32) for leaf in leaves)
        return (x.astype(jnp.float32) - mean) * (weight * jax.lax.rsqrt(variance + self.epsilon)) + bias


def _convolution(
    old: int,
    new: int,
    size: int,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    groups: int = 1,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """A convolution without bias.

    `padding` is (before, after) on both axes, by default half the size.
    """
    padding = [padding or (size // 2, size // 2)] * 2
    return nnx.Conv(
        old, new, (size, size), stride, padding=padding, feature_group_count=groups, use_bias=False, rngs=rngs
    )


class VisionEmbeddings(nnx.Module):
    """The stem: a convolution of stride 2, padded at the bottom and the right."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.channels(_STEM)
        self.convolution = _convolution(3, width, 3, stride=2, padding=(0, 1), rngs=rngs)
        self.batchnorm = BatchNorm(width, epsilon=config.batch_norm_eps, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, images: Array) -> Array:
        return layers.ACTIVATIONS[self.act](self.batchnorm(self.convolution(images))).astype(images.dtype)


class ExpansionLayer(nnx.Module):
    """A 1 x 1 convolution to more channels."""

    def __init__(self, config: VisionConfig, old: int, new: int, *, rngs: nnx.Rngs):
        self.expand_conv = _convolution(old, new, 1, rngs=rngs)
        self.expand_bn = BatchNorm(new, epsilon=config.batch_norm_eps, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return layers.ACTIVATIONS[self.act](self.expand_bn(self.expand_conv(x))).astype(x.dtype)


class DepthwiseLayer(nnx.Module):
    """A depthwise convolution.

    With stride 2, padding is equal on all sides if `is_square`, else one less before.
    """

    def __init__(self, config: VisionConfig, width: int, size: int, stride: int, is_square: bool, *, rngs: nnx.Rngs):
        padding = None if stride == 1 or is_square else (size // 2 - 1, size // 2)
        self.depthwise_conv = _convolution(width, width, size, stride=stride, padding=padding, groups=width, rngs=rngs)
        self.depthwise_norm = BatchNorm(width, epsilon=config.batch_norm_eps, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return layers.ACTIVATIONS[self.act](self.depthwise_norm(self.depthwise_conv(x))).astype(x.dtype)


class SqueezeExciteLayer(nnx.Module):
    """Weights for the channels, computed from their means (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, config: VisionConfig, width: int, squeezed: int, *, rngs: nnx.Rngs):
        self.reduce = nnx.Conv(width, squeezed, (1, 1), rngs=rngs)
        self.expand = nnx.Conv(squeezed, width, (1, 1), rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        means = x.mean((1, 2), dtype=jnp.float32, keepdims=True).astype(x.dtype)
        return x * jax.nn.sigmoid(self.expand(layers.ACTIVATIONS[self.act](self.reduce(means))))


class FinalBlockLayer(nnx.Module):
    """A 1 x 1 convolution to fewer channels, without an activation."""

    def __init__(self, config: VisionConfig, old: int, new: int, *, rngs: nnx.Rngs):
        self.project_conv = _convolution(old, new, 1, rngs=rngs)
        self.project_bn = BatchNorm(new, epsilon=config.batch_norm_eps, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return self.project_bn(self.project_conv(x))


class Block(nnx.Module):
    """Inverted bottleneck (MBConv) of a `stage`; `number` counts the blocks of the whole tower.

    All but the first of a stage keep size and width and have a skip connection.
    """

    def __init__(self, config: VisionConfig, stage: int, number: int, *, is_first: bool, rngs: nnx.Rngs):
        old = config.channels(config.in_channels[stage] if is_first else config.out_channels[stage])
        new = config.channels(config.out_channels[stage])
        ratio, stride = config.expand_ratios[stage], config.strides[stage] if is_first else 1
        wide, squeezed = ratio * old, max(1, int(old * config.squeeze_expansion_ratio))
        size, is_square = config.kernel_sizes[stage], number in config.depthwise_padding
        self.expansion = ExpansionLayer(config, old, wide, rngs=rngs) if ratio != 1 else None
        self.depthwise_conv = DepthwiseLayer(config, wide, size, stride, is_square, rngs=rngs)
        self.squeeze_excite = SqueezeExciteLayer(config, wide, squeezed, rngs=rngs)
        self.projection = FinalBlockLayer(config, wide, new, rngs=rngs)
        self.is_first = is_first

    def __call__(self, x: Array) -> Array:
        y = x if self.expansion is None else self.expansion(x)
        y = self.projection(self.squeeze_excite(self.depthwise_conv(y)))
        return (y if self.is_first else x + y).astype(x.dtype)


class VisionEncoder(nnx.Module):
    """Stages: in each a first block, then a stack of equal ones.

    Block by block the gradient of B7 takes four times as long to compile. Stacks are recomputed in
    the backward pass: for ten views the states within blocks are 7 GiB, those between them 1.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.blocks, number = layers.Row(), 0
        for stage in range(len(config.out_channels)):
            self.blocks.append(Block(config, stage, number, is_first=True, rngs=rngs))
            number, rest = number + config.depth(stage), config.depth(stage) - 1
            if rest:
                build = lambda rngs, stage=stage: Block(config, stage, -1, is_first=False, rngs=rngs)
                self.blocks.append(layers.stack(build, rest, rngs))

    def __call__(self, x: Array) -> Array:
        for part in self.blocks:
            x = layers.scan_layers(part, x, remat=True) if isinstance(part, layers.Stack) else part(x)
        return x


class VisionModel(nnx.Module):
    """Images to a map of states, and its mean."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.encoder = VisionEncoder(config, rngs=rngs)

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> tuple[Array, Array]:
        """Images `[B, H, W, 3]` in [-1, 1] `-> (states [B, H / 32, W / 32, D], means [B, D])`.

        H / 32 and W / 32 are rounded. Raises ValueError for another number of axes or channels.
        """
        if images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"images of shape {images.shape}, but ALIGN takes [B, H, W, 3]")
        # Not float_dtype(self), as batch norms are always float32.
        states = self.encoder(self.embeddings(images.astype(layers.float_dtype(self.embeddings.convolution))))
        return states, states.mean((1, 2), dtype=jnp.float32)


class ALIGN(nnx.Module):
    """transformers' `AlignModel`: two towers and a common space."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text = config.text_config
        self.text_model = bert.Bert(text, token_types=text.type_vocab_size, pooler=True, rngs=rngs)
        self.vision_model = VisionModel(config.vision_config, rngs=rngs)
        self.text_projection = layers.Linear(text.hidden_size, config.projection_dim, rngs=rngs)
        self.temperature = nnx.Param(jnp.asarray(config.temperature_init_value, jnp.float32))
        self.config = config

    def encode_text(self, input_ids: Array, mask: Array | None = None) -> Array:
        """`int32[B, T]`, and `bool[B, T]`, False on padding, `-> float32[B, D]` of unit length.

        The first token's last state is projected; the checkpoint's pooler is not used.
        """
        return layers.unit(self.text_projection(self.text_model(input_ids, mask)[:, 0]))

    def encode_image(self, images: Array) -> Array:
        """Images `[B, H, W, 3]` in [-1, 1] `-> float32[B, D]` of unit length."""
        return layers.unit(self.vision_model(images)[1])

    def logits(self, cosines: Array) -> Array:
        """Cosines to the logits of the training's softmax (section 4.1), float32."""
        return cosines / self.temperature[...]
