"""BERT (Devlin et al. 2018, arXiv 1810.04805), as in transformers.

A part of BLIP, BLIP-2 and ALIGN. Between self-attention and feed-forward, layers may cross-attend
to other states (BLIP, arXiv 2201.12086, section 3.1). Attention is bidirectional, or causal for a
language-modelling head. The caller chooses the parts (token types, cross-attention, pooler), on
which the configs that share this layout differ.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The sizes in every text_config of a BERT; the defaults are BERT-base."""

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        layers.check_config(self)


class Embeddings(nnx.Module):
    """The norm of words plus positions, and plus token types if the checkpoint has them.

    All tokens are of the first type.
    """

    def __init__(self, config: Config, *, token_types: int, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(token_types, width, rngs=rngs) if token_types else None
        self.LayerNorm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, input_ids: Array) -> Array:
        # Indexed directly: nnx.Embed would compute in the dtype it was built with, not in that of
        # the loaded weights.
        x = self.word_embeddings.embedding[...][input_ids]
        x = x + self.position_embeddings.embedding[...][: input_ids.shape[-1]]
        if self.token_type_embeddings is not None:
            x = x + self.token_type_embeddings.embedding[...][0]
        return self.LayerNorm(x)


class SelfAttention(nnx.Module):
    """Queries of the text; keys and values of `states`, which for self-attention are the text's."""

    def __init__(self, width: int, heads: int, states_width: int, *, rngs: nnx.Rngs):
        self.query = layers.Linear(width, width, rngs=rngs)
        self.key = layers.Linear(states_width, width, rngs=rngs)
        self.value = layers.Linear(states_width, width, rngs=rngs)
        self.heads, self.hardware = heads, chips.Hardware()

    def __call__(self, x: Array, states: Array, bias: Array | None, is_causal: bool) -> Array:
        q, k, v = (attention.split_heads(y, self.heads) for y in (self.query(x), self.key(states), self.value(states)))
        return attention.merge_heads(attention.attend(q, k, v, self.hardware, bias=bias, is_causal=is_causal))


class Output(nnx.Module):
    """Projection, skip connection, then the norm (post-norm)."""

    def __init__(self, config: Config, features: int, *, rngs: nnx.Rngs):
        self.dense = layers.Linear(features, config.hidden_size, rngs=rngs)
        self.LayerNorm = layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)

    def __call__(self, x: Array, residual: Array) -> Array:
        return self.LayerNorm(self.dense(x) + residual)


class Attention(nnx.Module):
    """Attention with its skip connection and norm."""

    def __init__(self, config: Config, states_width: int, *, rngs: nnx.Rngs):
        self.self = SelfAttention(config.hidden_size, config.num_attention_heads, states_width, rngs=rngs)
        self.output = Output(config, config.hidden_size, rngs=rngs)

    def __call__(self, x: Array, states: Array, bias: Array | None = None, is_causal: bool = False) -> Array:
        return self.output(self.self(x, states, bias, is_causal), x)


class Intermediate(nnx.Module):
    """The first half of the feed-forward: to the wider layer."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.dense = layers.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return layers.ACTIVATIONS[self.act](self.dense(x))


class Layer(nnx.Module):
    """Post-norm transformer block; it cross-attends if `states` are given."""

    def __init__(self, config: Config, *, cross_width: int, rngs: nnx.Rngs):
        self.attention = Attention(config, config.hidden_size, rngs=rngs)
        self.crossattention = Attention(config, cross_width, rngs=rngs) if cross_width else None
        self.intermediate = Intermediate(config, rngs=rngs)
        self.output = Output(config, config.intermediate_size, rngs=rngs)

    def __call__(
        self, x: Array, bias: Array | None, is_causal: bool, states: Array | None, states_bias: Array | None
    ) -> Array:
        x = self.attention(x, x, bias, is_causal)
        if states is not None:
            x = self.crossattention(x, states, states_bias)
        return self.output(self.intermediate(x), x)


class Encoder(nnx.Module):
    """A stack of equal blocks, recomputed in the backward pass from their inputs."""

    def __init__(self, config: Config, *, cross_width: int, rngs: nnx.Rngs):
        build = lambda rngs: Layer(config, cross_width=cross_width, rngs=rngs)
        self.layer = layers.stack(build, config.num_hidden_layers, rngs)

    def __call__(self, x: Array, *args) -> Array:
        return layers.scan_layers(self.layer, x, *args, remat=True)


class Pooler(nnx.Module):
    """A layer for the first token's state."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.dense = layers.Linear(config.hidden_size, config.hidden_size, rngs=rngs)

    def __call__(self, states: Array) -> Array:
        return jnp.tanh(self.dense(states[:, 0]))


