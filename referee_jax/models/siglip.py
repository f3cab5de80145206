"""SigLIP (Zhai et al. 2023, arXiv 2303.15343) and SigLIP 2 of fixed resolution.

SigLIP 2 is Tschannen et al. 2025, arXiv 2502.14786. Laid out as transformers' `SiglipModel`. Two
towers of CLIP's blocks. The vision tower has no class token: a learned query attends to the
patches. Attention in the text is bidirectional and without a mask, so that padding is part of the
text; its last token is projected. The logits have a bias, since each pair is classified by itself.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, clip, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig:
    """`text_config` of a SigLIP checkpoint; the defaults are transformers' (B/16)."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6
    projection_size: int | None = None  # width of the features; None: hidden_size

    def __post_init__(self):
        layers.check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of a SigLIP checkpoint; the defaults are transformers' (B/16)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self):
        layers.check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a `SiglipModel`."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()

    def __post_init__(self):
        text = self.text_config.projection_size or self.text_config.hidden_size
        if text != self.vision_config.hidden_size:
            raise ValueError(
                f"text_config.projection_size={text} is not implemented with another vision_config.hidden_size, "
                f"{self.vision_config.hidden_size}: texts and images are compared"
            )


class TextTransformer(nnx.Module):
    """Token ids to the feature of the last token."""

    def __init__(self, config: TextConfig, *, rngs: nnx.Rngs):
        width, positions = config.hidden_size, config.max_position_embeddings
        self.embeddings = clip.TextEmbeddings(config.vocab_size, positions, width, rngs=rngs)
        self.encoder = clip.Encoder(config, is_causal=False, rngs=rngs)
        self.final_layer_norm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.head = layers.Linear(width, config.projection_size or width, rngs=rngs)
        self.config = config

    @jax.named_scope("text_encoder")
    def __call__(self, input_ids: Array) -> Array:
        """`int32[B, T] -> [B, D]`. Raises ValueError unless T is the number of positions."""
        tokens, positions = input_ids.shape[-1], self.config.max_position_embeddings
        if tokens != positions:
            raise ValueError(f"{tokens} tokens, but SigLIP reads texts padded to {positions}")
        states = self.encoder(self.embeddings(input_ids))
        return self.head(self.final_layer_norm(states[:, -1]))


class VisionEmbeddings(nnx.Module):
    """Patches and positions.

    Pixels at the right and bottom that do not fill a patch are ignored.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        self.patch_embedding = layers.Patches(3, width, patch, rngs=rngs)
        self.position_embedding = nnx.Embed((config.image_size // patch) ** 2, width, rngs=rngs)

    def __call__(self, images: Array) -> Array:
        x = self.patch_embedding(images)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        return x + self.position_embedding.embedding[...].astype(x.dtype)


class PoolingAttention(nnx.Module):
    """Attention of a query to the tokens, with torch.nn.MultiheadAttention's parameters."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        # The matrices for queries, keys and values, stacked along the first axis.
        self.in_proj_weight = nnx.Param(jax.random.normal(rngs.params(), (3 * width, width)) * width**-0.5)
        self.in_proj_bias = nnx.Param(jnp.zeros(3 * width))
        self.out_proj = layers.Linear(width, width, rngs=rngs)
        self.heads, self.hardware = heads, chips.Hardware()

    def __call__(self, query: Array, x: Array) -> Array:
        """`[B, Q, D], [B, T, D] -> [B, Q, D]`."""
        weights, biases = (jnp.split(p[...], 3) for p in (self.in_proj_weight, self.in_proj_bias))
        q, k, v = (
            attention.split_heads(y @ weight.T + bias, self.heads)
            for y, weight, bias in zip((query, x, x), weights, biases, strict=True)
        )
        return self.out_proj(attention.merge_heads(attention.attend(q, k, v, self.hardware)))


class PoolingHead(nnx.Module):
    """A learned query attends to the tokens ("MAP head")."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width = config.hidden_size
        self.probe = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)))
        self.attention = PoolingAttention(width, config.num_attention_heads, rngs=rngs)
        self.layernorm = layers.LayerNorm(width, epsilon=config.layer_norm_eps, rngs=rngs)
        self.mlp = clip.MLP(width, config.intermediate_size, config.hidden_act, rngs=rngs)

    def __call__(self, x: Array) -> Array:
        """`[B, T, D] -> [B, D]`."""
        probe = jnp.broadcast_to(self.probe[...].astype(x.dtype), (len(x), 1, x.shape[-1]))
        x = self.attention(probe, x)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class VisionTransformer(nnx.Module):
    """Images to their pooled state."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.encoder = clip.Encoder.of_images(config, rngs=rngs)
        self.post_layernorm = layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.head = PoolingHead(config, rngs=rngs)
        self.config = config

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> Array:
        """Normalised images `[B, H, W, 3] -> [B, D]`.

        Raises ValueError if the size is not the checkpoint's.
        """
        layers.check_images(images, self.config.image_size, "SigLIP")
        return self.head(self.post_layernorm(self.encoder(self.embeddings(images))))


class SigLIP(nnx.Module):
    """transformers' `SiglipModel`: two towers and a common space."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.text_model = TextTransformer(config.text_config, rngs=rngs)
        self.vision_model = VisionTransformer(config.vision_config, rngs=rngs)
        # Initial values of the training (section 3.2 of the paper).
        self.logit_scale = nnx.Param(jnp.log(jnp.full(1, 10.0)))
        self.logit_bias = nnx.Param(jnp.full(1, -10.0))
        self.config = config

    def encode_text(self, input_ids: Array) -> Array:
        """`int32[B, T] -> float32[B, D]` of unit length.

        T is the checkpoint's number of positions.
        """
        return layers.unit(self.text_model(input_ids))

    def encode_image(self, images: Array) -> Array:
        """Normalised images `[B, H, W, 3]` to float32 `[B, D]` of unit length."""
        return layers.unit(self.vision_model(images.astype(layers.float_dtype(self.vision_model))))

    def logits(self, cosines: Array) -> Array:
        """Logits of the probability that text and image belong together."""
        return jnp.exp(self.logit_scale[0]) * cosines + self.logit_bias[0]
