"""A referee on the host: its network, its tokenizer and its settings."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from referee_jax import config, prompts
from referee_jax.method.referee import Referee
from referee_jax.referees import questions
from referee_jax.storage import images as images_lib

QUESTION = "question_"  # scores of single questions are QUESTION and their number, NaN where fewer are asked


def asked_alone(scores: dict[str, float]) -> dict[str, float]:
    """Scores without those of questions that were not asked."""
    return {name: x for name, x in scores.items() if not (name.startswith(QUESTION) and np.isnan(x))}


def filled(ids: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids of texts `[text, T]` as `count` of them, the first in place of missing ones, and which are `real [count]`."""
    places = np.arange(count)
    real = places < len(ids)
    return ids[np.where(real, places, 0)], real


def answer_scores(name: str, log_probabilities: jax.Array, real: jax.Array, count: int) -> dict[str, jax.Array]:
    """`name`, the geometric mean of the probabilities of `real` questions `[Q]`; and each of them, if `count` are asked."""
    scores = {name: jnp.exp(log_probabilities.mean(where=real))}
    each = jnp.where(real, jnp.exp(log_probabilities), jnp.nan)
    return scores | {f"{QUESTION}{n}": each[n] for n in range(count)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """One kind of referee. Its losses are in config.LOSSES.

    Attributes:
        kind: its network, of `load.KINDS`.
        build: `(spec, network, preprocessor_config.json, tokenizer)` to the referee.
        texts: `(judge, prompt)` to all texts that are read for it, templates included.
        tokens: `(judge, ids [text, T])` of those texts to what the referee's `encode` reads, of one
            shape for all prompts.
        asked: `(judge, atom)` to the text that asks it, where `spec.questions` takes prompts apart; ValueError where
            the answer is none that the referee gives.
        answers: `(judge, atoms)` to what is read beside `tokens` of their answers; of the whole prompt, of none.
        clean: what is done to the prompt before it is put into the template.
        template: text with one {} where the prompt is put; the settings, or a `template` of the
            referee itself, which its checkpoint has, may be another.
        length: the most tokens of a text; None: the tokenizer's limit.
        question_length: the most tokens of an atom's text.
        cut: tokens that the authors' code cuts a text to; None: the most.
        published: hub ids of its checkpoints.
        architecture: the name in its config.json, where it is not the name that `kind` has.
        files: the authors' original files, which weights.lavis converts.
        is_converted: whether `published` holds only such files.
        check: raises ValueError for a tokenizer that does not fit, before weights are read.
    """

    kind: str
    build: Callable[[config.RefereeSpec, Any, Mapping, Any], Referee]
    texts: Callable[["Judge", str], list[str]] = lambda judge, prompt: [judge.text(prompt)]
    tokens: Callable[["Judge", np.ndarray], dict[str, np.ndarray]]
    asked: Callable[["Judge", questions.Atom], str] = lambda judge, atom: atom.question
    answers: Callable[["Judge", Sequence[questions.Atom]], dict[str, np.ndarray]] = lambda judge, atoms: {}
    clean: Callable[[str], str] = str
    template: str = "{}"
    length: int | None = None
    question_length: int | None = None
    cut: int | None = None
    published: tuple[str, ...] = ()
    architecture: str = ""
    files: tuple[str, ...] = ()
    is_converted: bool = False
    check: Callable[[Any], Any] = lambda tokenizer: None


class Scoring:
    """Scores of images, for a judge with `referee`, `tokenize` and `preprocess`."""

    def score(self, images: Sequence[images_lib.Picture], texts: Sequence[str]) -> list[list[dict[str, float]]]:
        """The scores of each image with each text, behind the checkpoint's own preprocessing.

        An image is a file, an array or a picture of Pillow, see storage.images. Raises ValueError for
        one that cannot be read, prompts.Unreadable for a text, and what `preprocess` raises.
        """
        for name, values in (("images", images), ("texts", texts)):
            if isinstance(values, str | os.PathLike | PIL.Image.Image):
                raise ValueError(f"{name} is one of its kind; give a list: [{values!r}]")
        if not len(images) or not texts:
            return [[] for _ in images]
        encoded = _encode(self.referee, jax.tree.map(lambda *x: np.stack(x), *map(self.tokenize, texts)))
        rows = []
        for image in images:
            scores = _score(self.referee, jnp.asarray(self.preprocess(images_lib.picture(image))), encoded)
            scores = jax.tree.map(np.asarray, scores)
            rows.append([asked_alone({name: float(x[n]) for name, x in scores.items()}) for n in range(len(texts))])
        return rows


@dataclasses.dataclass(frozen=True)
class Judge(Scoring):
    """A referee with its tokenizer and its part of the settings."""

    spec: config.RefereeSpec
    family: Family
    referee: Referee
    tokenizer: Any

    @property
    def template(self) -> str:
        """Text with one {} where the prompt is put."""
        return self.spec.template or getattr(self.referee, "template", self.family.template)

    @property
    def length(self) -> int:
        """The most tokens of a text, both ends included."""
        limit = self.tokenizer.model_max_length
        own = self.spec.truncate and self.family.cut or self.family.length
        if self.spec.questions:
            own = self.family.question_length
        return min(own or limit, limit)

    def cutting(self) -> "Judge":
        """The same, with texts cut that are too long."""
        return dataclasses.replace(self, spec=dataclasses.replace(self.spec, truncate=True))

    def is_cut(self, prompt: str) -> bool:
        """Whether `tokenize` cuts it."""
        texts = self.texts(prompt, self.atoms(prompt)) if self.spec.truncate else ()
        return any(prompts.token_count(self.tokenizer, text) > self.length for text in texts)

    def atoms(self, prompt: str, given: Sequence[questions.Atom] = ()) -> tuple[questions.Atom, ...]:
        """What is asked about a prompt: `given`, or its atoms; nothing where it is asked as a whole.

        Raises prompts.Unreadable for more than `spec.questions`, which `spec.truncate` cuts.
        """
        if not self.spec.questions:
            return ()
        atoms = tuple(given) or questions.atoms(prompt)
        if len(atoms) > self.spec.questions and not self.spec.truncate:
            reason = f"{len(atoms)} questions, {self.spec.name} is asked {self.spec.questions} (its setting questions)"
            raise prompts.Unreadable(prompt, reason)
        return atoms[: self.spec.questions]

    def texts(self, prompt: str, atoms: Sequence[questions.Atom]) -> list[str]:
        """All texts that are read for a prompt with these atoms."""
        try:
            return [self.family.asked(self, atom) for atom in atoms] or self.family.texts(self, prompt)
        except prompts.Unreadable:
            raise
        except ValueError as error:
            raise prompts.Unreadable(prompt, str(error)) from error

    def text(self, prompt: str) -> str:
        """The template with the prompt, cleaned as texts were in training."""
        return self.template.replace("{}", self.family.clean(prompt))

    def read(self, prompt: str, given: Sequence[questions.Atom] = ()) -> dict[str, np.ndarray]:
        """`tokenize` of a prompt to make an image of: one with nothing to read is Unreadable too."""
        if not self.family.clean(prompt):
            raise prompts.Unreadable(prompt, f"nothing in it that {self.spec.name} reads")
        return self.tokenize(prompt, given)

    def tokenize(self, prompt: str, given: Sequence[questions.Atom] = ()) -> dict[str, np.ndarray]:
        """What `referee.encode` reads of any text, with the user's questions about it; the tokenizer is called once.

        Raises prompts.Unreadable for too many tokens, unless `spec.truncate`, and for one that the network has no embedding
        of, as the tokenizer of a processor may add ("<image>").
        """
        name = self.spec.name
        atoms = self.atoms(prompt, given)
        texts = self.texts(prompt, atoms)
        ids = prompts.tokenize(self.tokenizer, texts, self.length, reader=name, truncate=self.spec.truncate)
        sizes = self.referee.network.config
        last = int(ids.max())
        if last >= (getattr(sizes, "text_config", None) or sizes.qformer_config).vocab_size:
            token = self.tokenizer.convert_ids_to_tokens(last)
            raise prompts.Unreadable(prompt, f"it holds {token}, for which {name} has no word")
        return self.family.tokens(self, ids) | self.family.answers(self, atoms)

    def answered(
        self, scores: dict[str, float], prompt: str, given: Sequence[questions.Atom] = (), prefix: str = ""
    ) -> list[dict[str, Any]]:
        """Takes the answers to questions out of an image's scores, whose names begin with `prefix`.

        Each is the question with its `kind`, the `answer` that is right, and that one's `probability`.
        """
        atoms = self.atoms(prompt, given)
        probabilities = [scores.pop(f"{prefix}{QUESTION}{n}", np.nan) for n in range(self.spec.questions)]
        named = ({"question": x.question, "kind": x.kind, "answer": x.answer} for x in atoms)
        return [row | {"probability": p} for row, p in zip(named, probabilities, strict=False)]

    def preprocess(self, image: PIL.Image.Image) -> np.ndarray:
        """An RGB picture to the view that `referee.scores` reads, float32, as its authors do; see `Referee.fit`.

        Raises ValueError where the checkpoint's own preprocessing gives another size than the network's.
        """
        side, fitting = self.referee.image_size, self.referee.fitting
        if not self.spec.image_size and fitting.side != side:
            given = (3, fitting.side, fitting.side)
            raise ValueError(
                f"referee {self.spec.name} reads {side} x {side} pixels, its image processor gives {given}"
            )
        return fitting.at(side).of_picture(image)


# vmap over texts alone: the vision tower, which does not depend on them, runs once per image.
_encode = jax.jit(jax.vmap(lambda referee, tokens: referee.encode(tokens), in_axes=(None, 0)))
_score = jax.jit(jax.vmap(lambda referee, view, text: referee.scores(view, text), in_axes=(None, None, 0)))
