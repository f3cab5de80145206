"""Softmax attention on the kernel that suits the hardware, and the layout of heads.

Axis letters: B batch (views, latents), T queries, S keys and values, N heads, D width.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import PartitionSpec

from referee_jax.hardware import chips
from referee_jax.models import layers

LONG = 256  # queries and keys, at least, for cuDNN: with 77 keys XLA's products were faster
LANES = 128  # of a TPU: blocks of its kernel are multiples
BLOCK = 1024, 512  # queries or keys that its kernel has at once, at most and at least
TILED = 32  # MiB of logits, from more of which tokens are kept in whole tiles; with fewer it took longer
KEPT = 64  # MiB of logits that XLA keeps on a TPU's chip by itself; the kernel is faster from more


def attend(
    query: Array,
    key: Array,
    value: Array,
    hardware: chips.Hardware,
    *,
    bias: Array | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    tokens: int | None = None,
) -> Array:
    """Softmax attention with float32 probabilities, `[B, T, N, D]`.

    Without `bias`, `is_causal` and `scale`, a kernel that stores no probabilities, cuDNN's or JAX's own for
    TPUs, is used if `hardware` has it and the inputs suit it; else, with `hardware.attention_block`, long
    queries are processed in blocks.

    Args:
        query, key, value: `[B, T, N, D], [B, S, N, D], [B, S, N, D]`, of the dtype of the result; keys
            and values may have fewer heads, each of which serves as many queries in a row.
        hardware: what is compiled for.
        bias: is added to the logits, broadcast to `[B, N, T, S]`.
        is_causal: whether a query attends only to itself and what is before it.
        scale: factor of the products of queries and keys; None: D^-1/2.
        tokens: keys that are attended to, the first; None: all.
    """
    count = key.shape[1] if tokens is None else tokens
    if bias is None and not is_causal and scale is None:
        if hardware.splash and _suits_splash(query, key, hardware.group):
            return _splash_in_group(query, key, value, count, hardware.group)
        if count == key.shape[1]:
            if hardware.cudnn and _suits_cudnn(query, key):
                return _cudnn_attention(query, key, value)
            if (blocks := _block_count(query, key, hardware.attention_block)) > 1:
                return _attention_in_blocks(query, key, value, blocks)
    if count < key.shape[1]:
        padding = mask_bias(np.arange(key.shape[1]) < count)[None, None, None]
        bias = padding if bias is None else bias + padding
    return jax.nn.dot_product_attention(query, key, value, bias=bias, is_causal=is_causal, scale=scale)


def _suits_cudnn(query: Array, key: Array) -> bool:
    width, is_long = query.shape[-1], min(query.shape[1], key.shape[1]) >= LONG
    return is_long and query.dtype in (jnp.bfloat16, jnp.float16) and width % 8 == 0 and width <= 128


def _cudnn_attention(query: Array, key: Array, value: Array) -> Array:
    """Unmasked attention by cuDNN; odd lengths are padded and masked.

    cuDNN has no gradient for odd lengths with a bias, and JAX 0.10 mistakes the placeholder of a
    missing bias for one.
    """
    queries, keys = query.shape[1], key.shape[1]
    even = lambda x: jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
    lengths = {}
    if queries % 2 or keys % 2:
        # Computed from the query, so that vmap gives the lengths its axis.
        zero = 0 * query[:, 0, 0, 0].astype(jnp.int32)
        lengths = {"query_seq_lengths": zero + queries, "key_value_seq_lengths": zero + keys}
    x = jax.nn.dot_product_attention(even(query), even(key), even(value), implementation="cudnn", **lengths)
    return x[:, :queries]


def _suits_splash(query: Array, key: Array, group: int) -> bool:
    """Whether the logits are more than XLA keeps on a chip of a group, and the kernel can do it."""
    batch, queries, heads, _ = query.shape
    is_long = min(queries, key.shape[1]) >= BLOCK[1] and _logits(batch, heads, queries, key.shape[1]) > KEPT * group
    is_long &= heads % group == 0
    return is_long and query.dtype == jnp.bfloat16 and query.shape[2:] == key.shape[2:] and query.shape[-1] <= LANES


def _splash_in_group(query: Array, key: Array, value: Array, count: int, group: int) -> Array:
    """The kernel, each device of a group with its part of the heads."""
    attention = functools.partial(_splash_attention, count=count)
    if group == 1:
        return attention(query, key, value)
    heads = PartitionSpec(None, None, chips.MODEL, None)
    how = {"in_specs": (heads,) * 3, "out_specs": heads, "axis_names": {chips.MODEL}, "check_vma": False}
    return jax.shard_map(attention, **how)(query, key, value)


def _splash_attention(query: Array, key: Array, value: Array, *, count: int) -> Array:
    """Attention to the first keys by JAX's kernel for TPUs (Dao et al. 2022, arXiv 2205.14135), lengths padded to its blocks."""
    # Imported here, where there is a TPU: it takes a tenth of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    _, queries, heads, width = query.shape
    (padded, block), (keys, key_block) = _padded(queries), _padded(key.shape[1], in_turn=True)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    q = (q.astype(jnp.float32) * width**-0.5).astype(q.dtype)
    if keys > count:
        # Added keys are told by one more element, of which a query has 1: their logits are the least.
        last, is_added = np.arange(width + 1) == width, np.arange(keys)[:, None] >= count
        q = _pad(q, padded, 1) + last.astype(q.dtype)
        k = _pad(k, keys, 1) + np.where(last & is_added, -1e30, 0).astype(k.dtype)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=_in_turn(keys // key_block) * key_block,
        block_kv_compute=key_block,
        block_q_dkv=block,
        block_kv_dkv=key_block,
        block_kv_dkv_compute=key_block,
        use_fused_bwd_kernel=True,
    )
    mask = splash_mask.MultiHeadMask([splash_mask.FullMask((padded, keys))] * heads)
    shards = {"head_shards": 1, "q_seq_shards": 1}
    attend = splash.make_splash_mha(mask=mask, block_sizes=sizes, residual_checkpoint_name=chips.SPLASH, **shards)
    return jnp.swapaxes(jax.vmap(attend)(_pad(q, padded), k, _pad(v, keys))[:, :, :queries], 1, 2)


