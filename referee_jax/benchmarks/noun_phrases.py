"""The noun phrases of a prompt, about each of which BLIP-VQA asks a question.

    python -m referee_jax.benchmarks.noun_phrases FILE...

BLIP-VQA (Huang et al., T2I-CompBench, 2023, arXiv 2307.06350) splits a prompt into the noun chunks of spaCy's
en_core_web_sm. Where spaCy is not installed, a small system of rules for the language of those prompts finds the chunks:
words are tagged by closed classes, a lexicon and their endings, then grouped. The command compares both on files of prompts,
one a line.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which of a prompt's noun phrases are asked about: the first `limit` that are not `excluded`."""

    limit: int
    excluded: frozenset[str]


# The official scorer's, since it left out places, and at first: papers of early 2024 quote numbers of the old one, and scores
# by different rules cannot be compared.
NEW, OLD = "new", "old"
RULES = {NEW: Rule(8, frozenset({"top", "the side", "the left", "the right"})), OLD: Rule(2, frozenset())}

Source = Callable[[str], list[str]]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


DETERMINERS = _words(
    """a an the this these those each every some any many several all both no another few more most my your his
    her its our their whose"""
)
PRONOUNS = _words(
    """i you he she it we they me him them us who whom which that what someone somebody something everyone
    everybody everything anyone anything nobody nothing myself yourself himself herself itself ourselves
    themselves"""
)
NUMBERS = _words("one two three four five six seven eight nine ten eleven twelve thirteen twenty thirty fifty hundred")
PREPOSITIONS = _words(
    """of in on at by with without from to into onto for near under over above below beneath underneath behind
    beside between among across along alongside around against through throughout toward towards about after
    before during inside outside past off up down out as like than atop within upon beyond amid until since
    despite except because if when where why how whether although though while"""
)
CONJUNCTIONS = _words("and or but nor yet")
AUXILIARIES = _words(
    """am is are was were be been being can could will would shall should may might must isn't aren't wasn't
    weren't don't doesn't didn't"""
)
ADVERBS = _words(
    """not very too so also just still again together away back there here then now almost quite rather once twice
    never always often ever even forth apart aside alone nearby everywhere outdoors indoors otherwise already soon"""
)
# Verbs that are not nouns as well; those in -s are made from them.
VERBS = _words(
    """sit hold lie hang mix serve write grow swim eat wear carry feed open close fill make take give keep climb
    sleep throw pour boil bake reach rise help bring put build sell buy read sing perform surround protect secure
    contain reflect complement contrast create provide wait listen speak laugh gather feel seem appear try want
    enjoy prepare clean sweep spill wade greet fetch stretch learn save bend go come get be have do see hear
    connect tie wrap adorn decorate illuminate add stir attract explore find avoid soothe chug soar nibble melt
    cry follow meet teach tell send live stay"""
)
# Verbs that are nouns as well: where they stand decides.
NOUNS_TOO = _words(
    """stand rest cover display float fly play drink chase watch look shine walk jump ride drive catch cut cook
    fall flow move show lead set draw dance swing spin turn skate surf store match talk smile line sail
    smell taste sound love wash hit lift blow burn drip wag touch flash fit nap release pound beat measure glow
    drop pick frame travel race bark land join pass share guard feature run roll slide support kick pull push need
    wrap order dive repair fix lean kneel toss chat curve polish wave paint"""
)
IRREGULAR = _words(
    """sat lay stood hung held flew swam rose shone ran fell lit made took gave wore rode threw caught cut hit set
    put cast drove wound slept swept bent told sang sank sped spun wrote ate drank grew blew drew kept left met
    led went came said felt stuck strode burst clung dug fed found fought froze got heard hid knew lost paid sent shook
    shot slid spoke spread stole swung thought woke won wove brought built bought broke began became strung shrank
    had has does read did let lent struck stung sprang"""
)
LINKING = _words("feel feels feeling felt look looks looking looked seem seems seemed become becomes became")
MODALS = _words("to can could will would shall should may might must do does did don't doesn't didn't")
CLAUSAL = _words("after before while when by for without until since from")  # an -ing after them is a verb
ORDINALS = _words("other same last first second next only best whole")  # no phrase without a noun
ADJECTIVES = _words(
    """red orange yellow green blue purple pink brown black white grey gray gold silver golden beige maroon
    turquoise violet tan navy teal crimson bright dark light pale deep soft hard smooth rough warm cool cold hot
    wet sharp flat big small large tiny little huge long short tall low high wide narrow thick thin round square
    oval circular triangular rectangular spherical cubic cylindrical conical pyramidal pentagonal hexagonal oblong
    crescent diamond teardrop wooden woollen wool metallic metal plastic rubber leather fabric glass cotton silk
    satin velvet steel stone young old new ancient modern vintage fresh ripe sweet sour crisp tender bold calm
    clean sleek plush quiet gentle delicate intricate elegant vibrant fragrant quick slow loud strong weak full
    open closed plump blank early slender broken angular rugged ragged jagged striped checkered dotted spotted
    gnarled twisted curved arched pointed detailed covered colored coloured shaped tiled sized lined ready perfect
    useful own different left right half forgotten public fallen frozen hidden grown woven worn torn bare blunt
    dim upright best visible curly prickly lively lovely friendly lonely woolly elderly silly ugly unlikely bubbly
    daily chilly gooey empty whitish rich awestruck other same last first second next only best whole"""
)
# Nouns that look like a verb, an adjective or an adverb, or are adjectives where another noun follows.
NOUNS = _words(
    """building painting ring king string wing ceiling evening morning thing clothing lightning wedding earring
    railing sibling dumpling spring swing pudding stocking icing frosting awning flooring duckling offering
    seating being bed shed sled seed weed reed bread thread steed speed feed hundred belly jelly lily family
    assembly ally canal traffic orange glass square diamond crescent teardrop stone gold silver oval metal plastic
    wool cotton silk velvet leather light rose set cut shot hit cover fabric journal animal medal pedal petal
    hospital music picnic city berry party baby lady body puppy bunny kitty pony daisy country library gallery
    battery cherry strawberry jewelry pottery melody"""
)
PLURALS = _words("people men women children feet teeth mice geese oxen fish sheep deer cattle police")

