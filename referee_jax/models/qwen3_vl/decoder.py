"""Qwen3-VL's decoder, and the whole network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, layers
from referee_jax.models.qwen3_vl import packing as packing_lib
from referee_jax.models.qwen3_vl import vision


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`text_config` of a Qwen3-VL checkpoint; the defaults are transformers'."""

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    hidden_act: str = "silu"
    max_position_embeddings: int = 128000
    rms_norm_eps: float = 1e-6
    rope_theta: float = 500000.0
    mrope_section: tuple[int, ...] = (24, 20, 20)  # frequencies of time, rows and columns

    def __post_init__(self):
        layers.check_activation(self)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope_section={self.mrope_section} are not three that add up to head_dim={self.head_dim} / 2"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a `Qwen3VLForConditionalGeneration`."""

    text_config: TextConfig = TextConfig()
    vision_config: vision.VisionConfig = vision.VisionConfig(out_hidden_size=4096)
    tie_word_embeddings: bool = False

    def __post_init__(self):
        width, out = self.text_config.hidden_size, self.vision_config.out_hidden_size
        if out != width:
            raise ValueError(f"vision_config.out_hidden_size={out} is not text_config.hidden_size={width}")
        deepstack, depth = self.vision_config.deepstack_visual_indexes, self.text_config.num_hidden_layers
        if len(deepstack) > depth:
            raise ValueError(f"deepstack_visual_indexes={deepstack} are more than num_hidden_layers={depth}")


