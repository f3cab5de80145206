"""Scenes of the shapes world drawn at random, their true captions, and what is near them and false.

All functions take a NumPy Generator.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from referee_jax.shapes import world


def pick(rng: np.random.Generator, values: Sequence) -> object:
    """One of `values`; many times faster than `rng.choice`, and keeps the value's type."""
    return values[int(rng.integers(len(values)))]


def pick_distinct(rng: np.random.Generator, values: Sequence, count: int) -> list:
    """`count` different ones of `values`."""
    return [values[i] for i in rng.permutation(len(values))[:count]]


def place(rng: np.random.Generator, count: int) -> list[tuple[float, float, float]]:
    """Centres and radii of `count` objects in pixels: in a row or a column, not touching."""
    if count == 1:
        radius = rng.uniform(10, 17)
        return [(*rng.uniform(radius + 1, world.SIZE - radius - 1, 2), radius)]
    low, high = (8, 12) if count == 2 else (7, 8.5)
    radii = rng.uniform(low, high, count)
    slack = world.SIZE - 2 - 2 * radii.sum() - 3 * (count - 1)
    gaps = rng.dirichlet(np.ones(count + 1)) * slack
    along, edge = [], 1.0
    for radius, gap in zip(radii, gaps[:count], strict=True):
        along.append(edge + gap + radius)
        edge = along[-1] + radius + 3
    # Less offset across than along, so that the relation of two objects is clear.
    across = world.SIZE / 2 + rng.uniform(-7, 7, count)
    pairs = zip(along, across, strict=True) if rng.random() < 0.5 else zip(across, along, strict=True)
    placed = [(x, y, radius) for (x, y), radius in zip(pairs, radii, strict=True)]
    rng.shuffle(placed)
    return [tuple(map(float, item)) for item in placed]


