"""T2I-CompBench's own measures (Huang et al. 2023, arXiv 2307.06350, section 4), as its official scorers compute them.

    blip_vqa   for each noun phrase of the prompt, the probability that BLIP's answer to "<phrase>?" is yes; their product
    clip       the cosine of the whole prompt, or of what is left of it without its adjectives
    3_in_1     of a complex prompt, the mean of those parts that its kind has: `KINDS`

The official checkpoint of BLIP-VQA is `model_base_vqa_capfilt_large.pth`, which reads 480 pixels: referee_jax.weights.lavis
converts it. transformers' directory of the same weights reads 384, and its numbers are not comparable.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import PIL.Image

from referee_jax import referees
from referee_jax.benchmarks import scorer as scorer_lib

DIGITS = 4  # to which the official scorers round
QUESTION = 35  # tokens of a question that BLIP reads, both ends included
# Category -> what its images are measured by here; of those that are not named the official measure is an external detector.
MEASURES = {
    **dict.fromkeys(("color", "shape", "texture"), ("blip_vqa",)),
    "non_spatial": ("clip",),
    "complex": ("blip_vqa", "clip_without_adjectives"),
}
CATEGORIES = (*MEASURES, "spatial", "3d_spatial", "numeracy")
# What a complex prompt is about, as the official lists are called -> the parts of its 3-in-1.
KINDS = {
    "spatial": ("blip_vqa", "unidet_2d"),
    "action": ("blip_vqa", "clip_without_adjectives"),
    "spatialaction": ("blip_vqa", "unidet_2d", "clip_without_adjectives"),
}


def read_lists(directory: Path) -> dict[str, list[str]]:
    """Prompt -> what it counts in ("color", "color, seen", "complex, action", ...), of the official `*_val*.txt` files.

    ValueError where there are none.
    """
    found: dict[str, list[str]] = {}
    for file in sorted(directory.glob("*_val*.txt")):
        category, _, split = file.stem.partition("_val")
        name = ", ".join(filter(None, (category, split.strip("_"))))
        for prompt in _lines(file):
            parts = found.setdefault(prompt, [])
            parts += [part for part in dict.fromkeys((category, name)) if part not in parts]
    if not found:
        raise ValueError(f"{directory} holds none of T2I-CompBench's *_val.txt files")
    return found


def read_list_of(directory: Path, prompts: Collection[str], *, category: str | None = None) -> tuple[str, list[str]]:
    """The category that all these prompts are of, any if none is given, and its whole list; ValueError where there is none."""
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
    """What an official scorer's result (layouts.RESULTS) is, of a prompt that counts in `parts`.

    CLIP's has one name, and is of the words without adjectives for the complex set.
    """
    return "clip_without_adjectives" if measure == "clip" and "complex" in parts else measure


def is_measured(parts: Sequence[str], measure: str) -> bool:
    """Whether images of a prompt that counts in `parts` are measured by it."""
    return any(measure in MEASURES.get(part, ()) for part in parts)


def tokenize(judge: referees.Judge, phrase: str) -> dict[str, np.ndarray]:
    """The question about a phrase, `input_ids, mask [T]`. The official scorer cuts a long one, but for its last token."""
    length = min(QUESTION, judge.length)
    how = {"padding": "max_length", "padding_side": "right", "max_length": length, "truncation": True}
    ids = np.array(judge.tokenizer(judge.text(phrase), **how)["input_ids"], np.int32)
    return {"input_ids": ids, "mask": ids != judge.tokenizer.pad_token_id}


def blip_vqa(
    scorer: scorer_lib.Scorer, images: Sequence[PIL.Image.Image], phrases: Sequence[Sequence[str]]
) -> list[dict[str, float]]:
    """BLIP-VQA of images, each with the noun phrases of its prompt: `blip_vqa` and each question's probability.

    An image whose prompt has no phrase scores 1, as in the official code: no question, no doubt.
    """
    asked = [list(own) or ["picture"] for own in phrases]
    found = []
    for own, scores in zip(phrases, scorer(images, asked), strict=True):
        sure = {phrase: round(score["vqa_probability"], DIGITS) for phrase, score in zip(own, scores, strict=False)}
        found.append({"blip_vqa": math.prod(sure[phrase] for phrase in own), "questions": sure})
    return found


def three_in_one(parts: Sequence[str], scores: Mapping[str, float]) -> float | None:
    """The 3-in-1 of one image whose prompt counts in `parts`; None where the prompt is not complex, or a part is not there."""
    kinds = [kind for kind in KINDS if f"complex, {kind}" in parts]
    found = [scores.get(name) for kind in kinds for name in KINDS[kind]]
    return None if not found or None in found else sum(found) / len(found)
