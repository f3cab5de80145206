"""ImageReward (Xu et al. 2023, arXiv 2304.05977): how well people like an image for a text.

BLIP's text encoder cross-attends to the image. The state of its first token, which is [CLS] here,
goes through five linear layers with nothing but dropout between them. The reward is normalised by
mean and standard deviation of the rewards of the authors' data.
"""

import dataclasses
import itertools

import jax.numpy as jnp
from flax import nnx
from jax import Array

from referee_jax.models import bert, blip, layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """config.json as weights.lavis writes it.

    The defaults are those of ImageReward-v1.0: ViT-L/16, BERT-base.
    """

    text_config: blip.TextConfig = blip.TextConfig(num_attention_heads=12)
    vision_config: blip.VisionConfig = blip.VisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=224,
        layer_norm_eps=1e-6,
    )
    mlp_sizes: tuple[int, ...] = (1024, 128, 64, 16, 1)
    reward_mean: float = 0.16717362830052426
    reward_std: float = 1.0333394966054072


class MLP(nnx.Module):
    """Linear layers with nothing between them; `features` are their widths."""

    def __init__(self, features: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List(layers.Linear(a, b, rngs=rngs) for a, b in itertools.pairwise(features))

    def __call__(self, x: Array) -> Array:
        for layer in self.layers:
            x = layer(x)
        return x


class ImageReward(nnx.Module):
    """Images and texts to rewards."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        text, vision = config.text_config, config.vision_config
        self.vision_model = blip.VisionModel(vision, rngs=rngs)
        self.text_encoder = bert.Bert(text, cross_width=vision.hidden_size, rngs=rngs)
        self.mlp = MLP((text.hidden_size, *config.mlp_sizes), rngs=rngs)
        self.config = config

    def reward(self, states: Array, input_ids: Array, mask: Array) -> Array:
        """Image states `[B, S, D]`, a text `int32[B, T], bool[B, T]` to rewards, float32 `[B]`."""
        x = self.text_encoder(input_ids, mask, states=states)[:, 0]
        return (self.mlp(x.astype(jnp.float32))[:, 0] - self.config.reward_mean) / self.config.reward_std
