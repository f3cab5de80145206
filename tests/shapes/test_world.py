"""The shapes world: grammar, truth of captions, sampling and drawing, against what is known of them in closed form."""

import dataclasses
import math

import numpy as np
import pytest

from referee_jax.shapes import sampling, world

RED_STAR = world.Object("star", "red", x=16, y=30, radius=10)
BLUE_RING = world.Object("ring", "blue", "striped", x=44, y=34, radius=10)
PAIR = world.Scene((RED_STAR, BLUE_RING))
ALL = ("single", *world.CATEGORIES)


def scenes(category, count, *, unseen=False, seed=0):
    rng = np.random.default_rng([seed, ALL.index(category), unseen])
    return rng, [sampling.sample_scene(rng, category, unseen=unseen) for _ in range(count)]


# --- grammar -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unseen", [False, True])
@pytest.mark.parametrize("category", ALL)
def test_parse_reads_back_what_text_says(category, unseen):
    rng, made = scenes(category, 40, unseen=unseen)
    for scene in made:
        prompt = sampling.describe(rng, scene, category)
        assert world.parse(prompt.text) == prompt
        assert world.parse(f"  {prompt.text.upper()}.") == prompt


def test_captions_read_as_english():
    things = (world.Thing("circle", "orange"), world.Thing("cross", "red", "dotted"))
    assert world.Prompt(things).text == "an orange circle and a dotted red cross"
    assert world.Prompt(things[::-1], relations=("below",)).text == "a dotted red cross below an orange circle"
    assert world.Prompt(things[1:], count=3).text == "three dotted red crosses"
    three = (*things, world.Thing("star", "blue"))
    assert world.Prompt(three).text == "an orange circle and a dotted red cross and a blue star"
    assert world.Prompt(three, ("above", "on the left of")).text == (
        "an orange circle above a dotted red cross and on the left of a blue star"
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a dog",
        "red circle",
        "a red blue circle",
        "a striped red",
        "two",
        "four red circles",
        "a star and a ring and a cross and a circle",
        "a star above a ring above a cross",
        "a star above a ring and a cross",
        "a star and a ring above a cross",
        "a star and above a ring",
    ],
)
def test_parse_refuses_what_is_no_caption(text):
    with pytest.raises(ValueError):
        world.parse(text)


# --- truth -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, true",
    [
        ("a red star and a blue ring", True),
        ("a blue ring and a red star", True),
        ("a star and a ring", True),
        ("a star and a striped ring", True),
        ("a red star on the left of a striped blue ring", True),
        ("a blue ring on the right of a red star", True),
        ("a blue star and a red ring", False),
        ("a striped star and a ring", False),
        ("a red star on the right of a blue ring", False),
        ("a red star above a blue ring", False),  # it is, but less than it is to the left
        ("a red star", False),
        ("two stars", False),
        ("a red star and a red star", False),
    ],
)
def test_matches_on_a_known_scene(text, true):
    assert world.matches(world.parse(text), PAIR) == true


def test_numbers_count_equal_things_only():
    star = dataclasses.replace(RED_STAR, radius=7)
    three = world.Scene(tuple(dataclasses.replace(star, x=x) for x in (10.0, 30.0, 50.0)))
    mixed = dataclasses.replace(three, objects=(*three.objects[:2], dataclasses.replace(star, colour="blue", x=50)))
    assert world.matches(world.parse("three red stars"), three)
    assert not world.matches(world.parse("two red stars"), three)
    assert not world.matches(world.parse("three red stars"), mixed)
    assert world.matches(world.parse("three stars"), mixed)


def test_exactly_one_relation_holds():
    rng = np.random.default_rng(0)
    turned = dict(zip(world.RELATIONS, ("on the right of", "on the left of", "below", "above"), strict=True))
    for _ in range(200):
        a, b = (dataclasses.replace(RED_STAR, x=x, y=y) for x, y in rng.uniform(10, 54, (2, 2)))
        held = [relation for relation in world.RELATIONS if world.holds(relation, a, b)]
        assert len(held) == 1 and world.holds(turned[held[0]], b, a)


