"""Noun phrases of prompts: the brackets in ANNOTATED were set by hand, each around one base noun phrase of the prompt."""

import re

import hypothesis
import hypothesis.strategies as st
import pytest

from referee_jax.benchmarks import noun_phrases

ANNOTATED = {
    "colour": """
[a red kettle] and [a white teapot]
[a purple sofa] and [an orange curtain]
[a gold ring] and [a silver coin]
[a pink umbrella] next to [a black bin]
[a yellow school bus] and [a grey garage door]
[red tulips] and [white daisies]
[red and yellow tulips]
[a black and white cow] in [a green meadow]
[A light blue shirt] hangs beside [a dark green coat].
[Three brown eggs] lie in [a small blue bowl] near [a white jug].
[A bathroom] with [pink walls] and [a turquoise tub].
[A man] in [a red jacket] stands next to [a yellow tractor].
[The white lighthouse] with [a red stripe] shines over [a dark sea].
[A purple bicycle] is parked in [front] of [an orange house].
[Two green parrots] sit on [a brown branch] under [a grey sky].
[a blue-eyed cat] and [a red-haired girl]
[A kitchen] has [white cupboards], [a grey stove] and [a black fridge].
[a brown leather bag] with [a golden buckle]
[A bright pink flamingo] wades through [shallow green water].
[a green traffic light] and [a red stop sign]
[an orange] and [a lemon]
[A boy] wears [blue shorts] and [green socks].
[Many yellow taxis] wait on [a wet black street].
[a white duck] and [grey ducklings]
[a maroon car] parked near [a beige wall]
[A woman] with [long red hair] holds [a blue parasol].
[Some purple grapes] lie on [a white plate] with [a red rim].
[A bedroom] with [a brown bed], [two yellow lamps] and [a large red rug].
""",
    "shape": """
[a round cushion] and [a square stool]
[an oval tray] and [a rectangular box]
[a spherical lantern] and [a cubic crate]
[a conical hat] and [a cylindrical can]
[a big spider] and [a tiny ant]
[a tall giraffe] and [a short pony]
[a pentagonal tile] and [a triangular sail]
[a diamond kite] and [a crescent moon]
[an oblong loaf] and [a circular bread board]
[a long train] and [a narrow tunnel]
[a rectangular slice] of [cake] and [a round cup] of [tea]
[a teardrop earring] and [a hexagonal coin]
[a square birthday cake] and [a cylindrical birthday candle].
[The round table] and [the triangular chairs] filled [the small café].
[The tall chimney] and [the short fence] were painted by [the old neighbour].
[The spherical vase] with [its narrow neck] stood on [a square shelf].
[The oval window] and [the arched door] were [the only parts] left.
[The large drum] and [the small flute] are both useful in [the school band].
[The cubic box] was placed under [the pyramidal lamp] in [the empty hall].
[The crescent pendant] and [the round locket] were [gifts] from [her grandmother].
[A pyramidal tent] and [a circular rug] lay on [the flat sand].
[a small heart-shaped stone] and [a big star-shaped cookie]
[a long pencil] and [a short pencil]
[The conical roof] of [the round tower] dominated [the old town].
[a cylindrical water tank] beside [a rectangular swimming pool]
[A round mirror] hung above [the oval sink] in [the narrow bathroom].
""",
    "texture": """
[a wooden bench] and [a metallic gate]
[a fluffy slipper] and [a leather boot]
[a rubber hose] and [a plastic bucket]
[a glass lamp] and [a fabric lampshade]
[metallic spoons] and [a wooden chopping board]
[fluffy clouds] and [a metallic plane]
[a leather wallet] and [plastic cards]
[a plastic lunch box] and [a fabric napkin]
[wooden toys] and [rubber boots]
[rubber sole boots] and [a glass jug]
[The wooden table] and [leather chair] stand on [the fluffy carpet].
[The glass jar] and [plastic cup] hold [the metallic buttons].
[The fabric curtain] and [wooden shutter] cover [the glass window].
[The metallic ladle] and [wooden bowl] serve [the fluffy rice] on [the plastic tray].
[The leather strap] and [metallic buckle] secure [the fabric bag] to [the wooden pole].
[The rubber duck] and [plastic boat] float in [the metallic tub].
[The fluffy cat] rests on [the leather armchair] by [the glass door].
[The plastic bottle] and [glass cup] sit beside [the wooden tray] for [the metallic kettle].
[The wooden easel] and [metallic stand] display [the fabric banners] in [the glass gallery].
[The leather gloves] and [fluffy scarf] hang from [the wooden hook].
[The metallic key] opens [the wooden chest] with [the leather lining].
[a smooth stone] and [a rough brick wall]
[The soft pillow] was on [top] of [the hard mattress].
[A shiny metal spoon] next to [a crumpled paper bag].
[A knitted woollen hat] covers [a polished marble head].
[the fluffy dog's leather collar]
""",
    "spatial": """
[a lion] on [the left] of [a zebra]
[a hat] on [the right] of [a shoe]
[a penguin] on [the top] of [a bus]
[a spoon] on [the bottom] of [a guitar]
[a goat] on [side] of [a tractor]
[a wolf] near [a ladder]
[a teapot] next to [a lantern]
[an owl] on [the left] of [an umbrella]
[a squirrel] above [a bench]
[a basket] below [a window]
[a snail] under [a mushroom]
[an elephant] to [the right] of [a small hut]
[a fork] beside [a knife]
[a bottle] on [top] of [a piano]
[A tent] is on [the side] of [the road].
[A fox] stands between [two trees] on [the other side] of [the river].
[the clock] over [the door]
[a robot] inside [a box]
[a ship] in [the middle] of [the ocean]
[a crow] at [the top] of [a tall pine tree]
[A boy] is sitting to [the left] of [his sister].
[two boats] next to each other
[a pencil] across from [a notebook]
[A cat] is lying underneath [the kitchen table].
[a rug] beneath [a coffee table] and [a lamp] above [it]
[a lemon] close to [a cup] of [tea]
""",
    "non_spatial": """
[A girl] is feeding [ducks] at [the pond].
[A boy] is flying [a kite] with [his father].
[A woman] is reading [a newspaper] and drinking [a cup] of [tea].
[A man] is painting [a fence] in [his backyard].
[The waiter] is carrying [a tray] of [glasses] to [the table].
[A dog] is digging [a hole] and wagging [its tail].
[A couple] is dancing under [the moonlight].
[Two children] are building [a sandcastle] on [the beach].
[A nurse] is talking to [a patient] about [her medicine].
[The teacher] is writing [an equation] on [the blackboard].
[A group] of [tourists] is taking [photos] in [front] of [the cathedral].
[A chef] is carefully slicing [an onion], trying not to cry.
[A person] is riding [a bike] and listening to [music].
[A cat] is chasing [a mouse] around [the barn].
[A farmer] is picking [apples] and putting [them] into [a basket].
[Someone] is waving at [us] from [the window].
[She] is knitting [a sweater] for [her grandson].
[A musician] is playing [the violin] while [people] listen to [him].
[A man] is holding [an umbrella] and waiting for [a taxi].
[A toddler] is learning to walk with [his mother's help].
[The old man] feeds [the pigeons] in [the morning].
[A girl] [who] is wearing [a helmet] skates down [the street].
[A person] is feeling tired after [a long run].
[A fisherman] is sitting quietly on [a wooden pier] and watching [the sunset].
[The baby] laughed at [the clown's funny face].
[A student] is studying for [an exam] in [the library].
[Three friends] are sharing [a pizza] and telling [jokes].
[A lifeguard] ran into [the water] to save [a swimmer].
""",
    "complex": """
[The soft white towel] hung beside [the rough brown rope].
[The shiny red car] was parked next to [the old wooden barn].
[The small, fluffy kitten] slept on [the warm, woollen blanket].
[The round clock] is hung above [the square fireplace].
[The cold rain] fell on [the muddy road] and [the tall grass].
[The striped black and white shirt] was folded on [the wooden chair].
[The quick brown fox] jumped over [the lazy dog].
[The sharp knife] cut [the ripe tomato] and [the soft bread].
[The bright moon] shone over [the calm lake], [a mirror] of [the night sky].
[The gentle, flowing stream] wound through [the green valley], carrying [fallen leaves].
[The tall, slender trees] swayed in [the breeze], [their branches] reaching for [the sky].
[The fresh, crusty bread] smelled of [butter] and [warm yeast].
[The heavy iron gate] creaked as [it] opened.
[The jagged rocks] and [the foaming waves] made [the coast] [a dangerous place] for [ships].
[The silver spoon] gleamed on [the dark velvet cloth].
[The folded newspaper] lay beside [the steaming cup] of [coffee].
[The dusty, forgotten books] filled [the shelves] of [the quiet library].
[The young girl's yellow raincoat] contrasted with [the grey street].
[The blue ball] rolled under [the green bench] and [the tall lamp].
[The spicy soup] simmered in [the heavy pot], filling [the house] with [a rich smell].
[The delicate porcelain cup] was on [top] of [the thick wooden shelf].
[The glittering snow] covered [the roofs] and [the narrow streets].
[The rough bark] of [the ancient oak] told [a story] of [storms] and [droughts].
[The sleek black cat] watched [the tiny bird] from [the windowsill].
[The crisp autumn leaves] rustled beneath [the hikers' boots].
[The golden sun] rose above [the misty hills], [a symbol] of [hope] and [beauty].
[The smooth pebble] and [the rough shell] were resting on [the wet sand].
""",
    "numeracy": """
[four dogs] and [two cats]
[three kettles]
[seven lemons]
[one owl] and [five foxes]
[two ladders], [one bucket] and [three brushes]
[four spoons], [two forks], [three plates] and [one jug]
[six wolves] howled at [the moon]
[eight candles] burned on [the cake]
[two sailors] carried [three heavy ropes]
[five ducks] swam across [the pond]
[three goats], [a pig], and [two hens] filled [the barn]
[a violin], [two trumpets], and [three drums] completed [the band]
[one ship] sailed past [two islands]
[two boys] played with [four balls]
[five penguins] gathered on [the ice]
[three women] and [two men] danced in [the hall]
[six geese] flew over [the lake]
[four chairs] and [one table] stood in [the kitchen]
[seven peaches] were ready for [the market]
[a lion], [two zebras], [a monkey], and [four parrots] were at [the zoo]
[two robots] worked with [three scientists]
[eight socks]
[three lanterns] floated above [two boats]
[one camel] rested beside [four tents]
[ten balloons] and [twelve candles]
""",
    "3d": """
[a lion] in [front] of [a bus]
[a goat] behind [a ladder]
[a spoon] hidden by [a teapot]
[an owl] in [front] of [an umbrella]
[an umbrella] hidden by [a wolf]
[a robot] behind [a tree]
[a hat] hidden by [an elephant]
[a kettle] in [front] of [a window]
[a lantern] behind [a mushroom]
[a tractor] hidden by [a barn]
[a zebra] in [front] of [a zebra]
[two penguins] behind [a red sofa]
""",
}


