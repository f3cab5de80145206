"""What the networks share: attention, activations, norms in float32, stacks of equal layers.

Leaves are Flax NNX's own (`Linear`, `Conv`, `Embed`) plus the two norms below; a network's attributes carry the names
of the checkpoint's parameters, so that weights.convert can fill any of them. Modules are plain JAX pytrees: pass them
as arguments to jit, vmap, grad, scan and shard_map.

Axis letters: B batch (views, latents), H W C image rows, columns, channels, T tokens, N heads, D width.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from referee_jax.hardware import chips


def exact_gelu(x: Array) -> Array:
    """x Phi(x), computed in float32 by erf, as torch does (jax.nn.gelu's erfc takes a GPU twice the time)."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": exact_gelu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def check_config(config) -> None:
    """Raises ValueError, naming key and value, where a transformer's config says what is not implemented here."""
    check_activation(config)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} does not divide into num_attention_heads={config.num_attention_heads}"
        )


def check_images(images: Array, size: int, network: str) -> None:
    """Raises ValueError, in the name of `network`, unless `images` are `[B, size, size, 3]`."""
    if images.shape[1:] != (size, size, 3):
        raise ValueError(f"images of shape {images.shape}, but {network} takes [B, {size}, {size}, 3]")


def check_activation(config) -> None:
    """Raises ValueError if the config's `hidden_act` is not implemented here."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not implemented; supported: {', '.join(ACTIVATIONS)}")


def unit(x: Array) -> Array:
    """The vectors along the last axis in float32, each divided by its length."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def repeat(x: Array, batch: int) -> Array:
    """`[B, ...]` or, the same for all, `[1, ...] -> [B, ...]`."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalise(means: Callable[[Array], Array], epsilon: float, x: Array, scale: Array, bias: Array) -> Array:
    """`n * scale + bias` of `n`, which is `x` with mean 0 and variance 1; in float32, out in the dtype of `x`.

    `means` are over what shares its statistics, of a shape that broadcasts to that of `x`. Going back, `x` is all that is kept in
    full size, in its own dtype.
    """
    return _normalise(means, epsilon, x, scale, bias)[0]


def _normalise(means, epsilon, x, scale, bias):
    y = x.astype(jnp.float32)
    mean = means(y)
    if x.dtype == jnp.bfloat16:
        # Both sums in one pass. What cancels is less than what eight bits of a number far from 0 have lost.
        variance = jnp.maximum(means(jnp.square(y)) - jnp.square(mean), 0)
    else:
        variance = means(jnp.square(y - mean))
    rate = jax.lax.rsqrt(variance + epsilon)
    out = (y - mean) * rate * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype), (x, mean, rate, scale, bias)


def _denormalise(means, epsilon, kept, gradient):
    x, mean, rate, scale, bias = kept
    n, gradient = (x.astype(jnp.float32) - mean) * rate, gradient.astype(jnp.float32)
    scaled = gradient * scale.astype(jnp.float32)
    dx = (scaled - means(scaled) - n * means(scaled * n)) * rate
    others = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (gradient * n).sum(others).astype(scale.dtype), gradient.sum(others).astype(bias.dtype)


normalise.defvjp(_normalise, _denormalise)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, statistics in float32 (torch.nn.LayerNorm)."""

    def __init__(self, features: int, *, epsilon: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        return normalise(_of_features, self.epsilon, x, self.scale[...], self.bias[...])


def _of_features(x: Array) -> Array:
    return x.mean(-1, keepdims=True)


class GroupNorm(nnx.Module):
    """Group normalisation of `[B, H, W, C]`, statistics in float32 (torch.nn.GroupNorm)."""

    def __init__(self, groups: int, features: int, *, epsilon: float, rngs: nnx.Rngs):
        if features % groups:
            raise ValueError(f"GroupNorm: {features} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: Array) -> Array:
        means = functools.partial(_of_groups, self.groups)
        return normalise(means, self.epsilon, x, self.scale[...], self.bias[...])


def _of_groups(groups: int, x: Array) -> Array:
    """Means over the pixels and the channels of each group, for each of its channels: `[B, H, W, C] -> [B, 1, 1, C]`.

    Over the pixels first, whose channels lie side by side: a reduction over part of the channels as well is slow.
    """
    means = x.mean((-3, -2), keepdims=True)
    split = means.reshape(*means.shape[:-1], groups, -1)
    return jnp.broadcast_to(split.mean(-1, keepdims=True), split.shape).reshape(means.shape)


def interpolate_positions(table: Array, height: int, width: int) -> Array:
    """Learned positions `[1 + n * n, D]` of a class token and a square grid, for another grid: `[1 + height * width, D]`.

    Bicubic as torch.nn.functional.interpolate: its kernel has a = -0.75 where jax.image.resize has -0.5.
    """
    n = math.isqrt(len(table) - 1)
    if (height, width) == (n, n):
        return table
    grid = table[1:].reshape(n, n, -1).astype(jnp.float32)
    grid = jnp.einsum("hi,wj,ijd->hwd", bicubic(n, height), bicubic(n, width), grid, precision="highest")
    return jnp.concatenate([table[:1], grid.reshape(height * width, -1).astype(table.dtype)])


def bicubic(old: int, new: int) -> np.ndarray:
    """float32 `[new, old]`: a row's resampling about pixel centres, edges repeated, no antialiasing (Keys 1981, a = -0.75)."""
    a, weights = -0.75, np.zeros((new, old))
    at = (np.arange(new) + 0.5) * old / new - 0.5
    for step in (-1, 0, 1, 2):
        pixel = np.floor(at).astype(int) + step
        d = np.abs(at - pixel)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(pixel, 0, old - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


class Stack(nnx.Module):
    """Equal layers as one whose every weight has a leading axis of `depth`; a checkpoint numbers them from 0.

    `remat` is one of POLICIES, for layers that may be made again in the backward pass.
    """

    def __init__(self, layer: nnx.Module, depth: int):
        self.layer, self.depth, self.remat = layer, depth, "full"


class Interleaved(nnx.List):
    """Stacks of layers that take turns: of N, the checkpoint numbers the n-th's layers n, n + N, n + 2 N, ..."""


class Row(nnx.List):
    """Layers and stacks of equal layers one after another; a checkpoint numbers them all, as single layers, from 0."""

    def first(self, at: int) -> int:
        """The checkpoint's number of the first layer in the part `at`."""
        return sum(part.depth if isinstance(part, Stack) else 1 for part in self[:at])


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Stack:
    """`depth` equal layers for `scan_layers`, each built with a key of its own."""
    keys = jax.random.split(rngs.params(), depth)
    return Stack(jax.vmap(lambda key: build(nnx.Rngs(key)))(keys), depth)


# Name -> what is kept of each layer for the backward pass besides its input: nothing; the results of products with weights and
# of cuDNN's attention, so that only what is cheap is made again; or all.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": lambda prim, *args, **params: (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *args, **params)
        or prim.name == chips.CUDNN_FORWARD
    ),
    "none": jax.checkpoint_policies.everything_saveable,
}
UNROLLED = 8  # layers; where there are more, a loop compiles in the time of one


def configured(tree: Any, *, remat: str | None = None, hardware: chips.Hardware | None = None) -> Any:
    """A copy of networks, or of a pytree that holds some, with static fields set; None leaves a field as it is.

    Args:
        tree: the networks; weights are shared with the copy.
        remat: which of POLICIES all stacks of layers follow.
        hardware: what all modules with a field `hardware` are compiled for.
    """
    copy = jax.tree.map(lambda x: x, tree)
    if remat is not None:
        for stack in _parts(copy, lambda x: isinstance(x, Stack)):
            stack.remat = remat
    if hardware is not None:
        for module in _parts(copy, lambda x: hasattr(x, "hardware")):
            module.hardware = hardware
    return copy


def _parts(tree: Any, is_part: Callable[[Any], bool]) -> list[Any]:
    return [x for x in jax.tree.leaves(tree, is_leaf=is_part) if is_part(x)]


def unrolls(depth: int) -> bool:
    """Whether so many layers are written out one after the other: XLA:CPU works at half its speed within a loop."""
    return depth <= UNROLLED


def scan_layers(stack: Stack, x: Array, *args, remat: bool = False) -> Array:
    """`layers[n](... layers[0](x, *args), *args)`; with `remat` the backward pass keeps what `stack.remat` says."""

    def body(x, layer):
        return layer(x, *args), None

    if not remat:
        return jax.lax.scan(body, x, stack.layer, unroll=unrolls(stack.depth))[0]
    # Unrolled, XLA:CPU would keep what is to be made again, and a GPU's compiler takes minutes for a vision tower. In a loop
    # nothing of the forward pass is there to be merged with.
    return jax.lax.scan(jax.checkpoint(body, policy=POLICIES[stack.remat], prevent_cse=False), x, stack.layer)[0]


def float_dtype(module: nnx.Module) -> jnp.dtype:
    """The dtype that a network's weights were loaded in, which is the one it computes in."""
    # Scalars (logit scales) are float32 always.
    return next(x.dtype for x in jax.tree.leaves(module) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating))
