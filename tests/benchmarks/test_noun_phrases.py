"""Noun phrases: what is known of the benchmark's prompts, captions of the shapes world, and all else by spaCy."""

import os
import pathlib
import re
import types

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from referee_jax.benchmarks import noun_phrases, t2i_compbench
from referee_jax.shapes import benchmark, world

# Prompts of the benchmark; the brackets were set by hand, each around one base noun phrase.
ANNOTATED = """
[a green bench] and [a blue bowl]
[a brown acorn] and [a green leaf]
[a pentagonal stop sign] and [a spherical traffic light]
[an oblong cucumber] and [a teardrop plum]
[rubber sole shoes] and [fluffy clouds]
[a metallic keychain] and [a wooden jewelry box]
[a bee] on [the right] of [a refrigerator]
[a giraffe] next to [a lamp]
[A woman] is speaking on [the phone] and making [plans] with [a friend].
[The mechanic] is repairing [a car] in [the garage].
[The red hat] was on [top] of [the brown coat rack].
[The spicy curry] simmered on [the hot stove] and [the cool plate].
[six airplanes]
[four printers] and [four chickens]
[a dog] in [front] of [a desk]
[a balloon] hidden by [a book]
"""
EXAMPLES = [(re.sub(r"[\[\]]", "", line), re.findall(r"\[(.*?)\]", line)) for line in ANNOTATED.strip().splitlines()]
# The benchmark's own lists, which are no part of the project.
LISTS = pathlib.Path(os.environ.get("T2I_COMPBENCH") or pathlib.Path(__file__).parents[3] / "shared" / "t2i-compbench")


@pytest.fixture
def without_spacy(monkeypatch):
    monkeypatch.setattr(noun_phrases, "load_spacy", lambda: None)


@pytest.fixture
def with_spacy(monkeypatch):
    """A model whose noun chunks are words of more than three letters, and whose adjectives end in "y"."""

    def model(prompt):
        words = [(match.start(), match[0]) for match in re.finditer(r"\w+", prompt)]
        chunks = [types.SimpleNamespace(start_char=n, end_char=n + len(x)) for n, x in words if len(x) > 3]
        return Document([Token(n, x) for n, x in words], chunks)

    class Document(list):
        def __init__(self, tokens, chunks):
            super().__init__(tokens)
            self.noun_chunks = chunks

    class Token(str):
        def __new__(cls, start, text):
            token = super().__new__(cls, text)
            token.idx, token.pos_ = start, "ADJ" if text.endswith("y") else "NOUN"
            return token

    monkeypatch.setattr(noun_phrases, "load_spacy", lambda: model)
    monkeypatch.setattr(noun_phrases.metadata, "version", {"en_core_web_sm": "3.8.0"}.__getitem__)


def test_annotated_prompts(without_spacy):
    name, phrases = noun_phrases.find([prompt for prompt, _ in EXAMPLES], noun_phrases.PHRASES)
    assert phrases == dict(EXAMPLES) and len(phrases) == 16
    assert name == "spacy en_core_web_sm 3.8.0"


def test_errors_of_spacy_are_kept(without_spacy):
    """The official scorer asks about "marveling", too."""
    prompt = "A person is looking at a rainbow and marveling at its beauty."
    expected = ["A person", "a rainbow", "marveling", "its beauty"]
    assert noun_phrases.find([prompt], noun_phrases.PHRASES)[1] == {prompt: expected}


def test_words_without_adjectives(without_spacy):
    prompts = ["The red hat was on top of the brown coat rack.", "The leather wallet was inside the brown purse."]
    _, words = noun_phrases.find(prompts, noun_phrases.WORDS)
    assert [" ".join(words[prompt]) for prompt in prompts] == [
        "The hat was on top of the coat rack .",
        "The leather wallet was inside the purse .",
    ]


def test_the_file_is_whole():
    """Spans in order, apart and not empty, of each of 2400 prompts; words of the 300 complex ones."""
    assert noun_phrases.FILE.stat().st_size < 400_000
    prompts = noun_phrases.official()["prompts"]
    assert len(prompts) == 2400 and sum(noun_phrases.WORDS in kinds for kinds in prompts.values()) == 300
    for name, kinds in prompts.items():
        assert re.fullmatch("[0-9a-f]{12}", name) and noun_phrases.PHRASES in kinds
        for spans in kinds.values():
            ends = np.array(spans).reshape(-1)
            assert (np.diff(ends)[::2] > 0).all() and (np.diff(ends) >= 0).all()


@pytest.mark.skipif(not LISTS.is_dir(), reason="T2I_COMPBENCH is not the directory of the benchmark's prompt lists")
def test_every_prompt_of_the_benchmark_is_known(without_spacy):
    lists = t2i_compbench.read_lists(LISTS)
    _, phrases = noun_phrases.find(lists, noun_phrases.PHRASES)
    assert phrases.keys() == lists.keys() and sum(map(bool, phrases.values())) > 2390
    assert all(phrase == phrase.strip() != "" for own in phrases.values() for phrase in own)
    _, words = noun_phrases.find([prompt for prompt, parts in lists.items() if "complex" in parts], noun_phrases.WORDS)
    assert all(set("".join(own)) <= set(prompt) and len(own) > 2 for prompt, own in words.items())


