"""The fixed test prompts of the shapes world, in T2I-CompBench's categories, and their score by ground truth.

Hard ones name three things, or say where one is to two others, as no caption of the generator's training does.
`seen` prompts name no attribute pair of `world.UNSEEN`, nor does any training caption; `unseen` prompts name at least
one. No two prompts of a list mean the same. A list has `COUNT` prompts, or all that exist: 15 pairs of shapes, 21 + 9
pairs of a striped and a dotted shape, 12 unseen counts. The shape category names no pair of attributes and so has no
unseen list. The lists are in benchmark_prompts.json; `make_lists` made them.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from referee_jax.shapes import detect, sampling, world

COUNT = 48
SPLITS = ("seen", "unseen")
FILE = pathlib.Path(__file__).with_name("benchmark_prompts.json")


def prompts(category: str, split: str) -> list[str]:
    """The prompts of a category (of `world.CATEGORIES`) and split. Raises ValueError if there are none."""
    lists = _lists()
    if split not in lists.get(category, ()):
        names = ", ".join(f"{name} {part}" for name, parts in lists.items() for part in parts)
        raise ValueError(f"no prompts {category!r} {split!r}; there are {names}")
    return list(lists[category][split])


def splits(category: str) -> tuple[str, ...]:
    """The splits in which a category has prompts."""
    return tuple(split for split in SPLITS if split in _lists()[category])


def every_prompt(limit: int | None = None) -> tuple[str, ...]:
    """The prompts of all categories and splits, each once; at most `limit` of each list, the first ones."""
    lists = (texts[:limit] for parts in _lists().values() for texts in parts.values())
    return tuple(dict.fromkeys(text for texts in lists for text in texts))


def score(images: Sequence[np.ndarray], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Whether images `[64, 64, 3]` show exactly what their texts say, bool `[n]`; their quality in dB, float32 `[n]`.

    Raises ValueError for a text that is no caption of the world, or another number of texts than images.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images for {len(texts)} prompts")
    captions = [world.parse(text) for text in texts]
    detections = [detect.detect(image) for image in images]
    right = [world.matches(prompt, x.scene) for prompt, x in zip(captions, detections, strict=True)]
    return np.array(right, bool), np.array([x.quality for x in detections], np.float32)


def parts(text: str) -> list[str]:
    """The parts of a prompt: its category, and "category, seen" or "category, unseen". Raises ValueError as `parse`."""
    prompt = world.parse(text)
    textured = any(thing.texture for thing in prompt.things)
    if len(prompt.things) > 2:
        category = "hard"
    elif prompt.count > 1:
        category = "numeracy"
    elif prompt.relation:
        category = "complex" if textured else "spatial"
    elif textured:
        category = "texture"
    else:
        category = "colour" if any(thing.colour for thing in prompt.things) else "shape"
    return [category, f"{category}, {'unseen' if is_unseen(prompt) else 'seen'}"]


def is_unseen(prompt: world.Prompt) -> bool:
    """Whether the prompt names a pair of world.UNSEEN."""
    return any(thing.is_unseen() for thing in prompt.things)


def make_lists(count: int = COUNT, *, seed: int = 0, patience: int = 1000) -> dict[str, dict[str, list[str]]]:
    """Category -> split -> prompts: captions of random scenes, all different in meaning.

    A list ends at `count` prompts, or after `patience` scenes without a new one.
    """
    lists = {}
    for index, category in enumerate(world.CATEGORIES):
        lists[category] = {}
        for split in SPLITS[: 1 if category == "shape" else 2]:
            rng = np.random.default_rng([seed, index, SPLITS.index(split)])
            captions, tries = {}, 0
            while len(captions) < count and tries < patience:
                scene = sampling.sample_scene(rng, category, unseen=split == "unseen")
                prompt = sampling.describe(rng, scene, category)
                tries += 1
                if is_unseen(prompt) == (split == "unseen") and (meaning := world.meaning(prompt)) not in captions:
                    captions[meaning], tries = prompt.text, 0
            lists[category][split] = list(captions.values())
    return lists


@functools.cache
def _lists() -> dict[str, dict[str, list[str]]]:
    return json.loads(FILE.read_text(encoding="utf-8"))