# A word's tag is a letter: D determiner, Q number, J adjective, N noun, S the 's of a genitive, O pronoun, V verb,
# X auxiliary, R adverb, P preposition, C conjunction, M comma, "." any other mark. A noun phrase is a pattern of tags.
CLOSED = {word: tag for words, tag in (
    (DETERMINERS, "D"), (PRONOUNS, "O"), (NUMBERS, "Q"), (PREPOSITIONS, "P"), (("next to", "close to"), "P"),
    (CONJUNCTIONS, "C"), (AUXILIARIES, "X"), (ADVERBS, "R"), (("'s", "’s", "'", "’"), "S"), ((",",), "M"),
) for word in words}  # fmt: skip
WORD = re.compile(
    r"(?i:next|close)\s+(?i:to)\b|['’]s\b|(?<=s)['’](?=\s)|[^\W_]+(?:[-:.]\w+)*(?:['’](?!s\b)\w+)*|[^\w\s]|_"
)
ADJECTIVAL = re.compile(r".{2,}(?:[^aeo]y|ous|ful|less|al|ic|ive|ish|ant|ent|ible|able|ed|ing|-.+)")
LISTED = r"(?:(?<=[DQJSC])R+)?J(?:(?:MC?|C)(?=R*J)|M(?=N))?"  # an adjective and what joins it to the next
CORE = rf"(?:{LISTED}|N)*N"
PHRASE = re.compile(rf"O|D*Q*{CORE}(?:SQ*{CORE})*S?|(?<=P)J")


def _closed(word: str) -> str:
    """The tag of a word or mark of which there are few, "" for a noun, adjective or verb."""
    other = "" if word[0].isalpha() else "Q" if word[0].isdigit() else "."
    return CLOSED.get(word, other)


