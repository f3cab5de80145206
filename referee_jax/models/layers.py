"""What the networks share: attention, activations, norms in float32, stacks of equal layers.

Leaves are Flax NNX's own (`Linear`, `Conv`, `Embed`) plus the two norms below; a network's attributes carry the names
of the checkpoint's parameters, so that weights.convert can fill any of them. Modules are plain JAX pytrees: pass them
as arguments to jit, vmap, grad, scan and shard_map.

Axis letters: B batch (views, latents), H W C image rows, columns, channels, T tokens, N heads, D width.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
}


def attention(query: Array, key: Array, value: Array, *, bias: Array | None = None, is_causal: bool = False) -> Array:
    """Softmax attention with float32 probabilities: `[B, T, N, D], [B, S, N, D], [B, S, N, D] -> [B, T, N, D]`.

    `bias` is added to the logits and broadcast to `[B, N, T, S]`.
    """
    return jax.nn.dot_product_attention(query, key, value, bias=bias, is_causal=is_causal)


def split_heads(x: Array, heads: int) -> Array:
    """`[B, T, N * D] -> [B, T, N, D]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
    """`[B, T, N, D] -> [B, T, N * D]`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


class LayerNorm(nnx.Module):
    """Layer normalisation over the last axis, statistics in float32 (torch.nn.LayerNorm)."""

    def __init__(self, features: int, *, epsilon: float, rngs: nnx.Rngs):
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.epsilon = epsilon

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        y = y - y.mean(-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class GroupNorm(nnx.Module):
    """Group normalisation of `[B, H, W, C]`, statistics in float32 (torch.nn.GroupNorm)."""

    def __init__(self, groups: int, features: int, *, epsilon: float, rngs: nnx.Rngs):
        if features % groups:
            raise ValueError(f"GroupNorm: {features} channels do not divide into {groups} groups")
        self.scale = nnx.Param(jnp.ones(features))
        self.bias = nnx.Param(jnp.zeros(features))
        self.groups, self.epsilon = groups, epsilon

    def __call__(self, x: Array) -> Array:
        # The mean is subtracted before squaring: E[x^2] - E[x]^2 cancels badly where the mean is large.
        y = x.astype(jnp.float32)
        y = y.reshape(*x.shape[:-1], self.groups, -1)
        axes = (*range(x.ndim - 3, x.ndim - 1), x.ndim)
        y = y - y.mean(axes, keepdims=True)
        y = (y * jax.lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + self.epsilon)).reshape(x.shape)
        return (y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)).astype(x.dtype)


class Stack(nnx.Module):
    """Equal layers as one whose every weight has a leading axis of `depth`; a checkpoint numbers them from 0."""

    def __init__(self, layer: nnx.Module, depth: int):
        self.layer, self.depth = layer, depth


def stack(build: Callable[[nnx.Rngs], nnx.Module], depth: int, rngs: nnx.Rngs) -> Stack:
    """`depth` equal layers for `scan_layers`, each built with a key of its own."""
    keys = jax.random.split(rngs.params(), depth)
    return Stack(jax.vmap(lambda key: build(nnx.Rngs(key)))(keys), depth)


def scan_layers(stack: Stack, x: Array, *args, remat: bool = False, unroll: bool = False) -> Array:
    """`layers[n](... layers[0](x, *args), *args)`; with `remat` the backward pass keeps one layer input each."""

    def body(x, layer):
        return layer(x, *args), None

    return jax.lax.scan(jax.checkpoint(body) if remat else body, x, stack.layer, unroll=unroll)[0]


def float_dtype(module: nnx.Module) -> jnp.dtype:
    """The dtype that a network's weights were loaded in, which is the one it computes in."""
    # Scalars (logit scales) are float32 always.
    return next(x.dtype for x in jax.tree.leaves(module) if x.ndim and jnp.issubdtype(x.dtype, jnp.floating))
