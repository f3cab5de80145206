"""Qwen3-VL as a referee: by the probability that the answer to a question about the picture is yes.

    vqa = -mean over questions of log p,   p = the softmax over all words of the first one of the
                                           answer, summed over its spellings ("Yes", "yes", ...)

as GenEval 2 scores by it (https://github.com/facebookresearch/GenEval2); over several questions exp(-vqa)
is the geometric mean of Soft-TIFA.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from referee_jax import config, prompts
from referee_jax.models import qwen3_vl
from referee_jax.referees import questions, resizing
from referee_jax.referees.judge import Family, Judge, answer_scores

# A conversation as the published chat template writes it: a picture, a question, and the answer's beginning.
BEFORE, AFTER = "<|im_start|>user\n<|vision_start|>", "<|vision_end|>"
END = "<|im_end|>\n<|im_start|>assistant\n"
TOKENS, QUESTION = 96, 40  # of a question about a prompt, of which Stable Diffusion reads 75; and about an atom
SPELLINGS = (
    6  # of an answer, at most: a number as a word, capitalised or not, and in digits, each behind a space or not
)
SIDE = 448  # pixels of the views
LEAST, MOST = 256**2, 4096**2  # pixels of a picture, where a preprocessor_config.json does not say it
_MARK = re.compile(r"<\|\w+\|>")


class Qwen3VLReferee(struct.PyTreeNode):
    """Loss `vqa`.

    Attributes:
        image_size: side of the views in pixels.
        fitting: how a picture of any size is read; its sides stay as unequal as they are.
        before, after, end: ids of BEFORE, AFTER and END.
        questions: how many of a prompt are scored one by one.
    """

    network: qwen3_vl.Qwen3VL
    image_size: int = struct.field(pytree_node=False)
    fitting: resizing.Whole = struct.field(pytree_node=False)
    mean: tuple[float, float, float] = struct.field(pytree_node=False)
    std: tuple[float, float, float] = struct.field(pytree_node=False)
    before: tuple[int, ...] = struct.field(pytree_node=False)
    after: tuple[int, ...] = struct.field(pytree_node=False)
    end: tuple[int, ...] = struct.field(pytree_node=False)
    questions: int = struct.field(pytree_node=False)

    losses = config.LOSSES["qwen3_vl"]

    def encode(self, tokens: dict[str, Array]) -> dict[str, Array]:
        """Q questions' `input_ids, mask [Q, T]`, one without tokens is not asked; `answers [Q, A]`, -1 is none.

        Returns embeddings `before [P, D]` and `questions [Q, after + T + end, D]`, the numbers `last [Q]` of
        their last tokens, which are `real [Q]`, and the `answers`.
        """
        ids, mask = (jnp.asarray(tokens[name]) for name in ("input_ids", "mask"))
        constant = lambda ids: jnp.asarray(ids, jnp.int32)
        after, end, length = constant(self.after), constant(self.end), len(self.after) + mask.sum(-1)
        rows = jnp.concatenate([jnp.broadcast_to(after, (len(ids), len(after))), ids], axis=1)
        rows = jnp.pad(rows, ((0, 0), (0, len(end))))
        # END follows the last token, and padding END.
        place = jnp.arange(rows.shape[1]) - length[:, None]
        rows = jnp.where((place >= 0) & (place < len(end)), end[jnp.clip(place, 0, len(end) - 1)], rows)
        return {
            "before": self.network.embed(constant(self.before)),
            "questions": self.network.embed(rows),
            "last": length + len(end) - 1,
            "real": mask.any(-1),
            "answers": jnp.asarray(tokens["answers"]),
        }

    def log_probabilities(self, views: Array, text: dict[str, Array]) -> Array:
        """Of the answer to each question about each view `[V, H, W, 3]`: float32 `[V, Q]`."""
        pixels = (views - jnp.asarray(self.mean)) / jnp.asarray(self.std)
        logits = self.network.next_logits(pixels, text["before"], text["questions"], text["last"])
        answers = jnp.broadcast_to(text["answers"], (*logits.shape[:-1], text["answers"].shape[-1]))
        spelled = jnp.take_along_axis(logits, jnp.maximum(answers, 0), axis=-1)
        said = jax.nn.logsumexp(spelled, axis=-1, where=answers >= 0)
        return said - jax.nn.logsumexp(logits, axis=-1)

    def views_losses(self, views: Array, text: dict[str, Array]) -> dict[str, Array]:
        """See method.referee; sides are multiples of `fitting.factor`."""
        return {"vqa": -self.log_probabilities(views, text).mean(-1, where=text["real"])}

    def fit(self, image: Array) -> Array:
        """See method.referee; of the picture's ratio of sides."""
        return self.fitting(image)

    def scores(self, view: Array, text: dict[str, Array]) -> dict[str, Array]:
        """`vqa_probability` of the answers, the geometric mean over questions, and of each one where there are several."""
        return answer_scores(
            "vqa_probability", self.log_probabilities(view[None], text)[0], text["real"], self.questions
        )


