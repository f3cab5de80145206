"""Means and intervals, by hand and by what is known of them."""

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from referee_jax import console
from referee_jax.benchmarks import statistics


def test_interval_is_of_prompts():
    found = statistics.mean((n, n < 30) for n in range(40) for _ in range(2))
    error = 1.96 * np.sqrt(0.75 * 0.25 / 40)  # the normal approximation, of 40 prompts and not of 80 pictures
    assert found.mean == 0.75 and (found.prompts, found.images) == (40, 80)
    assert found.low == pytest.approx(0.75 - error, abs=0.03) and found.high == pytest.approx(0.75 + error, abs=0.03)


def test_a_prompt_with_more_images_counts_more():
    found = statistics.mean([("a", 1.0), ("b", 0.0), ("b", 0.0), ("b", 0.0)])
    assert found[:3] == (0.25, 0.0, 1.0)


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(-10, 10)), min_size=1))
def test_the_mean_is_that_of_all_and_within(values):
    found = statistics.mean(values)
    numbers = [value for _, value in values]
    assert found.mean == pytest.approx(np.mean(numbers), abs=1e-9)
    assert min(numbers) - 1e-9 <= found.low <= found.high <= max(numbers) + 1e-9


def test_of_nothing():
    assert np.isnan(statistics.mean([])[:3]).all() and statistics.mean([])[3:] == (0, 0)


def test_markdown():
    table = console.markdown(["method", "seen"], {"a": [statistics.mean([("p", 1)])], "b": ["-"]})
    assert table == "| method | seen |\n|---|---|\n| a | 1.000 (1.00..1.00) |\n| b | - |\n"


def test_the_interval_of_a_mean_of_means():
    """Against the normal approximation, of prompts within groups of 40 and 160 prompts with two pictures each."""
    tags = [[(str(n), float(n % 4 == 0)) for n in range(size) for _ in range(2)] for size in (40, 160)]
    tags[1] = [(prompt, 1 - value) for prompt, value in tags[1]]
    found = statistics.mean_of_means(tags)
    error = 1.96 * 0.5 * np.sqrt(0.25 * 0.75 * (1 / 40 + 1 / 160))
    assert found.mean == 0.5 and (found.prompts, found.images) == (200, 400)
    assert (found.low, found.high) == pytest.approx((0.5 - error, 0.5 + error), abs=0.01)
    # Between the groups nothing is drawn, and a single one is the mean that others are.
    constant = statistics.mean_of_means([[("a", 1.0), ("b", 1.0)], [("c", 0.0)]])
    assert constant[:3] == (0.5, 0.5, 0.5)
    assert statistics.mean_of_means(tags[:1]) == statistics.mean(tags[0])


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    right = rng.random(60) < 0.4
    scores = np.round(right + rng.normal(size=60), 1)  # with ties
    found = statistics.agreement(np.arange(60) // 2, scores, right)
    assert found.rank_correlation == pytest.approx(scipy.stats.spearmanr(scores, right)[0], abs=1e-12)
    assert found.low < found.rank_correlation < found.high and found.pictures == 60
    wins = scipy.stats.mannwhitneyu(scores[right], scores[~right]).statistic
    assert found.auroc == pytest.approx(wins / (right.sum() * (~right).sum()))


def test_pairs_of_one_prompt():
    """Prompt a: 0.2 right, 0.1 and 0.2 wrong: one and a half of two pairs; b has no pair of both kinds."""
    found = statistics.agreement("aaabb", [0.2, 0.1, 0.2, 0.9, 0.8], [True, False, False, False, False])
    assert found.same_prompt == pytest.approx(0.75) and found.auroc == pytest.approx(1.5 / 4)


def test_a_perfect_score_and_a_constant_one():
    right = [True, False, True, False]
    assert statistics.agreement("abcd", [3.0, 1.0, 4.0, 2.0], right).rank_correlation == pytest.approx(0.894, abs=1e-3)
    constant = statistics.agreement("abcd", [1.0] * 4, right)
    assert np.isnan(constant.rank_correlation) and constant.auroc == 0.5


@pytest.mark.parametrize("right", [[True, True], [False, False]])
def test_where_there_is_nothing_to_tell_apart(right):
    found = statistics.agreement("ab", [0.1, 0.2], right)
    assert np.isnan([found.rank_correlation, found.low, found.auroc, found.same_prompt]).all()
    assert (
        statistics.agreement_table({"clip_cosine": found}).splitlines()[-1] == "| clip_cosine | - (-..-) | - | - | 2 |"
    )


def test_fooled_are_the_wrong_ones_it_likes_best():
    assert statistics.fooled([0.5, 0.9, 0.7, 0.8], [True, False, False, True], 5) == [1, 2]
    assert statistics.fooled([0.5, 0.9, 0.7, 0.8], [False] * 4, 2) == [1, 3]
