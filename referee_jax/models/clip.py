"""CLIP (Radford et al. 2021, arXiv 2103.00020): text and vision tower.

Laid out as transformers' `CLIPModel`. Also text encoders of generators, `CLIPTextModel` and
`CLIPTextModelWithProjection`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`text_config` of a CLIP checkpoint; the defaults are transformers' (B/32)."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = 49407
    projection_dim: int | None = 512  # of TextModelWithProjection; CLIP has `Config.projection_dim`

    def __post_init__(self):
        layers.check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of a CLIP checkpoint; the defaults are transformers' (B/32)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    projection_dim: int | None = 512

    def __post_init__(self):
        layers.check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a `CLIPModel`."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()
    projection_dim: int = 512
    logit_scale_init_value: float = 2.6592


class TowerConfig(Protocol):
    """The config of a tower of equal blocks, CLIP's or SigLIP's."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    layer_norm_eps: float


class Attention(nnx.Module):
    """Multi-head self-attention with separate projections."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.q_proj = layers.Linear(width, width, rngs=rngs)
        self.k_proj = layers.Linear(width, width, rngs=rngs)
        self.v_proj = layers.Linear(width, width, rngs=rngs)
        self.out_proj = layers.Linear(width, width, rngs=rngs)
        self.heads, self.hardware = heads, chips.Hardware()

    def __call__(self, x: Array, tokens: int, is_causal: bool) -> Array:
        q, k, v = (p(x) for p in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(attention.among(q, k, v, self.heads, self.hardware, tokens, is_causal=is_causal))


class MLP(nnx.Module):
    """Two linear layers with an activation between."""

    def __init__(self, width: int, hidden: int, act: str, *, rngs: nnx.Rngs):
        self.fc1 = layers.Linear(width, hidden, rngs=rngs)
        self.fc2 = layers.Linear(hidden, width, rngs=rngs)
        self.act = act

    def __call__(self, x: Array) -> Array:
        return self.fc2(layers.ACTIVATIONS[self.act](self.fc1(x)))


class EncoderLayer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: TowerConfig, *, is_causal: bool, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = layers.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.self_attn = Attention(width, config.num_attention_heads, rngs=rngs)
        self.layer_norm2 = layers.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.mlp = MLP(width, config.intermediate_size, config.hidden_act, rngs=rngs)
        self.is_causal = is_causal

    def __call__(self, x: Array, tokens: int) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), tokens, self.is_causal)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    """A stack of equal blocks; `remat`, whether they are recomputed in the backward pass."""

    def __init__(self, config: TowerConfig, *, is_causal: bool, remat: bool = False, rngs: nnx.Rngs):
        build = lambda rngs: EncoderLayer(config, is_causal=is_causal, rngs=rngs)
        self.layers = layers.stack(build, config.num_hidden_layers, rngs)
        self.is_causal, self.remat = is_causal, remat

    @classmethod
    def of_images(cls, config: TowerConfig, *, rngs: nnx.Rngs) -> "Encoder":
        """A referee's tower; a short one is unrolled, for CPUs, and keeps everything."""
        return cls(config, is_causal=False, remat=not layers.unrolls(config.num_hidden_layers), rngs=rngs)

    def __call__(self, x: Array) -> Array:
        if self.is_causal:
            return layers.scan_layers(self.layers, x, x.shape[1], remat=self.remat)
        return attention.scan_in_tiles(self.layers, x, remat=self.remat)

    def last_two(self, x: Array) -> tuple[Array, Array]:
        """The states after the last block but one, and after the last."""
        blocks, depth = self.layers.layer, self.layers.depth
        first = layers.Stack(jax.tree.map(lambda w: w[:-1], blocks), depth - 1)
        before = layers.scan_layers(first, x, x.shape[1]) if depth > 1 else x
        return before, jax.tree.map(lambda w: w[-1], blocks)(before, x.shape[1])


