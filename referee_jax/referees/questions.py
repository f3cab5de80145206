"""A prompt as questions: objects, attributes, numbers and relations, each with "yes" as its answer.

    atoms("a red circle left of two blue squares")
    # object    circle                             Is there a circle?
    # attribute red circle                         Is the circle red?
    # number    two squares                        Are there exactly two squares?
    # attribute blue squares                       Are the squares blue?
    # relation  circle to the left of squares      Is the circle to the left of the squares?

A parser by rules, without a model: closed classes of words (determiners, numbers, prepositions, common
adjectives and verbs) cut a text into noun phrases, verbs and relations. In a noun phrase what is not
known as an adjective belongs to the noun, so a word that is missing here makes a longer noun and
no wrong question. Actions are no atoms, nor is what a text of many clauses tells.

Users may give questions of their own (`given`), also with other answers, as GenEval 2's "How many bicycles are
in the image?", "four".
"""

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

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


# --- words ------------------------------------------------------------------------------------------------------------

_NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
_DETERMINERS = set(
    "a an the this that these those some several many few all both each every another his her their its my your our".split()
)
_COLOURS = set(
    """red green blue yellow purple orange pink black white brown gray grey beige tan gold golden silver violet teal
    turquoise maroon navy crimson cyan magenta lavender cream""".split()
)
_SHADES = set("light dark bright pale deep dull".split())
_MATERIALS = set(
    """rubber leather glass plastic fabric wood metal stone marble silk velvet cotton wool paper ceramic steel brick
    concrete porcelain satin burlap bronze copper iron denim cardboard clay crystal""".split()
)
_SHAPED = set("teardrop diamond crescent star heart".split())  # nouns that say a shape where they stand before another
_ADJECTIVES = (
    _COLOURS
    | _SHADES
    | _MATERIALS
    | set(
        """metallic wooden fluffy rectangular spherical triangular pentagonal round pyramidal cylindrical cubic conical square
        oblong oval circular hexagonal octagonal angular curved curvy straight pointed flat hollow solid striped dotted
        checkered spotted plaid floral patterned textured big small large little tiny huge giant tall short long wide
        narrow thin thick high low heavy soft hard rough smooth sharp sleek shiny glossy matte warm hot cold cool cozy
        fresh crisp crispy crunchy juicy ripe sweet sour bitter spicy tender dry wet damp old new young ancient modern
        vintage rusty dusty dirty clean empty full open closed broken cracked jagged bumpy lumpy spiky prickly fuzzy furry
        hairy silky sticky slimy greasy rocky snowy icy rainy sunny cloudy foggy colorful colourful multicolored vibrant
        translucent transparent opaque shimmering glowing flickering sparkling fragrant delicate delicious beautiful
        happy sad angry sleepy tired calm quiet busy bulky sturdy graceful elegant luxurious rich plush dim murky fiery
        natural comfortable stainless rugged gnarled towering lush gentle bold plump iridescent tart whitish reddish greenish
        bluish yellowish grand fancy pretty cute""".split()
    )
)
_ADJECTIVE = re.compile(r"\w{3,}(ful|ous|less|ical|ular|-shaped|-colou?red)$|\w+-\w+ed$")
# What looks like an adjective and a noun, and is one thing.
_COMPOUNDS = (
    ("hot", "dog"), ("hot", "dogs"), ("hot", "air"), ("rubber", "band"), ("rubber", "bands"), ("rubber", "duck"),
    ("cotton", "candy"), ("paper", "towel"), ("high", "chair"), ("open", "book"), ("soft", "drink"), ("light", "bulb"),
    ("square", "dance"), ("diamond", "ring"), ("star", "fruit"), ("deep", "sea"), ("tan", "lines"),
)  # fmt: skip
_BE = set("is are was were be been being".split())
_VERBS = _BE | set(
    """has have had does did sat lay lain hung stood shone flew ran swam sank fell drove wrote grew held ate drank
    wore slept sang spun blew threw caught rode sped cast led fed kept told took gave made woke swung sprang""".split()
)
# Nouns too: verbs where a preposition, a determiner or an adverb follows.
_PERHAPS_VERBS = set(
    """sit sits hang hangs rest rests hold holds lie lies stand stands lays lean leans float floats fly flies run runs walk
    walks eat eats serve serves cover covers illuminate illuminates mix mixes line lines measure measures nap naps
    contain contains carry carries wear wears watch watches look looks sleep sleeps lit set cut shines reads play
    plays""".split()
)
_NOT_VERBS = set(
    """bed shed sled seed weed reed steed red ring earring king wing string spring swing ceiling building painting clothing
    lightning wedding evening morning pudding railing bedding icing flooring stocking awning thing""".split()
)
_OTHERS = set(
    """and or but with without of for from to at as by while which that who where when than then there not very so too into
    through across along down up out off past towards toward during after before via together nearby""".split()
)
_PRONOUNS = set("it they them he she him you i we us themselves itself himself herself".split())
_OTHERS |= _PRONOUNS
_GROUPS = set("row pile group bunch set stack collection herd flock crowd team variety number lot".split())
_ADVERB = re.compile(r"(?<!f)(?<!mi)(?<!jel)(?<!bel)(?<!li)ly$")  # not a fly, family, jelly, belly, lily
# Places, that are parts of relations, and words of no thing.
_NO_OBJECTS = set(
    """left right top bottom side front back middle center centre background foreground corner edge air mid-air way time
    distance other""".split()
)
_MASS = set(
    """snow water rain grass sand rice jewelry bread milk juice hair furniture lasagna toast mud smoke fog ice dough gravel
    cheese fruit""".split()
)
_PLURALS = set("people men women children mice geese feet teeth pants scissors jeans".split())
_SINGULAR = re.compile(r"(ss|us|is|'s)$|^(lens|gas|canvas|atlas|series|christmas|texas)$")
# As a prompt has it -> as a question has it.
_RELATIONS = {
    **{f"{before}{side}{part} of": f"to the {side} of" for side in ("left", "right") for before in ("on the ", "to the ",
        "at the ", "on ", "") for part in ("", " side")},
    "on top of": "on top of", "on the top of": "on top of", "atop": "on top of", "above": "above", "over": "over",
    "on the bottom of": "below", "at the bottom of": "below", "below": "below", "under": "under",
    "underneath": "under", "beneath": "under", "in front of": "in front of", "behind": "behind",
    "in back of": "behind", "hidden by": "hidden by", "next to": "next to", "on side of": "next to",
    "on the side of": "next to", "by the side of": "next to", "beside": "next to", "adjacent to": "next to", "by": "next to",
    "near": "near", "close to": "near", "inside": "inside", "inside of": "inside", "in the middle of": "in the middle of",
    "in the center of": "in the center of", "in": "in", "on": "on", "onto": "on", "against": "against", "around": "around",
    "between": "between", "surrounded by": "surrounded by",
}  # fmt: skip
_LONGEST = max(len(phrase.split()) for phrase in _RELATIONS)
_TOKEN = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[,.;:!?]")
_STOPS = set(".;:!?")


