"""T5 v1.1 (Raffel et al. 2020, arXiv 1910.10683), whose layout Flan-T5 has: encoder and decoder.

Laid out as transformers' `T5ForConditionalGeneration`, and `T5EncoderModel` for the encoder alone.
Gated feed-forwards (Shazeer 2020, arXiv 2002.05202), no biases, no factor in attention, whose
logits get a learned bias by the distance of query and key, the same in all layers of a half.

States between the layers grow to tens of thousands, which float16 cannot hold and bfloat16 only
with two digits: they are float32, as norms, softmaxes and logits are, and products have the
weights' dtype.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a T5; the defaults are transformers' (small), but for the gated feed-forward.

    Attributes:
        scale_decoder_outputs: whether the last states are divided by sqrt(d_model) before the head;
            None, as in files that transformers before 5 wrote: if the words are tied.
        lm_head: whether the head is another matrix than the table of words. Not transformers' key:
            a checkpoint has it if it has the tensor.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_decoder_layers: int | None = None
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"
    decoder_start_token_id: int = 0
    n_positions: int = 512  # of texts in training; there is no limit
    tie_word_embeddings: bool = True
    scale_decoder_outputs: bool | None = None
    lm_head: bool = False

    def __post_init__(self):
        if self.hidden_act not in layers.ACTIVATIONS:
            known = ", ".join(f"gated-{name}" for name in layers.ACTIVATIONS)
            raise ValueError(f"feed_forward_proj={self.feed_forward_proj!r} is not implemented; supported: {known}")
        if self.relative_attention_num_buckets % 4:
            raise ValueError(
                f"relative_attention_num_buckets={self.relative_attention_num_buckets} is not implemented; "
                "supported: multiples of 4"
            )

    @property
    def hidden_act(self) -> str:
        """Of layers.ACTIVATIONS; "" for a feed-forward without gates."""
        gated, _, name = self.feed_forward_proj.partition("-")
        return "" if gated != "gated" else "gelu_new" if name == "gelu" else name

    @property
    def output_scale(self) -> float:
        """Factor of the last states before the head."""
        is_scaled = self.tie_word_embeddings if self.scale_decoder_outputs is None else self.scale_decoder_outputs
        return self.d_model**-0.5 if is_scaled else 1.0

    @property
    def max_position_embeddings(self) -> int:
        """As other networks call `n_positions`."""
        return self.n_positions


def buckets(distances: np.ndarray, *, count: int, longest: int, both_ways: bool) -> np.ndarray:
    """The row of the table of biases for each distance, key's position minus query's.

    Half of the rows are for one distance each, the others for ever wider ranges up to `longest`.

    Args:
        distances: int.
        count: of rows.
        longest: distance from which on all share the last row.
        both_ways: whether half of the rows are for keys after the query; else these count as 0.
    """
    rows = count // 2 if both_ways else count
    away = np.abs(distances) if both_ways else np.maximum(-distances, 0)
    exact = rows // 2
    # In float32, as torch: at powers of two the next row begins.
    steps = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact)) / np.float32(math.log(longest / exact))
    wide = exact + (steps * np.float32(rows - exact)).astype(np.int32)
    row = np.where(away < exact, away, np.minimum(wide, rows - 1))
    return row + rows * (distances > 0) if both_ways else row


def position_bias(table: Array, config: Config, length: int, *, is_causal: bool) -> Array:
    """What the distances of `length` tokens add to the logits of all heads: float32 `[1, N, T, T]`.

    `table` is `[rows, N]`. A causal one hides the keys after the query, too.
    """
    distances = np.arange(1 - length, length)
    count, longest = config.relative_attention_num_buckets, config.relative_attention_max_distance
    rows = buckets(distances, count=count, longest=longest, both_ways=not is_causal)
    values = table[rows].astype(jnp.float32)
    if is_causal:
        values = values + attention.mask_bias(distances <= 0)[:, None]
    token = jnp.arange(length)
    return values[token[None, :] - token[:, None] + length - 1].transpose(2, 0, 1)[None]


class Attention(nnx.Module):
    """Multi-head attention to `states`, which for self-attention are those that ask."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        self.q = layers.Linear(config.d_model, inner, use_bias=False, rngs=rngs)
        self.k = layers.Linear(config.d_model, inner, use_bias=False, rngs=rngs)
        self.v = layers.Linear(config.d_model, inner, use_bias=False, rngs=rngs)
        self.o = layers.Linear(inner, config.d_model, use_bias=False, rngs=rngs)
        self.heads, self.hardware = config.num_heads, chips.Hardware()

    def __call__(self, x: Array, states: Array, *biases: Array) -> Array:
        q, k, v = (attention.split_heads(y, self.heads) for y in (self.q(x), self.k(states), self.v(states)))
        # Added here and not once for all layers: it need not be stored for each prompt.
        bias = sum(biases) if biases else None
        return self.o(attention.merge_heads(attention.attend(q, k, v, self.hardware, bias=bias, scale=1.0)))


class SelfAttention(nnx.Module):
    """Pre-norm self-attention with its skip connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.SelfAttention = Attention(config, rngs=rngs)
        self.layer_norm = layers.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, x: Array, *biases: Array) -> Array:
        y = self.layer_norm(x)
        return x + self.SelfAttention(y, y, *biases).astype(x.dtype)


class CrossAttention(nnx.Module):
    """Pre-norm attention to the encoder's states with its skip connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.EncDecAttention = Attention(config, rngs=rngs)
        self.layer_norm = layers.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, x: Array, states: Array, *biases: Array) -> Array:
        return x + self.EncDecAttention(self.layer_norm(x), states, *biases).astype(x.dtype)


