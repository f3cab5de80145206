"""VQAScore (Lin et al. 2024, arXiv 2404.01291): is the answer "Yes" to whether the image shows the text?

    vqa    = -log p("Yes"), the mean over the answer's tokens; VQAScore is exp(-vqa). Over several
             questions it is their mean
    versus = -log softmax of log p("Yes") of the prompt among its negatives': of all things that could
             be asked of this image, is it the prompt? Hard ones have the relation of the prompt, or
             its arguments, exchanged (prompts.exchanged)

Pictures, prompt and tokens are those of the authors' package (t2v_metrics 3.0): what stands before
the image and what stands behind it are tokenised separately, so that each ends with </s>; the words
that its tokenizer does not have are no answers, though the network has rows for them. The texts
around a prompt, the tokenizer and all sizes are the checkpoint's.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config, prompts
from referee_jax.models import bert
from referee_jax.models.flan_t5 import clip_t5
from referee_jax.referees import questions, resizing
from referee_jax.referees.judge import Family, Judge, answer_scores, filled

# Behind the image, of which the question's words are some 20. There is no limit: the authors cut at 2048, where a cut text
# is asked for, which nobody's prompts reach, and a compiled program computes all of them.
TOKENS, CUT, QUESTION = 128, 256, 64


class Vqascore(struct.PyTreeNode):
    """Losses `vqa` and, where the settings ask for it, `versus`: each negative costs as much as the prompt.

    Attributes:
        image_size: side of the views in pixels.
        fitting: how an image becomes the view that is scored.
        before: ids of what stands before the image.
        answer: ids of "Yes", its end included.
        words: how many rows of the table of words are words.
        is_contrasted: whether there is `versus`.
        questions: how many of a prompt are scored one by one.
    """

    network: clip_t5.CLIPT5
    image_size: int = struct.field(pytree_node=False)
    fitting: resizing.Fitting = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    before: tuple[int, ...] = struct.field(pytree_node=False)
    answer: tuple[int, ...] = struct.field(pytree_node=False)
    words: int = struct.field(pytree_node=False)
    is_contrasted: bool = struct.field(pytree_node=False)
    questions: int = struct.field(pytree_node=False)

    @property
    def losses(self) -> tuple[str, ...]:
        """Those of config.LOSSES that the settings have texts for."""
        return config.LOSSES["vqascore"] if self.is_contrasted else ("vqa",)

    @property
    def template(self) -> str:
        """The checkpoint's question."""
        return self.network.config.question

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """`input_ids, mask [R, T]`, `real [R]` of the questions about a prompt, or of that about it and about each negative.

        As they are: the image is among the words from the first layer on.
        """
        return tokens

    def _log_yes(self, views: Array, text: dict[str, Array]) -> Array:
        """`[V, R]`: mean log-probability of the answer's tokens."""
        ids, mask = text["input_ids"], text["mask"]
        image = self.network.encode_image((views - jnp.asarray(self.mean)) / jnp.asarray(self.std))
        pairs = lambda x: jnp.tile(x, (len(views), 1))
        logits = self.network.answer_logits(
            jnp.repeat(image, len(ids), axis=0), jnp.array(self.before), pairs(ids), pairs(mask), jnp.array(self.answer)
        )
        targets = jnp.broadcast_to(jnp.array(self.answer), logits.shape[:2])
        losses = bert.cross_entropy(logits[..., : self.words], targets)
        return -losses.mean(-1).reshape(len(views), len(ids))

    def _among(self, log_yes: Array, text: dict[str, Array]) -> Array:
        """`[V]`: log-share of the prompt in what is answered with "Yes"."""
        return jax.nn.log_softmax(jnp.where(text["real"], log_yes, -jnp.inf), axis=-1)[:, 0]

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee."""
        log_yes = self._log_yes(views, text)
        if self.is_contrasted:
            return {"vqa": -log_yes[:, 0], "versus": -self._among(log_yes, text)}
        return {"vqa": -log_yes.mean(-1, where=text["real"])}

    def fit(self, image: Array) -> Array:
        """See method.referee."""
        return self.fitting.at(self.image_size)(image)

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`vqascore`, over several questions the geometric mean, and of each one.

        Where there are negatives also the `probability` of the prompt among them.
        """
        log_yes = self._log_yes(view[None], text)
        if self.is_contrasted:
            return {"vqascore": jnp.exp(log_yes[0, 0]), "probability": jnp.exp(self._among(log_yes, text)[0])}
        return answer_scores("vqascore", log_yes[0], text["real"], self.questions)


def texts(judge: Judge, prompt: str) -> list[str]:
    """What stands behind the image, with the question about the prompt, then about each of its negatives.

    Negatives are those of the settings, then at most `spec.near` hard ones: first exchanged relations.
    """
    spec = judge.spec
    hard = [*prompts.exchanged(prompt), *prompts.hard_negatives(prompt, spec.exchange)]
    negatives = [*(text for text in spec.negatives if text != prompt), *list(dict.fromkeys(hard))[: spec.near]]
    asked = [prompt, *negatives] if judge.referee.is_contrasted else [prompt]
    return [_behind(judge, judge.template.replace("{}", judge.family.clean(text))) for text in asked]


def _asked(judge: Judge, atom: questions.Atom) -> str:
    """An atom's question, with how to answer as it stands in the checkpoint's own."""
    return _behind(judge, questions.closed(atom).question + judge.template.partition("?")[2])


def _behind(judge: Judge, question: str) -> str:
    return parts(judge.referee.network.config)[1].replace("{}", question)


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [R, T]`, `real [R]`; for missing questions or negatives the first is repeated, not real."""
    negatives = len(judge.spec.negatives) + judge.spec.near if judge.referee.is_contrasted else 0
    ids, real = filled(ids, 1 + negatives if judge.referee.is_contrasted else max(1, judge.spec.questions))
    return {"input_ids": ids, "mask": ids != judge.tokenizer.pad_token_id, "real": real}


def parts(sizes: clip_t5.Config) -> tuple[str, str]:
    """What stands before the image, and behind it."""
    before, _, after = sizes.conversation.partition(clip_t5.IMAGE)
    return before, after


def _build(spec: config.RefereeSpec, network: clip_t5.CLIPT5, preprocessing: Mapping, tokenizer: Any) -> Vqascore:
    sizes = network.config
    side, mean = sizes.vision_config.image_size, tuple(preprocessing["image_mean"])
    colour = tuple(int(255 * x) for x in mean)
    return Vqascore(
        network=network,
        image_size=side,
        fitting=resizing.fitting(preprocessing, side, "padded", colour=colour),
        mean=mean,
        std=tuple(preprocessing["image_std"]),
        before=tuple(tokenizer(parts(sizes)[0])["input_ids"]),
        answer=tuple(tokenizer(sizes.answer)["input_ids"]),
        words=min(len(tokenizer), sizes.vocab_size),
        is_contrasted="versus" in spec.losses,
        questions=spec.questions,
    )


FAMILY = Family(
    kind="clip_t5",
    build=_build,
    texts=texts,
    tokens=tokens,
    asked=_asked,
    length=TOKENS,
    question_length=QUESTION,
    cut=CUT,
    published=("zhiqiulin/clip-flant5-xl", "zhiqiulin/clip-flant5-xxl"),
    files=("clip-flant5-xl", "clip-flant5-xxl"),
    is_converted=True,
)