class Bert(nnx.Module):
    """Token ids to per-token states.

    Args:
        config: the sizes.
        token_types: size of the table of token types; 0: there is none.
        cross_width: width of the states that layers may cross-attend to; 0: no cross-attention.
        pooler: whether the checkpoint has one, which `self.pooler(states)` applies.
    """

    def __init__(
        self, config: Config, *, token_types: int = 0, cross_width: int = 0, pooler: bool = False, rngs: nnx.Rngs
    ):
        self.embeddings = Embeddings(config, token_types=token_types, rngs=rngs)
        self.encoder = Encoder(config, cross_width=cross_width, rngs=rngs)
        self.pooler = Pooler(config, rngs=rngs) if pooler else None
        self.config = config

    @jax.named_scope("bert")
    def __call__(
        self,
        input_ids: Array,
        mask: Array | None = None,
        *,
        states: Array | None = None,
        states_mask: Array | None = None,
        is_causal: bool = False,
    ) -> Array:
        """`int32[B, T] -> [B, T, D]`. Raises ValueError if there are more tokens than positions.

        Args:
            input_ids: int32 `[B, T]`.
            mask: bool `[B, T]`, False on padding.
            states: `[B, S, cross_width]`, for cross-attention.
            states_mask: bool `[B, S]`, False on padding.
            is_causal: whether a token attends only to itself and those before it.
        """
        tokens, positions = input_ids.shape[-1], self.config.max_position_embeddings
        if tokens > positions:
            raise ValueError(f"{tokens} tokens, but this BERT has {positions} positions")
        bias, states_bias = (None if x is None else attention.mask_bias(x[:, None, None]) for x in (mask, states_mask))
        return self.encoder(self.embeddings(input_ids), bias, is_causal, states, states_bias)


class PredictionHeadTransform(nnx.Module):
    """The layer between the last state and the vocabulary."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.dense = layers.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.LayerNorm = layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.LayerNorm(layers.ACTIVATIONS[self.act](self.dense(x)))


class Predictions(nnx.Module):
    """Logits over the vocabulary; the matrix is the table of word embeddings."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.transform = PredictionHeadTransform(config, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(config.vocab_size))

    def __call__(self, x: Array, words: Array) -> Array:
        x = self.transform(x)
        logits = jnp.einsum("btd,vd->btv", x, words.astype(x.dtype), preferred_element_type=jnp.float32)
        return logits + self.bias[...].astype(jnp.float32)


class Head(nnx.Module):
    """The checkpoint's `cls`."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.predictions = Predictions(config, rngs=rngs)


class LMHeadModel(nnx.Module):
    """A causal BERT with a language-modelling head: transformers' `BlipTextLMHeadModel`."""

    def __init__(self, config: Config, *, cross_width: int, rngs: nnx.Rngs):
        self.bert = Bert(config, cross_width=cross_width, rngs=rngs)
        self.cls = Head(config, rngs=rngs)

    def __call__(
        self, input_ids: Array, mask: Array | None = None, *, states: Array, states_mask: Array | None = None
    ) -> Array:
        """`int32[B, T] -> float32[B, T, V]`: logits of the next token."""
        x = self.bert(input_ids, mask, states=states, states_mask=states_mask, is_causal=True)
        return self.cls.predictions(x, self.bert.embeddings.word_embeddings.embedding[...])


def token_losses(logits: Array, input_ids: Array, *, smoothing: float = 0.0) -> Array:
    """`cross_entropy` of tokens after the first: `[B, T, V], int32[B, T] -> float32[B, T - 1]`."""
    return cross_entropy(logits[:, :-1], input_ids[:, 1:], smoothing=smoothing)


# Label smoothing with which BLIP (models/med.py of salesforce/BLIP) and BLIP-2 were trained.
SMOOTHING = 0.1


def cross_entropy(logits: Array, targets: Array, *, smoothing: float = 0.0) -> Array:
    """-log p of each target token: `[B, T, V], int32[B, T] -> float32[B, T]`.

    With label `smoothing` s the target distribution is (1 - s) times the token plus s times the
    uniform one (arXiv 1512.00567).
    """
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    likelihoods = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
    if smoothing:
        likelihoods = (1 - smoothing) * likelihoods + smoothing * log_probs.mean(-1)
    return -likelihoods