def _padded(length: int, *, in_turn: bool = False) -> tuple[int, int]:
    """The least multiple of a block that holds a length, and the block; `in_turn`: of so many that some can be taken in turn."""
    most, least = (size // LANES for size in BLOCK)
    lanes = -(-length // LANES)
    while True:
        block = max(n for n in range(1, most + 1) if lanes % n == 0)
        count = lanes // block
        if block >= least and (not in_turn or count == 1 or _in_turn(count) > 1):
            return lanes * LANES, block * LANES
        lanes += 1


def _in_turn(count: int) -> int:
    """Of so many blocks of keys, how many are loaded at once: products of one beside exponentials of another."""
    return next((n for n in (2, 3) if count % n == 0), 1)


def _pad(x: Array, length: int, elements: int = 0) -> Array:
    """Zeros behind the tokens of `[B, N, T, D]`, and behind the elements of each."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, elements)))


def _logits(batch: int, heads: int, queries: int, keys: int) -> float:
    """MiB of all logits."""
    return 4 * batch * heads * queries * keys / 2**20


def _block_count(query: Array, key: Array, limit: float | None) -> int:
    """Blocks of queries, a power of two, with at most `limit` MiB of logits each."""
    if limit is None:
        return 1
    batch, queries, heads, _ = query.shape
    blocks = 2 ** math.ceil(math.log2(max(1.0, _logits(batch, heads, queries, key.shape[1]) / limit)))
    # XLA by itself keeps logits of up to twice the limit on the chip, with a faster gradient than
    # blocks have.
    return blocks if blocks > 2 and queries % blocks == 0 else 1


def _attention_in_blocks(query: Array, key: Array, value: Array, blocks: int) -> Array:
    """Unmasked attention, one block of queries after the other.

    The backward pass recomputes the probabilities.
    """
    split = query.reshape(query.shape[0], blocks, -1, *query.shape[2:])
    one_block = jax.checkpoint(lambda query: jax.nn.dot_product_attention(query, key, value))
    return jnp.moveaxis(jax.lax.map(one_block, jnp.moveaxis(split, 1, 0)), 0, 1).reshape(query.shape)


def in_tiles(x: Array, heads: int, hardware: chips.Hardware) -> Array:
    """`[B, T, D]` with zeros behind, as many tokens as are whole tiles of the hardware, where they are many; see `among`."""
    batch, tokens, _ = x.shape
    missing = -tokens % hardware.rows if _logits(batch, heads, tokens, tokens) > TILED else 0
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0)))


def scan_in_tiles(stack: layers.Stack, x: Array, *, remat: bool) -> Array:
    """`layers.scan_layers` of layers that attend `among` their tokens, which lie in whole tiles meanwhile."""
    tokens, own = x.shape[1], stack.layer.self_attn
    return layers.scan_layers(stack, in_tiles(x, own.heads, own.hardware), tokens, remat=remat)[:, :tokens]


def among(
    query: Array,
    key: Array,
    value: Array,
    heads: int,
    hardware: chips.Hardware,
    tokens: int,
    *,
    is_causal: bool = False,
) -> Array:
    """Attention of tokens to each other, `[B, T, N * D]`; those from `tokens` on are of `in_tiles`, and not attended to.

    With 257 tokens a TPU's compiler does not keep the softmax in the products beside it, and 264 queries are three times
    128 for the matrix unit: the last ones attend by themselves.
    """
    is_filled = query.shape[1] > tokens
    # Stored in parts, or they would be taken apart again going back.
    stored = layers.keep if is_filled else lambda x: x
    keys, values = (split_heads(stored(x), heads) for x in (key, value))

    def attended(query):
        how = {"is_causal": is_causal, "tokens": tokens}
        return merge_heads(attend(split_heads(stored(query), heads), keys, values, hardware, **how))

    whole = query.shape[1] // LANES * LANES
    if not is_filled or not whole or query.shape[1] - whole > hardware.rows:
        return attended(query)
    return jnp.concatenate([attended(part) for part in (query[:, :whole], query[:, whole:])], axis=1)


def mask_bias(mask: Array) -> Array:
    """The `bias`, float32, for a mask that is True where attention is allowed."""
    # Finite, so that a row that is False throughout has no NaN in its gradient.
    return jnp.where(mask, 0.0, -1e30)


def split_heads(x: Array, heads: int) -> Array:
    """`[B, T, N * D] -> [B, T, N, D]`."""
    return x.reshape(*x.shape[:-1], heads, x.shape[-1] // heads)


def merge_heads(x: Array) -> Array:
    """`[B, T, N, D] -> [B, T, N * D]`."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def frequencies(count: int, theta: float) -> np.ndarray:
    """Of rotary positions, falling from 1 towards 1 / theta: float32 `[count]` (Su et al. 2021, arXiv 2104.09864)."""
    return (1 / theta ** (np.arange(count, dtype=np.float32) / np.float32(count))).astype(np.float32)


def rotate(x: Array, angles: np.ndarray) -> Array:
    """Rotary positions: elements i and i + D / 2 of each head of `[B, T, N, D]` turned by `angles [T, D / 2]`."""
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