def test_meaning_is_one_for_captions_that_say_the_same():
    def meant(text):
        return world.meaning(world.parse(text))

    assert meant("a red star and a ring") == meant("a ring and a red star")
    assert meant("a star above a ring") == meant("a ring below a star")
    assert meant("a star on the left of a ring") == meant("a ring on the right of a star")
    different = [
        "a star and a ring",
        "a star above a ring",
        "a ring above a star",
        "a star",
        "two stars",
        "three stars",
    ]
    assert len(set(map(meant, different))) == len(different)


@pytest.mark.parametrize("category", ALL)
def test_captions_are_true_and_distractors_never(category):
    rng, made = scenes(category, 40)
    for scene in made:
        prompt = sampling.describe(rng, scene, category)
        assert world.matches(prompt, scene)
        wrong = sampling.distractors(rng, prompt, 6)
        assert len({world.meaning(p) for p in (prompt, *wrong)}) == 1 + len(wrong)
        assert len(wrong) == 6 or category == "shape"
        assert not any(world.matches(p, scene) for p in wrong)


@pytest.mark.parametrize("category", ALL)
def test_edits_make_the_full_caption_false(category):
    rng, made = scenes(category, 60)
    unchanged = 0
    for scene in made:
        said = tuple(world.Thing(item.shape, item.colour, item.texture) for item in scene.objects)
        if category == "numeracy":
            full = world.Prompt(said[:1], count=len(said))
        else:
            first, *others = scene.objects
            full = world.Prompt(said, tuple(r for x in others for r in world.RELATIONS if world.holds(r, first, x)))
        assert world.matches(full, scene)
        edited = sampling.edit(rng, scene)
        unchanged += edited == scene
        assert edited == scene or not world.matches(full, edited)
        assert not any(item.is_unseen() for item in edited.objects)
    assert unchanged <= 1


# --- sampling ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("category", ALL)
def test_training_scenes_show_no_unseen_pair_and_test_scenes_do(category):
    for scene in scenes(category, 200)[1]:
        pairs = {(said, item.shape) for item in scene.objects for said in (item.colour, item.texture)}
        assert not pairs & world.UNSEEN
    for scene in scenes(category, 100, unseen=True)[1]:
        assert any(item.is_unseen() for item in scene.objects)


@pytest.mark.parametrize("category", ALL)
def test_scenes_are_of_their_category(category):
    made = scenes(category, 100)[1]
    counts = {len(scene.objects) for scene in made}
    assert counts == {"single": {1}, "numeracy": {2, 3}, "hard": {3}}.get(category, {2})
    for scene in made:
        kinds = [{getattr(item, name) for item in scene.objects} for name in ("shape", "colour", "texture")]
        alike = category == "numeracy"
        assert [len(kind) for kind in kinds[:2]] == [1 if alike else len(scene.objects)] * 2
        if category == "texture":
            assert kinds[2] == {"striped", "dotted"}
        elif category == "complex":
            assert kinds[2] != {"solid"}
        elif category != "single":
            assert kinds[2] == {"solid"}
        assert 235 <= scene.background <= 255


@pytest.mark.parametrize("category", ALL)
def test_objects_lie_inside_and_apart(category):
    for scene in scenes(category, 40)[1]:
        _, cover = world.draw(scene)
        masks = [cover[..., i] > 0 for i in range(len(scene.objects))]
        whole = sum(mask.astype(int) for mask in masks)
        assert whole.max() == 1
        assert not whole[[0, -1]].any() and not whole[:, [0, -1]].any()


# --- drawing -----------------------------------------------------------------------------------------------------------

