"""A text as noun phrases, verbs and relations: a parser by rules, without a model."""

import dataclasses
from typing import NamedTuple

from referee_jax.referees.questions import words


@dataclasses.dataclass(eq=False)
class Phrase:
    """A noun phrase: "two dark blue squares" has the noun "squares", the number "two", the attribute "dark blue"."""

    noun: str
    number: str = ""
    attributes: list[str] = dataclasses.field(default_factory=list)

    @property
    def head(self) -> str:
        """The word that has the number: of "slices of pizza", "slices"."""
        return self.noun.partition(" of ")[0].split()[-1]

    @property
    def is_plural(self) -> bool:
        """Whether it is more than one."""
        if self.number:
            return self.number != "one"
        return self.head in words.PLURALS or (self.head.endswith("s") and not words.SINGULAR.search(self.head))

    @property
    def described(self) -> str:
        """The noun with its attributes."""
        return " ".join([*self.attributes, self.noun])


class Verb(NamedTuple):
    """A verb between phrases; `is_be` for forms of "to be"."""

    is_be: bool


class Relation(NamedTuple):
    """As a question has it."""

    text: str


AND, STOP, PRONOUN, OTHER = "and", "stop", "pronoun", "other"
Part = Phrase | Verb | Relation | str


def is_number(word: str) -> bool:
    return word in words.NUMBERS or word.isdecimal()


def is_adjective(word: str) -> bool:
    return word in words.ADJECTIVES or word in words.SHAPED or bool(words.ADJECTIVE.match(word))


