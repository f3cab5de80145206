"""Means over a benchmark, with what is known of them: bootstrap intervals over prompts, and tables."""

from collections.abc import Hashable, Iterable, Mapping, Sequence
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
    by_prompt: dict[Hashable, list[float]] = {}
    for prompt, value in values:
        by_prompt.setdefault(prompt, []).append(float(value))
    if not by_prompt:
        return Mean(np.nan, np.nan, np.nan, 0, 0)
    sums, counts = (np.array([kind(own) for own in by_prompt.values()], float) for kind in (sum, len))
    picked = resamples(len(sums))
    low, high = np.percentile(sums[picked].sum(1) / counts[picked].sum(1), [2.5, 97.5])
    return Mean(float(sums.sum() / counts.sum()), float(low), float(high), len(sums), int(counts.sum()))


def resamples(count: int) -> np.ndarray:
    """The bootstrap's draws with replacement of `count` things, int `[DRAWS, count]`; always the same ones."""
    return np.random.default_rng(0).integers(count, size=(DRAWS, count))


def markdown(columns: Sequence[str], rows: Mapping[str, Sequence[object]]) -> str:
    """A table, one line per row: its name, then a cell for each of the other columns."""
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join([name, *map(str, cells)])} |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"