@pytest.mark.parametrize(
    "prompt, phrases, words",
    [
        ("a red circle and a blue square", ["a red circle", "a blue square"], "a circle and a square"),
        ("A striped ring  above\na Pink star.", ["A striped ring", "a Pink star"], "A ring above a star"),
        (
            "an orange cross on the left of a square",
            ["an orange cross", "the left", "a square"],
            "an cross on the left of a square",
        ),
        ("three dotted green crosses", ["three dotted green crosses"], "three crosses"),
    ],
)
def test_captions_of_the_shapes_world(without_spacy, prompt, phrases, words):
    assert noun_phrases.find([prompt], noun_phrases.PHRASES) == (noun_phrases.SHAPES, {prompt: phrases})
    assert noun_phrases.find([prompt], noun_phrases.WORDS) == (noun_phrases.SHAPES, {prompt: words.split()})


def test_captions_name_their_things(without_spacy):
    captions = benchmark.every_prompt()
    _, phrases = noun_phrases.find(captions, noun_phrases.PHRASES)
    for caption in captions:
        things = [phrase for phrase in phrases[caption] if phrase not in ("the left", "the right")]
        assert [world.thing(thing.partition(" ")[2]) for thing in things] == list(world.parse(caption).things)


@hypothesis.given(st.text())
def test_an_unknown_prompt_needs_spacy(prompt):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(noun_phrases, "load_spacy", lambda: None)
        with pytest.raises(ValueError, match=r"1 prompts, .* for one, .*: pip install 'referee_jax\[eval\]'"):
            noun_phrases.find([prompt], noun_phrases.PHRASES)


def test_other_prompts_are_read_by_spacy(with_spacy):
    prompt = "a shiny kettle"
    expected = {"phrases": ["shiny", "kettle"], "words": ["a", "kettle"]}
    for kind, texts in expected.items():
        assert noun_phrases.find([prompt], kind) == ("spacy en_core_web_sm 3.8.0", {prompt: texts})
    name, phrases = noun_phrases.find([prompt, "a red circle", "six airplanes"], "phrases")
    assert name == "shapes world, spacy en_core_web_sm 3.8.0"
    assert phrases == {
        prompt: ["shiny", "kettle"],
        "a red circle": ["a red circle"],
        "six airplanes": ["six airplanes"],
    }


def test_spacy():
    model = noun_phrases.load_spacy()
    if model is None:
        pytest.skip("en_core_web_sm is not installed")
    assert noun_phrases.find(["a green kettle and a blue cup"], "phrases")[1] == {
        "a green kettle and a blue cup": ["a green kettle", "a blue cup"]
    }


def test_places_are_excluded_exactly():
    places = ["top", "the side", "the left", "the right"]
    others = ["The left", "the left side", "the top", "side", "the bottom"]
    assert noun_phrases.RULES["new"].select([*places, *others]) == others


def test_at_most_the_limit_after_exclusion():
    phrases = ["a cat", *(f"a dog{n}" for n in range(12))]
    assert noun_phrases.RULES["new"].select(["a cat", "the left", *phrases[1:]]) == phrases[:8]


@pytest.mark.parametrize(
    "phrases, new, old",
    [
        (["a red book", "a yellow vase"], ["a red book", "a yellow vase"], ["a red book", "a yellow vase"]),
        (["a girl", "the left", "a bird"], ["a girl", "a bird"], ["a girl", "the left"]),
        (["top", "a desk", "a cup", "a pen"], ["a desk", "a cup", "a pen"], ["top", "a desk"]),
        (["a cup", "the top", "a desk"], ["a cup", "the top", "a desk"], ["a cup", "the top"]),
        (["a sleeping dog"], ["a sleeping dog"], ["a sleeping dog"]),
        ([], [], []),
    ],
)
def test_the_new_and_the_old_number(phrases, new, old):
    """The old scorer asked about the first two, places among them."""
    assert noun_phrases.RULES["new"].select(phrases) == new
    assert noun_phrases.RULES["old"].select(phrases) == old


def test_the_file_is_made_of_the_lists(with_spacy, monkeypatch, tmp_path):
    prompts = {"color": "a tiny kettle", "complex": "The shiny lamp stood."}
    for category, prompt in prompts.items():
        (tmp_path / f"{category}_val.txt").write_text(prompt + "\n")
    assert noun_phrases.make(tmp_path, tmp_path / "made.json") == f"2 prompts in {tmp_path / 'made.json'}"
    assert not any(word in (tmp_path / "made.json").read_text() for word in ("kettle", "lamp"))
    monkeypatch.setattr(noun_phrases, "FILE", tmp_path / "made.json")
    monkeypatch.setattr(noun_phrases, "load_spacy", lambda: None)
    noun_phrases.official.cache_clear()
    try:
        expected = {"a tiny kettle": ["tiny", "kettle"], "The shiny lamp stood.": ["shiny", "lamp", "stood"]}
        assert noun_phrases.find(prompts.values(), "phrases") == ("spacy en_core_web_sm 3.8.0", expected)
        assert noun_phrases.find([prompts["complex"]], "words")[1] == {prompts["complex"]: ["The", "lamp", "stood"]}
        with pytest.raises(ValueError, match="1 prompts"):
            noun_phrases.find([prompts["color"]], "words")
    finally:
        noun_phrases.official.cache_clear()


def test_the_file_is_not_made_without_spacy(without_spacy, tmp_path):
    with pytest.raises(ValueError, match="pip install spacy"):
        noun_phrases.make(tmp_path, tmp_path / "made.json")
    assert not (tmp_path / "made.json").exists()
