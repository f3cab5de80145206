"""The shapes world: scenes of coloured shapes on 64x64 canvases, their captions, and the drawing of both.

A scene is one to three objects, each a shape with a colour, a texture, a centre and a radius. A `Prompt` is the
meaning of a caption, `Prompt.text` the caption. The grammar works both ways: `parse(text)` returns the Prompt,
so that any caption of the world can be judged (shapes.detect). Everything is NumPy; sampling.py draws scenes at random.

For the next training: the star stands on its head and should have one point up. Circles that the method makes
are often a little bent, at the edge of what the detector passes. Neither changes without training anew.
"""

import dataclasses
import itertools
import re

import numpy as np

SIZE = 64
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (45, 80, 215),
    "yellow": (240, 205, 40),
    "purple": (140, 60, 170),
    "orange": (245, 130, 30),
    "pink": (250, 130, 180),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PLURALS = {"cross": "crosses"} | {shape: shape + "s" for shape in SHAPES if shape != "cross"}
TEXTURES = ("solid", "striped", "dotted")
RELATIONS = ("on the left of", "on the right of", "above", "below")
NUMBERS = {"two": 2, "three": 3}
CATEGORIES = ("colour", "shape", "texture", "spatial", "numeracy", "complex", "hard")
MAX_OBJECTS = 3

# Attribute pairs that no training caption names: T2I-CompBench's "unseen".
UNSEEN = frozenset(
    {
        ("red", "star"),
        ("green", "circle"),
        ("blue", "triangle"),
        ("yellow", "cross"),
        ("purple", "square"),
        ("orange", "ring"),
        ("striped", "ring"),
        ("dotted", "triangle"),
    }
)


@dataclasses.dataclass(frozen=True)
class Object:
    """A drawn object: centre (x right, y down) and radius in pixels."""

    shape: str
    colour: str
    texture: str = "solid"
    x: float = SIZE / 2
    y: float = SIZE / 2
    radius: float = 12.0

    def is_unseen(self) -> bool:
        """Whether it shows a pair of UNSEEN."""
        return (self.colour, self.shape) in UNSEEN or (self.texture, self.shape) in UNSEEN


@dataclasses.dataclass(frozen=True)
class Scene:
    """Objects on a grey background (235..255)."""

    objects: tuple[Object, ...]
    background: int = 245


