"""BLIP (Li et al. 2022, arXiv 2201.12086): a vision tower, and a BERT that reads the image.

Laid out as in transformers. Three networks: whether a text matches the image
(`ImageTextRetrieval`), how likely it is as a caption (`ConditionalGeneration`), the first token of
the answer to a question (`QuestionAnswering`). As in the authors' code, padding of a question is
masked in the decoder, too; transformers 5 drops that mask.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, bert, clip, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(bert.Config):
    """`text_config` of a BLIP checkpoint; the defaults are transformers'."""

    vocab_size: int = 30524
    num_attention_heads: int = 8
    bos_token_id: int = 30522  # [DEC], the decoder's first token; [ENC] is the next id


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of a BLIP checkpoint; the defaults are transformers' (B/16)."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    image_size: int = 384
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        layers.check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of all three networks."""

    text_config: TextConfig = TextConfig()
    vision_config: VisionConfig = VisionConfig()
    image_text_hidden_size: int = 256  # width of the common space of image and text


class VisionEmbeddings(nnx.Module):
    """Class token, patches and positions; positions are resampled for images of another size.

    `bias`: whether the patches have one.
    """

    def __init__(self, config: VisionConfig, *, bias: bool = True, rngs: nnx.Rngs):
        width, patch = config.hidden_size, config.patch_size
        tokens = (config.image_size // patch) ** 2 + 1
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (1, 1, width)))
        self.patch_embedding = layers.Patches(3, width, patch, use_bias=bias, rngs=rngs)
        self.position_embedding = nnx.Param(jax.random.normal(rngs.params(), (1, tokens, width)))

    def __call__(self, images: Array) -> Array:
        x = self.patch_embedding(images)
        b, h, w, d = x.shape
        first = jnp.broadcast_to(self.class_embedding[...].astype(x.dtype), (b, 1, d))
        positions = layers.interpolate_positions(self.position_embedding[...][0], h, w)
        return jnp.concatenate([first, x.reshape(b, h * w, d)], axis=1) + positions.astype(x.dtype)


class VisionAttention(nnx.Module):
    """Self-attention with one matrix, and a `bias` or none, for queries, keys, values."""

    def __init__(self, config: VisionConfig, *, bias: bool = True, rngs: nnx.Rngs):
        self.qkv = layers.Linear(config.hidden_size, 3 * config.hidden_size, use_bias=bias, rngs=rngs)
        self.projection = layers.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.heads, self.hardware = config.num_attention_heads, chips.Hardware()

    def __call__(self, x: Array, tokens: int) -> Array:
        q, k, v = jnp.split(self.qkv(x), 3, axis=-1)
        return self.projection(attention.among(q, k, v, self.heads, self.hardware, tokens))


class VisionLayer(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionConfig, *, bias: bool = True, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        self.layer_norm1 = layers.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.self_attn = VisionAttention(config, bias=bias, rngs=rngs)
        self.layer_norm2 = layers.LayerNorm(width, epsilon=eps, rngs=rngs)
        self.mlp = clip.MLP(width, config.intermediate_size, config.hidden_act, rngs=rngs)

    def __call__(self, x: Array, tokens: int) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), tokens)
        return x + self.mlp(self.layer_norm2(x))


class VisionEncoder(nnx.Module):
    """A stack of equal blocks; `bias`: whether queries, keys and values have one.

    Blocks are recomputed in the backward pass: the inner states of ten views are gigabytes per
    prompt.
    """

    def __init__(self, config: VisionConfig, *, bias: bool = True, rngs: nnx.Rngs):
        build = lambda rngs: VisionLayer(config, bias=bias, rngs=rngs)
        self.layers = layers.stack(build, config.num_hidden_layers, rngs)

    def __call__(self, x: Array) -> Array:
        return attention.scan_in_tiles(self.layers, x, remat=True)


class VisionModel(nnx.Module):
    """Images to the states of the class token and the patches."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.encoder = VisionEncoder(config, rngs=rngs)
        self.post_layernorm = layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.config = config

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> Array:
        """Normalised images `[B, H, W, 3] -> [B, S, D]`, S = 1 + patches.

        Raises ValueError if the sides are no multiples of the patch size.
        """
        patch = self.config.patch_size
        if images.ndim != 4 or images.shape[1] % patch or images.shape[2] % patch or images.shape[3] != 3:
            raise ValueError(
                f"images of shape {images.shape}, but BLIP takes [B, H, W, 3] in patches of {patch} pixels"
            )
        return self.post_layernorm(self.encoder(self.embeddings(images.astype(layers.float_dtype(self)))))