def interleaved(positions: np.ndarray, config: TextConfig) -> np.ndarray:
    """Angles of the rotary positions `[3, S]`: float32 `[S, D / 2]` of a head.

    Frequencies take turns: time, rows, columns, time, ...; when the sections of rows and columns are
    used up, the rest is time's.
    """
    frequencies = attention.frequencies(config.head_dim // 2, config.rope_theta)
    number = np.arange(len(frequencies))
    axis = np.zeros_like(number)
    for n in (1, 2):
        axis[(number % 3 == n) & (number < 3 * config.mrope_section[n])] = n
    return positions.astype(np.float32)[axis].T * frequencies


class Attention(nnx.Module):
    """Self-attention in which groups of heads share keys and values; queries and keys are normed."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        own, shared = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = layers.Linear(width, own, use_bias=False, rngs=rngs)
        self.k_proj = layers.Linear(width, shared, use_bias=False, rngs=rngs)
        self.v_proj = layers.Linear(width, shared, use_bias=False, rngs=rngs)
        self.o_proj = layers.Linear(own, width, use_bias=False, rngs=rngs)
        self.q_norm = layers.RMSNorm(config.head_dim, epsilon=eps, rngs=rngs)
        self.k_norm = layers.RMSNorm(config.head_dim, epsilon=eps, rngs=rngs)
        self.heads, self.shared = config.num_attention_heads, config.num_key_value_heads
        self.hardware = chips.Hardware()

    def __call__(self, x: Array, angles: np.ndarray, bias: Array) -> Array:
        query = attention.rotate(self.q_norm(attention.split_heads(self.q_proj(x), self.heads)), angles)
        key = attention.rotate(self.k_norm(attention.split_heads(self.k_proj(x), self.shared)), angles)
        value = attention.split_heads(self.v_proj(x), self.shared)
        return self.o_proj(attention.merge_heads(attention.attend(query, key, value, self.hardware, bias=bias)))


class MLP(nnx.Module):
    """Two linear layers, gated by a third."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, hidden = config.hidden_size, config.intermediate_size
        self.gate_proj = layers.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.up_proj = layers.Linear(width, hidden, use_bias=False, rngs=rngs)
        self.down_proj = layers.Linear(hidden, width, use_bias=False, rngs=rngs)
        self.act = config.hidden_act

    def __call__(self, x: Array) -> Array:
        return self.down_proj(layers.ACTIVATIONS[self.act](self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Pre-norm transformer block; `extra` is added to its result."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = layers.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.self_attn = Attention(config, rngs=rngs)
        self.post_attention_layernorm = layers.RMSNorm(width, epsilon=eps, rngs=rngs)
        self.mlp = MLP(config, rngs=rngs)

    def __call__(self, x: Array, angles: np.ndarray, bias: Array, extra: Array | None = None) -> Array:
        x = x + self.self_attn(self.input_layernorm(x), angles, bias)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x if extra is None else x + extra


class TextModel(nnx.Module):
    """Embeddings of a packed sequence to its last states."""

    def __init__(self, config: TextConfig, deepstack: int, *, rngs: nnx.Rngs):
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        # Those to which features of the picture are added, and the rest.
        build = lambda rngs: DecoderLayer(config, rngs=rngs)
        depths = deepstack, config.num_hidden_layers - deepstack
        self.layers = layers.Row(layers.stack(build, depth, rngs) for depth in depths if depth)
        self.norm = layers.RMSNorm(config.hidden_size, epsilon=config.rms_norm_eps, rngs=rngs)
        self.config = config

    @jax.named_scope("decoder")
    def __call__(self, x: Array, packing: packing_lib.Packing, features: list[Array]) -> Array:
        """`[B, S, D]` to the normed states `[B, S, D]`.

        `features` `[B, N, D]` are added to the image tokens behind the first layers, one for each.
        """
        angles = interleaved(packing.positions, self.config)
        bias = attention.mask_bias(packing.allowed)[None, None]
        stacks = list(self.layers)
        if features:
            behind = x.shape[1] - packing.image.stop
            extra = jnp.pad(jnp.stack(features), ((0, 0), (0, 0), (packing.image.start, behind), (0, 0)))
            x = layers.scan_layers(stacks.pop(0), x, angles, bias, each=extra, remat=True)
        for stack in stacks:
            x = layers.scan_layers(stack, x, angles, bias, remat=True)
        return self.norm(x)


class Model(nnx.Module):
    """Both towers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.visual = vision.VisionModel(config.vision_config, rngs=rngs)
        deepstack = len(config.vision_config.deepstack_visual_indexes)
        self.language_model = TextModel(config.text_config, deepstack, rngs=rngs)


class Qwen3VL(nnx.Module):
    """transformers' `Qwen3VLForConditionalGeneration`, for one still and several questions about it."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text = config.text_config
        self.model = Model(config, rngs=rngs)
        is_tied = config.tie_word_embeddings
        self.lm_head = None if is_tied else layers.Linear(text.hidden_size, text.vocab_size, use_bias=False, rngs=rngs)
        self.config = config

    def embed(self, input_ids: Array) -> Array:
        """`int32[...] -> [..., D]`."""
        return self.model.language_model.embed_tokens(input_ids)

    def next_logits(self, images: Array, before: Array, questions: Array, last: Array) -> Array:
        """Logits of the token that follows each question, float32 `[B, Q, vocabulary]`.

        Args:
            images: `[B, H, W, 3]`, normalised with the checkpoint's mean and std.
            before: `[P, D]`, embeddings of what comes before the image tokens.
            questions: `[Q, T, D]`, embeddings of what comes after them: of Q questions, each of which
                is answered as if it were alone.
            last: int32[Q], the number of each question's last token; those behind it are padding.
        """
        tokens, features = self.model.visual(images)
        side = self.config.vision_config.side
        count, length, width = questions.shape
        packing = packing_lib.pack(len(before), images.shape[1] // side, images.shape[2] // side, count, length)
        repeat = lambda x: layers.repeat(x.reshape(1, -1, width).astype(tokens.dtype), len(images))
        x = jnp.concatenate([repeat(before), tokens, repeat(questions)], axis=1)
        states = self.model.language_model(x, packing, features)
        # Only what is read is multiplied with the table of words.
        states = states[:, packing.image.stop + jnp.arange(count) * length + last]
        if self.lm_head is None:
            table = self.model.language_model.embed_tokens.embedding[...]
            return jnp.einsum("bqd,vd->bqv", states, table, preferred_element_type=jnp.float32)
        return jnp.einsum("bqd,dv->bqv", states, self.lm_head.kernel[...], preferred_element_type=jnp.float32)