# --- noun phrases -----------------------------------------------------------------------------------------------------


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
        return self.head in _PLURALS or (self.head.endswith("s") and not _SINGULAR.search(self.head))

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


def _is_number(word: str) -> bool:
    return word in _NUMBERS or word.isdecimal()


def _is_adjective(word: str) -> bool:
    return word in _ADJECTIVES or word in _SHAPED or bool(_ADJECTIVE.match(word))


class _Reader:
    """Reads the words of a text from left to right, into `parts`."""

    def __init__(self, text: str):
        self.words = _TOKEN.findall(text.lower().replace("’", "'"))
        self.at = 0
        self.parts: list[Part] = []

    def word(self, ahead: int = 0) -> str:
        """The word `ahead` of the place, "." behind the last."""
        place = self.at + ahead
        return self.words[place] if place < len(self.words) else "."

    def relation(self, ahead: int = 0) -> str:
        """The longest phrase of _RELATIONS that begins there, or an empty text."""
        for length in range(_LONGEST, 0, -1):
            phrase = " ".join(self.words[self.at + ahead : self.at + ahead + length])
            if phrase in _RELATIONS:
                return phrase
        return ""

    def ends(self, ahead: int = 0) -> bool:
        """Whether a noun phrase that has no noun yet cannot go on there."""
        word = self.word(ahead)
        is_closed = word in _STOPS or word == "," or word in _OTHERS or word in _DETERMINERS or word in _VERBS
        return is_closed or _is_number(word) or bool(self.relation(ahead))

    def is_verb(self, ahead: int = 0) -> bool:
        """Whether a verb, or an adverb before one, is there, if it follows a noun."""
        word, then = self.word(ahead), self.word(ahead + 1)
        if then in _DETERMINERS or _is_number(then):
            return word not in _OTHERS
        if word in _PERHAPS_VERBS:
            follows = then in _OTHERS - {"and"} or self.relation(ahead + 1)
            return bool(follows) or then.endswith("ly") or _is_adjective(then)
        if word in _VERBS or _ADVERB.search(word):
            return True
        return word.endswith(("ed", "ing")) and word not in _NOT_VERBS and len(word) > 4

    def read(self) -> list[Part]:
        """All parts."""
        while self.at < len(self.words):
            self.parts += self._part()
        return self.parts

    def _part(self) -> list[Part]:
        word, last = self.word(), self.parts[-1] if self.parts else STOP
        if word in _STOPS or word == "," or word == "and":
            self.at += 1
            return [STOP if word in _STOPS else AND]
        if phrase := self.relation():
            self.at += len(phrase.split())
            # "Trying on shoes" and "held by a man" are no places.
            is_place = len(phrase.split()) > 1 or phrase not in ("in", "on", "by") or self._begins_phrase()
            is_place = is_place and not (phrase == "by" and not isinstance(last, Phrase))
            return [Relation(_RELATIONS[phrase]) if is_place else OTHER]
        if isinstance(last, Verb) and last.is_be and (attributes := self._predicates()):
            subject = next((part for part in reversed(self.parts) if isinstance(part, Phrase)), None)
            if subject:
                subject.attributes += attributes
            return []
        is_bare = last in (STOP, AND) and not self.ends() and not self.is_verb() and not _ADVERB.search(word)
        if self._begins_phrase() or is_bare:
            return self._phrase()
        is_verb = self.is_verb()
        self.at += 1
        return [Verb(word in _BE) if is_verb else PRONOUN if word in _PRONOUNS else OTHER]

    def _begins_phrase(self) -> bool:
        word = self.word()
        is_adjective = _is_adjective(word) and (not self.ends(1) or self._goes_on(1))
        return word in _DETERMINERS or _is_number(word) or is_adjective

    def _predicates(self) -> list[str]:
        """Adjectives behind "is" that belong to no noun: "is red", "is black and white"."""
        start, attributes = self.at, []
        while _is_adjective(self.word()):
            attributes.append(self.word())
            self.at += 1
            if self.word() in ("and", ",") and _is_adjective(self.word(1)):
                self.at += 1
        if not attributes or not self.ends():
            self.at = start
            return []
        return attributes

    def _phrase(self) -> list[Part]:
        number = ""
        while self.word() in _DETERMINERS or _is_number(self.word()):
            if self.word() in ("a", "the") and self.word(1) in ("pair", "couple") and self.word(2) == "of":
                number, self.at = "two", self.at + 3
            else:
                number, self.at = self._number() or number, self.at + 1
        if self.word() in _GROUPS and self.word(1) == "of" and not self.ends(2):
            number, self.at = "", self.at + 2
        attributes = self._attributes()
        noun = self._noun()
        if not noun or noun[-1] in _NO_OBJECTS:
            return [OTHER]
        if self.word() == "of" and not self.ends(1):
            self.at += 1
            noun += ["of", *self._noun()]
        return [Phrase(" ".join(noun), number, attributes)]

    def _number(self) -> str:
        word = self.word()
        if word.isdecimal() and 0 < int(word) <= len(_NUMBERS):
            return _NUMBERS[int(word) - 1]
        return word if _is_number(word) else ""

    def _noun(self) -> list[str]:
        noun: list[str] = []
        # Two phrases side by side have a verb between them: "the wooden mallets pound the nails".
        is_object = lambda: self.word(1) in _DETERMINERS or _is_number(self.word(1))
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
            elif (word, then) in _COMPOUNDS or not self._modifies() or (self.ends(1) and not self._goes_on(1)):
                return attributes
            elif word in _SHADES and then in _COLOURS and not self.ends(2):
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
        return _is_adjective(word) or (word.endswith(("ed", *endings)) and word not in _NOT_VERBS and len(word) > 4)