def place_corner(rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and radii of three objects: the second beside the first, the third above or below it, not touching."""
    (near_x, far_x), (near_y, far_y) = (rng.permutation([18.0, 46.0]) for _ in range(2))
    centres = [(near_x, near_y), (far_x, near_y), (near_x, far_y)]
    jittered = [(x + rng.uniform(-4, 4), y + rng.uniform(-4, 4), rng.uniform(7, 8.5)) for x, y in centres]
    return [tuple(map(float, item)) for item in jittered]


def _objects(rng: np.random.Generator, count: int, *, textured: bool, equal: bool) -> tuple[world.Object, ...]:
    shapes, colours = pick_distinct(rng, world.SHAPES, count), pick_distinct(rng, tuple(world.COLOURS), count)
    textures = [pick(rng, world.TEXTURES) if textured else "solid" for _ in range(count)]
    if equal:
        shapes, colours, textures = ([kind[0]] * count for kind in (shapes, colours, textures))
    places = place_corner(rng) if count == 3 and not equal else place(rng, count)
    return tuple(world.Object(s, c, t, *p) for s, c, t, p in zip(shapes, colours, textures, places, strict=True))


def sample_scene(rng: np.random.Generator, category: str, *, unseen: bool | None = False) -> world.Scene:
    """A scene for a caption of `category` ('single' or one of CATEGORIES).

    `unseen`: True, at least one object shows a pair of UNSEEN; False, none does; None, any scene.
    """
    count = {"single": 1, "numeracy": int(rng.integers(2, 4)), "hard": 3}.get(category, 2)
    textured = category in ("texture", "complex") or (category == "single" and rng.random() < 0.3)
    while True:
        objects = _objects(rng, count, textured=textured, equal=category == "numeracy")
        fit = unseen is None or any(item.is_unseen() for item in objects) == unseen
        if category == "texture":
            fit = fit and len({item.texture for item in objects}) == 2 and "solid" not in {i.texture for i in objects}
        if category == "complex":
            fit = fit and any(item.texture != "solid" for item in objects)
        if fit:
            return world.Scene(objects, int(rng.integers(235, 256)))


def describe(rng: np.random.Generator, scene: world.Scene, category: str) -> world.Prompt:
    """A true caption of the scene, of `category`; objects are named in random order.

    A hard one lists three things, or says where the first, the corner of `place_corner`, is to the others.
    """
    objects, is_related = list(scene.objects), category in ("spatial", "complex")
    if category == "hard" and (is_related := rng.random() < 0.5):
        objects[1:] = [objects[1 + i] for i in rng.permutation(len(objects) - 1)]
    elif category != "numeracy":
        rng.shuffle(objects)

    def thing(item: world.Object) -> world.Thing:
        colour = item.colour if category not in ("shape", "texture") else None
        texture = item.texture if item.texture != "solid" and category not in ("colour", "shape") else None
        return world.Thing(item.shape, colour, texture)

    if category == "numeracy":
        return world.Prompt(things=(thing(objects[0]),), count=len(objects))
    others = objects[1:] if is_related else []
    relations = (next(r for r in world.RELATIONS if world.holds(r, objects[0], other)) for other in others)
    return world.Prompt(things=tuple(map(thing, objects)), relations=tuple(relations))


def edit(rng: np.random.Generator, scene: world.Scene, *, unseen: bool = False) -> world.Scene:
    """The scene with one change: attributes swapped, an attribute changed, places swapped or an object dropped.

    Only with `unseen` may an object show a pair of UNSEEN. Returns the scene itself if no edit succeeds.
    """
    a, *rest = scene.objects
    equal = len(rest) > 0 and all((i.shape, i.colour, i.texture) == (a.shape, a.colour, a.texture) for i in rest)
    kinds = ["colour", "shape", "texture"] if a.texture != "solid" else ["colour", "shape"]
    if rest and not equal:
        kinds = [*kinds, "swap colour", "swap colour", "swap shape", "places", "places", "drop"]
        if {a.texture, rest[0].texture} != {"solid"}:
            kinds.append("swap texture")
    elif equal:
        kinds = [*kinds, "drop"]
    for _ in range(20):
        kind = pick(rng, kinds)
        edited = scene
        if kind == "drop":
            remaining = rng.permutation(len(scene.objects))[1:]
            edited = dataclasses.replace(scene, objects=tuple(scene.objects[i] for i in sorted(remaining)))
        elif kind == "places":
            b = rest[0]
            moved = (dataclasses.replace(a, x=b.x, y=b.y), dataclasses.replace(b, x=a.x, y=a.y))
            edited = dataclasses.replace(scene, objects=moved)
        elif kind.startswith("swap"):
            name, b = kind.split()[1], rest[0]
            swapped = (
                dataclasses.replace(a, **{name: getattr(b, name)}),
                dataclasses.replace(b, **{name: getattr(a, name)}),
            )
            edited = dataclasses.replace(scene, objects=swapped)
        else:
            n = len(scene.objects)
            which = range(n) if equal else [int(rng.integers(n))]
            values = {"colour": list(world.COLOURS), "shape": world.SHAPES, "texture": world.TEXTURES[1:]}[kind]
            taken = {getattr(item, kind) for item in scene.objects}
            new = pick(rng, [value for value in values if value not in taken] or values)
            objects = tuple(
                dataclasses.replace(o, **{kind: new}) if i in which else o for i, o in enumerate(scene.objects)
            )
            edited = dataclasses.replace(scene, objects=objects)
        if edited != scene and (unseen or not any(item.is_unseen() for item in edited.objects)):
            return edited
    return scene


def crowd(rng: np.random.Generator, scene: world.Scene) -> world.Scene:
    """The scene with an extra object in a free place, mostly a copy of one of its own."""
    while True:
        radius = rng.uniform(5, 9)
        x, y = map(float, rng.uniform(radius + 1, world.SIZE - radius - 1, 2))
        if all(np.hypot(x - item.x, y - item.y) > radius + item.radius for item in scene.objects):
            break
    added = dataclasses.replace(pick(rng, scene.objects), x=x, y=y, radius=radius)
    if rng.random() < 0.3:
        other = sample_scene(rng, "single").objects[0]
        added = dataclasses.replace(added, shape=other.shape, colour=other.colour, texture=other.texture)
    return dataclasses.replace(scene, objects=(*scene.objects, added))


def distractors(
    rng: np.random.Generator, prompt: world.Prompt, count: int, *, seen: bool = False
) -> list[world.Prompt]:
    """Hard negatives of `prompt`: other or swapped attributes, another relation or count, or one thing less.

    At most `count`, all different in meaning from `prompt` and from each other. With `seen` none names a pair
    of UNSEEN: a referee that met those only in false captions would learn that they are never true.
    """
    negatives: dict[str, world.Prompt] = {}
    things = prompt.things
    for _ in range(20 * count):
        if len(negatives) == count:
            break
        moves = ["colour", "shape", "colour"]
        if len(things) > 1:
            moves += ["swap", "swap", "drop"]
        if prompt.relation:
            moves += ["relation", "relation"]
        if prompt.count > 1:
            moves += ["count"]
        if any(thing.texture for thing in things):
            moves += ["texture"]
        move, near = pick(rng, moves), prompt
        i = int(rng.integers(len(things)))
        if move in ("colour", "shape", "texture"):
            old = getattr(things[i], move)
            values = {"colour": list(world.COLOURS), "shape": world.SHAPES, "texture": world.TEXTURES[1:]}[move]
            if old is not None:
                new = pick(rng, [value for value in values if value != old])
                changed = tuple(dataclasses.replace(t, **{move: new}) if j == i else t for j, t in enumerate(things))
                near = dataclasses.replace(prompt, things=changed)
        elif move == "swap":
            near = prompt.swapped()
        elif move == "drop":
            near = world.Prompt(things=(things[i],))
        elif move == "relation":
            other = pick(rng, [relation for relation in world.RELATIONS if relation != prompt.relation])
            near = dataclasses.replace(prompt, relations=(other, *prompt.relations[1:]))
        elif move == "count":
            near = prompt.miscounted()
        if world.meaning(near) != world.meaning(prompt) and not (
            seen and any(thing.is_unseen() for thing in near.things)
        ):
            negatives.setdefault(world.meaning(near), near)
    return list(negatives.values())
