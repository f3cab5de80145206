"""Qwen3-VL's vision tower: a transformer on patches, of which merged blocks become the decoder's tokens.

Patches are ordered in blocks of `spatial_merge_size` squared from the start: block row, block
column, row and column within the block.
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

EPSILON = 1e-6  # of all norms


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of a Qwen3-VL checkpoint; the defaults are transformers'."""

    depth: int = 27
    hidden_size: int = 1152
    hidden_act: str = "gelu_pytorch_tanh"
    intermediate_size: int = 4304
    num_heads: int = 16
    patch_size: int = 16
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    out_hidden_size: int = 3584
    num_position_embeddings: int = 2304
    deepstack_visual_indexes: tuple[int, ...] = (8, 16, 24)
    rope_theta: float = 10000.0

    def __post_init__(self):
        layers.check_activation(self)
        if self.hidden_size % (4 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} does not divide into num_heads={self.num_heads} of a width that is a "
                "multiple of 4"
            )
        if math.isqrt(self.num_position_embeddings) ** 2 != self.num_position_embeddings:
            raise ValueError(f"num_position_embeddings={self.num_position_embeddings} is not a square")
        numbers = self.deepstack_visual_indexes
        if list(numbers) != sorted(set(numbers)) or not all(0 <= n < self.depth for n in numbers):
            raise ValueError(f"deepstack_visual_indexes={numbers} are not rising numbers of depth={self.depth} layers")

    @property
    def side(self) -> int:
        """Pixels along a side of one of the decoder's tokens."""
        return self.patch_size * self.spatial_merge_size


def in_blocks(grid: Array | np.ndarray, merge: int) -> Array | np.ndarray:
    """`[H, W, ...] -> [H * W, ...]`, in blocks of `merge` x `merge`."""
    height, width, *rest = grid.shape
    x = grid.reshape(height // merge, merge, width // merge, merge, *rest)
    return x.swapaxes(1, 2).reshape(height * width, *rest)


def bilinear(old: int, new: int) -> np.ndarray:
    """The matrix that resamples a row linearly, corner onto corner, float32 `[new, old]`."""
    positions = np.arange(new, dtype=np.float32) * np.float32(old - 1) / np.float32(max(new - 1, 1))
    return np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(old, dtype=np.float32)))


class PatchEmbed(nnx.Module):
    """Patches to vectors; the checkpoint's kernel is of two frames, which are equal in a still."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        size = (config.temporal_patch_size, config.patch_size, config.patch_size)
        self.proj = nnx.Conv(3, config.hidden_size, size, size, padding="VALID", rngs=rngs)

    def __call__(self, patches: Array) -> Array:
        """`[..., p, p, 3] -> [..., D]`."""
        kernel = self.proj.kernel[...].astype(jnp.float32).sum(0).astype(patches.dtype)
        return jnp.tensordot(patches, kernel, 3) + self.proj.bias[...]


class Attention(nnx.Module):
    """Self-attention with one matrix for queries, keys and values, and rotary positions."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.qkv = layers.Linear(config.hidden_size, 3 * config.hidden_size, rngs=rngs)
        self.proj = layers.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.heads, self.hardware = config.num_heads, chips.Hardware()

    def __call__(self, x: Array, angles: np.ndarray) -> Array:
        q, k, v = (attention.split_heads(y, self.heads) for y in jnp.split(self.qkv(x), 3, axis=-1))
        q, k = (attention.rotate(y, angles) for y in (q, k))
        return self.proj(attention.merge_heads(attention.attend(q, k, v, self.hardware)))


class MLP(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, out: int, act: str, *, rngs: nnx.Rngs):
        self.linear_fc1 = layers.Linear(width, hidden, rngs=rngs)
        self.linear_fc2 = layers.Linear(hidden, out, rngs=rngs)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return self.linear_fc2(layers.ACTIVATIONS[self.act](self.linear_fc1(x)))


