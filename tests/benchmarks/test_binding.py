"""Swaps and near captions: what is asked is false, and who wins is counted."""

import types

import numpy as np
import pytest

from referee_jax.benchmarks import binding
from referee_jax.shapes import detect, world


@pytest.mark.parametrize("category", binding.CATEGORIES)
@pytest.mark.parametrize("split", ["seen", "unseen"])
def test_one_caption_is_true(category, split):
    asked = binding.scenes(category, split, 5, seed=1)
    assert len(asked) == 5
    for image, crowded, texts in asked:
        scene = detect.detect(image).scene
        right = [world.matches(world.parse(text), scene) for text in texts]
        assert right == [True] + [False] * (1 + binding.NEAR)
        assert not world.matches(world.parse(texts[0]), detect.detect(crowded).scene)
    again = binding.scenes(category, split, 5, seed=1)
    assert [x.texts for x in again] == [x.texts for x in asked]


def test_exchanged():
    swap = lambda text: binding.exchanged(world.parse(text)).text
    assert swap("a red circle and a blue square") == "a red square and a blue circle"
    assert swap("a red circle above a blue square") == "a blue square above a red circle"
    assert swap("three red circles") == "two red circles"


def test_shares():
    """Of three scenes: all is well, a near caption is liked more, the swap and the crowd are."""
    found = np.array([[1.0, 2, 3, 4, 2], [1.0, 2, 0.5, 4, 2], [1.0, 0, 3, 4, 0.5]])
    swap, near, crowd = binding.shares(found)
    assert (swap.mean, near.mean, crowd.mean) == pytest.approx((2 / 3, 2 / 3, 2 / 3)) and swap.images == 3


def test_the_packages_referee_binds():
    """A few scenes of what the package's CLIP is good at, with a batch that is not full; a word wrong is told."""
    flags = {"referee": ["shapes/clip"], "loss": None, "category": ["colour"], "scenes": 18, "seed": 0}
    head, _, row = binding.table(types.SimpleNamespace(**flags)).strip().splitlines()
    assert head.split(" | ")[1:5] == ["swap, seen", "swap, unseen", "near, seen", "near, unseen"]
    cells = row.strip("| ").split(" | ")
    assert cells[0] == "shapes/clip, cosine: colour" and min(float(cell.split()[0]) for cell in cells[1:]) > 0.7
    with pytest.raises(ValueError, match="shapes/clip has no loss 'itm'; there are cosine, contrastive"):
        binding.load("shapes/clip", "itm")