class Reader:
    """Reads the words of a text from left to right, into `parts`."""

    def __init__(self, text: str):
        self.words = words.TOKEN.findall(text.lower().replace("’", "'"))
        self.at = 0
        self.parts: list[Part] = []

    def word(self, ahead: int = 0) -> str:
        """The word `ahead` of the place, "." behind the last."""
        place = self.at + ahead
        return self.words[place] if place < len(self.words) else "."

    def relation(self, ahead: int = 0) -> str:
        """The longest phrase of RELATIONS that begins there, or an empty text."""
        for length in range(words.LONGEST, 0, -1):
            phrase = " ".join(self.words[self.at + ahead : self.at + ahead + length])
            if phrase in words.RELATIONS:
                return phrase
        return ""

    def ends(self, ahead: int = 0) -> bool:
        """Whether a noun phrase that has no noun yet cannot go on there."""
        word = self.word(ahead)
        closed = (words.STOPS, {","}, words.OTHERS, words.DETERMINERS, words.VERBS)
        is_closed = any(word in group for group in closed)
        return is_closed or is_number(word) or bool(self.relation(ahead))

    def is_verb(self, ahead: int = 0) -> bool:
        """Whether a verb, or an adverb before one, is there, if it follows a noun."""
        word, then = self.word(ahead), self.word(ahead + 1)
        if then in words.DETERMINERS or is_number(then):
            return word not in words.OTHERS
        if word in words.PERHAPS_VERBS:
            follows = then in words.OTHERS - {"and"} or self.relation(ahead + 1)
            return bool(follows) or then.endswith("ly") or is_adjective(then)
        if word in words.VERBS or words.ADVERB.search(word):
            return True
        return word.endswith(("ed", "ing")) and word not in words.NOT_VERBS and len(word) > 4

    def read(self) -> list[Part]:
        """All parts."""
        while self.at < len(self.words):
            self.parts += self._part()
        return self.parts

    def _part(self) -> list[Part]:
        word, last = self.word(), self.parts[-1] if self.parts else STOP
        if word in words.STOPS or word == "," or word == "and":
            self.at += 1
            return [STOP if word in words.STOPS else AND]
        if phrase := self.relation():
            self.at += len(phrase.split())
            # "Trying on shoes" and "held by a man" are no places.
            is_place = len(phrase.split()) > 1 or phrase not in ("in", "on", "by") or self._begins_phrase()
            is_place = is_place and not (phrase == "by" and not isinstance(last, Phrase))
            return [Relation(words.RELATIONS[phrase]) if is_place else OTHER]
        if isinstance(last, Verb) and last.is_be and (attributes := self._predicates()):
            subject = next((part for part in reversed(self.parts) if isinstance(part, Phrase)), None)
            if subject:
                subject.attributes += attributes
            return []
        is_bare = last in (STOP, AND) and not self.ends() and not self.is_verb() and not words.ADVERB.search(word)
        if self._begins_phrase() or is_bare:
            return self._phrase()
        is_verb = self.is_verb()
        self.at += 1
        return [Verb(word in words.BE) if is_verb else PRONOUN if word in words.PRONOUNS else OTHER]

    def _begins_phrase(self) -> bool:
        word = self.word()
        is_modifier = is_adjective(word) and (not self.ends(1) or self._goes_on(1))
        return word in words.DETERMINERS or is_number(word) or is_modifier

    def _predicates(self) -> list[str]:
        """Adjectives behind "is" that belong to no noun: "is red", "is black and white"."""
        start, attributes = self.at, []
        while is_adjective(self.word()):
            attributes.append(self.word())
            self.at += 1
            if self.word() in ("and", ",") and is_adjective(self.word(1)):
                self.at += 1
        if not attributes or not self.ends():
            self.at = start
            return []
        return attributes

    def _phrase(self) -> list[Part]:
        number = ""
        while self.word() in words.DETERMINERS or is_number(self.word()):
            if self.word() in ("a", "the") and self.word(1) in ("pair", "couple") and self.word(2) == "of":
                number, self.at = "two", self.at + 3
            else:
                number, self.at = self._number() or number, self.at + 1
        if self.word() in words.GROUPS and self.word(1) == "of" and not self.ends(2):
            number, self.at = "", self.at + 2
        attributes = self._attributes()
        noun = self._noun()
        if not noun or noun[-1] in words.NO_OBJECTS:
            return [OTHER]
        if self.word() == "of" and not self.ends(1):
            self.at += 1
            noun += ["of", *self._noun()]
        return [Phrase(" ".join(noun), number, attributes)]

    def _number(self) -> str:
        word = self.word()
        if word.isdecimal() and 0 < int(word) <= len(words.NUMBERS):
            return words.NUMBERS[int(word) - 1]
        return word if is_number(word) else ""

    def _noun(self) -> list[str]:
        noun: list[str] = []
        # Two phrases side by side have a verb between them: "the wooden mallets pound the nails".
        is_object = lambda: self.word(1) in words.DETERMINERS or is_number(self.word(1))
        while not self.ends() and not (noun and (self.is_verb() or is_object())):
            noun.append(self.word())
            self.at += 1
        return noun

    def _attributes(self) -> list[str]:
        """Adjectives before a noun: "dark blue" and "black and white" are one, "soft, warm" two."""
        attributes: list[str] = []
        while True:
            word, then = self.word(), self.word(1)
            if attributes and self._goes_on():
                if word == "and":
                    attributes[-1] += f" and {then}"
                else:
                    attributes.append(then)
                self.at += 2
            elif (word, then) in words.COMPOUNDS or not self._modifies() or (self.ends(1) and not self._goes_on(1)):
                return attributes
            elif word in words.SHADES and then in words.COLOURS and not self.ends(2):
                attributes.append(f"{word} {then}")
                self.at += 2
            else:
                attributes.append(word)
                self.at += 1

    def _goes_on(self, ahead: int = 0) -> bool:
        """Whether "and" or a comma is there, with another adjective behind it and the noun behind that."""
        return self.word(ahead) in ("and", ",") and self._modifies(ahead + 1, "ing") and not self.ends(ahead + 2)

    def _modifies(self, ahead: int = 0, *endings: str) -> bool:
        """Whether a word before others is an adjective: of the list, or a participle ("rusted", not "dining table")."""
        word = self.word(ahead)
        return is_adjective(word) or (word.endswith(("ed", *endings)) and word not in words.NOT_VERBS and len(word) > 4)