class TextEmbeddings(nnx.Module):
    """Token plus position embeddings."""

    def __init__(self, vocabulary: int, positions: int, width: int, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position_embedding = nnx.Embed(positions, width, rngs=rngs)

    def __call__(self, input_ids: Array) -> Array:
        return self.token_embedding(input_ids) + self.position_embedding(jnp.arange(input_ids.shape[-1]))


class TextTransformer(nnx.Module):
    """Token ids to per-token states and the state of the end token."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        positions, width = config.max_position_embeddings, config.hidden_size
        self.embeddings = TextEmbeddings(config.vocab_size, positions, width, rngs=rngs)
        self.encoder = Encoder(config, is_causal=True, rngs=rngs)
        self.final_layer_norm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.config = config

    @jax.named_scope("text_encoder")
    def __call__(self, input_ids: Array) -> tuple[Array, Array]:
        """`int32[B, T] -> (states [B, T, D], pooled [B, D])`.

        No padding mask is needed: attention is causal. Raises ValueError if there are more tokens
        than positions.
        """
        states = self.final_layer_norm(self.encoder(self._embedded(input_ids)))
        return states, self._of_end(states, input_ids)

    @jax.named_scope("text_encoder")
    def penultimate(self, input_ids: Array) -> tuple[Array, Array]:
        """As `__call__`, but the states are those before the last block and the final norm."""
        before, states = self.encoder.last_two(self._embedded(input_ids))
        return before, self._of_end(self.final_layer_norm(states), input_ids)

    def _embedded(self, input_ids: Array) -> Array:
        positions = self.config.max_position_embeddings
        if input_ids.shape[-1] > positions:
            raise ValueError(f"{input_ids.shape[-1]} tokens, but CLIP has {positions} positions")
        return self.embeddings(input_ids)

    def end(self, input_ids: Array) -> Array:
        """Position of the end token, `int32[B, T] -> int32[B]`; 1 for an empty text."""
        # Checkpoints saved before transformers 4.31 have eos_token_id 2 and mean the largest id.
        end_token = self.config.eos_token_id
        return jnp.argmax(input_ids == (input_ids.max(-1, keepdims=True) if end_token == 2 else end_token), -1)

    def _of_end(self, states: Array, input_ids: Array) -> Array:
        return jnp.take_along_axis(states, self.end(input_ids)[:, None, None], axis=1)[:, 0]


class TextModel(nnx.Module):
    """transformers' `CLIPTextModel`: the text encoder of Stable Diffusion, and one of SDXL's and FLUX's."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config, rngs=rngs)

    def __call__(self, input_ids: Array) -> Array:
        """`int32[B, T] -> [B, T, D]`: the last hidden states after the final norm."""
        return self.text_model(input_ids)[0]


class TextModelWithProjection(nnx.Module):
    """transformers' `CLIPTextModelWithProjection`: a text encoder of SDXL and of SD3."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config, rngs=rngs)
        self.text_projection = layers.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, input_ids: Array) -> tuple[Array, Array]:
        """`int32[B, T]` to the states before the last block `[B, T, D]`, and the projected end token's `[B, P]`."""
        states, pooled = self.text_model.penultimate(input_ids)
        return states, self.text_projection(pooled)


class VisionEmbeddings(nnx.Module):
    """Class token, patches and positions."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        tokens = (config.image_size // patch) ** 2 + 1
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (width,)) * width**-0.5)
        self.patch_embedding = layers.Patches(3, width, patch, use_bias=False, rngs=rngs)
        self.position_embedding = nnx.Embed(tokens, width, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        x = self.patch_embedding(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (x.shape[0], 1, x.shape[-1]))
        return jnp.concatenate([first, x], axis=1) + self.position_embedding.embedding[...].astype(x.dtype)


class VisionTransformer(nnx.Module):
    """Images to the pooled state of the class token."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        eps = config.layer_norm_eps
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        # The checkpoint's spelling.
        self.pre_layrnorm = layers.LayerNorm(config.hidden_size, epsilon=eps, rngs=rngs)
        self.encoder = Encoder.of_images(config, rngs=rngs)
        self.post_layernorm = layers.LayerNorm(config.hidden_size, epsilon=eps, rngs=rngs)
        self.config = config

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> Array:
        """Normalised images `[B, H, W, 3] -> [B, D]`.

        Raises ValueError if the size is not the checkpoint's.
        """
        layers.check_images(images, self.config.image_size, "CLIP")
        x = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        return self.post_layernorm(x[:, 0])


class CLIP(nnx.Module):
    """transformers' `CLIPModel`: two towers and a common space."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config.text_config, rngs=rngs)
        self.vision_model = VisionTransformer(config.vision_config, rngs=rngs)
        width = config.projection_dim
        self.visual_projection = layers.Linear(config.vision_config.hidden_size, width, use_bias=False, rngs=rngs)
        self.text_projection = layers.Linear(config.text_config.hidden_size, width, use_bias=False, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale_init_value, jnp.float32))
        self.config = config

    def encode_text(self, input_ids: Array) -> Array:
        """`int32[B, T] -> float32[B, D]` of unit length."""
        return layers.unit(self.text_projection(self.text_model(input_ids)[1]))

    def encode_image(self, images: Array) -> Array:
        """Normalised images `[B, H, W, 3]` to float32 `[B, D]` of unit length."""
        images = images.astype(layers.float_dtype(self.vision_model))
        return layers.unit(self.visual_projection(self.vision_model(images)))

    def logits(self, cosines: Array) -> Array:
        """Logits of the training's softmax: cosines divided by the learned temperature."""
        return jnp.exp(self.logit_scale[...]) * cosines