# --- questions --------------------------------------------------------------------------------------------------------


def atoms(prompt: str) -> tuple[Atom, ...]:
    """The atoms of a prompt: those of its things in their order, then its relations; none twice.

    Empty where nothing is found, as in a text without nouns or in another language's letters.
    """
    parts = _Reader(prompt).read()
    things = [part for part in parts if isinstance(part, Phrase)]
    made = [atom for thing in things for atom in _of_thing(thing, things)]
    made += [_of_relation(*found, things) for found in _relations(parts)]
    return tuple({atom.question: atom for atom in made}.values())


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
    if not match or number not in _NUMBERS and not number.isdecimal():
        raise ValueError(f"the answer to {atom.question[:60]!r} is {atom.answer[:20]!r}, and it answers yes or no")
    is_one = number in ("one", "1")
    return atom._replace(question=f"{'Is' if is_one else 'Are'} there exactly {number} {match[1]}?", answer=YES)


def spellings(answer: str) -> tuple[str, ...]:
    """How a model may begin to answer: in lower case and capitalised, a number also in digits, each also behind a space.

    Those that GenEval 2 adds up (https://github.com/facebookresearch/GenEval2).
    """
    word = answer.lower()
    number = _NUMBERS.index(word) + 1 if word in _NUMBERS else int(word) if word.isdecimal() else None
    words = [word, word.capitalize()]
    if number is not None:
        name = _NUMBERS[number - 1] if 0 < number <= len(_NUMBERS) else word
        words = [name, name.capitalize(), str(number)]
    return tuple(dict.fromkeys(space + x for space in ("", " ") for x in words))


def _article(noun: str) -> str:
    is_vowel = noun[0] in "aeiou" and not re.match(r"uni|use|eu|one\b|ukulele", noun)
    return f"{'an' if is_vowel else 'a'} {noun}"


def _there(noun: str, thing: Phrase) -> str:
    """Whether there is `noun`, which is the thing's with or without attributes."""
    if thing.is_plural:
        return f"Are there {noun}?"
    return f"Is there {noun if thing.head in _MASS else _article(noun)}?"


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
    if word in _MATERIALS:
        return f"made of {word}"
    return f"{word}-shaped" if word in _SHAPED else word


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
