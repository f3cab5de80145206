"""Means over a benchmark, with what is known of them: bootstrap intervals over prompts, and tables."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000


class Mean(NamedTuple):
    """A mean with its 95 % interval, and of how many prompts and images it is."""

    mean: float
    low: float
    high: float
    prompts: int
    images: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.2f}..{self.high:.2f})"


def mean(values: Iterable[tuple[Hashable, float]]) -> Mean:
    """The mean over images of `(prompt, value)` pairs; prompts are drawn with replacement, all images of one together.

    NaN throughout where there are none.
    """
    return mean_of_means([values])


def mean_of_means(groups: Sequence[Iterable[tuple[Hashable, float]]]) -> Mean:
    """The mean of the means of several groups (GenEval's overall score, of its tags), whatever their sizes.

    Prompts are drawn within their group: how many it has is no chance.
    """
    counted = []
    for values in groups:
        by_prompt: dict[Hashable, list[float]] = {}
        for prompt, value in values:
            by_prompt.setdefault(prompt, []).append(float(value))
        counted.append([np.array([kind(own) for own in by_prompt.values()], float) for kind in (sum, len)])
    if not all(len(sums) for sums, _ in counted):
        return Mean(np.nan, np.nan, np.nan, 0, 0)
    middle = np.mean([sums.sum() / counts.sum() for sums, counts in counted])
    drawn = [(sums, counts, resamples(len(sums), n)) for n, (sums, counts) in enumerate(counted)]
    low, high = np.percentile(
        np.mean([sums[picked].sum(1) / counts[picked].sum(1) for sums, counts, picked in drawn], 0), [2.5, 97.5]
    )
    prompts, images = sum(len(sums) for sums, _ in counted), sum(counts.sum() for _, counts in counted)
    return Mean(float(middle), float(low), float(high), prompts, int(images))


def resamples(count: int, seed: int = 0) -> np.ndarray:
    """The bootstrap's draws with replacement of `count` things, int `[DRAWS, count]`; always the same ones for a `seed`."""
    return np.random.default_rng(seed).integers(count, size=(DRAWS, count))