# Of radius 1. The pentagram has five triangles over a pentagon: 5 r R sin 36 with R = 1, r = cos 72 / cos 36.
AREAS = {
    "circle": math.pi * 0.95**2,
    "square": (2 * 0.84) ** 2,
    "triangle": 0.56 * 1.8**2,
    "star": 5 * math.sin(math.pi / 5) * math.cos(2 * math.pi / 5) / math.cos(math.pi / 5),
    "cross": 2 * 1.9 * 0.6 - 0.6**2,
    "ring": math.pi * (0.98**2 - 0.52**2),
}


@pytest.mark.parametrize("radius", [9.0, 16.0])
@pytest.mark.parametrize("shape", world.SHAPES)
def test_area_is_the_closed_form(shape, radius):
    rng = np.random.default_rng(0)
    places = 32 + rng.uniform(-1, 1, (12, 2))
    areas = [world.draw(world.Scene((world.Object(shape, "red", "solid", x, y, radius),)))[1].sum() for x, y in places]
    assert np.mean(areas) == pytest.approx(AREAS[shape] * radius**2, rel=0.02)


@pytest.mark.parametrize("texture, white", [("solid", 0), ("striped", 2.8 / 7), ("dotted", math.pi * 1.7**2 / 36)])
def test_textures_paint_their_share_white(texture, white):
    period = {"solid": 6, "striped": 7, "dotted": 6}[texture]  # in pixels; the square shows six by six
    shares = []
    for x, y in 32 + np.random.default_rng(0).uniform(-1, 1, (12, 2)):
        image, cover = world.draw(world.Scene((world.Object("square", "black", texture, x, y, 3 * period / 0.84),)))
        shares.append((image[cover[..., 0] == 1].mean() - 25 / 255) / (1 - 25 / 255))
    assert np.mean(shares) == pytest.approx(white, abs=0.02)


@pytest.mark.parametrize("colour", world.COLOURS)
def test_solid_pixels_have_the_palette_colour_and_the_rest_the_background(colour):
    scene = world.Scene((world.Object("circle", colour, x=20, y=40),), background=240)
    image, cover = world.draw(scene)
    assert image.shape == (64, 64, 3) and image.dtype == np.float32 and cover.shape == (64, 64, world.MAX_OBJECTS)
    np.testing.assert_allclose(image[40, 20], np.array(world.COLOURS[colour]) / 255, atol=1e-6)
    np.testing.assert_allclose(image[cover.sum(-1) == 0], 240 / 255, atol=1e-6)
    ys, xs = np.indices((64, 64)) + 0.5
    weight = cover[..., 0] / cover[..., 0].sum()
    assert (weight * xs).sum() == pytest.approx(20, abs=0.1) and (weight * ys).sum() == pytest.approx(40, abs=0.1)


def test_a_view_of_nothing_changed_is_the_picture():
    image, cover = world.draw(PAIR)
    same, covered = world.draw(PAIR, view=np.array([[1.0, 0, 0], [0, 1, 0]]))
    np.testing.assert_allclose(same, image, atol=1e-6)
    np.testing.assert_array_equal(covered, cover)


def test_a_view_moves_turns_and_blackens():
    image, _ = world.draw(PAIR)
    moved, _ = world.draw(PAIR, view=np.array([[1.0, 0, 5], [0, 1, 0]]))
    np.testing.assert_allclose(moved[:, :-5], image[:, 5:], atol=1e-6)
    assert not moved[:, -5:].any()
    turned, _ = world.draw(PAIR, view=np.array([[0.0, 1, 0], [-1, 0, 0]]))
    # A quarter turn maps pixel centres to pixel centres; only samples on an outline may fall to the other side.
    assert np.abs(turned - np.rot90(image, k=3)).mean() < np.abs(turned - image).mean() / 20


def test_unknown_shapes_are_refused():
    with pytest.raises(ValueError, match="no shape"):
        world.draw(world.Scene((world.Object("blob", "red"),)))
