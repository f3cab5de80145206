"""CLIP as a referee: cosine distance to the prompt, or the prompt against near-by negatives."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import prompts
from referee_jax.models import clip
from referee_jax.referees import base


class ClipReferee(struct.PyTreeNode):
    """Losses `cosine` = 1 - cos(view, prompt) and `contrastive` = -log softmax of the prompt among its negatives.

    The logits of the second are exp(logit_scale) cos, as CLIP was trained (Radford et al. 2021, section 2.3).
    """

    network: clip.CLIP
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)

    losses = ("cosine", "contrastive")

    @property
    def image_size(self) -> int:
        """Side of the views, pixels."""
        return self.network.config.vision_config.image_size

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids [1 + N, T]` (the prompt, then its negatives) and `real [1 + N]` to unit features `[1 + N, D]`."""
        return {"features": self.network.encode_text(tokens["input_ids"]), "real": tokens["real"]}

    def _cosines(self, images: Array, text: dict[str, Array]) -> Array:
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return self.network.encode_image((images - mean) / std) @ text["features"].T

    def _log_share(self, cosines: Array, text: dict[str, Array]) -> Array:
        logits = jnp.exp(self.network.logit_scale[...]) * cosines
        return jax.nn.log_softmax(jnp.where(text["real"], logits, -jnp.inf), axis=-1)[..., 0]

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See base.Referee."""
        cosines = self._cosines(views, text)
        return {"cosine": 1 - cosines[:, 0], "contrastive": -self._log_share(cosines, text)}

    def scores(self, image: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`cosine` with the prompt and, where there are negatives, `probability` of the prompt among them."""
        cosines = self._cosines(base.resized(image, self.image_size)[None], text)
        scores = {"cosine": cosines[0, 0]}
        if len(text["real"]) > 1:
            scores["probability"] = jnp.exp(self._log_share(cosines, text)[0])
        return scores


def from_checkpoint(network: clip.CLIP, preprocessing: dict[str, Any]) -> ClipReferee:
    """The referee of a loaded network and its preprocessor_config.json."""
    return ClipReferee(network=network, mean=tuple(preprocessing["image_mean"]), std=tuple(preprocessing["image_std"]))


def texts(judge: Any, prompt: str) -> list[str]:
    """The prompt, then its negatives: the spec's own, and `spec.near` of the prompt's neighbours (prompts.near) or fewer."""
    spec = judge.spec
    near = prompts.near(prompt, spec.exchange)[: spec.near]
    return list(map(judge.text, [prompt, *(text for text in spec.negatives if text != prompt), *near]))


def tokenize(judge: Any, prompt: str) -> dict[str, np.ndarray]:
    """`texts`: `input_ids [1 + N, T]`, `real [1 + N]`; where they are fewer, the prompt fills the rows, as not real."""
    read, count = texts(judge, prompt), 1 + len(judge.spec.negatives) + judge.spec.near
    rows = read + read[:1] * (count - len(read))
    ids = prompts.tokenize(judge.tokenizer, rows, judge.length)
    return {"input_ids": ids, "real": np.arange(count) < len(read)}