def _is_adverb(word: str) -> bool:
    return word.endswith("ly") and not word.endswith("fly") and word not in NOUNS | ADJECTIVES


def _is_plural(word: str) -> bool:
    return word in PLURALS or (word.endswith("s") and not word.endswith("ss"))


def _looks_adjectival(word: str) -> bool:
    return word in ADJECTIVES or (word not in NOUNS and ADJECTIVAL.fullmatch(word) is not None)


def _stems(word: str) -> set[str]:
    return {word.removesuffix("s"), word.removesuffix("es"), word.removesuffix("ies") + "y"}


def _predicates(word: str, following: str) -> bool:
    """Whether a word that nothing it could modify follows has the form of a finite verb only."""
    if not _closed(following) or word in NOUNS | ADJECTIVES:
        return False
    return word in IRREGULAR or word.endswith("ed") or (word.endswith("s") and not VERBS.isdisjoint(_stems(word)))


def _modifies(following: list[str]) -> bool:
    """Whether these words can begin with the noun of an adjective before them, or with further adjectives of that noun."""
    if following[0] in (",", "and", "but"):
        joined = [word for word in following[1:4] if word not in ("and", "but") and not _is_adverb(word)]
        return len(joined) > 1 and _looks_adjectival(joined[0]) and not _closed(joined[0]) + _closed(joined[1])
    return not (_closed(following[0]) or _is_adverb(following[0]) or _predicates(*following[:2]))


def _is_verb(word: str, previous: str, tags: str, after: str, modifies: bool) -> bool:
    """Whether a word is a verb: after the word `previous`, words of these tags, and before one of tag `after`."""
    before = re.sub(r"(?<=J)[MC]+$", "", tags.rstrip("R"))[-1:]  # in a list of adjectives as after an adjective
    subject = before in ("N", "O")
    continues = before in ("C", "M") and "V" in tags
    if previous in MODALS and word in VERBS | NOUNS_TOO:
        return True
    if word.endswith("ing"):
        if word in NOUNS:
            return before == "X" or (continues and after == "D")
        named = before in ("D", "J", "S", "Q") or (before in ("V", "P", "") and modifies)
        return previous in CLAUSAL or not (named or (before == "C" and not continues and modifies))
    if word.endswith("ed") and word not in NOUNS:
        if word in ADJECTIVES and (modifies or not subject):
            return False
        return subject or before == "X" or continues or not modifies
    if word in IRREGULAR and word not in NOUNS:
        return subject or before == "X" or continues or (before == "J" and not modifies and word not in ADJECTIVES)
    if not subject and not continues:
        return False
    if subject and after == "D" and "V" not in tags and tags[0] != "P":
        return True  # between the first two noun phrases
    if word in VERBS or (word.endswith("s") and not VERBS.isdisjoint(_stems(word))):
        return subject or after in ("D", "Q", "P")
    # "dogs watch" but "a wrist watch", "the cat rests on" but "two arm rests on"
    if word in NOUNS_TOO and (before == "O" or "C" in tags or _is_plural(previous)):
        return after in ("D", "Q", "P", "R") or modifies or before == "O"
    inflected = word in IRREGULAR or not NOUNS_TOO.isdisjoint(_stems(word) - {word})
    if not inflected or _is_plural(previous):
        return False
    return after in ("D", "Q") or (subject and (after in ("P", "R") or (modifies and word.endswith("s"))))


def _open(words: list[str], n: int, tags: str) -> str:
    """The tag of a noun, adjective, verb or adverb after words with these tags."""
    word, previous = words[n], words[n - 1] if n else ""
    following = [*words[n + 1 :], ".", "."]
    modifies = _modifies(following)
    if _is_adverb(word):
        return "R"
    if _is_verb(word, previous, tags, _closed(following[0]), modifies):
        return "V"
    if word in ORDINALS:
        return "J"
    if word in ADJECTIVES and (modifies or word not in NOUNS):
        return "J" if modifies or tags[-1:] != "D" else "N"  # "on the left", "the blue"
    # "a yo-yo and red balls", "a party and old friends": an ending is not enough before "and".
    predicative = tags.rstrip("R")[-1:] == "X" or previous in LINKING
    if _looks_adjectival(word) and (predicative or (modifies and following[0] not in CONJUNCTIONS)):
        return "J"
    return "N"