def _read(line: str) -> tuple[str, list[str]]:
    return re.sub(r"[\[\]]", "", line), re.findall(r"\[(.*?)\]", line)


EXAMPLES = [_read(line) for lines in ANNOTATED.values() for line in lines.strip().splitlines()]
VOCABULARY = sorted(
    {word for prompt, _ in EXAMPLES for word in prompt.split()} | {",", ".", "'s", "’s", "-", "1", "\n"}
)


def test_annotated_prompts():
    assert len({prompt for prompt, _ in EXAMPLES}) == len(EXAMPLES) >= 150
    differing = [
        f"{prompt}\n  expected {expected}\n  found    {found}"
        for prompt, expected in EXAMPLES
        if (found := noun_phrases.chunk(prompt)) != expected
    ]
    assert len(differing) <= 0.01 * len(EXAMPLES), "\n".join(differing)


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", []),
        ("  ", []),
        ("?!", []),
        ("is hanging", []),
        ("A RED Apple!", ["A RED Apple"]),
        ("a Christmas tree, (a star); a gift...", ["a Christmas tree", "a star", "a gift"]),
        ("a red-and-white cup", ["a red-and-white cup"]),
        ("the man\N{RIGHT SINGLE QUOTATION MARK}s hat", ["the man\N{RIGHT SINGLE QUOTATION MARK}s hat"]),
        ("12 boats", ["12 boats"]),
        ("a cat  next\n to a dog", ["a cat", "a dog"]),
    ],
)
def test_text_stays_and_punctuation_goes(prompt, expected):
    assert noun_phrases.chunk(prompt) == expected