def from_checkpoint(
    network: qwen3_vl.Qwen3VL, preprocessing: Mapping, tokenizer: Any, *, image_size: int = 0, questions: int = 0
) -> Qwen3VLReferee:
    """The referee of a loaded network, its preprocessor_config.json and its tokenizer.

    `image_size` 0 is SIDE, or what the checkpoint's limits make of it. Raises ValueError for a side that
    is no multiple of the network's, and for patches that are not the network's.
    """
    sizes = network.config.vision_config
    for key, wanted in (
        ("patch_size", sizes.patch_size),
        ("merge_size", sizes.spatial_merge_size),
        ("temporal_patch_size", sizes.temporal_patch_size),
    ):
        if preprocessing.get(key, wanted) != wanted:
            raise ValueError(f"preprocessor_config.json: {key}={preprocessing[key]}, but the network has {wanted}")
    if image_size % sizes.side:
        raise config.ConfigError(f"referee qwen3_vl: image_size = {image_size} is not a multiple of {sizes.side}")
    fitting = resizing.whole(preprocessing, sizes.side, side=SIDE, least=LEAST, most=MOST)
    if image_size:
        fitting = dataclasses.replace(fitting, side=image_size, resized=image_size)
    ids = lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    return Qwen3VLReferee(
        network=network,
        image_size=fitting.side,
        fitting=fitting,
        mean=tuple(preprocessing["image_mean"]),
        std=tuple(preprocessing["image_std"]),
        before=ids(BEFORE),
        after=ids(AFTER),
        end=ids(END),
        questions=questions,
    )


def check(tokenizer: Any) -> None:
    """Raises ValueError for a tokenizer without the marks of a conversation, or whose checkpoint thinks before it answers."""
    words = tokenizer.get_vocab()
    missing = [mark for text in (BEFORE, AFTER, END) for mark in _MARK.findall(text) if mark not in words]
    if missing:
        raise ValueError(f"{tokenizer.name_or_path}: the tokenizer has no {missing[0]}; is it Qwen3-VL's?")
    if tokenizer.chat_template:
        options = {"tokenize": False, "add_generation_prompt": True}
        asked = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], **options)
        if not asked.endswith(END):
            raise ValueError(
                f"{tokenizer.name_or_path}: an answer begins behind {asked[-30:]!r}, not {END!r}, as of a checkpoint that "
                "thinks before it answers; take the Instruct checkpoint"
            )
    for answer in questions.spellings(questions.YES):
        if len(row := tokenizer(answer, add_special_tokens=False)["input_ids"]) != 1:
            pieces = " ".join(tokenizer.convert_ids_to_tokens(row))
            raise ValueError(f"{tokenizer.name_or_path}: the answer {answer!r} is {pieces!r}, not one token of its own")


def _texts(judge: Judge, prompt: str) -> list[str]:
    return [judge.text(_unmarked(judge, prompt))]


def _unmarked(judge: Judge, text: str) -> str:
    """The text; with a mark of the conversation it would end that, or pretend another picture."""
    if mark := _MARK.search(text):
        raise prompts.Unreadable(
            text, f"it holds {mark[0]}, which {judge.spec.name} takes for a mark of the conversation"
        )
    return text


def tokens(judge: Judge, ids: np.ndarray) -> dict[str, np.ndarray]:
    """`input_ids, mask [Q, T]`."""
    missing = max(1, judge.spec.questions) - len(ids)
    ids = np.pad(ids, ((0, missing), (0, 0)), constant_values=judge.tokenizer.pad_token_id)
    return {"input_ids": ids, "mask": ids != judge.tokenizer.pad_token_id}


def answers(judge: Judge, atoms: Sequence[questions.Atom]) -> dict[str, np.ndarray]:
    """`answers [Q, SPELLINGS]`: the first tokens of each answer's spellings, -1 where there are fewer."""
    rows = np.full((max(1, judge.spec.questions), SPELLINGS), -1, np.int32)
    for row, answer in zip(rows, [atom.answer for atom in atoms] or [questions.YES], strict=False):
        first = {
            judge.tokenizer(text, add_special_tokens=False)["input_ids"][0] for text in questions.spellings(answer)
        }
        row[: len(first)] = sorted(first)
    return {"answers": rows}


def _asked(judge: Judge, atom: questions.Atom) -> str:
    return _unmarked(judge, f"{atom.question} Answer in one word.")  # as GenEval 2 asks


def _build(
    spec: config.RefereeSpec, network: qwen3_vl.Qwen3VL, preprocessing: Mapping, tokenizer: Any
) -> Qwen3VLReferee:
    sizes = {"image_size": spec.image_size, "questions": spec.questions}
    return from_checkpoint(network, preprocessing, tokenizer, **sizes)


FAMILY = Family(
    kind="qwen3_vl",
    build=_build,
    texts=_texts,
    tokens=tokens,
    asked=_asked,
    answers=answers,
    template='Does this image show "{}"? Answer the question with Yes or No.',  # GenEval 2's
    length=TOKENS,
    question_length=QUESTION,
    published=("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
    check=check,
)