def _tags(words: list[str]) -> str:
    tags = ""
    for n, word in enumerate(words):
        following = [*words[n + 1 :], ".", "."]
        closed = _closed(word)
        if word in ("both", "all") and tags[-1:] == "X":
            closed = "R"
        elif closed == "P" and tags[-1:] == "D" and _closed(following[0]):
            closed = "N"  # "the past"
        elif word == "can" and following[0] not in VERBS | NOUNS_TOO | AUXILIARIES:
            closed = "N"
        elif word == "her" and not _modifies(following):
            closed = "O"
        tags += closed or _open(words, n, tags)
    return tags


def _tagged(prompt: str) -> tuple[list[re.Match], str]:
    """The words and marks of a prompt, and their tags."""
    found = list(WORD.finditer(prompt))
    return found, _tags([" ".join(word.group().lower().split()) for word in found])


def chunk(prompt: str) -> list[str]:
    """The base noun phrases of a prompt in their order, pronouns among them, each a span of the prompt.

    They neither overlap nor contain relative clauses or prepositional phrases.
    """
    found, tags = _tagged(prompt)
    return [prompt[found[span.start()].start() : found[span.end() - 1].end()] for span in PHRASE.finditer(tags)]


def without_adjectives(prompt: str) -> str:
    """The words and marks of a prompt that are no adjectives, with spaces between, as CLIPScore reads complex prompts."""
    return " ".join(word.group() for word, tag in zip(*_tagged(prompt), strict=True) if tag != "J")


def _spacy() -> Any:
    """spaCy's en_core_web_sm; None where either is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        return None


def spacy_source() -> Source | None:
    """The noun chunks of spaCy's en_core_web_sm; None where either is not installed."""
    model = _spacy()
    return model and (lambda prompt: [span.text for span in model(prompt).noun_chunks])


def default_source() -> tuple[str, Source]:
    """What finds noun phrases here, spaCy's model where there is one, and its name for a report."""
    source = spacy_source()
    return (_name(), source) if source else ("referee_jax", chunk)


def default_stripper() -> tuple[str, Callable[[str], str]]:
    """What takes out adjectives here, as `default_source`."""
    model = _spacy()
    if model is None:
        return "referee_jax", without_adjectives
    return _name(), lambda prompt: " ".join(token.text for token in model(prompt) if token.pos_ != "ADJ")


def _name() -> str:
    return f"spacy en_core_web_sm {metadata.version('en_core_web_sm')}"


def phrases(prompt: str, *, rule: str = NEW, source: Source = chunk) -> list[str]:
    """What BLIP-VQA asks about, by one of RULES."""
    return [phrase for phrase in source(prompt) if phrase not in RULES[rule].excluded][: RULES[rule].limit]


def main(paths: list[str]) -> int:
    """The command line; the exit code."""
    source = spacy_source()
    if source is None:
        print("spaCy's en_core_web_sm is not installed: pip install spacy && python -m spacy download en_core_web_sm")
        return 2
    for path in paths:
        prompts = [line.strip() for line in pathlib.Path(path).read_text().splitlines() if line.strip()]
        pairs = {prompt: (phrases(prompt), phrases(prompt, source=source)) for prompt in prompts}
        differing = {prompt: pair for prompt, pair in pairs.items() if pair[0] != pair[1]}
        print(f"{path}: {1 - len(differing) / max(1, len(pairs)):.1%} of {len(pairs)} prompts give the same phrases")
        for prompt, (own, theirs) in differing.items():
            print(f"  {prompt}\n    referee_jax: {own}\n    spaCy:       {theirs}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
