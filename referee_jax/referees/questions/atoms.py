"""The atoms of a prompt: a question for each object, attribute, number and relation."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from referee_jax.referees.questions import words
from referee_jax.referees.questions.phrases import AND, PRONOUN, STOP, Part, Phrase, Reader, Relation, Verb

OBJECT, ATTRIBUTE, NUMBER, RELATION = KINDS = ("object", "attribute", "number", "relation")
YES = "yes"


class Atom(NamedTuple):
    """One fact of a prompt: its kind, of KINDS; itself in short; and a question with the answer that makes it true.

    Of a question that was given the kind is the user's, or empty, and `text` the question.
    """

    kind: str
    text: str
    question: str
    answer: str = YES


def atoms(prompt: str) -> tuple[Atom, ...]:
    """The atoms of a prompt: those of its things in their order, then its relations; none twice.

    Empty where nothing is found, as in a text without nouns or in another language's letters.
    """
    parts = Reader(prompt).read()
    things = [part for part in parts if isinstance(part, Phrase)]
    made = [atom for thing in things for atom in _of_thing(thing, things)]
    made += [_of_relation(*found, things) for found in _relations(parts)]
    return tuple({atom.question: atom for atom in made}.values())


def _article(noun: str) -> str:
    is_vowel = noun[0] in "aeiou" and not re.match(r"uni|use|eu|one\b|ukulele", noun)
    return f"{'an' if is_vowel else 'a'} {noun}"


def _there(noun: str, thing: Phrase) -> str:
    """Whether there is `noun`, which is the thing's with or without attributes."""
    if thing.is_plural:
        return f"Are there {noun}?"
    return f"Is there {noun if thing.head in words.MASS else _article(noun)}?"


def _is(thing: Phrase) -> str:
    return "Are" if thing.is_plural else "Is"


def _is_named_twice(thing: Phrase, things: Sequence[Phrase]) -> bool:
    return sum(other.noun == thing.noun for other in things) > 1


def _of_thing(thing: Phrase, things: Sequence[Phrase]) -> list[Atom]:
    if thing.number:
        text = f"{thing.number} {thing.noun}"
        found = [Atom(NUMBER, text, f"{_is(thing)} there exactly {text}?")]
        if _is_named_twice(thing, things) and thing.attributes:
            text = f"{thing.number} {thing.described}"
            found = [Atom(NUMBER, text, f"{_is(thing)} there exactly {text}?")]
    else:
        found = [Atom(OBJECT, thing.noun, _there(thing.noun, thing))]
    for word in thing.attributes:
        text = f"{word} {thing.noun}"
        if _is_named_twice(thing, things):  # "the circle" would be either
            question = _there(text, thing)
        else:
            question = f"{_is(thing)} the {thing.noun} {_predicate(word)}?"
        found.append(Atom(ATTRIBUTE, text, question))
    return found


def _predicate(word: str) -> str:
    """An attribute as it stands behind "is": made of leather, teardrop-shaped."""
    if word in words.MATERIALS:
        return f"made of {word}"
    return f"{word}-shaped" if word in words.SHAPED else word


def _of_relation(subject: Phrase, relation: str, others: tuple[Phrase, ...], things: Sequence[Phrase]) -> Atom:
    short = lambda thing: thing.described if _is_named_twice(thing, things) else thing.noun
    names = [short(other) for other in others]
    text = f"{short(subject)} {relation} {' and '.join(names)}"
    if names == [short(subject)]:
        other = f"other {names[0]}" if others[0].is_plural else f"another {names[0]}"
        first = names[0] if subject.is_plural else _article(names[0])
        return Atom(RELATION, text, f"{_is(subject)} {first} {relation} {other}?")
    objects = " and ".join(f"the {name}" for name in names)
    return Atom(RELATION, text, f"{_is(subject)} the {short(subject)} {relation} {objects}?")


def _relations(parts: Sequence[Part]) -> list[tuple[Phrase, str, tuple[Phrase, ...]]]:
    """Each relation with its subject and its objects.

    In a clause with a verb all that "and" joins takes part ("the belt and the scarf hang on the hook"), in a
    phrase the nearest thing ("a cat and a dog on a mat"), or that of the relation before ("a cat on a mat and near a dog").
    """
    found, found_at = [], -1
    for n, part in enumerate(parts):
        if not isinstance(part, Relation):
            continue
        start = max((i + 1 for i in range(n) if parts[i] == STOP), default=0)
        verb = next((i for i in range(start, n) if isinstance(parts[i], Verb)), None)
        objects = _joined(parts[n + 1 :])
        if n > start and parts[n - 1] == PRONOUN:
            continue
        if n > start and isinstance(parts[n - 1], Phrase):
            subjects = [parts[n - 1]]
        elif verb is not None:
            subjects = _joined(parts[start:verb][::-1])[::-1]
        elif n > start and parts[n - 1] == AND and found_at >= start:
            subjects = [found[-1][0]]
        else:
            subjects = [x for x in parts[start:n] if isinstance(x, Phrase)][-1:]
        if part.text == "between":
            groups = [tuple(objects[:2])] if len(objects) > 1 else [(thing,) for thing in objects]
        else:
            groups = [(thing,) for thing in (objects if verb is not None else objects[:1])]
        if subjects and groups:
            found += [(subject, part.text, group) for subject in subjects for group in groups]
            found_at = n
    return found


def _joined(parts: Sequence[Part]) -> list[Phrase]:
    """The phrases at the beginning that "and" or a comma joins, but for one that a verb makes the subject of the next."""
    phrases: list[Phrase] = []
    for n, part in enumerate(parts):
        if isinstance(part, Phrase):
            if phrases and n + 1 < len(parts) and isinstance(parts[n + 1], Verb):
                return phrases
            phrases.append(part)
        elif part != AND:
            return phrases
    return phrases