@dataclasses.dataclass(frozen=True)
class Thing:
    """What a caption names of one object; None is not named."""

    shape: str
    colour: str | None = None
    texture: str | None = None

    @property
    def text(self) -> str:
        """Its words: "striped red circle"."""
        return " ".join(word for word in (self.texture, self.colour, self.shape) if word)

    def fits(self, item: Object) -> bool:
        """Whether the object has all named attributes."""
        pairs = ((self.shape, item.shape), (self.colour, item.colour), (self.texture, item.texture))
        return all(word is None or word == shown for word, shown in pairs)

    def is_unseen(self) -> bool:
        """Whether it names a pair of UNSEEN."""
        return (self.colour, self.shape) in UNSEEN or (self.texture, self.shape) in UNSEEN

    def unsaid(self) -> "Thing":
        """The same without the attributes that make pairs of UNSEEN."""
        words = {"colour": self.colour, "texture": self.texture}
        return Thing(self.shape, **{kind: word for kind, word in words.items() if (word, self.shape) not in UNSEEN})


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The meaning of a caption: its things, the relation of the first to the second, or the count of a single one.

    Of three things, `relations` are those of the first to the second and to the third, or there are none.
    """

    things: tuple[Thing, ...]
    relations: tuple[str, ...] = ()
    count: int = 1

    @property
    def relation(self) -> str | None:
        """The relation of the first thing to the second."""
        return self.relations[0] if self.relations else None

    @property
    def text(self) -> str:
        """The caption."""
        if self.count > 1:
            thing = self.things[0]
            number = next(word for word, count in NUMBERS.items() if count == self.count)
            return f"{number} {dataclasses.replace(thing, shape=PLURALS[thing.shape]).text}"
        first, *others = (f"{'an' if thing.text[0] in 'aeiou' else 'a'} {thing.text}" for thing in self.things)
        if not self.relations:
            return " and ".join([first, *others])
        related = (f"{relation} {other}" for relation, other in zip(self.relations, others, strict=True))
        return f"{first} {' and '.join(related)}"

    def swapped(self) -> "Prompt":
        """The prompt with the shapes of its first two things swapped, which swaps all attributes."""
        a, b, *others = self.things
        things = (dataclasses.replace(a, shape=b.shape), dataclasses.replace(b, shape=a.shape), *others)
        return dataclasses.replace(self, things=things)

    def miscounted(self) -> "Prompt":
        """The prompt of two or three with the other number."""
        return dataclasses.replace(self, count=5 - self.count)

    def unsaid(self) -> "Prompt":
        """The prompt without the attributes that make pairs of UNSEEN."""
        return dataclasses.replace(self, things=tuple(thing.unsaid() for thing in self.things))


def thing(words: str) -> Thing:
    """The Thing of its words without an article, as "striped red circle" or "red circles". Raises ValueError."""
    attributes = {"shape": None, "colour": None, "texture": None}
    singular = {plural: shape for shape, plural in PLURALS.items()}
    for word in words.split():
        word = singular.get(word, word)
        kind = (
            "shape" if word in SHAPES else "colour" if word in COLOURS else "texture" if word in TEXTURES[1:] else None
        )
        if kind is None or attributes[kind] is not None:
            raise ValueError(f"not a thing of the shapes world: {words!r}")
        attributes[kind] = word
    if attributes["shape"] is None:
        raise ValueError(f"no shape in {words!r}; there are {', '.join(SHAPES)}")
    return Thing(**attributes)


def parse(text: str) -> Prompt:
    """The Prompt of a caption. Raises ValueError for a text that is no caption of the world."""
    words = " ".join(text.lower().replace(".", " ").split())
    if match := re.fullmatch(rf"({'|'.join(NUMBERS)}) (.+)", words):
        return Prompt(things=(thing(match[2]),), count=NUMBERS[match[1]])
    relation = "|".join(RELATIONS)
    parts = re.split(rf" ((?:and )?(?:{relation})|and) an? ", words)
    first, joints = re.fullmatch(r"an? (.+)", parts[0]), parts[1::2]
    is_list = all(joint == "and" for joint in joints)
    if (
        not first
        or len(parts) > 5
        or not (is_list or re.fullmatch(rf"({relation})( and ({relation}))?", " ".join(joints)))
    ):
        raise ValueError(f"not a caption of the shapes world: {text!r}")
    things = (thing(first[1]), *(thing(part) for part in parts[2::2]))
    return Prompt(things=things, relations=() if is_list else tuple(joint.removeprefix("and ") for joint in joints))


def holds(relation: str, first: Object, second: Object) -> bool:
    """Whether `first` is in `relation` to `second`; the larger offset of the centres decides the axis."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) >= abs(dy):
        return relation == ("on the left of" if dx < 0 else "on the right of")
    return relation == ("above" if dy < 0 else "below")


def matches(prompt: Prompt, scene: Scene) -> bool:
    """Whether the scene shows the named objects, attributes, relation and count, and nothing else."""
    if prompt.count > 1:
        return len(scene.objects) == prompt.count and all(map(prompt.things[0].fits, scene.objects))
    if len(scene.objects) != len(prompt.things):
        return False
    return any(
        all(named.fits(item) for named, item in zip(prompt.things, shown, strict=True))
        and all(holds(relation, shown[0], other) for relation, other in zip(prompt.relations, shown[1:], strict=False))
        for shown in itertools.permutations(scene.objects)
    )


def meaning(prompt: Prompt) -> str:
    """A canonical caption: equal for captions that mean the same, such as "a X and a Y" and "a Y and a X"."""
    if len(prompt.relations) == 1 and prompt.relation in ("on the right of", "below"):
        turned = {"on the right of": "on the left of", "below": "above"}[prompt.relation]
        return Prompt(things=prompt.things[::-1], relations=(turned,)).text
    if len(prompt.relations) == 2:
        pairs = sorted(zip(prompt.relations, prompt.things[1:], strict=True), key=str)
        relations, others = zip(*pairs, strict=True)
        return Prompt(things=(prompt.things[0], *others), relations=relations).text
    if not prompt.relations:
        return dataclasses.replace(prompt, things=tuple(sorted(prompt.things, key=lambda thing: thing.text))).text
    return prompt.text


