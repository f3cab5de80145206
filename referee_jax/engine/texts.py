"""What an engine reads: prompts as tokens, and the questions that its referees are asked about them."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from referee_jax import config, prompts, referees
from referee_jax.engine import builders
from referee_jax.items import Item
from referee_jax.referees.questions import Atom

TOKENIZED = 4096  # prompts whose tokens stay in memory, some kilobytes each


class Texts:
    """The texts of an engine.

    Args:
        settings: of the images.
        tokenizers: of the generator's text encoders.
        judges: the referees.
        held_out: the referees that judge alone.
        questions: of their user's, by prompt.
    """

    def __init__(
        self,
        settings: config.Settings,
        tokenizers: Any,
        judges: Sequence[referees.Judge],
        held_out: Sequence[referees.Judge],
        questions: Mapping[str, Sequence[Atom]] | None = None,
    ):
        self.settings, self.tokenizers, self.questions = settings, tokenizers, questions or {}
        self.judges, self.held_out = judges, held_out
        self._tokens: dict[tuple[str, str | None], dict[str, Any]] = {}

    def asking(self, questions: Mapping[str, Sequence[Atom]]) -> "Texts":
        """The same with other questions."""
        return Texts(self.settings, self.tokenizers, self.judges, self.held_out, questions)

    def refusal(self, prompt: str, negative: str | None = None) -> str | None:
        """Why this prompt, with a negative prompt of its own, cannot be used, or None."""
        try:
            self.tokens(prompt, negative)
        except prompts.Unreadable as error:
            return error.reason
        return None

    def tokens(self, prompt: str, negative: str | None = None) -> dict[str, Any]:
        """The tokens of a prompt, and of a negative prompt in the place of the settings'. Raises prompts.Unreadable.

        Those of the last TOKENIZED are kept, so that what was checked is not read again.
        """
        if (prompt, negative) not in self._tokens:
            given = self.questions.get(prompt, ())
            tokens = builders.tokenize(
                self.settings, self.tokenizers, self.judges, self.held_out, prompt, given, negative=negative
            )
            if len(self._tokens) == TOKENIZED:
                del self._tokens[next(iter(self._tokens))]
            self._tokens[prompt, negative] = tokens
        return self._tokens[prompt, negative]

    def asked(self, items: Sequence[Item]) -> dict[str, np.ndarray]:
        """Where referees are asked questions, a hash of those about each item's prompt, to be saved."""
        judges = [judge for judge in (*self.judges, *self.held_out) if judge.spec.questions]
        if not judges:
            return {}
        asked = lambda prompt: [judge.atoms(prompt, self.questions.get(prompt, ())) for judge in judges]
        return {"questions": np.array([zlib.crc32(repr(asked(item.prompt)).encode()) for item in items], np.uint32)}

    def answered(self, prompt: str, scores: dict[str, float]) -> dict[str, list[dict[str, Any]]]:
        """Takes the answers to questions out of an item's scores, by referee."""
        groups = (("referee", self.judges), ("held_out", self.held_out))
        judges = [(f"{role}_{n}", judge) for role, group in groups for n, judge in enumerate(group)]
        given = self.questions.get(prompt, ())
        return {
            name: judge.answered(scores, prompt, given, f"{name}/") for name, judge in judges if judge.spec.questions
        }
