"""Questions of a user's own, and how answers other than yes are asked for."""

import json
import re
from collections.abc import Sequence
from typing import Any

from referee_jax.referees.questions.atoms import YES, Atom
from referee_jax.referees.questions.words import NUMBERS


def given(values: Any, kinds: Sequence[str] = ()) -> tuple[Atom, ...]:
    """Questions of a user's, each a text whose answer is yes, or a pair of question and answer.

    In a text they stand between "|", or it is JSON. `kinds` names them, in their order, if they have names.
    Raises ValueError for anything else.
    """
    if isinstance(values, str):
        is_json = values.lstrip().startswith("[")
        values = json.loads(values) if is_json else [text for text in map(str.strip, values.split("|")) if text]
    if not isinstance(values, list | tuple):
        raise ValueError(f"{str(values)[:60]!r} is no list of questions")
    pairs = [(value, YES) if isinstance(value, str) else value for value in values]
    for pair in pairs:
        if not (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, str) and x.strip() for x in pair)
        ):
            raise ValueError(f"{str(pair)[:60]!r} is neither a question nor a pair of question and answer")
    kinds = list(map(str, kinds)) if len(kinds) == len(pairs) else [""] * len(pairs)
    return tuple(
        Atom(kind, question.strip(), question.strip(), YES if answer.strip().lower() == YES else answer.strip())
        for kind, (question, answer) in zip(kinds, pairs, strict=True)
    )


_COUNT = re.compile(r"how many (.+?) (?:are|is) (?:there|in the (?:image|picture|photo))\b.*", re.IGNORECASE)


def closed(atom: Atom) -> Atom:
    """The same as a question whose answer is yes, for referees that know no other answer.

    Of those with another answer questions of numbers can be turned: "How many dogs are there?", "two". Raises
    ValueError for the rest.
    """
    if atom.answer == YES:
        return atom
    match, number = _COUNT.fullmatch(atom.question), atom.answer.lower()
    if not match or number not in NUMBERS and not number.isdecimal():
        raise ValueError(f"the answer to {atom.question[:60]!r} is {atom.answer[:20]!r}, and it answers yes or no")
    is_one = number in ("one", "1")
    return atom._replace(question=f"{'Is' if is_one else 'Are'} there exactly {number} {match[1]}?", answer=YES)


def spellings(answer: str) -> tuple[str, ...]:
    """How a model may begin to answer: in lower case and capitalised, a number also in digits, each also behind a space.

    Those that GenEval 2 adds up (https://github.com/facebookresearch/GenEval2).
    """
    word = answer.lower()
    number = NUMBERS.index(word) + 1 if word in NUMBERS else int(word) if word.isdecimal() else None
    words = [word, word.capitalize()]
    if number is not None:
        name = NUMBERS[number - 1] if 0 < number <= len(NUMBERS) else word
        words = [name, name.capitalize(), str(number)]
    return tuple(dict.fromkeys(space + x for space in ("", " ") for x in words))