def test_many_adjectives_take_no_longer_than_a_few():
    prompt = "red, " * 500
    assert noun_phrases.chunk(prompt) == []
    assert noun_phrases.chunk(f"{prompt}ball") == [f"{prompt}ball"]


def test_places_are_excluded_exactly():
    places = ["top", "the side", "the left", "the right"]
    others = ["The left", "the left side", "the top", "side", "the bottom"]
    assert noun_phrases.phrases("", source=lambda prompt: [*places, *others]) == others
    assert noun_phrases.phrases("a girl on the left of a bird") == ["a girl", "a bird"]
    assert noun_phrases.phrases("a cup on top of a desk") == ["a cup", "a desk"]
    assert noun_phrases.phrases("a cup on the top of a desk") == ["a cup", "the top", "a desk"]


def test_at_most_the_limit_after_exclusion():
    prompt = "a cat on the left of " + ", ".join(f"a dog{n}" for n in range(12))
    expected = ["a cat", *(f"a dog{n}" for n in range(12))]
    assert noun_phrases.phrases(prompt) == noun_phrases.phrases(prompt, rule="new") == expected[:8]


@pytest.mark.parametrize(
    "prompt, new, old",
    [
        ("a red book and a yellow vase", ["a red book", "a yellow vase"], ["a red book", "a yellow vase"]),
        ("a girl on the left of a bird", ["a girl", "a bird"], ["a girl", "the left"]),
        ("on top of a desk, a cup and a pen", ["a desk", "a cup", "a pen"], ["top", "a desk"]),
        ("a sleeping dog", ["a sleeping dog"], ["a sleeping dog"]),
        ("over there", [], []),
    ],
)
def test_the_new_and_the_old_number(prompt, new, old):
    """The old scorer asked about the first two, places among them."""
    assert noun_phrases.phrases(prompt, rule="new") == new
    assert noun_phrases.phrases(prompt, rule="old") == old


