"""Prompts: files of them, what can be wrong with one, and their tokens."""

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np


class PromptError(ValueError):
    """A file of prompts or a prompt that cannot be used; one sentence."""


class Unreadable(PromptError):
    """A text that a network cannot read; `reason` says why, without the text."""

    def __init__(self, text: str, reason: str):
        super().__init__(f"the prompt {text[:60]!r}: {reason}")
        self.reason = reason


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of `text` with both ends, by a transformers tokenizer."""
    return len(tokenizer(text, verbose=False)["input_ids"])


def tokenize(
    tokenizer: Any, texts: Sequence[str], length: int | None = None, *, reader: str = "the text encoder"
) -> np.ndarray:
    """Token ids, int32 `[text, length]`, padded as the tokenizer pads; `length` is by default the tokenizer's limit.

    Nothing is cut: a text of more tokens raises Unreadable, which names the `reader`.
    """
    length = tokenizer.model_max_length if length is None else length
    if not texts:
        return np.zeros((0, length), np.int32)
    # Positions are counted from the first token, wherever a tokenizer made for generating text would pad.
    how = {"padding": "max_length", "padding_side": "right", "max_length": length, "truncation": False}
    rows = tokenizer(list(texts), verbose=False, **how)["input_ids"]
    text, longest = max(zip(texts, rows, strict=True), key=lambda pair: len(pair[1]))
    if len(longest) > length:
        raise Unreadable(text, f"{len(longest)} tokens, {reader} reads {length}")
    return np.array(rows, np.int32)


_MARKS = re.compile(r"""[.!"()*#:;~]""")


def caption(text: str) -> str:
    """The text as BLIP's were in training (`blip_caption` of LAVIS): lower case, some marks blanked.

    What LAVIS also does, cutting after 50 words, is left out: a text is read whole or refused.
    """
    return re.sub(r"\s{2,}", " ", _MARKS.sub(" ", text.lower())).strip()


PLACES = re.compile(r"\{(caption)?\}")


def fill(template: str, prompt: str) -> str:
    """The template with the prompt in place of {}, or, as `caption` leaves it, of {caption}."""
    return PLACES.sub(lambda place: caption(prompt) if place[1] else prompt, template)


def question(text: str) -> str:
    """The same for questions (`blip_question` of LAVIS), where the marks are deleted."""
    return _MARKS.sub("", text.lower()).strip()


def hard_negatives(prompt: str, exchange: Sequence[Sequence[str]]) -> list[str]:
    """Texts near to a prompt that say something else, the most treacherous first: what a referee must not mix up.

    `exchange` are groups of words of which each may stand where another stands (colours, shapes, ...). Two words of a group
    that are both in the prompt change places; one part of an "and" is left out; one word gives way to each other one of its
    group.
    """
    words = prompt.split()
    groups = [{word.lower(): None for word in group} for group in exchange]
    at = [[i for i, word in enumerate(words) if word.lower() in group] for group in groups]
    texts = []
    for places in at:
        for i, j in itertools.combinations(places, 2):
            swapped = list(words)
            swapped[i], swapped[j] = words[j], words[i]
            texts.append(swapped)
    parts = prompt.split(" and ")
    texts += [part.split() for part in parts if len(parts) > 1]
    for group, places in zip(groups, at, strict=True):
        texts += [[*words[:i], other, *words[i + 1 :]] for i in places for other in group]
    # "a red ..." with another colour may be "an orange ...".
    told = [" ".join(_article(text, i) for i in range(len(text))) for text in texts]
    return [text for text in dict.fromkeys(told) if text.lower() != prompt.lower()]


def _article(words: Sequence[str], i: int) -> str:
    if words[i] not in ("a", "an") or i + 1 == len(words):
        return words[i]
    return "an" if words[i + 1][0].lower() in "aeiou" else "a"