class Block(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1 = layers.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.attn = Attention(config, rngs=rngs)
        self.norm2 = layers.LayerNorm(width, epsilon=EPSILON, rngs=rngs)
        self.mlp = MLP(width, config.intermediate_size, width, config.hidden_act, rngs=rngs)

    def __call__(self, x: Array, angles: np.ndarray) -> Array:
        x = x + self.attn(self.norm1(x), angles)
        return x + self.mlp(self.norm2(x))


class Merger(MLP):
    """Blocks of patches to the decoder's tokens; the norm is of each patch, or of a whole block."""

    def __init__(self, config: VisionConfig, *, of_block: bool, rngs: nnx.Rngs):
        block = config.hidden_size * config.spatial_merge_size**2
        self.norm = layers.LayerNorm(block if of_block else config.hidden_size, epsilon=EPSILON, rngs=rngs)
        super().__init__(block, block, config.out_hidden_size, "gelu", rngs=rngs)
        self.block, self.of_block = block, of_block

    def __call__(self, x: Array) -> Array:
        merge = lambda x: x.reshape(x.shape[0], -1, self.block)
        return super().__call__(self.norm(merge(x)) if self.of_block else merge(self.norm(x)))


class VisionModel(nnx.Module):
    """Images to the decoder's tokens, and to what is added to its first layers (deepstack)."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.patch_embed = PatchEmbed(config, rngs=rngs)
        self.pos_embed = nnx.Embed(config.num_position_embeddings, config.hidden_size, rngs=rngs)
        # One stack up to each layer whose states are looked at, and one of what is left.
        ends = sorted({*(n + 1 for n in config.deepstack_visual_indexes), config.depth})
        build = lambda rngs: Block(config, rngs=rngs)
        depths = np.diff([0, *ends]).tolist()
        self.blocks = layers.Row(layers.stack(build, depth, rngs) for depth in depths)
        self.merger = Merger(config, of_block=False, rngs=rngs)
        self.deepstack_merger_list = nnx.List(
            Merger(config, of_block=True, rngs=rngs) for _ in config.deepstack_visual_indexes
        )
        self.config = config

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> tuple[Array, list[Array]]:
        """Normalised images `[B, H, W, 3]` to `[B, N, D]`, and as much for each of the deepstack layers.

        N counts squares of `config.side` pixels, row by row. Raises ValueError for sides that are no
        multiples of that.
        """
        config, side = self.config, self.config.side
        if images.ndim != 4 or images.shape[1] % side or images.shape[2] % side or images.shape[3] != 3:
            raise ValueError(
                f"images of shape {images.shape}, but Qwen3-VL takes [B, H, W, 3], H and W multiples of {side}"
            )
        size = config.patch_size
        batch, height, width = images.shape[0], images.shape[1] // size, images.shape[2] // size
        x = images.astype(layers.float_dtype(self)).reshape(batch, height, size, width, size, 3)
        x = in_blocks(x.transpose(1, 3, 0, 2, 4, 5), config.spatial_merge_size)  # [patches, B, size, size, 3]
        x = self.patch_embed(x).swapaxes(0, 1) + self._positions(height, width)
        angles, features = self._angles(height, width), []
        for n, stack in enumerate(self.blocks):
            x = layers.scan_layers(stack, x, angles, remat=True)
            if n < len(self.deepstack_merger_list):
                features.append(self.deepstack_merger_list[n](x))
        return self.merger(x), features

    def _positions(self, height: int, width: int) -> Array:
        """Learned positions of a grid of patches, `[height * width, D]`."""
        table = self.pos_embed.embedding[...]
        side = math.isqrt(len(table))
        grid = table.reshape(side, side, -1).astype(jnp.float32)
        grid = jnp.einsum("hi,wj,ijd->hwd", bilinear(side, height), bilinear(side, width), grid, precision="highest")
        return in_blocks(grid, self.config.spatial_merge_size).astype(table.dtype)

    def _angles(self, height: int, width: int) -> np.ndarray:
        """Of the rotary positions, `[height * width, D / 2]` of a head: first by rows, then by columns."""
        quarter = self.config.hidden_size // self.config.num_heads // 4
        frequencies = attention.frequencies(quarter, self.config.rope_theta)
        grid = in_blocks(np.stack(np.indices((height, width)), axis=-1), self.config.spatial_merge_size)
        return (grid[:, :, None].astype(np.float32) * frequencies).reshape(height * width, 2 * quarter)
