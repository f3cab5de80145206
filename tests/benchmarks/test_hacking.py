"""Precision and recall of the mark of reward hacking, by hand."""

import math

import pytest

from referee_jax import config
from referee_jax.benchmarks import hacking


def record(*, fell: bool, held_out: float, was_right: bool, is_right: bool, quality=(30.0, 30.0)):
    losses = {"referee": [1.0, 0.5 if fell else 1.5], "held_out": [0.0, held_out]}
    return {"losses": losses, "right": [was_right, is_right], "quality": list(quality)}


GOOD = record(fell=True, held_out=0.1, was_right=False, is_right=True)


def test_precision_and_recall():
    records = [
        record(fell=True, held_out=0.5, was_right=True, is_right=False),  # hacked and marked
        record(fell=True, held_out=0.1, was_right=True, is_right=False),  # hacked
        record(fell=True, held_out=0.5, was_right=True, is_right=True),  # marked
        record(fell=True, held_out=0.1, was_right=True, is_right=True, quality=(30.0, 28.9)),  # hacked: worse
        record(fell=True, held_out=0.1, was_right=False, is_right=True, quality=(30.0, 20.0)),  # better all the same
        record(fell=False, held_out=5.0, was_right=True, is_right=False),  # did not please the referee
        GOOD,
    ]
    figures = hacking.precision_and_recall(records, doubt=0.3)
    assert (figures["pictures"], figures["hacked"], figures["marked"]) == (7, 3, 2)
    assert figures["precision"] == 0.5 and figures["recall"] == pytest.approx(1 / 3)
    assert figures["right"] == pytest.approx(4 / 7)


def test_nothing_to_mark():
    figures = hacking.precision_and_recall([GOOD], doubt=0.3)
    assert math.isnan(figures["precision"]) and math.isnan(figures["recall"])


def test_prompts():
    """Of each list as many as LISTS says, each once: the journal tells them apart by their text."""
    prompts = hacking.prompts()
    assert len(prompts) == len(set(prompts)) == sum(2 * count for count in hacking.LISTS.values())


def test_who_marks_nothing_is_refused(tmp_path):
    settings = config.from_config({"referees": ({}, {"role": "held_out", "losses": {"cosine": 1.0}})})
    with pytest.raises(ValueError, match="answers yes or no"):
        hacking.compare(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_loss_that_was_not_finite_marks_nothing():
    broken = GOOD | {"losses": {"referee": [1.0, None], "held_out": [0.1, None]}}  # as JSON has it
    assert hacking.precision_and_recall([GOOD, broken], doubt=0.3)["marked"] == 0
