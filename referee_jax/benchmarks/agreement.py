"""How far scores of pictures agree with the ground truth, and by which pictures they are fooled."""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import scipy.stats

from referee_jax import console
from referee_jax.benchmarks import statistics


class Agreement(NamedTuple):
    """Of one score, over pictures some of which are right.

    Attributes:
        rank_correlation: Spearman's, between the score and whether the picture is right, with its 95 % interval.
        auroc: the share of pairs of a right and a wrong picture that the score puts in that order; ties count half.
        same_prompt: the same of pairs made for one prompt, where there are some, which is what a choice among samples asks.
    """

    rank_correlation: float
    low: float
    high: float
    auroc: float
    same_prompt: float
    pictures: int


def measure(prompts: Sequence[Hashable], scores: Sequence[float], right: Sequence[bool]) -> Agreement:
    """The agreement of `scores` (higher is better) with `right`, `[picture]` each; the interval is a bootstrap over prompts.

    Not a number where all pictures are right, or none is.
    """
    scores, right = np.asarray(scores, float), np.asarray(right, bool)
    rows: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(row)
    own = [np.array(x) for x in rows.values()]
    drawn = []
    for numbers in statistics.resamples(len(own)):
        picked = np.concatenate([own[i] for i in numbers])
        drawn.append(_correlation(scores[picked], right[picked]))
    low, high = np.nanpercentile(drawn, [2.5, 97.5]) if np.isfinite(drawn).any() else (np.nan, np.nan)
    within = np.array([_pairs(scores[x], right[x]) for x in own]).sum(0)
    first = _pairs(scores, right)
    share = lambda won, of: float(won / of) if of else np.nan
    return Agreement(_correlation(scores, right), float(low), float(high), share(*first), share(*within), len(scores))


def fooled(scores: Sequence[float], right: Sequence[bool], count: int) -> list[int]:
    """The numbers of the `count` wrong pictures with the highest scores, the highest first."""
    return sorted(np.flatnonzero(~np.asarray(right, bool)).tolist(), key=lambda row: -scores[row])[:count]


def _correlation(scores: np.ndarray, right: np.ndarray) -> float:
    if right.all() or not right.any() or np.ptp(scores) == 0:
        return np.nan
    ranks = scipy.stats.rankdata(scores)
    return float(np.corrcoef(ranks, right)[0, 1])  # ranks of what is 0 or 1 are a line of it


def _pairs(scores: np.ndarray, right: np.ndarray) -> tuple[float, int]:
    """Pairs of a right and a wrong picture in their order, and all such pairs."""
    wins = (scores[right][:, None] > scores[~right]) + 0.5 * (scores[right][:, None] == scores[~right])
    return float(wins.sum()), wins.size


def table(found: dict[str, Agreement]) -> str:
    """A row for each score, as Markdown."""
    cell = lambda x: "-" if np.isnan(x) else f"{x:.3f}"
    rows = {
        name: [
            f"{cell(x.rank_correlation)} ({cell(x.low)}..{cell(x.high)})",
            cell(x.auroc), cell(x.same_prompt), x.pictures,
        ]
        for name, x in found.items()
    }  # fmt: skip
    columns = ["score", "rank correlation with right", "right before wrong", "of one prompt", "images"]
    return console.markdown(columns, rows)
