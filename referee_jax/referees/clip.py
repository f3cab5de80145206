"""CLIP and its kin as referees: two towers whose features are compared by their cosine.

    cosine      = 1 - cos(view, prompt)
    contrastive = -log softmax of the prompt's logit among its negatives', as CLIP was trained
                  (Radford et al. 2021, section 2.3)
    sigmoid     = -log sigmoid of the prompt's logit, as SigLIP was trained
                  (Zhai et al. 2023, section 3.2)

PickScore (Kirstain et al. 2023) and HPS (Wu et al. 2023) are CLIP H/14 trained on what people
prefer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config, prompts
from referee_jax.models import align, clip, siglip
from referee_jax.referees import resizing
from referee_jax.referees.judge import Family, Judge, filled


class ClipReferee(struct.PyTreeNode):
    """CLIP, ALIGN or another network with `encode_text`, `encode_image` and `logits`.

    Attributes:
        image_size: side of the views in pixels.
        fitting: how an image becomes the view that is scored.
        shape: of the fitting, see resizing.Fitting.
    """

    network: clip.CLIP | siglip.SigLIP | align.ALIGN
    image_size: int = struct.field(pytree_node=False)
    fitting: resizing.Fitting = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)

    losses = config.LOSSES["clip"]
    shape = "rounded"

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """Tokens of the prompt and its N negatives, `[1 + N, T]` each, and `real [1 + N]`.

        Returns unit `features [1 + N, D]`, and `real`.
        """
        inputs = {name: x for name, x in tokens.items() if name != "real"}
        return {"features": self.network.encode_text(**inputs), "real": tokens["real"]}

    def _cosines(self, images: Array, text: dict[str, Array]) -> Array:
        """`[V, 1 + N]`, of each view with the prompt and its negatives."""
        mean, std = jnp.asarray(self.mean), jnp.asarray(self.std)
        return self.network.encode_image((images - mean) / std) @ text["features"].T

    def _log_softmax(self, cosines: Array, text: dict[str, Array]) -> Array:
        """`[V]`: log-probability of the prompt among its negatives."""
        logits = jnp.where(text["real"], self.network.logits(cosines), -jnp.inf)
        return jax.nn.log_softmax(logits, axis=-1)[:, 0]

    def _log_sigmoid(self, cosines: Array) -> Array:
        """`[V]`: log-probability of a match with the prompt."""
        return jax.nn.log_sigmoid(self.network.logits(cosines)[:, 0])

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        cosines = self._cosines(views, text)
        losses = {
            "cosine": 1 - cosines[:, 0],
            "contrastive": -self._log_softmax(cosines, text),
            "sigmoid": -self._log_sigmoid(cosines),
        }
        return {name: losses[name] for name in self.losses}

    def fit(self, image: Array) -> Array:
        """See method.referee."""
        return self.fitting.at(self.image_size)(image)

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`cosine` and, where there are negatives, the `probability` of the prompt among them."""
        cosines = self._cosines(view[None], text)
        return {"cosine": cosines[0, 0]} | self._probability(cosines, text)

    def _probability(self, cosines: Array, text: dict[str, Array]) -> dict[str, Array]:
        if len(text["real"]) == 1:
            return {}
        return {"probability": jnp.exp(self._log_softmax(cosines, text)[0])}


class SiglipReferee(ClipReferee):
    """Also has the loss `sigmoid`."""

    losses = config.LOSSES["siglip"]
    shape = resizing.SQUASHED

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`cosine`, and the `probability` of a match."""
        cosines = self._cosines(view[None], text)
        return {"cosine": cosines[0, 0], "probability": jnp.exp(self._log_sigmoid(cosines)[0])}


class PickScore(ClipReferee):
    """CLIP's losses; the authors' score is the logit."""

    losses = config.LOSSES["pickscore"]
    shape = "floored"  # the authors' own script asks transformers' processor

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`score` and, where there are negatives, the `probability` of the prompt among them."""
        cosines = self._cosines(view[None], text)
        return {"score": self.network.logits(cosines)[0, 0]} | self._probability(cosines, text)


class Hps(ClipReferee):
    """Loss `cosine`; the authors' score is the cosine."""

    losses = config.LOSSES["hps"]
    shape = "letterboxed"  # open_clip's ResizeMaxSize, of floats

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`score`."""
        return {"score": self._cosines(view[None], text)[0, 0]}


def from_checkpoint(
    network: clip.CLIP | siglip.SigLIP, preprocessing: Mapping, referee: type[ClipReferee] = ClipReferee
) -> ClipReferee:
    """The referee of a loaded network and its preprocessor_config.json."""
    size = network.config.vision_config.image_size
    mean, std = tuple(preprocessing["image_mean"]), tuple(preprocessing["image_std"])
    fitting = resizing.fitting(preprocessing, size, referee.shape, is_exact=referee is Hps)
    return referee(network=network, image_size=size, fitting=fitting, mean=mean, std=std)


def texts(judge: Judge, prompt: str) -> list[str]:
    """The prompt, then its negatives: those of the settings, and at most `spec.near` hard ones."""
    spec, template, clean = judge.spec, judge.template, judge.family.clean
    hard = prompts.hard_negatives(prompt, spec.exchange)[: spec.near]
    negatives = [text for text in spec.negatives if text != prompt]
    return [template.replace("{}", clean(text)) for text in (prompt, *negatives, *hard)]


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids [1 + N, T]`, `real [1 + N]`; for missing negatives the prompt is repeated, not real."""
    ids, real = filled(ids, 1 + len(judge.spec.negatives) + judge.spec.near)
    return {"input_ids": ids, "real": real}


def _family(referee: type[ClipReferee], kind: str = "clip", **attributes: Any) -> Family:
    build = lambda spec, network, preprocessing, tokenizer: from_checkpoint(network, preprocessing, referee)
    return Family(kind=kind, build=build, texts=texts, tokens=tokens, **attributes)


CLIP = _family(
    ClipReferee,
    clean=prompts.repaired,
    published=(
        "openai/clip-vit-base-patch32",
        "openai/clip-vit-large-patch14",
        "openai/clip-vit-large-patch14-336",
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    ),
    files=("ViT-B-32.pt", "ViT-B-16.pt", "ViT-L-14.pt", "ViT-L-14-336px.pt"),
)
# SigLIP 2's tokenizer_config.json asks for lower case, which transformers 5 ignores, and no file of
# it has the length of texts. SigLIP 1's tokenizer has both, and drops punctuation.
SIGLIP = _family(
    SiglipReferee,
    kind="siglip",
    length=64,
    clean=str.lower,
    published=(
        "google/siglip-base-patch16-224",
        "google/siglip2-base-patch16-224",
        "google/siglip2-so400m-patch14-384",
    ),
)
# Its authors' script asks transformers' quick tokenizer, which repairs nothing.
PICKSCORE = _family(PickScore, published=("yuvalkirstain/PickScore_v1",))
HPS = _family(
    Hps,
    clean=prompts.repaired,
    published=("xswu/HPSv2",),
    files=("HPS_v2_compressed.pt", "HPS_v2.1_compressed.pt"),
    is_converted=True,
    architecture="HPS",
)