# --- drawing -----------------------------------------------------------------------------------------------------------


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Whether unit coordinates (u right, v down) lie inside the shape."""
    match shape:
        case "circle":
            return u * u + v * v <= 0.95**2
        case "square":
            return np.maximum(np.abs(u), np.abs(v)) <= 0.84
        case "triangle":
            return (v <= 0.8) & (np.abs(u) <= (v + 1) * 0.56)
        case "star":
            # In the pentagram is what lies within at least four of the five lines that join every second tip.
            turns = np.pi * (2 * np.arange(5) + 1) / 5
            return sum((u * np.sin(a) - v * np.cos(a) <= np.cos(2 * np.pi / 5)).astype(int) for a in turns) >= 4
        case "cross":
            u, v = np.abs(u), np.abs(v)
            return (np.minimum(u, v) <= 0.3) & (np.maximum(u, v) <= 0.95)
        case "ring":
            square = u * u + v * v
            return (square <= 0.98**2) & (square >= 0.52**2)
    raise ValueError(f"no shape {shape!r}; there are {', '.join(SHAPES)}")


def _is_white(texture: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Whether the texture is white at offset (x, y) from the object's centre."""
    if texture == "striped":
        return (x + y) % 7 < 2.8
    if texture == "dotted":
        return ((x + 3) % 6 - 3) ** 2 + ((y + 3) % 6 - 3) ** 2 < 1.7**2
    return np.zeros(x.shape, bool)


def draw(scene: Scene, *, view: np.ndarray | None = None, supersampling: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Draws a scene, antialiased by supersampling.

    `view` float `[2, 3]` maps canvas pixels (x, y, 1), measured from the middle, to world pixels; outside of the
    world it is black, as in a referee's views. Returns the image, float32 `[64, 64, 3]` in [0, 1], and the share
    of each pixel that each object covers, float32 `[64, 64, MAX_OBJECTS]`, or of more objects if there are more.
    """
    n, middle = SIZE * supersampling, SIZE / 2
    canvas = np.full((n, n, 3), scene.background / 255, np.float32)
    cover = np.zeros((n, n, max(MAX_OBJECTS, len(scene.objects))), np.float32)
    ticks = ((np.arange(n) + 0.5) / supersampling - middle).astype(np.float32)
    linear, offset = np.eye(2, dtype=np.float32), np.zeros(2, np.float32)
    if view is not None:
        linear, offset = np.asarray(view[:, :2], np.float32), np.asarray(view[:, 2], np.float32)
        x, y = ticks[None, :], ticks[:, None]
        across, down = (np.abs(linear[i, 0] * x + linear[i, 1] * y + offset[i]) for i in range(2))
        canvas[np.maximum(across, down) > middle] = 0
    reach_out = 1 / np.sqrt(abs(np.linalg.det(linear)))
    for i, item in enumerate(scene.objects):
        at = np.linalg.solve(linear, np.array([item.x, item.y]) - middle - offset)
        reach = item.radius * reach_out + 1
        low, high = (np.clip(np.searchsorted(ticks, at + d), 0, n) for d in (-reach, reach))
        x, y = ticks[None, low[0] : high[0]] - at[0], ticks[low[1] : high[1], None] - at[1]
        dx, dy = (linear[j, 0] * x + linear[j, 1] * y for j in range(2))
        mask = _inside(item.shape, dx / item.radius, dy / item.radius)
        white = _is_white(item.texture, dx, dy)[..., None]
        box = (slice(low[1], high[1]), slice(low[0], high[0]))
        paint = np.where(white, np.float32(1), np.array(COLOURS[item.colour], np.float32) / 255)
        canvas[box] = np.where(mask[..., None], paint, canvas[box])
        cover[(*box, i)] = mask
    steps = range(supersampling)
    return tuple(
        sum(x[i::supersampling, j::supersampling] for i in steps for j in steps) / len(steps) ** 2
        for x in (canvas, cover)
    )
