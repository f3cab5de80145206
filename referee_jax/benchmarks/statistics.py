"""Means over a benchmark, and how far scores agree with the truth, with bootstrap intervals over prompts."""

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from referee_jax import console

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


class Agreement(NamedTuple):
    """How well one score tells right pictures from wrong ones.

    Attributes:
        rank_correlation: Spearman's, of the score with whether the picture is right.
        low: lower end of its 95 % interval.
        high: upper end of its 95 % interval.
        auroc: area under the ROC curve; ties count half.
        same_prompt: AUROC within prompts, as in a choice among samples of one prompt.
        pictures: how many were scored.
    """

    rank_correlation: float
    low: float
    high: float
    auroc: float
    same_prompt: float
    pictures: int


def agreement(prompts: Sequence[Hashable], scores: Sequence[float], right: Sequence[bool]) -> Agreement:
    """The agreement of `scores` (higher is better) with `right`, `[picture]` each.

    The interval is a bootstrap over prompts. All numbers are NaN where all pictures are right, or none is.
    """
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    groups = [np.array(x) for x in rows.values()]
    correlations = []
    for numbers in resamples(len(groups)):
        sample = np.concatenate([groups[i] for i in numbers])
        correlations.append(_correlation(scores[sample], right[sample]))
    low, high = np.nanpercentile(correlations, [2.5, 97.5]) if np.isfinite(correlations).any() else (np.nan, np.nan)
    within = np.array([_pairs(scores[x], right[x]) for x in groups]).sum(0)
    overall = _pairs(scores, right)
    ratio = lambda wins, pairs: float(wins / pairs) if pairs else np.nan
    return Agreement(_correlation(scores, right), float(low), float(high), ratio(*overall), ratio(*within), len(scores))


def fooled(scores: Sequence[float], right: Sequence[bool], count: int) -> list[int]:
    """Indices of the `count` wrong pictures with the highest scores, highest first."""
    return sorted(np.flatnonzero(~np.asarray(right, bool)).tolist(), key=lambda row: -scores[row])[:count]


def _correlation(scores: np.ndarray, right: np.ndarray) -> float:
    if right.all() or not right.any() or np.ptp(scores) == 0:
        return np.nan
    ranks = scipy.stats.rankdata(scores)
    return float(np.corrcoef(ranks, right)[0, 1])  # ranks of zeros and ones are a linear function of them


def _pairs(scores: np.ndarray, right: np.ndarray) -> tuple[float, int]:
    """Pairs of a right and a wrong picture in the right order, ties half; and all such pairs."""
    wins = (scores[right][:, None] > scores[~right]) + 0.5 * (scores[right][:, None] == scores[~right])
    return float(wins.sum()), wins.size


def agreement_table(agreements: dict[str, Agreement]) -> str:
    """A row per score, as Markdown."""
    cell = lambda x: "-" if np.isnan(x) else f"{x:.3f}"
    rows = {
        name: [
            f"{cell(x.rank_correlation)} ({cell(x.low)}..{cell(x.high)})",
            cell(x.auroc), cell(x.same_prompt), x.pictures,
        ]
        for name, x in agreements.items()
    }  # fmt: skip
    columns = ["score", "rank correlation with right", "AUROC", "AUROC of one prompt", "images"]
    return console.markdown(columns, rows)
