"""BLIP as a referee: by its match with the prompt, by the prompt as a caption, or as a question.

The authors put [ENC] in the place of [CLS] wherever the text reads the image (arXiv 2201.12086,
figure 2), and [DEC] where a text is generated; transformers' port leaves [CLS] in the first case,
so `first_token` is a setting.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config, prompts
from referee_jax.models import bert, blip, layers
from referee_jax.referees import questions, resizing
from referee_jax.referees.judge import Family, Judge, answer_scores, filled

ANSWERS = ("yes", "no")
# BLIP was trained on texts of 35 to 40 wordpieces, but its table of positions is BERT's, of 512.
TOKENS, QUESTION = 64, 32


class BlipReferee(struct.PyTreeNode):
    """Common to BLIP's referees.

    Attributes:
        image_size: side of the views in pixels; positions are interpolated for another than the
            checkpoint's.
        fitting: how an image becomes the view that is scored.
        first_token: id put first in a text that reads the image; None leaves [CLS].
    """

    network: blip.ImageTextRetrieval | blip.ConditionalGeneration | blip.QuestionAnswering
    image_size: int = struct.field(pytree_node=False)
    fitting: resizing.Fitting = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    first_token: int | None = struct.field(pytree_node=False)

    shape = resizing.SQUASHED

    def _states(self, views: Array) -> Array:
        return self.network.vision_model((views - jnp.asarray(self.mean)) / jnp.asarray(self.std))

    def _reading(self, input_ids: Array) -> Array:
        return input_ids if self.first_token is None else jnp.asarray(input_ids).at[..., 0].set(self.first_token)

    def _generated(self, input_ids: Array) -> Array:
        return jnp.asarray(input_ids).at[..., 0].set(self.network.config.text_config.bos_token_id)

    def fit(self, image: Array) -> Array:
        """See method.referee."""
        return self.fitting.at(self.image_size)(image)

    def _losses(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        return {name: loss[0] for name, loss in self.views_losses(view[None], text).items()}


class Itm(BlipReferee):
    """Losses `itm` = -log p(match) of the matching head, `itc` = 1 - cos(view, prompt)."""

    losses = config.LOSSES["blip_itm"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids, mask [T]`; adds the prompt's unit `feature [D]`, for `itc`."""
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
    """Loss `caption` = mean cross-entropy of the prompt's tokens, with `bert.SMOOTHING` as in training."""

    losses = config.LOSSES["blip_caption"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids [T]`, and `scored [T]`: neither padding nor the template's beginning."""
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
    """Loss `vqa` = -log p("yes"), of the answers "yes" and "no" to a question made of the prompt, or the mean over several.

    By the first token of the answer, as in T2I-CompBench ("disentangled BLIP-VQA", arXiv 2307.06350).

    Attributes:
        answers: ids of "yes" and of "no".
        questions: how many of a prompt are scored one by one.
    """

    answers: tuple[int, int] = struct.field(pytree_node=False)
    questions: int = struct.field(pytree_node=False)

    losses = config.LOSSES["blip_vqa"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """Q questions' `input_ids, mask [Q, T]`, and which are `real [Q]`."""
        return tokens | {"input_ids": self._reading(tokens["input_ids"])}

    def _log_yes(self, views: Array, text: dict[str, Array]) -> Array:
        """Log-probability of "yes" to each question about each view, `[V, Q]`."""
        count = len(text["input_ids"])
        ids, mask = (jnp.tile(text[name], (len(views), 1)) for name in ("input_ids", "mask"))
        states = jnp.repeat(self._states(views), count, axis=0)
        logits = self.network.answer_logits(states, ids, mask)[:, jnp.asarray(self.answers)]
        return jax.nn.log_softmax(logits)[:, 0].reshape(len(views), count)

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        return {"vqa": -self._log_yes(views, text).mean(-1, where=text["real"])}

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`vqa_probability` of "yes", over several questions the geometric mean, and of each one."""
        return answer_scores("vqa_probability", self._log_yes(view[None], text)[0], text["real"], self.questions)


def from_checkpoint(
    referee: type[BlipReferee],
    network: Any,
    preprocessing: Mapping,
    *,
    image_size: int = 0,
    first_token: int | None = None,
    **attributes: Any,
) -> BlipReferee:
    """The referee of a loaded network and its preprocessor_config.json.

    `image_size` 0 is the checkpoint's; `attributes` are those that only this kind of referee has.
    """
    side = network.config.vision_config.image_size
    return referee(
        network=network,
        image_size=image_size or side,
        fitting=resizing.fitting(preprocessing, side, referee.shape),
        mean=tuple(preprocessing["image_mean"]),
        std=tuple(preprocessing["image_std"]),
        first_token=first_token,
        **attributes,
    )


def answer_tokens(tokenizer: Any) -> tuple[int, int]:
    """Ids of "yes" and "no"; ValueError where the tokenizer does not have each as one token."""
    rows = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in ANSWERS]
    for answer, row in zip(ANSWERS, rows, strict=True):
        if len(row) != 1 or row[0] == tokenizer.unk_token_id:
            words = " ".join(tokenizer.convert_ids_to_tokens(row))
            raise ValueError(f"{tokenizer.name_or_path}: the answer {answer!r} is {words!r}, not one token of its own")
    return rows[0][0], rows[1][0]


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [T]` of the first text."""
    return {"input_ids": ids[0], "mask": ids[0] != judge.tokenizer.pad_token_id}


def question_tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [Q, T]`, `real [Q]`; for missing questions the first is repeated, not real."""
    ids, real = filled(ids, max(1, judge.spec.questions))
    return {"input_ids": ids, "mask": ids != judge.tokenizer.pad_token_id, "real": real}


def caption_texts(judge: Judge, prompt: str) -> list[str]:
    """The caption, then the template's beginning, to know how many of its tokens that is."""
    return [judge.text(prompt), judge.template.partition("{}")[0]]


def caption_tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [T]`, and `scored [T]`: False on padding and on the template's beginning."""
    caption, beginning = tokens(judge, ids), ids[1] != judge.tokenizer.pad_token_id
    first = beginning.sum() - 1  # without its [SEP]
    return caption | {"scored": caption["mask"] & (np.arange(judge.length) >= first)}


def _build(
    referee: type[BlipReferee], spec: config.RefereeSpec, network: Any, preprocessing: Mapping, tokenizer: Any
) -> BlipReferee:
    attributes = {"answers": answer_tokens(tokenizer), "questions": spec.questions} if referee is Vqa else {}
    if spec.first_token == "[ENC]":
        # The authors' tokenizer adds [DEC], then [ENC]; that of published directories has neither.
        enc = network.config.text_config.bos_token_id + 1
        attributes["first_token"] = tokenizer.get_vocab().get("[ENC]", enc)
    return from_checkpoint(referee, network, preprocessing, image_size=spec.image_size, **attributes)


_family = functools.partial(Family, clean=prompts.caption, length=TOKENS)

ITM = _family(
    kind="blip_itm",
    cut=35,  # https://github.com/salesforce/BLIP, models/blip_itm.py, blip.py and blip_vqa.py
    build=functools.partial(_build, Itm),
    tokens=tokens,
    published=(
        "Salesforce/blip-itm-base-coco",
        "Salesforce/blip-itm-large-coco",
        "Salesforce/blip-itm-base-flickr",
        "Salesforce/blip-itm-large-flickr",
    ),
    files=(
        "model_base_retrieval_coco.pth",
        "model_large_retrieval_coco.pth",
        "model_base_retrieval_flickr.pth",
        "model_large_retrieval_flickr.pth",
    ),
)
CAPTION = _family(
    kind="blip_caption",
    cut=40,
    build=functools.partial(_build, Caption),
    texts=caption_texts,
    tokens=caption_tokens,
    template="a picture of {}",  # as captions began in training
    published=("Salesforce/blip-image-captioning-base", "Salesforce/blip-image-captioning-large"),
    files=("model_base_caption_capfilt_large.pth", "model_large_caption.pth"),
)
VQA = _family(
    kind="blip_vqa",
    cut=35,
    build=functools.partial(_build, Vqa),
    tokens=question_tokens,
    asked=lambda judge, atom: f"{prompts.question(questions.closed(atom).question.rstrip('?'))}?",
    question_length=QUESTION,
    clean=prompts.question,
    template="{}?",  # T2I-CompBench's question
    published=("Salesforce/blip-vqa-base", "Salesforce/blip-vqa-capfilt-large"),
    files=("model_base_vqa_capfilt_large.pth",),  # at 480 pixels, as T2I-CompBench uses it
    check=answer_tokens,
)
