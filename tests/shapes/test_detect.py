"""The detector against scenes that are known: clean, soiled as a generator soils them, and no scenes at all."""

import dataclasses

import numpy as np
import pytest
from scipy import ndimage

from referee_jax.shapes import detect, sampling, world


def to_uint8(image):
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def is_right(scene, found):
    """Whether the found objects are those of the scene, each in its place."""
    if len(found.objects) != len(scene.objects):
        return False
    left = list(found.objects)
    for item in scene.objects:
        near = min(left, key=lambda other: np.hypot(other.x - item.x, other.y - item.y))
        left.remove(near)
        same = (near.shape, near.colour, near.texture) == (item.shape, item.colour, item.texture)
        off = max(abs(near.x - item.x), abs(near.y - item.y), abs(near.radius - item.radius))
        if not same or off > 1:
            return False
    return True


def samples(category, count, *, seed):
    """Scenes with and without unseen pairs in turn."""
    rng = np.random.default_rng([seed, world.CATEGORIES.index(category)])
    return rng, [sampling.sample_scene(rng, category, unseen=bool(i % 2)) for i in range(count)]


def star_and(*others):
    return world.Scene((world.Object("star", "red", x=15, y=16, radius=11), *others))


@pytest.mark.parametrize("category", world.CATEGORIES)
def test_clean_pictures_are_read_right(category):
    rng, scenes = samples(category, 30, seed=11)
    for scene in scenes:
        image = world.draw(scene)[0]
        found = detect.detect(to_uint8(image))
        assert is_right(scene, found.scene), (scene, found.scene)
        assert abs(found.scene.background - scene.background) <= 1
        assert found.quality > 24
        assert detect.judge(image, sampling.describe(rng, scene, category).text)


def blurred(rng, image):
    return ndimage.gaussian_filter(image, (*[rng.uniform(0.5, 0.7)] * 2, 0))


SOILED = {
    "noise": lambda rng, image: image + rng.normal(0, 0.02, image.shape),
    "blur": blurred,
    "half a pixel": lambda rng, image: ndimage.shift(image, (0.5, 0.5, 0), order=1, mode="nearest"),
    "tint": lambda rng, image: image + rng.uniform(-0.05, 0.05, 3),
}


@pytest.mark.parametrize("how", SOILED)
def test_soiled_pictures_are_read_right(how):
    right = []
    for category in world.CATEGORIES:
        rng, scenes = samples(category, 10, seed=12)
        for scene in scenes:
            found = detect.detect(to_uint8(SOILED[how](rng, world.draw(scene)[0]))).scene
            if how == "half a pixel":
                back = (dataclasses.replace(item, x=item.x - 0.5, y=item.y - 0.5) for item in found.objects)
                found = dataclasses.replace(found, objects=tuple(back))
            right.append(is_right(scene, found))
    assert np.mean(right) >= 0.98


@pytest.mark.parametrize("texture, shape", [("striped", "circle"), ("striped", "square"), ("dotted", "ring")])
def test_the_phase_of_a_texture_is_free(texture, shape):
    """A texture painted from another origin, as a generator may, is still that texture."""
    item = world.Object(shape, "blue", texture, 30, 33, 13)
    image, cover = world.draw(world.Scene((dataclasses.replace(item, texture="solid"),)))
    ticks = np.arange(world.SIZE) + 0.5
    white = world._is_white(texture, ticks[None] - 28.5, ticks[:, None] - 31.0) & (cover[..., 0] > 0)
    found = detect.detect(np.where(white[..., None], 1, image)).scene
    assert [(o.shape, o.colour, o.texture) for o in found.objects] == [(shape, "blue", texture)]


def test_float_and_uint8_read_the_same():
    image = world.draw(star_and())[0]
    floats, integers = detect.detect(image), detect.detect(to_uint8(image))
    assert floats.scene.objects == integers.scene.objects
    assert floats.quality == pytest.approx(integers.quality, abs=0.5)
    for wrong in (image[:32], image[..., :1], image[None]):
        with pytest.raises(ValueError, match="64x64x3"):
            detect.detect(wrong)


