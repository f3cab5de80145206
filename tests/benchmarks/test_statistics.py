"""Means and intervals, by hand and by what is known of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    table = statistics.markdown(["method", "seen"], {"a": [statistics.mean([("p", 1)])], "b": ["-"]})
    assert table == "| method | seen |\n|---|---|\n| a | 1.000 (1.00..1.00) |\n| b | - |\n"