class GatedDense(nnx.Module):
    """act(wi_0 x) * (wi_1 x), then wo."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.wi_0 = layers.Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs)
        self.wi_1 = layers.Linear(config.d_model, config.d_ff, use_bias=False, rngs=rngs)
        self.wo = layers.Linear(config.d_ff, config.d_model, use_bias=False, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.wo(layers.ACTIVATIONS[self.act](self.wi_0(x)) * self.wi_1(x))


class FeedForward(nnx.Module):
    """Pre-norm feed-forward with its skip connection."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.DenseReluDense = GatedDense(config, rngs=rngs)
        self.layer_norm = layers.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        return x + self.DenseReluDense(self.layer_norm(x)).astype(x.dtype)


class EncoderBlock(nnx.Module):
    """Self-attention, then the feed-forward."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.layer = nnx.List([SelfAttention(config, rngs=rngs), FeedForward(config, rngs=rngs)])

    def __call__(self, x: Array, *biases: Array) -> Array:
        attend, transform = self.layer
        return transform(attend(x, *biases))


class DecoderBlock(nnx.Module):
    """Self-attention, attention to the encoder, then the feed-forward."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        parts = SelfAttention, CrossAttention, FeedForward
        self.layer = nnx.List([part(config, rngs=rngs) for part in parts])

    def __call__(self, x: Array, bias: Array, states: Array, *states_biases: Array) -> Array:
        attend, read, transform = self.layer
        return transform(read(attend(x, bias), states, *states_biases))


class Half(nnx.Module):
    """A stack of equal blocks, recomputed in the backward pass from their inputs, and the last norm.

    A checkpoint keeps the table of position biases in block 0.
    """

    def __init__(self, config: Config, block: type[nnx.Module], depth: int, *, rngs: nnx.Rngs):
        self.relative_attention_bias = nnx.Embed(config.relative_attention_num_buckets, config.num_heads, rngs=rngs)
        self.block = layers.stack(lambda rngs: block(config, rngs=rngs), depth, rngs)
        self.final_layer_norm = layers.RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, rngs=rngs)
        self.config = config

    def _run(self, x: Array, *args: Array, is_causal: bool) -> Array:
        table = self.relative_attention_bias.embedding[...]
        bias = position_bias(table, self.config, x.shape[1], is_causal=is_causal)
        return self.final_layer_norm(layers.scan_layers(self.block, x.astype(jnp.float32), bias, *args, remat=True))


def _mask_biases(mask: Array | None) -> tuple[Array, ...]:
    return () if mask is None else (attention.mask_bias(mask[:, None, None]),)


class Encoder(Half):
    """Embeddings to states; every token attends to every other."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, EncoderBlock, config.num_layers, rngs=rngs)

    @jax.named_scope("t5_encoder")
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """`[B, T, D]`, and a mask bool `[B, T]` that is False on padding, to states `[B, T, D]`."""
        return self._run(x, *_mask_biases(mask), is_causal=False)


class Decoder(Half):
    """Embeddings to states; a token attends to itself, those before it and the encoder's states."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        depth = config.num_layers if config.num_decoder_layers is None else config.num_decoder_layers
        super().__init__(config, DecoderBlock, depth, rngs=rngs)

    @jax.named_scope("t5_decoder")
    def __call__(self, x: Array, states: Array, states_mask: Array | None = None) -> Array:
        """`[B, T, D]`, states `[B, S, D]` and their mask bool `[B, S]`, to states `[B, T, D]`."""
        return self._run(x, states, *_mask_biases(states_mask), is_causal=True)


class T5Encoder(nnx.Module):
    """transformers' `T5EncoderModel`: the text encoder of SD3, FLUX and PixArt."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.shared = nnx.Embed(config.vocab_size, config.d_model, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.config = config

    def embed(self, input_ids: Array) -> Array:
        """Rows of the table of words: `int32[...] -> [..., D]`."""
        # Indexed directly, as in models/bert.py.
        return self.shared.embedding[...][input_ids]

    def __call__(self, input_ids: Array, mask: Array | None = None) -> Array:
        """`int32[B, T]`, and a mask bool `[B, T]` that is False on padding, to states `[B, T, D]`."""
        return self.encoder(self.embed(input_ids), mask)


class T5(T5Encoder):
    """transformers' `T5ForConditionalGeneration`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        linear = lambda: layers.Linear(config.d_model, config.vocab_size, use_bias=False, rngs=rngs)
        self.lm_head = linear() if config.lm_head else None

    def logits(self, targets: Array, states: Array, states_mask: Array | None = None) -> Array:
        """Logits of each target token given those before it: `int32[B, L]` to float32 `[B, L, V]`.

        Args:
            targets: ids; the decoder reads its start token and all of them but the last.
            states: `[B, S, D]`, of the encoder.
            states_mask: bool `[B, S]`, False on padding.
        """
        start = jnp.full_like(targets[:, :1], self.config.decoder_start_token_id)
        x = self.decoder(self.embed(jnp.concatenate([start, targets[:, :-1]], axis=1)), states, states_mask)
        x = x * jnp.asarray(self.config.output_scale, x.dtype)
        if self.lm_head is None:
            return jnp.einsum("bld,vd->blv", x, self.shared.embedding[...], preferred_element_type=jnp.float32)
        return jnp.einsum("bld,dv->blv", x, self.lm_head.kernel[...], preferred_element_type=jnp.float32)
