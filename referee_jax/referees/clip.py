"""CLIP and its kin as referees: two towers whose features are compared by their cosine.

    cosine      = 1 - cos(view, prompt)
    contrastive = -log softmax of the prompt's logit among its negatives', as CLIP was trained (Radford et al. 2021, section 2.3)
    sigmoid     = -log sigmoid of the prompt's logit, as SigLIP was trained (Zhai et al. 2023, section 3.2)

PickScore (Kirstain et al. 2023) and HPS (Wu et al. 2023) are CLIP H/14 trained on what people prefer. Which losses and scores a
referee has is data: `Reading`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import prompts
from referee_jax.models import align, clip, siglip
from referee_jax.referees import resizing
from referee_jax.referees.judge import Judge

# Name of a loss -> of what it is the loss, and how.
_LOSSES = {
    "cosine": lambda found: 1 - found["cosine"],
    "contrastive": lambda found: -found["log_share"],
    "sigmoid": lambda found: -found["log_match"],
}
_SCORES = {
    "cosine": lambda found: found["cosine"],
    "logit": lambda found: found["logit"],
    "share": lambda found: jnp.exp(found["log_share"]),
    "match": lambda found: jnp.exp(found["log_match"]),
}


@dataclasses.dataclass(frozen=True)
class Reading:
    """What is made of a referee's cosines.

    Attributes:
        losses: names of its losses.
        scores: `(name, what)`: the `cosine`, the `logit`, the probability of a `match` with the prompt, or the prompt's `share`
            of the probability among its negatives, which there is where there are negatives.
    """

    losses: tuple[str, ...]
    scores: tuple[tuple[str, str], ...]


CLIP = Reading(("cosine", "contrastive"), (("cosine", "cosine"), ("probability", "share")))
SIGLIP = Reading(("cosine", "sigmoid", "contrastive"), (("cosine", "cosine"), ("probability", "match")))
PICKSCORE = Reading(("cosine", "contrastive"), (("score", "logit"), ("probability", "share")))
HPS = Reading(("cosine",), (("score", "cosine"),))


class ClipReferee(struct.PyTreeNode):
    """CLIP, SigLIP, ALIGN or another network with `encode_text`, `encode_image` and `logits`.

    Attributes:
        image_size: side of the views in pixels.
        resized: side to which an image is resized to be scored; the views' size of its middle is what is looked at.
    """

    network: clip.CLIP | siglip.SigLIP | align.ALIGN
    image_size: int = struct.field(pytree_node=False)
    resized: int = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    reading: Reading = struct.field(pytree_node=False, default=CLIP)

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of its losses."""
        return self.reading.losses

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """What the text tower reads, as `input_ids [1 + N, T]` (the prompt, then its negatives), and `real [1 + N]`.

        Returns unit `features [1 + N, D]`, and `real`.
        """
        read = {name: x for name, x in tokens.items() if name != "real"}
        return {"features": self.network.encode_text(**read), "real": tokens["real"]}

    def _found(self, images: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`[V]` each: the prompt's cosine, logit, log-probability of a match and of being the one among its negatives."""
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        cosines = self.network.encode_image((images - mean) / std) @ text["features"].T
        logits = self.network.logits(cosines)
        return {
            "cosine": cosines[:, 0],
            "logit": logits[:, 0],
            "log_match": jax.nn.log_sigmoid(logits[:, 0]),
            "log_share": jax.nn.log_softmax(jnp.where(text["real"], logits, -jnp.inf), axis=-1)[:, 0],
        }

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        found = self._found(views, text)
        return {name: _LOSSES[name](found) for name in self.losses}

    def fit(self, image: Array) -> Array:
        """Resized; of that, the middle."""
        return resizing.middle(resizing.resized(image, self.resized), self.image_size)

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """What `reading.scores` says."""
        found = self._found(view[None], text)
        told = len(text["real"]) > 1
        return {name: _SCORES[what](found)[0] for name, what in self.reading.scores if told or what != "share"}


def from_checkpoint(
    network: clip.CLIP | siglip.SigLIP, preprocessing: dict[str, Any], reading: Reading = CLIP
) -> ClipReferee:
    """The referee of a loaded network and its preprocessor_config.json."""
    size = network.config.vision_config.image_size
    mean, std = tuple(preprocessing["image_mean"]), tuple(preprocessing["image_std"])
    return ClipReferee(network=network, image_size=size, resized=size, mean=mean, std=std, reading=reading)


def texts(judge: Judge, prompt: str) -> list[str]:
    """The prompt, then its negatives: the spec's own, and `spec.near` of the prompt's neighbours (prompts.near) or fewer."""
    spec = judge.spec
    near = prompts.hard_negatives(prompt, spec.exchange)[: spec.near]
    return list(map(judge.text, [prompt, *(text for text in spec.negatives if text != prompt), *near]))


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids [1 + N, T]`, `real [1 + N]`; for missing negatives the prompt is repeated, not real."""
    rows = np.arange(1 + len(judge.spec.negatives) + judge.spec.near)
    real = rows < len(ids)
    return {"input_ids": ids[np.where(real, rows, 0)], "real": real}
