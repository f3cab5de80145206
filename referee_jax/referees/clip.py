"""CLIP as a referee: cosine distance to the prompt, or the prompt against near-by negatives.

So are others of two towers that meet in one space only at the end; what differs is in the network and the preprocessing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import prompts
from referee_jax.models import align, clip
from referee_jax.referees import base


class ClipReferee(struct.PyTreeNode):
    """Losses `cosine` = 1 - cos(view, prompt) and `contrastive` = -log softmax of the prompt among its negatives.

    The logits of the second are those that the network was trained with.

    Attributes:
        image_size: side of the views in pixels.
        resized: side to which an image is resized to be scored; the views' size of its middle is what is looked at.
    """

    network: clip.CLIP | align.ALIGN
    image_size: int = struct.field(pytree_node=False)
    resized: int = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)

    losses = ("cosine", "contrastive")

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """What the text tower reads, as `input_ids [1 + N, T]` (the prompt, then its negatives), and `real [1 + N]`.

        Returns unit `features [1 + N, D]`, and `real`.
        """
        read = {name: x for name, x in tokens.items() if name != "real"}
        return {"features": self.network.encode_text(**read), "real": tokens["real"]}

    def _cosines(self, images: Array, text: dict[str, Array]) -> Array:
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return self.network.encode_image((images - mean) / std) @ text["features"].T

    def _log_share(self, cosines: Array, text: dict[str, Array]) -> Array:
        logits = jnp.where(text["real"], self.network.logits(cosines), -jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)[..., 0]

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See base.Referee."""
        cosines = self._cosines(views, text)
        return {"cosine": 1 - cosines[:, 0], "contrastive": -self._log_share(cosines, text)}

    def scores(self, image: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`cosine` with the prompt and, where there are negatives, `probability` of the prompt among them."""
        seen = base.middle(base.resized(image, self.resized), self.image_size)
        cosines = self._cosines(seen[None], text)
        scores = {"cosine": cosines[0, 0]}
        if len(text["real"]) > 1:
            scores["probability"] = jnp.exp(self._log_share(cosines, text)[0])
        return scores


def from_checkpoint(network: clip.CLIP, preprocessing: dict[str, Any]) -> ClipReferee:
    """The referee of a loaded network and its preprocessor_config.json."""
    size = network.config.vision_config.image_size
    mean, std = tuple(preprocessing["image_mean"]), tuple(preprocessing["image_std"])
    return ClipReferee(network=network, image_size=size, resized=size, mean=mean, std=std)


def tokenize(judge: Any, prompt: str) -> dict[str, np.ndarray]:
    """The prompt and its negatives: `input_ids [1 + N, T]`, `real [1 + N]`.

    Negatives are the spec's own, and `spec.near` of the prompt's neighbours (prompts.near); where there are fewer, the
    prompt itself fills the rows, marked as not real.
    """
    spec = judge.spec
    near = prompts.near(prompt, spec.exchange)[: spec.near]
    texts = [prompt, *(text for text in spec.negatives if text != prompt), *near]
    count = 1 + len(spec.negatives) + spec.near
    real = np.arange(count) < len(texts)
    texts += [prompt] * (count - len(texts))
    return {"input_ids": prompts.tokenize(judge.tokenizer, list(map(judge.text, texts)), judge.length), "real": real}
