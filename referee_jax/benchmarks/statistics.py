"""Means over a benchmark with bootstrap intervals over prompts."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2000  # bootstrap samples


class Mean(NamedTuple):
    """A mean with its 95 % interval `low`..`high`, and the numbers of prompts and images."""

    mean: float
    low: float
    high: float
    prompts: int
    images: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ({self.low:.2f}..{self.high:.2f})"


def mean(values: Iterable[tuple[Hashable, float]]) -> Mean:
    """The mean over images, of a `(prompt, value)` each; NaN if there are none.

    The bootstrap draws prompts, each with all of its images.
    """
    return mean_of_means([values])


def mean_of_means(groups: Sequence[Iterable[tuple[Hashable, float]]]) -> Mean:
    """The mean of the means of groups of any sizes, such as GenEval's overall score of its tags.

    The bootstrap draws prompts within their group, whose size is fixed.
    """
    totals = []
    for values in groups:
        by_prompt: dict[Hashable, list[float]] = {}
        for prompt, value in values:
            by_prompt.setdefault(prompt, []).append(float(value))
        totals.append([np.array([kind(x) for x in by_prompt.values()], float) for kind in (sum, len)])
    if not all(len(sums) for sums, _ in totals):
        return Mean(np.nan, np.nan, np.nan, 0, 0)
    average = np.mean([sums.sum() / counts.sum() for sums, counts in totals])
    samples = [(sums, counts, resamples(len(sums), n)) for n, (sums, counts) in enumerate(totals)]
    low, high = np.percentile(
        np.mean([sums[rows].sum(1) / counts[rows].sum(1) for sums, counts, rows in samples], 0), [2.5, 97.5]
    )
    prompts, images = sum(len(sums) for sums, _ in totals), sum(counts.sum() for _, counts in totals)
    return Mean(float(average), float(low), float(high), prompts, int(images))


def resamples(count: int, seed: int = 0) -> np.ndarray:
    """The bootstrap's indices, drawn with replacement from `count`, int `[DRAWS, count]`; fixed by `seed`."""
    return np.random.default_rng(seed).integers(count, size=(DRAWS, count))
