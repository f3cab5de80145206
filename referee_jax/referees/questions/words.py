"""Words by class, for the parser of phrases: what is not here is part of a noun."""

import re

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()
DETERMINERS = set(
    "a an the this that these those some several many few all both each every another his her their its my your our".split()
)
COLOURS = set(
    """red green blue yellow purple orange pink black white brown gray grey beige tan gold golden silver violet teal
    turquoise maroon navy crimson cyan magenta lavender cream""".split()
)
SHADES = set("light dark bright pale deep dull".split())
MATERIALS = set(
    """rubber leather glass plastic fabric wood metal stone marble silk velvet cotton wool paper ceramic steel brick
    concrete porcelain satin burlap bronze copper iron denim cardboard clay crystal""".split()
)
SHAPED = set("teardrop diamond crescent star heart".split())  # nouns that say a shape where they stand before another
ADJECTIVES = (
    COLOURS
    | SHADES
    | MATERIALS
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
ADJECTIVE = re.compile(r"\w{3,}(ful|ous|less|ical|ular|-shaped|-colou?red)$|\w+-\w+ed$")
# What looks like an adjective and a noun, and is one thing.
COMPOUNDS = (
    ("hot", "dog"), ("hot", "dogs"), ("hot", "air"), ("rubber", "band"), ("rubber", "bands"), ("rubber", "duck"),
    ("cotton", "candy"), ("paper", "towel"), ("high", "chair"), ("open", "book"), ("soft", "drink"), ("light", "bulb"),
    ("square", "dance"), ("diamond", "ring"), ("star", "fruit"), ("deep", "sea"), ("tan", "lines"),
)  # fmt: skip
BE = set("is are was were be been being".split())
VERBS = BE | set(
    """has have had does did sat lay lain hung stood shone flew ran swam sank fell drove wrote grew held ate drank
    wore slept sang spun blew threw caught rode sped cast led fed kept told took gave made woke swung sprang""".split()
)
# Nouns too: verbs where a preposition, a determiner or an adverb follows.
PERHAPS_VERBS = set(
    """sit sits hang hangs rest rests hold holds lie lies stand stands lays lean leans float floats fly flies run runs walk
    walks eat eats serve serves cover covers illuminate illuminates mix mixes line lines measure measures nap naps
    contain contains carry carries wear wears watch watches look looks sleep sleeps lit set cut shines reads play
    plays""".split()
)
NOT_VERBS = set(
    """bed shed sled seed weed reed steed red ring earring king wing string spring swing ceiling building painting clothing
    lightning wedding evening morning pudding railing bedding icing flooring stocking awning thing""".split()
)
OTHERS = set(
    """and or but with without of for from to at as by while which that who where when than then there not very so too into
    through across along down up out off past towards toward during after before via together nearby""".split()
)
PRONOUNS = set("it they them he she him you i we us themselves itself himself herself".split())
OTHERS |= PRONOUNS
GROUPS = set("row pile group bunch set stack collection herd flock crowd team variety number lot".split())
ADVERB = re.compile(r"(?<!f)(?<!mi)(?<!jel)(?<!bel)(?<!li)ly$")  # not a fly, family, jelly, belly, lily
# Places, that are parts of relations, and words of no thing.
NO_OBJECTS = set(
    """left right top bottom side front back middle center centre background foreground corner edge air mid-air way time
    distance other""".split()
)
MASS = set(
    """snow water rain grass sand rice jewelry bread milk juice hair furniture lasagna toast mud smoke fog ice dough gravel
    cheese fruit""".split()
)
PLURALS = set("people men women children mice geese feet teeth pants scissors jeans".split())
SINGULAR = re.compile(r"(ss|us|is|'s)$|^(lens|gas|canvas|atlas|series|christmas|texas)$")
# As a prompt has it -> as a question has it.
RELATIONS = {
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
LONGEST = max(len(phrase.split()) for phrase in RELATIONS)
TOKEN = re.compile(r"[^\W_]+(?:[-'’][^\W_]+)*|[,.;:!?]")
STOPS = set(".;:!?")
