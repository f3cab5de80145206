"""Questions of prompts: captions of the shapes world against its own grammar, and others against what a reader finds."""

import string
import time

import numpy as np
import pytest

from referee_jax.referees import questions
from referee_jax.shapes import sampling, world

RELATIONS = {
    "on the left of": "to the left of",
    "on the right of": "to the right of",
    "above": "above",
    "below": "below",
}


def expected(prompt: world.Prompt) -> list[tuple[str, str, str]]:
    """The atoms of a caption's meaning."""
    found, names = [], []
    shapes = [thing.shape for thing in prompt.things]
    for thing in prompt.things:
        shape = world.PLURALS[thing.shape] if prompt.count > 1 else thing.shape
        is_alone, be = shapes.count(thing.shape) == 1, "Are" if prompt.count > 1 else "Is"
        names.append(shape if is_alone else thing.text)
        if prompt.count > 1:
            number = next(word for word, count in world.NUMBERS.items() if count == prompt.count)
            found.append(("number", f"{number} {shape}", f"Are there exactly {number} {shape}?"))
        else:
            found.append(("object", shape, f"Is there a {shape}?"))
        for word in filter(None, (thing.texture, thing.colour)):
            article = "an" if word == "orange" else "a"
            question = f"{be} the {shape} {word}?" if is_alone else f"Is there {article} {word} {shape}?"
            found.append(("attribute", f"{word} {shape}", question))
    for said, (a, b) in zip(prompt.relations, [(names[0], other) for other in names[1:]], strict=False):
        relation = RELATIONS[said]
        question = f"Is the {a} {relation} the {b}?"
        if a == b:
            question = f"Is {'an' if a[0] == 'o' else 'a'} {a} {relation} another {b}?"
        found.append(("relation", f"{a} {relation} {b}", question))
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("category", ["single", *world.CATEGORIES])
def test_captions_of_the_shapes_world(category):
    """Of true captions and of their hard negatives, by what world.parse reads."""
    rng, kinds = np.random.default_rng(0), set()
    for _ in range(60):
        caption = sampling.describe(rng, sampling.sample_scene(rng, category, unseen=None), category)
        for prompt in (caption, *sampling.distractors(rng, caption, 4)):
            atoms = questions.atoms(prompt.text)
            assert [atom[:3] for atom in atoms] == expected(world.parse(prompt.text)), prompt.text
            assert {atom.answer for atom in atoms} == {"yes"}
            assert questions.atoms(prompt.text.capitalize() + ".") == atoms
            kinds |= {atom.kind for atom in atoms}
    assert kinds >= {"spatial": {"relation"}, "complex": {"relation", "attribute"}, "numeracy": {"number"}}.get(
        category, {"object"}
    )


def test_given():
    asked = questions.given(["Is it red?", ["How many? ", " Two"], ("Is it a cat?", "YES")], ["a", "b", "c"])
    assert asked == (
        ("a", "Is it red?", "Is it red?", "yes"), ("b", "How many?", "How many?", "Two"),
        ("c", "Is it a cat?", "Is it a cat?", "yes"),
    )  # fmt: skip
    assert questions.given('[["a?", "b"]]') == (("", "a?", "a?", "b"),) and questions.given(" a? |b? | ") == (
        ("", "a?", "a?", "yes"), ("", "b?", "b?", "yes"),
    )  # fmt: skip
    assert questions.given(["a?"], ["too", "many"])[0].kind == "" and questions.given([]) == questions.given("") == ()


@pytest.mark.parametrize(
    ("question", "answer", "turned"),
    [
        ("How many cats are in the image?", "four", "Are there exactly four cats?"),
        ("How many red cats are there?", "One", "Is there exactly one red cats?"),
        ("how many cats are there in the picture?", "3", "Are there exactly 3 cats?"),
        ("Is it red?", "yes", "Is it red?"),
        ("Is it red?", "No", None),
        ("How many cats are in the image?", "some", None),
    ],
)
def test_questions_of_yes(question, answer, turned):
    (atom,) = questions.given([(question, answer)])
    if turned:
        assert (questions.closed(atom).question, questions.closed(atom).answer) == (turned, "yes")
    else:
        with pytest.raises(ValueError, match=f"is '{answer}', and it answers yes or no"):
            questions.closed(atom)


def test_spellings():
    assert questions.spellings("yes") == ("yes", "Yes", " yes", " Yes")
    assert questions.spellings("Two") == questions.spellings("2") == ("two", "Two", "2", " two", " Two", " 2")
    assert questions.spellings("20") == ("20", " 20") and questions.spellings("Red")[:2] == ("red", "Red")


