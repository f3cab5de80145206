"""Texts made from a prompt (captions, questions, hard negatives) and their tokens."""

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any

import ftfy
import numpy as np

PLACES = re.compile(r"\{(caption)?\}")  # of the prompt in a template
_MARKS = re.compile(r"""[.!"()*#:;~]""")


class PromptError(ValueError):
    """A prompt, or a file of prompts, that cannot be used; one sentence."""


class Unreadable(PromptError):
    """A text that a network cannot read; `reason` says why, without the text."""

    def __init__(self, text: str, reason: str):
        super().__init__(f"the prompt {text[:60]!r}: {reason}")
        self.reason = reason


def token_count(tokenizer: Any, text: str) -> int:
    """Number of tokens of `text`, start and end included, by a transformers tokenizer."""
    return len(tokenizer(text, verbose=False)["input_ids"])


def tokenize(
    tokenizer: Any,
    texts: Sequence[str],
    length: int | None = None,
    *,
    reader: str = "the text encoder",
    truncate: bool = False,
) -> np.ndarray:
    """Token ids, int32 `[text, length]`, padded as the tokenizer pads; `length` is by default the tokenizer's limit.

    A text of more tokens is cut, its end token kept, if `truncate`; or else raises Unreadable, which names the `reader`.
    """
    length = tokenizer.model_max_length if length is None else length
    if not texts:
        return np.zeros((0, length), np.int32)
    # Position 0 is the first token, also for a tokenizer that would pad on the left.
    options = {"padding": "max_length", "padding_side": "right", "max_length": length, "truncation": truncate}
    rows = tokenizer(list(texts), verbose=False, **options)["input_ids"]
    text, longest = max(zip(texts, rows, strict=True), key=lambda pair: len(pair[1]))
    if len(longest) > length:
        raise Unreadable(text, f"{len(longest)} tokens, {reader} reads {length}")
    return np.array(rows, np.int32)


def repaired(text: str) -> str:
    """A text as the tokenizers of OpenAI and open_clip are given it (`basic_clean`): quotes straightened, &amp; resolved,
    full-width letters, ligatures and what was decoded wrongly put right; most texts stay as they are.
    """
    return html.unescape(html.unescape(ftfy.fix_text(text))).strip()


def caption(text: str) -> str:
    """A caption as in BLIP's training (`blip_caption` of LAVIS): lower case, some marks as spaces.

    Unlike LAVIS, it does not cut after 50 words.
    """
    return re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower())).strip()


def fill(template: str, prompt: str) -> str:
    """Replaces {} in the template by the prompt, and {caption} by its `caption`."""
    return PLACES.sub(lambda match: caption(prompt) if match[1] else prompt, template)


def question(text: str) -> str:
    """A question as in BLIP's training (`blip_question` of LAVIS): lower case, marks deleted."""
    return _MARKS.sub("", text.lower()).strip()


def hard_negatives(prompt: str, exchange: Sequence[Sequence[str]]) -> list[str]:
    """Hard negatives of a prompt, hardest first: similar texts that a referee must tell from it.

    `exchange` are groups of interchangeable words (colours, shapes, ...). First, two words of a
    group that are both in the prompt swap places; then one side of an "and" is left out; then a
    word is replaced by each other word of its group.
    """
    words = prompt.split()
    groups = [{word.lower(): None for word in group} for group in exchange]
    positions = [[i for i, word in enumerate(words) if word.lower() in group] for group in groups]
    texts = []
    for indices in positions:
        for i, j in itertools.combinations(indices, 2):
            swapped = list(words)
            swapped[i], swapped[j] = words[j], words[i]
            texts.append(swapped)
    parts = prompt.split(" and ")
    texts += [part.split() for part in parts if len(parts) > 1]
    for group, indices in zip(groups, positions, strict=True):
        texts += [[*words[:i], other, *words[i + 1 :]] for i in indices for other in group]
    negatives = [" ".join(_article(text, i) for i in range(len(text))) for text in texts]
    return [text for text in dict.fromkeys(negatives) if text.lower() != prompt.lower()]


# Where one thing is, seen from another; each word with its opposite.
_OPPOSITES = {"left": "right", "above": "below", "over": "under", "top": "bottom", "in front of": "behind"}
_OPPOSITES |= {other: word for word, other in _OPPOSITES.items()}
_RELATION = re.compile(
    r"\s(?:(?:is|are)\s)?(?:(?:(?:on|to|at)\s)?(?:the\s)?(left|right|top|bottom)(?:\sside)?\sof|"
    r"(above|below|over|under|in front of|behind))\s",
    re.IGNORECASE,
)


def exchanged(prompt: str) -> list[str]:
    """Texts that are wrong where the prompt is right, as its relations are turned round; none without one.

    First, if there is one relation, its arguments change places ("a left of b": "b left of a"); then each relation
    becomes its opposite.
    """
    relations = list(_RELATION.finditer(prompt))
    texts = []
    if len(relations) == 1:
        sentence = prompt.rstrip(" .")
        first, second = sentence[: relations[0].start()], sentence[relations[0].end() :]
        if first[:1].isupper() and second[:1].islower():
            first, second = first[0].lower() + first[1:], second[0].upper() + second[1:]
        texts.append(second + relations[0][0] + first + prompt[len(sentence) :])
    for relation in relations:
        n = relation.lastindex
        texts.append(prompt[: relation.start(n)] + _OPPOSITES[relation[n].lower()] + prompt[relation.end(n) :])
    return [text for text in dict.fromkeys(texts) if text.lower() != prompt.lower()]


def _article(words: Sequence[str], i: int) -> str:
    """Word `i`, with an article adapted to the next word: "a red ..." becomes "an orange ..."."""
    if words[i] not in ("a", "an") or i + 1 == len(words):
        return words[i]
    return "an" if words[i + 1][0].lower() in "aeiou" else "a"