@hypothesis.given(st.text() | st.lists(st.sampled_from(VOCABULARY), max_size=30).map(" ".join))
def test_phrases_are_spans_in_order(prompt):
    end = 0
    for phrase in noun_phrases.chunk(prompt):
        assert phrase == phrase.strip() != ""
        start = prompt.find(phrase, end)
        assert start >= end
        end = start + len(phrase)


def test_default_source(monkeypatch):
    monkeypatch.setattr(noun_phrases, "spacy_source", lambda: None)
    assert noun_phrases.default_source() == ("referee_jax", noun_phrases.chunk)
    monkeypatch.setattr(noun_phrases, "spacy_source", lambda: str.split)
    monkeypatch.setattr(noun_phrases.metadata, "version", {"en_core_web_sm": "3.8.0"}.__getitem__)
    assert noun_phrases.default_source() == ("spacy en_core_web_sm 3.8.0", str.split)


def test_spacy_source():
    source = noun_phrases.spacy_source()
    if source is None:
        pytest.skip("en_core_web_sm is not installed")
    assert source("a green bench and a blue cup") == ["a green bench", "a blue cup"]


def test_command_without_spacy(monkeypatch, capsys):
    monkeypatch.setattr(noun_phrases, "spacy_source", lambda: None)
    assert noun_phrases.main(["prompts.txt"]) == 2
    assert "pip install spacy" in capsys.readouterr().out


def test_command_compares(monkeypatch, capsys, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a cat\n\na dog and a cow\n")
    monkeypatch.setattr(noun_phrases, "spacy_source", lambda: lambda prompt: [prompt])
    assert noun_phrases.main([str(file)]) == 0
    printed = capsys.readouterr().out
    assert f"{file}: 50.0% of 2 prompts" in printed
    assert "a dog and a cow" in printed and "['a cat']" not in printed


def test_without_adjectives():
    read = noun_phrases.without_adjectives
    assert (
        read("The soft, plush blanket is draped over the hard wooden bench.")
        == "The , blanket is draped over the bench ."
    )
    assert read("a dog next to a cat") == "a dog next to a cat"
    assert read("") == ""