class ImageTextRetrieval(nnx.Module):
    """transformers' `BlipForImageTextRetrieval`: matching (ITM) and contrast (ITC)."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text, vision = config.text_config.hidden_size, config.vision_config.hidden_size
        self.vision_model = VisionModel(config.vision_config, rngs=rngs)
        self.text_encoder = bert.Bert(config.text_config, cross_width=vision, rngs=rngs)
        self.vision_proj = layers.Linear(vision, config.image_text_hidden_size, rngs=rngs)
        self.text_proj = layers.Linear(text, config.image_text_hidden_size, rngs=rngs)
        self.itm_head = layers.Linear(text, 2, rngs=rngs)
        self.config = config

    def match(self, states: Array, input_ids: Array, mask: Array) -> Array:
        """`[B, S, D], int32[B, T], bool[B, T]` to logits of (no match, match), float32 `[B, 2]`."""
        x = self.text_encoder(input_ids, mask, states=states)
        return self.itm_head(x[:, 0].astype(jnp.float32))

    def image_features(self, states: Array) -> Array:
        """The vision tower's states `[B, S, D]` to float32 `[B, D']` of unit length."""
        return layers.unit(self.vision_proj(states[:, 0].astype(jnp.float32)))

    def text_features(self, input_ids: Array, mask: Array) -> Array:
        """`int32[B, T], bool[B, T]` to float32 `[B, D']` of unit length, without the image."""
        return layers.unit(self.text_proj(self.text_encoder(input_ids, mask)[:, 0].astype(jnp.float32)))


class ConditionalGeneration(nnx.Module):
    """transformers' `BlipForConditionalGeneration`: captions."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        self.vision_model = VisionModel(config.vision_config, rngs=rngs)
        self.text_decoder = bert.LMHeadModel(
            config.text_config, cross_width=config.vision_config.hidden_size, rngs=rngs
        )
        self.config = config

    def token_losses(
        self, states: Array, input_ids: Array, mask: Array | None = None, *, smoothing: float = 0.0
    ) -> Array:
        """Cross-entropy of each token after the first (`bert.token_losses`): float32 `[B, T - 1]`.

        `states [B, S, D]` are the vision tower's; the first of `input_ids [B, T]` should be [DEC].
        """
        logits = self.text_decoder(input_ids, mask, states=states)
        return bert.token_losses(logits, input_ids, smoothing=smoothing)


class QuestionAnswering(nnx.Module):
    """transformers' `BlipForQuestionAnswering`.

    The question's encoder cross-attends to the image, the answer's decoder to the question.
    """

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text, vision = config.text_config, config.vision_config
        self.vision_model = VisionModel(vision, rngs=rngs)
        self.text_encoder = bert.Bert(text, cross_width=vision.hidden_size, rngs=rngs)
        # transformers gives the decoder's cross-attention the vision tower's width, though it
        # attends to the question; the two widths are equal in every published checkpoint.
        if text.hidden_size != vision.hidden_size:
            raise ValueError(
                f"text_config.hidden_size={text.hidden_size} is not implemented for questions; "
                f"supported: vision_config.hidden_size={vision.hidden_size}"
            )
        self.text_decoder = bert.LMHeadModel(text, cross_width=text.hidden_size, rngs=rngs)
        self.config = config

    def answer_logits(self, states: Array, question: Array, mask: Array) -> Array:
        """Logits of the answer's first token, which follows [DEC]: float32 `[B, V]`.

        `states [B, S, D]` are the vision tower's; `int32[B, T], bool[B, T]` the questions.
        """
        question_states = self.text_encoder(question, mask, states=states)
        start = jnp.full((len(states), 1), self.config.text_config.bos_token_id)
        return self.text_decoder(start, states=question_states, states_mask=mask)[:, 0]