def test_the_example():
    atoms = questions.atoms("a red circle left of two blue squares")
    assert [atom.kind for atom in atoms] == ["object", "attribute", "number", "attribute", "relation"]
    assert [atom.text for atom in atoms] == [
        "circle", "red circle", "two squares", "blue squares", "circle to the left of squares",
    ]  # fmt: skip
    assert [atom.question for atom in atoms] == [
        "Is there a circle?", "Is the circle red?", "Are there exactly two squares?", "Are the squares blue?",
        "Is the circle to the left of the squares?",
    ]  # fmt: skip


# Prompts as those of T2I-CompBench: what is asked of each, besides "Is there a thing?" where it says "object: thing".
OTHERS = {
    # colours
    "a brown piano and a blue camel": "object: piano | Is the piano brown? | object: camel | Is the camel blue?",
    "a purple orange and an orange plum": "object: orange | Is the orange purple? | object: plum | Is the plum orange?",
    "a yellow school bus and a gray coat": "object: school bus | Is the school bus yellow? | object: coat | Is the coat gray?",
    "A silver van is parked on black gravel.": "object: van | Is the van silver? | +Is there gravel? | Is the gravel black? | "
    "Is the van on the gravel?",
    "a red bench, a white cow and a dark green fence": "object: bench | Is the bench red? | object: cow | Is the cow white? | "
    "object: fence | Is the fence dark green?",
    "two black dogs and a white dog": "Are there exactly two dogs? | Are the dogs black? | object: dog | Is the dog white?",
    "a red door and a blue door": "object: door | Is there a red door? | Is there a blue door?",
    "The wall is yellow and the chair that is black and white is old.": "object: wall | Is the wall yellow? | "
    "object: chair | Is the chair black? | Is the chair white? | Is the chair old?",
    # shapes
    "an oval picture frame and a teardrop earring": "object: picture frame | Is the picture frame oval? | object: earring | "
    "Is the earring teardrop-shaped?",
    "a triangular slice of cheese and a cubic box of candles": "object: slice of cheese | Is the slice of cheese triangular? | "
    "object: box of candles | Is the box of candles cubic?",
    "a spherical bowling ball and a circular dining table": "object: bowling ball | Is the bowling ball spherical? | "
    "object: dining table | Is the dining table circular?",
    "The square rug and the round stool were in the centre of the room.": "object: rug | Is the rug square? | object: stool | "
    "Is the stool round? | object: room",
    "a big horse and a small truck": "object: horse | Is the horse big? | object: truck | Is the truck small?",
    "a round can of soup and a butterfly": "object: can of soup | Is the can of soup round? | object: butterfly",
    # textures
    "a leather glove and a glass jug": "object: glove | Is the glove made of leather? | object: jug | Is the jug made of glass?",
    "rubber boots and a fluffy cushion": "+Are there boots? | Are the boots made of rubber? | object: cushion | "
    "Is the cushion fluffy?",
    "a glass and a metallic straw": "object: glass | object: straw | Is the straw metallic?",
    "The leather bag and wooden cane hang on the metallic hook by the glass door.": "object: bag | Is the bag made of leather? | "
    "object: cane | Is the cane wooden? | object: hook | Is the hook metallic? | object: door | "
    "Is the door made of glass? | Is the bag on the hook? | Is the cane on the hook? | Is the hook next to the door?",
    "The metallic hammers and wooden mallets pound the plastic board.": "+Are there hammers? | Are the hammers metallic? | "
    "+Are there mallets? | Are the mallets wooden? | object: board | Is the board made of plastic?",
    # space
    "a pig on the left of a clock": "object: pig | object: clock | Is the pig to the left of the clock?",
    "a airplane to the right of a bee": "+Is there an airplane? | object: bee | Is the airplane to the right of the bee?",
    "a key on side of a lamp": "object: key | object: lamp | Is the key next to the lamp?",
    "a hat on the top of a fish": "object: hat | object: fish | Is the hat on top of the fish?",
    "a man on the bottom of a balloon": "object: man | object: balloon | Is the man below the balloon?",
    "a cat on a mat and near a dog": "object: cat | object: mat | object: dog | Is the cat on the mat? | "
    "Is the cat near the dog?",
    "a mouse near a woman": "object: mouse | object: woman | Is the mouse near the woman?",
    "a sheep hidden by a book": "object: sheep | object: book | Is the sheep hidden by the book?",
    "a cow in front of a cow": "object: cow | Is a cow in front of another cow?",
    "a phone behind a sofa": "object: phone | object: sofa | Is the phone behind the sofa?",
    "a red cup on the right of a blue cup": "object: cup | Is there a red cup? | Is there a blue cup? | "
    "Is the red cup to the right of the blue cup?",
    # numbers
    "three pears": "Are there exactly three pears?",
    "four boats, two fish, one pig and 3 people": "Are there exactly four boats? | Are there exactly two fish? | "
    "Is there exactly one pig? | Are there exactly three people?",
    "six children gathered for a concert": "Are there exactly six children? | object: concert",
    "two kites floated with five mice": "Are there exactly two kites? | Are there exactly five mice?",
    "seven birds lounged on a boat": "Are there exactly seven birds? | object: boat | Are the birds on the boat?",
    "a pair of wooden chairs under some clocks": "Are there exactly two chairs? | Are the chairs wooden? | +Are there clocks? | "
    "Are the chairs under the clocks?",
    "a group of people near a pile of grey stones": "+Are there people? | +Are there stones? | Are the stones grey? | "
    "Are the people near the stones?",
    # complex
    "The striped black and white goat lay next to the soft blanket.": "object: goat | Is the goat striped? | "
    "Is the goat black and white? | object: blanket | Is the blanket soft? | Is the goat next to the blanket?",
    "The smooth, white marble column stood between the tall gate and the rusted fence.": "object: column | "
    "Is the column smooth? | Is the column white? | Is the column made of marble? | object: gate | Is the gate tall? | "
    "object: fence | Is the fence rusted? | Is the column between the gate and the fence?",
    "The rough brick was on top of the shiny tile.": "object: brick | Is the brick rough? | object: tile | Is the tile shiny? | "
    "Is the brick on top of the tile?",
    "The sour grape sat next to the sweet plum and the juicy pear.": "object: grape | Is the grape sour? | object: plum | "
    "Is the plum sweet? | object: pear | Is the pear juicy? | Is the grape next to the plum? | Is the grape next to the pear?",
    "The bright red fire engine sped past the dull building.": "object: fire engine | Is the fire engine bright red? | "
    "object: building | Is the building dull?",
    "Two hot dogs sit on a white paper plate.": "Are there exactly two hot dogs? | object: plate | Is the plate white? | "
    "Is the plate made of paper? | Are the hot dogs on the plate?",
    "a blue snow": "+Is there snow? | Is the snow blue?",
    # what is done is not asked
    "A woman is holding a cup and reading in a garden.": "object: woman | object: cup | object: garden | "
    "Is the woman in the garden?",
    "The baker kneaded the dough before placing it in the oven.": "object: baker | +Is there dough? | +Is there an oven?",
    "A man is trying on shoes.": "object: man",
    "Two giraffes slowly strode past a tree.": "Are there exactly two giraffes? | object: tree",
}  # fmt: skip


