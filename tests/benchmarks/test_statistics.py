"""Means and intervals, by hand and by what is known of them."""

import numpy as np
import pytest
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
