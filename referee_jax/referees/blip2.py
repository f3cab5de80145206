"""BLIP-2 as a referee: its three training objectives (Li et al. 2023, section 3.1) as losses.

    itm = -log p(the text is the image's)
    itc = 1 - cos(text, nearest query)
    itg = cross-entropy of the text's tokens, each given the image and the tokens before it; stage-1 weights only

One pass of the vision transformer serves all.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config, prompts
from referee_jax.models import bert, blip2, layers
from referee_jax.referees import resizing
from referee_jax.referees.judge import Family, Judge

TOKENS = 32  # both ends included, as BLIP-2 was trained


class Blip2Referee(struct.PyTreeNode):
    """Losses `itm`, `itc` and, where the network has a language head, `itg`.

    Attributes:
        image_size: side of the views in pixels; positions are interpolated for another than the
            checkpoint's.
        fitting: how an image becomes the view that is scored.
        dec_token_id: id of [DEC], which begins a caption.
    """

    network: blip2.BLIP2
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    image_size: int = struct.field(pytree_node=False)
    fitting: resizing.Fitting = struct.field(pytree_node=False)
    dec_token_id: int = struct.field(pytree_node=False)

    @property
    def losses(self) -> tuple[str, ...]:
        """Those of config.LOSSES that these weights allow."""
        return tuple(name for name in config.LOSSES["blip2"] if name != "itg" or self.network.cls)

    def encode(self, tokens: dict[str, Array]) -> dict[str, Any]:
        """`input_ids, attention_mask [T]` to the network's `Text`, and a caption's targets."""
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        text = self.network.encode_text(ids[None], mask[None], dec_token_id=self.dec_token_id)
        return {"text": text, "targets": ids[1:], "real": mask[1:]}

    def _encode_image(self, images: Array) -> blip2.Image:
        return self.network.encode_image((images - jnp.asarray(self.mean)) / jnp.asarray(self.std))

    def _caption_loss(self, image: blip2.Image, text: dict[str, Any], smoothing: float) -> Array:
        """Cross-entropy with smoothed targets, mean over the tokens that are not padding."""
        logits = self.network.caption(image, text["text"])
        losses = bert.cross_entropy(logits, layers.repeat(text["targets"][None], len(logits)), smoothing=smoothing)
        return losses.mean(-1, where=text["real"].astype(bool))

    def image_losses(self, image: blip2.Image, text: dict[str, Any]) -> dict[str, Array]:
        """`views_losses` of images that the network has encoded."""
        losses = {
            "itm": -jax.nn.log_softmax(self.network.match(image, text["text"]))[:, 1],
            "itc": 1 - self.network.contrast(image, text["text"]),
        }
        if "itg" in self.losses:
            losses["itg"] = self._caption_loss(image, text, bert.SMOOTHING)
        return losses

    def views_losses(self, views: Array, text: dict[str, Any]) -> dict[str, Array]:
        """See method.referee."""
        return self.image_losses(self._encode_image(views), text)

    def fit(self, image: Array) -> Array:
        """See method.referee."""
        return self.fitting.at(self.image_size)(image)

    def scores(self, view: Array, text: dict[str, Any]) -> dict[str, Array]:
        """`itm_probability`, `cosine`; with a language head `caption_log_likelihood`, mean per token."""
        image = self._encode_image(view[None])
        losses = self.image_losses(image, text)
        scores = {"itm_probability": jnp.exp(-losses["itm"][0]), "cosine": 1 - losses["itc"][0]}
        if "itg" in self.losses:
            scores["caption_log_likelihood"] = -self._caption_loss(image, text, smoothing=0.0)[0]
        return scores


def from_checkpoint(
    network: blip2.BLIP2, preprocessing: Mapping, *, image_size: int = 0, dec_token_id: int | None = None
) -> Blip2Referee:
    """The referee of a loaded network and its preprocessor_config.json.

    `image_size` 0 is the checkpoint's; `dec_token_id` is the tokenizer's, None the network's last.
    Raises ValueError if the network has no such word.
    """
    words = network.config.qformer_config.vocab_size
    dec_token_id = network.dec_token_id if dec_token_id is None else dec_token_id
    if dec_token_id >= words:
        raise ValueError(f"the tokenizer's id of [DEC] is {dec_token_id}, but this BLIP-2 has {words} words")
    side = network.config.vision_config.image_size
    return Blip2Referee(
        network=network,
        mean=tuple(preprocessing["image_mean"]),
        std=tuple(preprocessing["image_std"]),
        image_size=image_size or side,
        fitting=resizing.fitting(preprocessing, side),
        dec_token_id=dec_token_id,
    )


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids [T]`, `attention_mask [T]`."""
    return {"input_ids": ids[0], "attention_mask": (ids[0] != judge.tokenizer.pad_token_id).astype(np.int32)}


def _build(spec: config.RefereeSpec, network: blip2.BLIP2, preprocessing: Mapping, tokenizer: Any) -> Blip2Referee:
    # LAVIS' tokenizer has [DEC] as bos_token; BERT's own has none.
    return from_checkpoint(network, preprocessing, image_size=spec.image_size, dec_token_id=tokenizer.bos_token_id)


FAMILY = Family(
    kind="blip2",
    build=_build,
    tokens=tokens,
    clean=prompts.caption,
    length=TOKENS,
    published=("Salesforce/blip2-itm-vit-g", "Salesforce/blip2-itm-vit-g-coco"),
    files=("blip2_pretrained.pth eva_vit_g.pth",),  # the first stage, which captions
)