@pytest.mark.parametrize("prompt", OTHERS)
def test_other_prompts(prompt):
    wanted = [text.removeprefix("+") for text in OTHERS[prompt].split(" | ")]
    articles = lambda noun: f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
    wanted = [f"Is there {articles(x.removeprefix('object: '))}?" if x.startswith("object: ") else x for x in wanted]
    assert [atom.question for atom in questions.atoms(prompt)] == wanted


@pytest.mark.parametrize(
    "prompt", ["", "   ", "...", "赤い丸", "of the", "and and", "on the left", "the red", "is", "two of"]
)
def test_texts_of_nothing(prompt):
    """No error, and at most the word that could be a thing."""
    assert len(questions.atoms(prompt)) <= 1


def test_any_text_gives_questions():
    """Words in any order: each atom is of a kind, short, a question, and there once; in a time linear in the words."""
    rng = np.random.default_rng(0)
    words = [
        *"a an the two red black and of on in to left right circle squares , . is sat dogs it by running wooden".split()
    ]
    for count in rng.integers(1, 40, 300):
        atoms = questions.atoms(" ".join(rng.choice(words, count)))
        assert all(atom.kind in questions.KINDS and atom.question.startswith(("Is ", "Are ")) for atom in atoms)
        assert all(atom.question.endswith("?") and set(atom.text) <= {*string.ascii_lowercase, " "} for atom in atoms)
        assert len({atom.question for atom in atoms}) == len(atoms)
    start = time.perf_counter()
    questions.atoms("a red circle left of a blue square, " * 500)
    assert time.perf_counter() - start < 5
