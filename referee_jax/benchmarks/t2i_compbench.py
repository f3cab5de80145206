"""T2I-CompBench's own measures (Huang et al. 2023, arXiv 2307.06350, section 4), as its official scorers compute them.

    blip_vqa   the product, over the prompt's noun phrases, of the probability that BLIP answers "<phrase>?" with yes
    clip       the cosine of the whole prompt, or of its words without the adjectives
    3_in_1     of a complex prompt, the mean of the measures of its kind: `KINDS`

The official checkpoint of BLIP-VQA is `model_base_vqa_capfilt_large.pth`, which reads 480 pixels;
referee_jax.weights.lavis converts it. transformers' directory of the same weights reads 384 pixels, and its
numbers are not comparable.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import PIL.Image

from referee_jax.benchmarks import scorer as scorer_lib

DIGITS = 4  # the official scorers round to
# Category -> its measures; the official measure of the other categories is an external detector.
MEASURES = {
    **dict.fromkeys(("color", "shape", "texture"), ("blip_vqa",)),
    "non_spatial": ("clip",),
    "complex": ("blip_vqa", "clip_without_adjectives"),
}
CATEGORIES = (*MEASURES, "spatial", "3d_spatial", "numeracy")
# Kind of a complex prompt, as in the names of the official lists -> the measures of its 3-in-1.
KINDS = {
    "spatial": ("blip_vqa", "unidet_2d"),
    "action": ("blip_vqa", "clip_without_adjectives"),
    "spatialaction": ("blip_vqa", "unidet_2d", "clip_without_adjectives"),
}


def read_lists(directory: Path) -> dict[str, list[str]]:
    """Prompt -> its parts ("color", "color, seen", "complex, action", ...), of the official `*_val*.txt` files.

    Raises ValueError if there are none.
    """
    lists: dict[str, list[str]] = {}
    for file in sorted(directory.glob("*_val*.txt")):
        category, _, split = file.stem.partition("_val")
        name = ", ".join(filter(None, (category, split.strip("_"))))
        for prompt in _lines(file):
            parts = lists.setdefault(prompt, [])
            parts += [part for part in dict.fromkeys((category, name)) if part not in parts]
    if not lists:
        raise ValueError(f"{directory} holds none of T2I-CompBench's *_val.txt files")
    return lists


def read_list_of(directory: Path, prompts: Collection[str], *, category: str | None = None) -> tuple[str, list[str]]:
    """The category (any, or `category`) that has all these prompts, and its list. Raises ValueError if none has."""
    for file in sorted(directory.glob(f"{category or '*'}_val.txt")):
        if set(listed := _lines(file)).issuperset(prompts):
            return file.stem.removesuffix("_val"), listed
    raise ValueError(
        f"no {category or '*'}_val.txt of {directory} has all {len(prompts)} prompts; official scorers take one category at once"
    )


def _lines(file: Path) -> list[str]:
    """The prompts of a list, each once."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    return list(dict.fromkeys(line for line in lines if line))


def name_of_result(measure: str, parts: Sequence[str]) -> str:
    """The name of an official scorer's result (layouts.RESULTS) for a prompt of these parts.

    For complex prompts, the result called clip is of the words without adjectives.
    """
    return "clip_without_adjectives" if measure == "clip" and "complex" in parts else measure


def is_measured(parts: Sequence[str], measure: str) -> bool:
    """Whether images of a prompt of these parts have this measure."""
    return any(measure in MEASURES.get(part, ()) for part in parts)


def blip_vqa(
    scorer: scorer_lib.Scorer, images: Sequence[PIL.Image.Image], phrases: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """`blip_vqa` and the probability of each question, of images with the noun phrases of their prompts.

    An image whose prompt has no phrase scores 1, as in the official code.
    """
    texts = [list(group) or ["picture"] for group in phrases]
    results = []
    for group, scores in zip(phrases, scorer(images, texts), strict=True):
        if isinstance(scores, str):
            results.append({scorer_lib.UNREAD: scores})
            continue
        yes = {phrase: round(score["vqa_probability"], DIGITS) for phrase, score in zip(group, scores, strict=False)}
        cut = {scorer_lib.CUT: True} if any(scorer_lib.CUT in score for score in scores) else {}
        results.append({"blip_vqa": math.prod(yes[phrase] for phrase in group), "questions": yes} | cut)
    return results


def three_in_one(parts: Sequence[str], scores: Mapping[str, float]) -> float | None:
    """The 3-in-1 of an image; None if its prompt is not complex, or a score is missing."""
    kinds = [kind for kind in KINDS if f"complex, {kind}" in parts]
    values = [scores.get(name) for kind in kinds for name in KINDS[kind]]
    return None if not values or None in values else sum(values) / len(values)
