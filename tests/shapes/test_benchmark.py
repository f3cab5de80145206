"""The fixed prompts of the shapes world: what they are made of, and their score."""

import numpy as np
import pytest

from referee_jax.shapes import benchmark, world

LISTS = [(category, split) for category, parts in benchmark._lists().items() for split in parts]


def test_the_committed_lists_are_what_the_function_makes():
    assert benchmark.make_lists() == benchmark._lists()


def test_every_category_has_its_lists():
    wanted = {(c, s) for c in world.CATEGORIES for s in benchmark.SPLITS} - {("shape", "unseen")}
    assert set(LISTS) == wanted
    sizes = {pair: len(benchmark.prompts(*pair)) for pair in LISTS}
    all_there_are = {
        ("shape", "seen"): 15,
        ("texture", "seen"): 21,
        ("texture", "unseen"): 9,
        ("numeracy", "unseen"): 12,
    }
    assert sizes == {pair: all_there_are.get(pair, 48) for pair in LISTS}


@pytest.mark.parametrize("category, split", LISTS)
def test_prompts_are_distinct_captions_of_their_split(category, split):
    prompts = [world.parse(text) for text in benchmark.prompts(category, split)]
    assert [prompt.text for prompt in prompts] == benchmark.prompts(category, split)
    assert len({world.meaning(prompt) for prompt in prompts}) == len(prompts)
    assert all(benchmark.is_unseen(prompt) == (split == "unseen") for prompt in prompts)
    for prompt in prompts:
        assert (prompt.count > 1) == (category == "numeracy")
        assert len(prompt.things) == {"numeracy": 1, "hard": 3}.get(category, 2)
        counts = {"spatial": {1}, "complex": {1}, "hard": {0, 2}}.get(category, {0})
        assert len(prompt.relations) in counts
        assert all((thing.colour is None) == (category in ("shape", "texture")) for thing in prompt.things)
        assert any(thing.texture for thing in prompt.things) == (category in ("texture", "complex"))


@pytest.mark.parametrize("category, split", LISTS)
def test_a_prompt_says_what_it_counts_in(category, split):
    wanted = [category, f"{category}, {split}"]
    assert [benchmark.parts(prompt) for prompt in benchmark.prompts(category, split)] == [wanted] * len(
        benchmark.prompts(category, split)
    )


def test_every_prompt():
    every = benchmark.every_prompt()
    assert len(every) == len(set(every)) and set(every) == {p for pair in LISTS for p in benchmark.prompts(*pair)}
    assert set(benchmark.every_prompt(2)) == {p for pair in LISTS for p in benchmark.prompts(*pair)[:2]}


def test_lists_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match="no prompts 'shape' 'unseen'"):
        benchmark.prompts("shape", "unseen")
    with pytest.raises(ValueError, match="there are colour seen"):
        benchmark.prompts("weather", "seen")


def test_prompts_gives_a_list_of_ones_own():
    benchmark.prompts("colour", "seen").clear()
    assert len(benchmark.prompts("colour", "seen")) == 48


def test_score_knows_right_from_wrong_and_clean_from_soiled():
    scene = world.Scene((world.Object("star", "red", x=18, radius=10), world.Object("circle", "blue", x=46, radius=10)))
    image = world.draw(scene)[0]
    soiled = np.clip(image + np.random.default_rng(0).normal(0, 0.03, image.shape), 0, 1)
    texts = ["a red star and a blue circle", "a blue star and a red circle", "a red star on the left of a blue circle"]
    right, quality = benchmark.score([image, image, soiled], texts)
    assert right.tolist() == [True, False, True]
    assert quality.shape == (3,) and quality[0] == quality[1] > 35 and 29 < quality[2] < 31.5
    with pytest.raises(ValueError, match="1 images for 3 prompts"):
        benchmark.score([image], texts)
    with pytest.raises(ValueError, match="not a"):
        benchmark.score([image], ["a dog"])
