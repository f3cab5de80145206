"""What the networks share: activations, norms in float32, stacks of equal layers.

Leaves are Flax NNX's `Conv` and `Embed`, and `Linear` and the norms below. A network's attributes
have the names of the checkpoint's parameters, so that weights.convert can fill any network. Modules
are JAX pytrees: pass them as arguments to jit, vmap, grad, scan and shard_map.

Axis letters: B batch (views, latents), H W C image rows, columns, channels, T tokens, N heads, D
width.
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
from jax.ad_checkpoint import checkpoint_name

from referee_jax.hardware import chips


def exact_gelu(x: Array) -> Array:
    """x Phi(x), in float32 by erf, as torch does (jax.nn.gelu's erfc takes a GPU twice as long)."""
    y = x.astype(jnp.float32)
    return (0.5 * y * (1 + jax.lax.erf(y * math.sqrt(0.5)))).astype(x.dtype)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": exact_gelu,
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def check_config(config) -> None:
    """Raises ValueError, naming key and value, if a transformer's config is not implemented."""
    check_activation(config)
    if config.hidden_size % config.num_attention_heads:
        raise ValueError(
            f"hidden_size={config.hidden_size} does not divide into num_attention_heads={config.num_attention_heads}"
        )


def check_images(images: Array, size: int, network: str) -> None:
    """Raises ValueError, naming the `network`, unless `images` are `[B, size, size, 3]`."""
    if images.shape[1:] != (size, size, 3):
        raise ValueError(f"images of shape {images.shape}, but {network} takes [B, {size}, {size}, 3]")


def check_activation(config) -> None:
    """Raises ValueError if the config's `hidden_act` is not implemented here."""
    if config.hidden_act not in ACTIVATIONS:
        raise ValueError(f"hidden_act={config.hidden_act!r} is not implemented; supported: {', '.join(ACTIVATIONS)}")


def keep(x: Array) -> Array:
    """The same, named as what `remat="dots"` stores (POLICIES)."""
    return checkpoint_name(x, chips.KEPT)


class Linear(nnx.Linear):
    """Flax NNX's, whose result is stored with its bias: as a product alone it would be added to again going back."""

    def __call__(self, x: Array) -> Array:
        return keep(super().__call__(x))


def unit(x: Array) -> Array:
    """The vectors along the last axis in float32, each divided by its length."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def repeat(x: Array, batch: int) -> Array:
    """`[B, ...] -> [B, ...]`, or `[1, ...] -> [B, ...]` by repetition."""
    return jnp.broadcast_to(x, (batch, *x.shape[1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def normalise(means: Callable[[Array], Array], epsilon: float, x: Array, scale: Array, bias: Array) -> Array:
    """`n * scale + bias`, where `n` is `x` with mean 0 and variance 1.

    Float32 inside, the dtype of `x` outside. For the backward pass `x` alone is stored in full
    size.

    Args:
        means: averages over the elements that share statistics; its result broadcasts to the shape
            of `x`.
        epsilon: is added to the variance.
        x: `[..., D]`.
        scale, bias: `[D]`.
    """
    return _normalise(means, epsilon, x, scale, bias)[0]


def _normalise(means, epsilon, x, scale, bias):
    y = x.astype(jnp.float32)
    mean = means(y)
    if x.dtype == jnp.bfloat16:
        # Both sums in one pass: the cancellation error is below the rounding error of bfloat16.
        variance = jnp.maximum(means(jnp.square(y)) - jnp.square(mean), 0)
    else:
        variance = means(jnp.square(y - mean))
    rate = jax.lax.rsqrt(variance + epsilon)
    out = (y - mean) * rate * scale.astype(jnp.float32) + bias.astype(jnp.float32)
    return out.astype(x.dtype), (x, mean, rate, scale, bias)


def _normalise_backward(means, epsilon, residuals, gradient):
    x, mean, rate, scale, bias = residuals
    n, gradient = (x.astype(jnp.float32) - mean) * rate, gradient.astype(jnp.float32)
    scaled = gradient * scale.astype(jnp.float32)
    dx = (scaled - means(scaled) - n * means(scaled * n)) * rate
    others = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), (gradient * n).sum(others).astype(scale.dtype), gradient.sum(others).astype(bias.dtype)


normalise.defvjp(_normalise, _normalise_backward)


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, statistics in float32 (torch.nn.LayerNorm)."""

    def __init__(self, features: int, *, epsilon: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        return normalise(of_features, self.epsilon, x, self.scale[...], self.bias[...])


def of_features(x: Array) -> Array:
    """Means over the last axis, for `normalise`."""
    return x.mean(-1, keepdims=True)


class RMSNorm(nnx.Module):
    """Division by the root of the mean square over the last axis, in float32 (Zhang & Sennrich 2019).

    The result has the weights' dtype. Its input may have more digits, as a residual stream in float32 has.
    """

    def __init__(self, features: int, *, epsilon: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        y, scale = x.astype(jnp.float32), self.scale[...]
        rate = jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * rate * scale.astype(jnp.float32)).astype(scale.dtype)


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
    """Means over pixels and a group's channels: `[B, H, W, C] -> [B, 1, 1, C]`.

    Pixels first: one reduction over pixels and part of the channels is slow.
    """
    means = x.mean((-3, -2), keepdims=True)
    split = means.reshape(*means.shape[:-1], groups, -1)
    return jnp.broadcast_to(split.mean(-1, keepdims=True), split.shape).reshape(means.shape)


class Patches(nnx.Conv):
    """A convolution of square patches that do not overlap, without those that are not whole, as a product.

    XLA's gradient of such a convolution is up to a thousand times slower on TPUs, as it dilates what it gets.
    """

    def __init__(self, inputs: int, width: int, side: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        super().__init__(inputs, width, (side, side), (side, side), padding="VALID", use_bias=use_bias, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        """`[B, H, W, C] -> [B, H / side, W / side, D]`."""
        kernel, side = self.kernel[...], self.kernel_size[0]
        height, width = (n // side for n in images.shape[1:3])
        rows = images[:, : height * side, : width * side].reshape(len(images), height, side, width, -1)
        x = jnp.einsum("bhiwk,ikd->bhwd", rows, kernel.reshape(side, -1, kernel.shape[-1]))
        return x if self.bias is None else x + self.bias[...]


def interpolate_positions(table: Array, height: int, width: int) -> Array:
    """Resamples learned positions for another grid: `[1 + n * n, D] -> [1 + height * width, D]`.

    The first is the class token's. Bicubic as in torch.nn.functional.interpolate, whose kernel has
    a = -0.75; that of jax.image.resize has -0.5.
    """
    n = math.isqrt(len(table) - 1)
    if (height, width) == (n, n):
        return table
    grid = table[1:].reshape(n, n, -1).astype(jnp.float32)
    grid = jnp.einsum("hi,wj,ijd->hwd", bicubic(n, height), bicubic(n, width), grid, precision="highest")
    return jnp.concatenate([table[:1], grid.reshape(height * width, -1).astype(table.dtype)])


def bicubic(old: int, new: int) -> np.ndarray:
    """The matrix that resamples a row of pixels, float32 `[new, old]` (Keys 1981, a = -0.75).

    Coordinates are of pixel centres; edges are repeated; no antialiasing.
    """
    a, weights = -0.75, np.zeros((new, old))
    positions = (np.arange(new) + 0.5) * old / new - 0.5
    for step in (-1, 0, 1, 2):
        pixel = np.floor(positions).astype(int) + step
        d = np.abs(positions - pixel)
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * (d**3 - 5 * d**2 + 8 * d - 4)
        np.add.at(weights, (np.arange(new), np.clip(pixel, 0, old - 1)), np.where(d <= 1, near, far))
    return weights.astype(np.float32)


class Stack(nnx.Module):
    """Equal layers as one module whose weights have a leading axis of length `depth`.

    A checkpoint numbers them from 0. `remat`, one of POLICIES, is what `scan_layers` stores for the
    backward pass.
    """

    def __init__(self, layer: nnx.Module, depth: int):
        self.layer, self.depth, self.remat = layer, depth, "full"


class Interleaved(nnx.List):
    """N stacks whose layers alternate: those of the n-th are numbered n, n + N, n + 2 N, ..."""


class Row(nnx.List):
    """Layers and stacks one after another.

    A checkpoint numbers their layers consecutively from 0.
    """

    def first(self, index: int) -> int:
        """The checkpoint's number of the first layer in the part of this index."""
        return sum(part.depth if isinstance(part, Stack) else 1 for part in self[:index])


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Stack:
    """`depth` equal layers for `scan_layers`, each initialised with another key."""
    keys = jax.random.split(rngs.params(), depth)
    return Stack(jax.vmap(lambda key: build(nnx.Rngs(key)))(keys), depth)


# Name -> what is stored of each layer for the backward pass besides its input: nothing; products
# with weights and what a kernel attends, so that only cheap operations are recomputed; or everything.
POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": lambda prim, *args, **params: (
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable(prim, *args, **params)
        or prim.name == chips.CUDNN_FORWARD
        or params.get("name") in (chips.KEPT, chips.SPLASH)
    ),
    "none": jax.checkpoint_policies.everything_saveable,
}
UNROLLED = 8  # layers; from more of them a loop is made, which compiles in the time of one layer


def configured(tree: Any, *, remat: str | None = None, hardware: chips.Hardware | None = None) -> Any:
    """A copy of networks, or of a pytree that holds some, with static fields set.

    None leaves a field as it is.

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
    """Those of a pytree, and those within them."""
    below = [x for x in jax.tree.leaves(tree, is_leaf=lambda x: x is not tree and is_part(x)) if is_part(x)]
    own = [tree] if is_part(tree) else []
    return own + [part for x in below if x is not tree for part in _parts(x, is_part)]


def unrolls(depth: int) -> bool:
    """Whether a loop over so many layers is unrolled: XLA:CPU is half as fast within a loop."""
    return depth <= UNROLLED


def scan_layers(stack: Stack, x: Any, *args, each: Array | None = None, remat: bool = False) -> Any:
    """Applies the layers one after the other, each as `layer(x, *args)`; `x` is an array, or several.

    With `each` `[depth, ...]` a layer's part of it is its last argument. With `remat` only what
    `stack.remat` names is stored for the backward pass.
    """
    xs = (stack.layer,) if each is None else (stack.layer, each)

    def body(x, parts):
        layer, *own = parts
        return layer(x, *args, *own), None

    if not remat:
        return jax.lax.scan(body, x, xs, unroll=unrolls(stack.depth))[0]
    # Not unrolled: XLA:CPU would store what should be recomputed, and compiling a vision tower for
    # a GPU would take minutes. prevent_cse is not needed in a loop: no forward pass is there to be
    # merged with.
    return jax.lax.scan(jax.checkpoint(body, policy=POLICIES[stack.remat], prevent_cse=False), x, xs)[0]


def float_dtype(module: nnx.Module) -> jnp.dtype:
    """The dtype of a network's weights, in which it also computes."""
    # Scalars (logit scales) are always float32.
    return next(x.dtype for x in jax.tree.leaves(module) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating))