@pytest.mark.parametrize("side, counts", [(3, False), (4, True), (6, True)])
@pytest.mark.parametrize("colour", ["red", "green"])
def test_debris_counts_from_twelve_pixels(side, counts, colour):
    image = world.draw(star_and())[0]
    image[44 : 44 + side, 40 : 40 + side] = np.array(world.COLOURS[colour]) / 255
    assert (side**2 >= detect.DEBRIS) == counts
    assert len(detect.detect(image).scene.objects) == 1 + counts
    assert detect.judge(image, "a red star") == (not counts)


def test_a_thing_that_is_no_shape_is_unknown_and_never_matches():
    image = world.draw(world.Scene(()))[0]
    image[28:33, 8:52] = image[8:44, 48:52] = np.array(world.COLOURS["green"]) / 255
    [item] = detect.detect(image).scene.objects
    assert item.shape == detect.UNKNOWN and item.colour == "green"
    assert not any(detect.judge(image, f"a green {shape}") for shape in world.SHAPES)


def test_touching_things_of_different_colours_come_apart():
    scene = world.Scene(
        (world.Object("square", "red", x=22, y=32, radius=12), world.Object("circle", "blue", x=43, radius=12))
    )
    cover = world.draw(scene)[1]
    assert (ndimage.label(cover.sum(-1) > 0)[1]) == 1
    assert is_right(scene, detect.detect(world.draw(scene)[0]).scene)


def test_merged_things_of_one_colour_are_not_one_good_thing():
    scene = world.Scene(tuple(world.Object("circle", "green", x=x, radius=11) for x in (25, 40)))
    image = world.draw(scene)[0]
    assert not detect.judge(image, "a green circle")


@pytest.mark.parametrize("fill", [(0, 0, 0), (0.9, 0.3, 0.3), (0.5, 0.5, 0.5)])
def test_a_picture_without_a_light_background_shows_nothing_of_the_world(fill):
    image = np.broadcast_to(np.float32(fill), (64, 64, 3)).copy()
    rows, columns = np.indices((64, 64)) - 32
    image[np.hypot(rows, columns) < 12] = np.array(world.COLOURS["blue"]) / 255
    found = detect.detect(image)
    assert [item.shape for item in found.scene.objects] == [detect.UNKNOWN]
    assert found.quality < 15


def test_an_empty_picture_shows_nothing():
    found = detect.detect(world.draw(world.Scene((), 250))[0])
    assert found.scene == world.Scene((), 250) and found.quality == pytest.approx(60)
    noise = np.random.default_rng(0).uniform(size=(64, 64, 3))
    assert not detect.judge(noise, "a red circle")


def test_quality_is_the_psnr_and_falls_with_every_fault():
    scene = star_and(world.Object("circle", "blue", x=45, y=45, radius=12))
    image = world.draw(scene)[0]
    rng = np.random.default_rng(0)
    qualities = [
        detect.detect(np.clip(image + s * rng.normal(size=image.shape), 0, 1)).quality for s in (0, 0.02, 0.04)
    ]
    assert qualities[0] > 35 and qualities[0] > qualities[1] > qualities[2]
    assert qualities[2] == pytest.approx(-20 * np.log10(0.04), abs=1)
    assert detect.detect(ndimage.gaussian_filter(image, (0.7, 0.7, 0))).quality < 35


def test_judge_tells_a_caption_from_its_near_ones():
    for category in world.CATEGORIES:
        rng, scenes = samples(category, 4, seed=13)
        for scene in scenes:
            prompt, image = sampling.describe(rng, scene, category), world.draw(scene)[0]
            found = detect.detect(image).scene
            assert world.matches(prompt, found)
            assert not any(world.matches(wrong, found) for wrong in sampling.distractors(rng, prompt, 6))
    with pytest.raises(ValueError):
        detect.judge(image, "a dog")
