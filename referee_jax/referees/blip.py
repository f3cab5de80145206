"""BLIP as a referee: does the prompt match the image, how likely is it as its caption, is the answer to it "yes".

The authors put [ENC] in the place of [CLS] wherever the text reads the image (arXiv 2201.12086, figure 2), and [DEC]
where a text is generated; transformers' port leaves [CLS] in the first case, so `first_token` is a setting.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config
from referee_jax.models import bert, blip, layers
from referee_jax.referees import resizing
from referee_jax.referees.judge import Judge

ANSWERS = ("yes", "no")


class BlipReferee(struct.PyTreeNode):
    """What the three have in common.

    Attributes:
        image_size: side of the views in pixels; the table of positions is resampled if it is not the checkpoint's.
        first_token: id put first in a text that reads the image; None leaves [CLS].
    """

    network: blip.ImageTextRetrieval | blip.ConditionalGeneration | blip.QuestionAnswering
    image_size: int = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    first_token: int | None = struct.field(pytree_node=False)

    def _states(self, views: Array) -> Array:
        return self.network.vision_model((views - jnp.asarray(self.mean)) / jnp.asarray(self.std))

    def _reading(self, input_ids: Array) -> Array:
        return input_ids if self.first_token is None else jnp.asarray(input_ids).at[..., 0].set(self.first_token)

    def _generated(self, input_ids: Array) -> Array:
        return jnp.asarray(input_ids).at[..., 0].set(self.network.config.text_config.bos_token_id)

    def fit(self, image: Array) -> Array:
        """Resized."""
        return resizing.resized(image, self.image_size)

    def _losses(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        return {name: loss[0] for name, loss in self.views_losses(view[None], text).items()}


class Itm(BlipReferee):
    """Losses `itm` = -log p(match) of the matching head and `itc` = 1 - cos(view, prompt) in the contrastive space."""

    losses = config.LOSSES["blip_itm"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids, mask [T]`; adds the prompt's unit feature `[D]`, which does not read the image."""
        ids, mask = tokens["input_ids"], tokens["mask"]
        feature = self.network.text_features(ids[None], mask[None])[0]
        return {"input_ids": self._reading(ids), "mask": mask, "feature": feature}

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        states = self._states(views)
        ids, mask = (layers.repeat(text[name][None], len(views)) for name in ("input_ids", "mask"))
        match = jax.nn.log_softmax(self.network.match(states, ids, mask))[:, 1]
        return {"itm": -match, "itc": 1 - self.network.image_features(states) @ text["feature"]}

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`itm_probability` of a match, and the `cosine`."""
        losses = self._losses(view, text)
        return {"itm_probability": jnp.exp(-losses["itm"]), "cosine": 1 - losses["itc"]}


class Caption(BlipReferee):
    """Loss `caption` = mean cross-entropy of the prompt's tokens, smoothed as in training (`bert.SMOOTHING`)."""

    losses = config.LOSSES["blip_caption"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids [T]` and which are `scored [T]`: neither padding nor what the template puts before the prompt."""
        return tokens | {"input_ids": self._generated(tokens["input_ids"])}

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        return {"caption": self._loss(views, text, bert.SMOOTHING)}

    def _loss(self, views: Array, text: dict[str, Array], smoothing: float) -> Array:
        ids, mask = (layers.repeat(text[name][None], len(views)) for name in ("input_ids", "mask"))
        losses = self.network.token_losses(self._states(views), ids, mask, smoothing=smoothing)
        return losses.mean(-1, where=text["scored"][1:])

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`caption_log_likelihood`, the mean per token; not smoothed."""
        return {"caption_log_likelihood": -self._loss(view[None], text, 0.0)[0]}


class Vqa(BlipReferee):
    """Loss `vqa` = -log p("yes"), of the two answers "yes" and "no" to a question made of the prompt.

    As T2I-CompBench measures it ("disentangled BLIP-VQA", arXiv 2307.06350): by the first token of the answer.

    Attributes:
        answers: ids of "yes" and of "no".
    """

    answers: tuple[int, int] = struct.field(pytree_node=False)

    losses = config.LOSSES["blip_vqa"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """The question's `input_ids, mask [T]`."""
        return tokens | {"input_ids": self._reading(tokens["input_ids"])}

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        ids, mask = (layers.repeat(text[name][None], len(views)) for name in ("input_ids", "mask"))
        logits = self.network.answer_logits(self._states(views), ids, mask)[:, jnp.asarray(self.answers)]
        return {"vqa": -jax.nn.log_softmax(logits)[:, 0]}

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`vqa_probability` of "yes"."""
        return {"vqa_probability": jnp.exp(-self._losses(view, text)["vqa"])}


def from_checkpoint(
    kind: type[BlipReferee],
    network: Any,
    preprocessing: dict[str, Any],
    *,
    image_size: int = 0,
    first_token: int | None = None,
    **own: Any,
) -> BlipReferee:
    """The referee of a loaded network and its preprocessor_config.json; `image_size` 0 is the checkpoint's.

    `own` are attributes that only this kind has.
    """
    return kind(
        network=network,
        image_size=image_size or network.config.vision_config.image_size,
        mean=tuple(preprocessing["image_mean"]),
        std=tuple(preprocessing["image_std"]),
        first_token=first_token,
        **own,
    )


def answer_tokens(tokenizer: Any) -> tuple[int, int]:
    """Ids of "yes" and "no"; ValueError where the tokenizer does not have each as one token."""
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    for answer, row in zip(ANSWERS, rows, strict=True):
        if len(row) != 1 or row[0] == tokenizer.unk_token_id:
            tokens = " ".join(tokenizer.convert_ids_to_tokens(row))
            raise ValueError(f"{tokenizer.name_or_path}: the answer {answer!r} is {tokens!r}, not one token of its own")
    return rows[0][0], rows[1][0]


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [T]` of the first text."""
    return {"input_ids": ids[0], "mask": ids[0] != judge.tokenizer.pad_token_id}


def caption_texts(judge: Judge, prompt: str) -> list[str]:
    """The caption, then the template's beginning, to know how many of its tokens that is."""
    return [judge.text(prompt), judge.template.partition("{}")[0]]


def caption_tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [T]`, and `scored [T]`: False on padding and on the template's beginning."""
    caption, beginning = tokens(judge, ids), ids[1] != judge.tokenizer.pad_token_id
    first = beginning.sum() - 1  # without its [SEP]
    return caption | {"scored": caption["mask"] & (np.arange(judge.length) >= first)}
