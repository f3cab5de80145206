"""The fixed test prompts of the shapes world, in the categories of T2I-CompBench, and their score by ground truth.

`seen` prompts name no attribute pair of `world.UNSEEN`, nor does any training caption; `unseen` prompts name at least one. No two
prompts of a list mean the same. A list holds `COUNT` prompts, or all there are: 15 pairs of shapes, 21 + 9 pairs of a striped and
a dotted shape, 12 unseen numbers of things. The shape category names no pair of attributes and so has no unseen list.
The lists are the file benchmark_prompts.json; `make_lists` is how they were made.
"""

import functools
import json
import pathlib
from collections.abc import Sequence

import numpy as np

from referee_jax.shapes import detect, world

COUNT = 48
SPLITS = ("seen", "unseen")
FILE = pathlib.Path(__file__).with_name("benchmark_prompts.json")


def prompts(category: str, split: str) -> list[str]:
    """The fixed prompts of a category (of `world.CATEGORIES`) and split ("seen" or "unseen"); ValueError if there are none."""
    lists = _lists()
    if split not in lists.get(category, ()):
        there = ", ".join(f"{name} {part}" for name, parts in lists.items() for part in parts)
        raise ValueError(f"no prompts {category!r} {split!r}; there are {there}")
    return list(lists[category][split])


def splits(category: str) -> tuple[str, ...]:
    """Those of SPLITS in which a category has prompts."""
    return tuple(split for split in SPLITS if split in _lists()[category])


def every_prompt() -> tuple[str, ...]:
    """Those of all categories and splits, each once."""
    return tuple(dict.fromkeys(text for parts in _lists().values() for texts in parts.values() for text in texts))


def score(images: Sequence[np.ndarray], texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Whether each image `[64, 64, 3]` shows just what its prompt says, bool `[n]`, and its quality in dB, float32 `[n]`.

    ValueError where a text is no caption of the world, or there are not as many texts as images.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images for {len(texts)} prompts")
    said = [world.parse(text) for text in texts]
    read = [detect.detect(image) for image in images]
    right = [world.matches(prompt, found.scene) for prompt, found in zip(said, read, strict=True)]
    return np.array(right, bool), np.array([found.quality for found in read], np.float32)


def parts(text: str) -> list[str]:
    """What a prompt counts in: its category, and that with "seen" or "unseen". ValueError where it is no caption of the world."""
    prompt = world.parse(text)
    textured = any(thing.texture for thing in prompt.things)
    if prompt.count > 1:
        category = "numeracy"
    elif prompt.relation:
        category = "complex" if textured else "spatial"
    elif textured:
        category = "texture"
    else:
        category = "colour" if any(thing.colour for thing in prompt.things) else "shape"
    return [category, f"{category}, {'unseen' if is_unseen(prompt) else 'seen'}"]


def is_unseen(prompt: world.Prompt) -> bool:
    """Whether the prompt names an attribute pair that no training caption does."""
    return any(thing.is_unseen() for thing in prompt.things)


def make_lists(count: int = COUNT, *, seed: int = 0, patience: int = 1000) -> dict[str, dict[str, list[str]]]:
    """Category -> split -> prompts: captions of random scenes, distinct in meaning.

    A list ends with `count` prompts, or after `patience` scenes without a new one.
    """
    lists = {}
    for index, category in enumerate(world.CATEGORIES):
        lists[category] = {}
        for split in SPLITS[: 1 if category == "shape" else 2]:
            rng = np.random.default_rng([seed, index, SPLITS.index(split)])
            found, tries = {}, 0
            while len(found) < count and tries < patience:
                scene = world.sample_scene(rng, category, unseen=split == "unseen")
                prompt = world.describe(rng, scene, category)
                tries += 1
                if is_unseen(prompt) == (split == "unseen") and (meant := world.meaning(prompt)) not in found:
                    found[meant], tries = prompt.text, 0
            lists[category][split] = list(found.values())
    return lists


@functools.cache
def _lists() -> dict[str, dict[str, list[str]]]:
    return json.loads(FILE.read_text(encoding="utf-8"))
