"""Agreement of scores with the truth, against scipy and counting by hand."""

import numpy as np
import pytest
import scipy.stats

from referee_jax.benchmarks import agreement


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    right = rng.random(60) < 0.4
    scores = np.round(right + rng.normal(size=60), 1)  # with ties
    found = agreement.measure(np.arange(60) // 2, scores, right)
    assert found.rank_correlation == pytest.approx(scipy.stats.spearmanr(scores, right)[0], abs=1e-12)
    assert found.low < found.rank_correlation < found.high and found.pictures == 60
    wins = scipy.stats.mannwhitneyu(scores[right], scores[~right]).statistic
    assert found.auroc == pytest.approx(wins / (right.sum() * (~right).sum()))


def test_pairs_of_one_prompt():
    """Prompt a: 0.2 right, 0.1 and 0.2 wrong: one and a half of two pairs; b has no pair of both kinds."""
    found = agreement.measure("aaabb", [0.2, 0.1, 0.2, 0.9, 0.8], [True, False, False, False, False])
    assert found.same_prompt == pytest.approx(0.75) and found.auroc == pytest.approx(1.5 / 4)


def test_a_perfect_score_and_a_constant_one():
    right = [True, False, True, False]
    assert agreement.measure("abcd", [3.0, 1.0, 4.0, 2.0], right).rank_correlation == pytest.approx(0.894, abs=1e-3)
    constant = agreement.measure("abcd", [1.0] * 4, right)
    assert np.isnan(constant.rank_correlation) and constant.auroc == 0.5


@pytest.mark.parametrize("right", [[True, True], [False, False]])
def test_where_there_is_nothing_to_tell_apart(right):
    found = agreement.measure("ab", [0.1, 0.2], right)
    assert np.isnan([found.rank_correlation, found.low, found.auroc, found.same_prompt]).all()
    assert agreement.table({"clip_cosine": found}).splitlines()[-1] == "| clip_cosine | - (-..-) | - | - | 2 |"


def test_fooled_are_the_wrong_ones_it_likes_best():
    assert agreement.fooled([0.5, 0.9, 0.7, 0.8], [True, False, False, True], 5) == [1, 2]
    assert agreement.fooled([0.5, 0.9, 0.7, 0.8], [False] * 4, 2) == [1, 3]
