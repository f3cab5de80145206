"""CLIP-FlanT5 (Lin et al. 2024, arXiv 2404.01291): a T5 that reads an image among its words.

Laid out as the authors' `CLIPT5ForConditionalGeneration` (t2v_metrics): the patch tokens of a late
layer of CLIP, projected to the width of the words, stand in the question where the image does.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.models import clip, layers
from referee_jax.models.flan_t5 import t5

IMAGE = "<image>"  # where the patch tokens stand in a conversation
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(t5.Config):
    """config.json of a CLIP-FlanT5, with its tower's as `vision_config`.

    `vision_config` and the three texts are ours: the authors' files name the tower by its hub id,
    and their package has the texts.

    Attributes:
        mm_vision_select_layer: which of the tower's states are read, counted from the last, -1.
        conversation: the whole input, with IMAGE before {}, where the question is put.
        question: with {} where the text is put.
        answer: of which the probability is asked.
    """

    vision_config: clip.VisionConfig = clip.VisionConfig()
    mm_vision_select_layer: int = -2
    conversation: str = f"{SYSTEM} USER: {IMAGE}\n{{}} ASSISTANT: "
    question: str = 'Does this figure show "{}"? Please answer yes or no.'
    answer: str = "Yes"

    def __post_init__(self):
        super().__post_init__()
        if not -self.vision_config.num_hidden_layers <= self.mm_vision_select_layer <= -1:
            raise ValueError(
                f"mm_vision_select_layer={self.mm_vision_select_layer} is not implemented; supported: -1 to "
                f"-{self.vision_config.num_hidden_layers}"
            )
        before, image, after = self.conversation.partition(IMAGE)
        if not image or "{}" in before or after.count("{}") != 1:
            raise ValueError(f"conversation={self.conversation!r} is not a text with {IMAGE} and then one {{}}")
        if self.question.count("{}") != 1:
            raise ValueError(f"question={self.question!r} is not a text with one {{}}")

    @property
    def text_config(self) -> t5.Config:
        """As in other networks of two parts."""
        return self

    @property
    def tower(self) -> clip.VisionConfig:
        """The tower without the layers behind the one that is read."""
        depth = self.vision_config.num_hidden_layers + 1 + self.mm_vision_select_layer
        return dataclasses.replace(self.vision_config, num_hidden_layers=depth)


class VisionTower(nnx.Module):
    """CLIP's vision tower up to a layer, recomputed in the backward pass: images to patch tokens."""

    def __init__(self, config: clip.VisionConfig, *, rngs: nnx.Rngs):
        self.embeddings = clip.VisionEmbeddings(config, rngs=rngs)
        # The checkpoint's spelling.
        self.pre_layrnorm = layers.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.encoder = clip.Encoder(config, is_causal=False, remat=True, rngs=rngs)
        self.config = config

    @jax.named_scope("vision_tower")
    def __call__(self, images: Array) -> Array:
        """Normalised images `[B, S, S, 3] -> [B, P, D]`, without the class token and the last norm.

        Raises ValueError if the size is not the checkpoint's.
        """
        layers.check_images(images, self.config.image_size, "CLIP-FlanT5")
        images = images.astype(layers.float_dtype(self))
        return self.encoder(self.pre_layrnorm(self.embeddings(images)))[:, 1:]


class CLIPT5(t5.T5):
    """A T5 with CLIP's tower and a projector of two layers."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.vision_tower = VisionTower(config.tower, rngs=rngs)
        inputs = (config.vision_config.hidden_size, config.d_model)
        self.mm_projector = nnx.List(layers.Linear(n, config.d_model, rngs=rngs) for n in inputs)

    def encode_image(self, images: Array) -> Array:
        """Normalised images `[B, S, S, 3]` to what stands among the words, `[B, P, D]`."""
        first, second = self.mm_projector
        return second(layers.exact_gelu(first(self.vision_tower(images))))

    def read(self, image: Array, before: Array, after: Array, mask: Array) -> tuple[Array, Array]:
        """The encoder's states `[B, S, D]` of words, image and words, and their mask, bool `[B, S]`.

        Args:
            image: `[B, P, D]`, of `encode_image`.
            before: int32 `[T]`, tokens before the image.
            after: int32 `[B, T']`, tokens behind it.
            mask: bool `[B, T']`, False on padding of those.
        """
        first = layers.repeat(self.embed(before)[None], len(image)).astype(image.dtype)
        spliced = jnp.concatenate([first, image, self.embed(after).astype(image.dtype)], axis=1)
        real = jnp.pad(mask, ((0, 0), (first.shape[1] + image.shape[1], 0)), constant_values=True)
        return self.encoder(spliced, real), real

    def answer_logits(self, image: Array, before: Array, after: Array, mask: Array, answer: Array) -> Array:
        """Logits of each token of the answer `int32[L]`, given those before it: float32 `[B, L, V]`; see `read`."""
        return self.logits(layers.repeat(answer[None], len(image)), *self.read(image, before, after, mask))
