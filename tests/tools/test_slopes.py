"""The slopes of the cost: what is varied, one small measurement, and the table."""

import dataclasses

import jax
import pytest

from referee_jax import config
from referee_jax.engine import capacity
from referee_jax.performance import abstract_networks, cost, flops
from tests.conftest import abstract_step
from tests.tools import slopes

SETTINGS = config.override(config.load("configs/shapes_clip.py"), {"views.augmentations": ("Af",)})


def work(settings):
    step = abstract_step(settings)
    fn, args = capacity.batched(capacity.one_step(step.plan), step, step.plan.latent, settings.batch_size)
    return flops.flops(fn, *args)


def test_more_of_anything_is_more_work():
    found = {}
    for axis, name, settings in slopes.variants(SETTINGS, 2, counts=(1, 3)):
        assert all(spec.role == "optimise" for spec in settings.referees)
        found.setdefault(axis, {})[name] = work(settings)
    assert {axis: list(rows) for axis, rows in found.items()} == {
        "views": ["1", "3"], "images at once": ["1", "3"],
        "referees": ["its own", "its own + blip_itm", "its own + blip_itm + blip2"],
    }  # fmt: skip
    for rows in found.values():
        assert sorted(rows.values()) == list(rows.values()) and len(set(rows.values())) == len(rows)
    assert found["images at once"]["3"] == 3 * found["images at once"]["1"]


def test_a_published_generator_has_published_referees():
    varied = list(slopes.variants(config.load("configs/paper.py"), 2))
    assert [name for axis, name, _ in varied if axis == "referees"] == [
        "its own", "its own + clip", "its own + clip + blip_itm",
    ]  # fmt: skip
    *_, (_, _, settings) = varied
    assert all(spec.checkpoint in abstract_networks.PUBLISHED for spec in settings.referees[1:])


@pytest.mark.slow  # as test_bench measures one
def test_a_row_is_measured(checkpoints):
    sd, judge = map(str, checkpoints)
    values = {
        "steps": 2, "chunk": 2, "image_size": 32, "generator": {"checkpoint": sd}, "views": {"count": 2, "keep": 2},
        "referees": ({"checkpoint": judge},), "batch_size": 2,
    }  # fmt: skip
    settings = config.from_config(values)
    row = slopes.measure("views", "2", settings, jax.devices()[0])
    assert row["seconds"] > 0 and row["flops"] == 2 * cost.estimate(dataclasses.replace(settings, remat="full")).step


def test_slopes_and_their_table():
    """Seconds that start at one and go with the operations, and some that do not go up."""
    rows = [{"axis": "views", "row": str(n), "flops": n * 1e9, "seconds": 1 + n} for n in (1, 2, 4)]
    rows += [{"axis": "referees", "row": str(n), "flops": n * 1e9, "seconds": 3 - n} for n in (1, 2)]
    found = slopes.slopes(rows)
    assert found["views"]["slope"] == pytest.approx(1e-9) and found["views"]["ratio"] == pytest.approx(4 / 5)
    assert found["views"]["monotone"] and not found["referees"]["monotone"]
    lines = slopes.table(rows).splitlines()
    assert "| views: 4 | 5000 | 4 | 0.8 |" in lines
    assert "| views | 1000 | 1250 | 0.80 | yes |" in lines and any(line.startswith("| referees |") for line in lines)
