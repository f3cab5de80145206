"""BLIP-2's first stage (Li et al. 2023, arXiv 2301.12597): matching, contrast and captions.

Laid out as transformers' `Blip2ForImageTextRetrieval`. A vision transformer, and the Q-Former: a
BERT whose first tokens are learned queries that cross-attend to the image. It has three uses
(section 3.1), which differ in the attention mask:

    contrast   queries alone and text alone; compared in a common space                       (ITC)
    match      queries and text attend to each other                                          (ITM)
    caption    text attends to the queries of `contrast` and to its earlier tokens            (ITG)

Only stage-1 weights can caption (`Config.lm_head`). The smaller of them have CLIP's ViT-L/14
without its last block, as in LAVIS' clip_vit.py (`pre_layernorm`, `patch_bias`). `encode_image`
computes once what the three share: each layer's keys and values of the image and of the queries
alone. `encode_text` computes what depends on the text alone. The vision transformer computes in the
dtype of its weights, the rest in float32.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from referee_jax.hardware import chips
from referee_jax.models import attention, bert, blip, layers

KeysValues = tuple[Array, Array]  # each [B, T, N, D]; of several layers: their axis comes first


@dataclasses.dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """`vision_config` of a BLIP-2 checkpoint; the defaults are transformers' (EVA ViT-g)."""

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    # The next three are not transformers' but ours, for LAVIS' weights.
    post_layernorm_eps: float | None = None  # of the last norm; None: layer_norm_eps
    pre_layernorm: bool = False  # whether there is CLIP's norm before the layers
    patch_bias: bool = True  # False for CLIP's

    def __post_init__(self):
        layers.check_config(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QFormerConfig:
    """`qformer_config` of a BLIP-2 checkpoint; the defaults are transformers'."""

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    max_position_embeddings: int = 512
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    use_qformer_text_input: bool = False

    def __post_init__(self):
        layers.check_config(self)
        if not self.use_qformer_text_input:
            raise ValueError("use_qformer_text_input=False is not implemented; supported: True (only that reads text)")
        if self.num_hidden_layers % self.cross_attention_frequency:
            raise ValueError(
                f"num_hidden_layers={self.num_hidden_layers} is not implemented; supported: multiples of "
                f"cross_attention_frequency={self.cross_attention_frequency}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json of a `Blip2ForImageTextRetrieval`.

    `lm_head`, whether there is a `cls`, is ours.
    """

    vision_config: VisionConfig = VisionConfig()
    qformer_config: QFormerConfig = QFormerConfig(vocab_size=30523, use_qformer_text_input=True)
    num_query_tokens: int = 32
    image_text_hidden_size: int = 256
    lm_head: bool = False


class VisionModel(nnx.Module):
    """Images to the states of the class token and all patches."""

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs):
        width, eps = config.hidden_size, config.layer_norm_eps
        last = eps if config.post_layernorm_eps is None else config.post_layernorm_eps
        self.embeddings = blip.VisionEmbeddings(config, bias=config.patch_bias, rngs=rngs)
        self.pre_layernorm = layers.LayerNorm(width, epsilon=eps, rngs=rngs) if config.pre_layernorm else None
        # EVA's keys have no bias; transformers stores zeros for it.
        self.encoder = blip.VisionEncoder(config, bias=config.qkv_bias, rngs=rngs)
        self.post_layernorm = layers.LayerNorm(width, epsilon=last, rngs=rngs)
        self.config = config

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> Array:
        """Normalised square images `[B, S, S, 3] -> [B, 1 + (S / patch)^2, D]`.

        Positions are interpolated if S is not the checkpoint's. Raises ValueError for other shapes,
        or if S is neither the checkpoint's nor a multiple of the patch.
        """
        size, patch = self.config.image_size, self.config.patch_size
        side = images.shape[1]
        if images.shape[1:] != (side, side, 3) or side != size and (side % patch or not side):
            raise ValueError(
                f"images of shape {images.shape}, but BLIP-2 takes [B, S, S, 3], S = {size} or a multiple of {patch}"
            )
        x = self.embeddings(images)
        if self.pre_layernorm is not None:
            x = self.pre_layernorm(x)
        return self.post_layernorm(self.encoder(x))


class Projections(nnx.Module):
    """Queries, keys and values; the last two may be of states of another width, `inputs`."""

    def __init__(self, config: QFormerConfig, inputs: int, *, rngs: nnx.Rngs):
        self.query = layers.Linear(config.hidden_size, config.hidden_size, rngs=rngs)
        self.key = layers.Linear(inputs, config.hidden_size, rngs=rngs)
        self.value = layers.Linear(inputs, config.hidden_size, rngs=rngs)


class Attention(nnx.Module):
    """Post-norm multi-head attention to keys and values that `keys_values` computed."""

    def __init__(self, config: QFormerConfig, inputs: int, *, rngs: nnx.Rngs):
        self.attention = Projections(config, inputs, rngs=rngs)
        self.output = bert.Output(config, config.hidden_size, rngs=rngs)
        self.heads, self.hardware = config.num_attention_heads, chips.Hardware()

    def keys_values(self, x: Array) -> KeysValues:
        """Keys and values of the states `[B, T, D]` to attend to."""
        return tuple(attention.split_heads(p(x), self.heads) for p in (self.attention.key, self.attention.value))

    def __call__(self, x: Array, keys_values: KeysValues, bias: Array | None = None) -> Array:
        query = attention.split_heads(self.attention.query(x), self.heads)
        return self.output(attention.merge_heads(attention.attend(query, *keys_values, self.hardware, bias=bias)), x)


class QFormerLayer(nnx.Module):
    """Self-attention of all tokens, then one feed-forward network for queries and one for text.

    Queries cross-attend to the image in layers that have an `image_width`.
    """

    def __init__(self, config: QFormerConfig, image_width: int | None, *, rngs: nnx.Rngs):
        self.attention = Attention(config, config.hidden_size, rngs=rngs)
        self.crossattention = Attention(config, image_width, rngs=rngs) if image_width else None
        self.intermediate = bert.Intermediate(config, rngs=rngs)
        self.output = bert.Output(config, config.intermediate_size, rngs=rngs)
        self.intermediate_query = bert.Intermediate(config, rngs=rngs)
        self.output_query = bert.Output(config, config.intermediate_size, rngs=rngs)

    def __call__(
        self, x: Array, queries: int, image: KeysValues | None, prefix: KeysValues | None, bias: Array | None
    ) -> tuple[Array, KeysValues]:
        new = self.attention.keys_values(x)
        every = new if prefix is None else jax.tree.map(lambda *pair: jnp.concatenate(pair, axis=1), prefix, new)
        x = self.attention(x, every, bias)
        query, text = x[:, :queries], x[:, queries:]
        if self.crossattention is not None and queries:
            query = self.crossattention(query, image)
        query = self.output_query(self.intermediate_query(query), query)
        text = self.output(self.intermediate(text), text)
        return jnp.concatenate([query, text], axis=1), new


class QFormerEncoder(nnx.Module):
    """Groups of layers, of which the first attends to the image, in one scan."""

    def __init__(self, config: QFormerConfig, image_width: int, *, rngs: nnx.Rngs):
        period = config.cross_attention_frequency
        self.layer = layers.Interleaved(
            layers.stack(
                lambda rngs, width=None if n else image_width: QFormerLayer(config, width, rngs=rngs),
                config.num_hidden_layers // period,
                rngs,
            )
            for n in range(period)
        )

    def __call__(
        self, x: Array, queries: int, image: KeysValues | None, prefix: list[KeysValues] | None, bias: Array | None
    ) -> tuple[Array, list[KeysValues]]:
        stacks = [stack.layer for stack in self.layer]

        def run_group(x, weights_image_prefix):
            group, group_image, group_prefix = weights_image_prefix
            keys_values = []
            for n, layer in enumerate(group):
                x, new = layer(x, queries, group_image, group_prefix and group_prefix[n], bias)
                keys_values.append(new)
            return x, keys_values

        return jax.lax.scan(run_group, x, (stacks, image, prefix), unroll=layers.unrolls(self.layer[0].depth))


class QFormer(nnx.Module):
    """The layers, for normed embeddings of queries, text, or both."""

    def __init__(self, config: QFormerConfig, image_width: int, *, rngs: nnx.Rngs):
        self.layernorm = layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.encoder = QFormerEncoder(config, image_width, rngs=rngs)

    def image_keys(self, image: Array) -> KeysValues:
        """Keys and values of the image `[B, T, D]` for all layers that attend to it."""
        return jax.vmap(lambda layer: layer.crossattention.keys_values(image))(self.encoder.layer[0].layer)

    @jax.named_scope("qformer")
    def __call__(
        self,
        x: Array,
        *,
        queries: int = 0,
        image: KeysValues | None = None,
        prefix: list[KeysValues] | None = None,
        bias: Array | None = None,
    ) -> tuple[Array, list[KeysValues]]:
        """Returns the last states `[B, T, D]`, and all layers' keys and values of the tokens.

        Args:
            x: `[B, T, D]`, embeddings.
            queries: how many of the T tokens, the first, are queries.
            image: the result of `image_keys`.
            prefix: keys and values of another pass, to attend to before those of `x`.
            bias: that of `attention.attend`.
        """
        return self.encoder(x, queries, image, prefix, bias)


class TextEmbeddings(nnx.Module):
    """Token plus position embeddings, before the norm."""

    def __init__(self, config: QFormerConfig, *, rngs: nnx.Rngs):
        self.word_embeddings = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, input_ids: Array) -> Array:
        return self.word_embeddings(input_ids) + self.position_embeddings(jnp.arange(input_ids.shape[-1]))


class Image(struct.PyTreeNode):
    """What the three uses need of B images.

    Attributes:
        features: float32[B, Q, P], unit length; of the queries alone.
        prefix: all layers' keys and values of the queries alone.
        keys: keys and values of the image, for all layers that attend to it.
    """

    features: Array
    prefix: list[KeysValues]
    keys: KeysValues


class Text(struct.PyTreeNode):
    """What the three uses need of texts.

    B is that of the images, or 1 for one text with all images.

    Attributes:
        features: float32[B, P], unit length; of the first token.
        states: float32[B, T, D], normed embeddings.
        decoder: float32[B, T - 1, D], normed embeddings with [DEC] for the first token and without
            the last.
        mask: bool[B, T], False on padding.
    """

    features: Array
    states: Array
    decoder: Array
    mask: Array


class BLIP2(nnx.Module):
    """transformers' `Blip2ForImageTextRetrieval`, and LAVIS' language head if there is one."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        qformer, width = config.qformer_config, config.qformer_config.hidden_size
        self.vision_model = VisionModel(config.vision_config, rngs=rngs)
        self.query_tokens = nnx.Param(jax.random.normal(rngs.params(), (1, config.num_query_tokens, width)) * 0.02)
        self.embeddings = TextEmbeddings(qformer, rngs=rngs)
        self.qformer = QFormer(qformer, config.vision_config.hidden_size, rngs=rngs)
        self.vision_projection = layers.Linear(width, config.image_text_hidden_size, rngs=rngs)
        self.text_projection = layers.Linear(width, config.image_text_hidden_size, rngs=rngs)
        self.itm_head = layers.Linear(width, 2, rngs=rngs)
        self.cls = bert.Head(qformer, rngs=rngs) if config.lm_head else None
        self.config = config

    @property
    def dec_token_id(self) -> int:
        """Id of [DEC], which LAVIS adds after BERT's tokens.

        Assumes that the table of words is not padded.
        """
        return self.config.qformer_config.vocab_size - 1

    def encode_image(self, images: Array) -> Image:
        """Square images `[B, S, S, 3]`, normalised with the checkpoint's mean and std.

        See `Image`.
        """
        states = self.vision_model(images.astype(layers.float_dtype(self.vision_model)))
        return self.query_image(states)

    def query_image(self, states: Array) -> Image:
        """`encode_image` of the vision transformer's states `[B, T, D]`."""
        keys = self.qformer.image_keys(states.astype(jnp.float32))
        queries = self._queries(len(states))
        queries, prefix = self.qformer(queries, queries=queries.shape[1], image=keys)
        return Image(features=layers.unit(self.vision_projection(queries)), prefix=prefix, keys=keys)

    def encode_text(self, input_ids: Array, attention_mask: Array, *, dec_token_id: int | None = None) -> Text:
        """`int32[B, T]` ids and a mask that is 0 on padding; see `Text`.

        `dec_token_id` is the tokenizer's id of [DEC]; None: `self.dec_token_id`. Raises ValueError
        if there are more tokens than positions.
        """
        positions = self.config.qformer_config.max_position_embeddings
        if input_ids.shape[-1] > positions:
            raise ValueError(f"{input_ids.shape[-1]} tokens, but BLIP-2 has {positions} positions")
        dec_token_id = self.dec_token_id if dec_token_id is None else dec_token_id
        mask = attention_mask.astype(bool)
        states = self._embed(input_ids)
        features = self.qformer(states, bias=attention.mask_bias(mask[:, None, None]))[0][:, 0]
        return Text(
            features=layers.unit(self.text_projection(features)),
            states=states,
            decoder=self._embed(input_ids.at[:, 0].set(dec_token_id)[:, :-1]),
            mask=mask,
        )

    def contrast(self, image: Image, text: Text) -> Array:
        """Cosines of the text with the nearest query, float32[B]."""
        return jnp.einsum("bqp,bp->bq", image.features, layers.repeat(text.features, len(image.features))).max(-1)

    def match(self, image: Image, text: Text) -> Array:
        """Logits of (no match, match), `[B, 2]`: the mean over all queries."""
        queries = self._queries(len(image.features))
        batch, count = queries.shape[:2]
        mask = jnp.pad(layers.repeat(text.mask, batch), ((0, 0), (count, 0)), constant_values=True)
        both = jnp.concatenate([queries, layers.repeat(text.states, batch)], axis=1)
        states, _ = self.qformer(both, queries=count, image=image.keys, bias=attention.mask_bias(mask[:, None, None]))
        return self.itm_head(states[:, :count]).mean(1)

    def caption(self, image: Image, text: Text) -> Array:
        """Logits `[B, T - 1, vocabulary]` of each token after the first, given those before it."""
        tokens, queries = text.decoder.shape[1], image.features.shape[1]
        # Padding comes last, so a causal mask hides it from all other tokens.
        mask = jnp.pad(jnp.tri(tokens, dtype=bool), ((0, 0), (queries, 0)), constant_values=True)
        decoder = layers.repeat(text.decoder, len(image.features))
        states, _ = self.qformer(decoder, prefix=image.prefix, bias=attention.mask_bias(mask[None, None]))
        return self.cls.predictions(states, self.embeddings.word_embeddings.embedding[...])

    def _queries(self, batch: int) -> Array:
        """The learned queries, normed; they have no positions."""
        return layers.repeat(self.qformer.layernorm(self.query_tokens[...]), batch)

    def _embed(self, input_ids: Array) -> Array:
        return self.qformer.layernorm(self.embeddings(input_ids))
