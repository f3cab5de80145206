"""Curves of the shapes world: what is counted, who is whose opponent, what is not made twice."""

import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

from referee_jax import config
from referee_jax.benchmarks import methods
from referee_jax.engine import results
from referee_jax.performance import cost
from referee_jax.shapes import benchmark, world
from referee_jax.weights import hub

SETTINGS = config.override(config.load("shapes_clip"), {"samples": 2, "prompts": ("a red circle and a blue square",)})


class Engine:
    """Draws the prompt, but for every second sample, and counts what it is asked for; a batch is its items."""

    batch_size, steps = 4, 1

    def __init__(self, settings=SETTINGS):
        self.settings, self.asked = settings, []

    def begin(self, items, seed):
        self.asked += [item.prompt for item in items]
        return types.SimpleNamespace(items=items, step=0)

    def advance(self, batch):
        return types.SimpleNamespace(items=batch.items, step=1), {}

    def finish(self, batch):
        return list(map(self.picture, batch.items))

    def picture(self, item):
        things = world.parse(item.prompt).things[: 1 if item.sample % 2 else None]
        objects = [
            world.Object(thing.shape, thing.colour or "red", x=18 + 28 * n, radius=10) for n, thing in enumerate(things)
        ]
        image = world.draw(world.Scene(tuple(objects)))[0].astype(np.float32)
        losses = {"referee": (1.0, float(item.sample % 2)), "held_out": (1.0, 0.25)}
        return results.Picture(item, image, {}, np.zeros(2), losses=losses)


def measured(engine, out, category="colour", split="seen", limit=3, samples=2):
    settings = dataclasses.replace(SETTINGS, samples=samples)
    return methods.measure("a row", category, split, settings, out, lambda settings: engine, limit=limit)


def record(prompt, sample, right, loss):
    return {
        "prompt": prompt, "sample": sample, "right": right, "loss": loss, "choice": loss, "quality": 30.0, "held_out": None,
        "seconds": 2.0
    }  # fmt: skip


# Two prompts by four samples: the referees like the wrong one of the first pairs most, the right one of all.
SAMPLED = [
    record(prompt, n, right, loss)
    for prompt in ("a", "b")
    for n, (right, loss) in enumerate([(False, 0.2), (True, 0.3), (True, 0.1), (False, 0.4)])
]


def test_records_are_kept_and_not_made_again(tmp_path):
    engine = Engine()
    first = measured(engine, tmp_path, limit=2)
    assert list(dict.fromkeys(engine.asked)) == benchmark.prompts("colour", "seen")[:2]
    assert [record["right"] for record in first] == [True, False] * 2
    assert [record["loss"] for record in first] == [0, 1] * 2 and {record["held_out"] for record in first} == {0.25}
    more = measured(engine, tmp_path, limit=3)
    assert len(engine.asked) == 6 and more[:4] == first and len(more) == 6
    lines = (tmp_path / "a_row-colour-seen.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == more
    assert all((tmp_path / record["file"]).is_file() for record in more)


def test_only_what_is_asked_for_counts(tmp_path):
    """Not what an earlier command made besides, and nothing twice, also after half a line."""
    first = measured(Engine(), tmp_path, limit=2)
    file = tmp_path / "a_row-colour-seen.jsonl"
    file.write_bytes(file.read_bytes() + b'{"prompt": "a r')
    engine = Engine()
    found = measured(engine, tmp_path, limit=2, samples=3)
    assert [record["sample"] for record in found] == [0, 1, 2] * 2
    assert len(file.read_text().splitlines()) == 6 and measured(engine, tmp_path, limit=1) == first[:2]


def test_other_settings_and_weights_are_refused(tmp_path, monkeypatch):
    methods.keep(SETTINGS, tmp_path)
    methods.keep(dataclasses.replace(SETTINGS, samples=9), tmp_path)
    with pytest.raises(config.ConfigError, match="other settings; choose another --out\nsteps: "):
        methods.keep(dataclasses.replace(SETTINGS, steps=7), tmp_path)
    version = hub.version
    with monkeypatch.context() as patch:
        patch.setattr(
            hub, "version", lambda name, revision: "new" if name == "shapes/clip" else version(name, revision)
        )
        with pytest.raises(config.ConfigError, match='another --out\nweights.shapes/clip: "[0-9a-f]{16}" -> "new"'):
            methods.keep(SETTINGS, tmp_path)
    (tmp_path / "settings.json").rename(tmp_path / "a_row-colour-seen.jsonl")
    with pytest.raises(config.ConfigError, match="unknown settings"):
        methods.keep(SETTINGS, tmp_path)


def test_favourites():
    """Of groups in the order of the samples; what is left over counts for nothing."""
    samples = lambda count: [(record["prompt"], record["sample"]) for record in methods.favourites(SAMPLED, count)]
    assert samples(1) == [(prompt, n) for prompt in "ab" for n in range(4)]
    assert samples(2) == [("a", 0), ("a", 2), ("b", 0), ("b", 2)]
    assert samples(3) == [("a", 2), ("b", 2)] == samples(4) and samples(5) == []


def test_a_curve():
    curve = methods.points("sampling", 10.0, {"colour": SAMPLED})
    assert [(point.count, point.passes, point.seconds) for point in curve] == [(1, 10, 2), (2, 20, 4), (4, 40, 8)]
    assert [point.scores["all"].mean for point in curve] == [0.5, 0.5, 1.0]
    text, _ = methods.table({"sampling": curve}, {"colour": SAMPLED})
    assert [line.split(" | ")[3] for line in text.splitlines()[2:]] == ["0.25", "0.125", "0.125"]  # right a second
    blind = [{**record, "loss": None, "choice": None} for record in SAMPLED]
    assert [point.count for point in methods.points("a row", 10.0, {"colour": blind})] == [1]


@pytest.mark.parametrize(
    ("passes", "expected"), [(9.0, None), (10.0, 0.0), (25.0, 0.0), (30.0, -0.5), (49.0, -0.5), (50.0, None)]
)
def test_the_opponent_is_what_the_cost_pays_for(passes, expected):
    """Of 30 passes the best of three samples; below one and above all there is none."""
    curve = methods.points("sampling", 10.0, {"colour": SAMPLED})
    mine = [record(prompt, 0, prompt == "a", 0.0) for prompt in ("a", "b")]
    point = methods.Point("mine", 1, passes, 1.0, {"colour": mine})
    found = methods.gains(point, curve, {"colour": SAMPLED})
    assert found == {} if expected is None else found["gain"].mean == expected == found["gain, colour"].mean


def test_all_categories_count_the_same():
    parts = {"colour": [record("a", 0, True, 0.0)] * 3, "shape": [record("b", 0, False, 0.0)]}
    scores = methods.Point("mine", 1, 10.0, 1.0, parts).scores
    assert (scores["colour"].mean, scores["shape"].mean, scores["all"].mean) == (1.0, 0.0, 0.5)
    assert scores["loss"].mean == 0 and "held-out loss" not in scores


def test_who_is_fooled():
    """Whose referees are happier than with any sample of the cost, where no more are right."""
    curve = methods.points("sampling", 10.0, {"colour": SAMPLED})
    point = lambda right, loss, passes: methods.Point("mine", 1, passes, 1.0, {"colour": [record("a", 0, right, loss)]})
    assert methods.is_fooled(point(False, 0.0, 20.0), curve) and not methods.is_fooled(point(True, 0.0, 20.0), curve)
    assert not methods.is_fooled(point(False, 0.3, 20.0), curve) and not methods.is_fooled(
        point(False, 0.0, 5.0), curve
    )
    assert not methods.is_fooled(curve[1], curve)


def test_costs():
    """Of a guided step two passes, and what decodes and judges; of an iteration of eight steps three times sixteen."""
    unit = methods.one_pass(SETTINGS)
    passes = lambda row, steps: (
        cost.estimate(config.override(SETTINGS, methods.ROWS[row] | {"steps": steps})).image / unit
    )
    one, more = (passes(methods.SAMPLING, n) for n in (4, 9))
    assert more - one == pytest.approx(10, abs=0.01) and 8 < one < 16
    moved = [passes("noise, 5 iterations", n) for n in (1, 2)]
    assert 48 < moved[1] - moved[0] < 80


@pytest.mark.parametrize("row", methods.ROWS)
def test_every_row_is_possible(row):
    for name in ("shapes", "shapes_clip"):
        config.override(config.load(name), methods.ROWS[row])


def test_what_is_written(tmp_path, monkeypatch):
    """By the command, of two rows: tables, CSV, figure."""
    monkeypatch.setattr(methods, "ROWS", {"sampling": {}, "a row": {}})
    monkeypatch.setattr(methods, "Engines", lambda: Engine)
    monkeypatch.setattr(methods, "one_pass", lambda settings: 1.0)
    monkeypatch.setattr(cost, "estimate", lambda settings: types.SimpleNamespace(image=10.0))
    args = types.SimpleNamespace(
        config=config.read("shapes_clip"), samples=2, candidates=4, out=str(tmp_path), rows=None, category=["shape", "colour"],
        limit=3,
    )  # fmt: skip
    text = methods.compare(args)
    lines, gains = (
        part.splitlines() for part in text.split("\n\nMore right than of the best of as many samples as the same cost")
    )
    assert lines[0] == (
        "| method | passes | s | right a second | shape | colour | all | at equal cost | held-out loss | quality, dB |  |"
    )
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in lines[2:]}
    assert list(rows) == ["sampling", "a row", "sampling: best of 2", "a row: best of 2", "sampling: best of 4"]
    assert rows["a row"][3:7] == ["0.50", "0.50", "0.500 (0.50..0.50)", "0.000 (0.00..0.00)"]
    assert rows["sampling: best of 4"][3:7] == ["1.00", "1.00", "1.000 (1.00..1.00)", "-"]
    assert gains[2] == "| method | gain, shape | gain, colour | gain |"
    assert gains[4] == "| a row | 0.000 (0.00..0.00) | 0.000 (0.00..0.00) | 0.000 (0.00..0.00) |" and len(gains) == 6
    assert (tmp_path / "table.md").read_text() == text
    assert "a row,all,0.5,0.5,0.5," in (tmp_path / "table.csv").read_text()
    assert Image.open(tmp_path / "figure.png").size[0] > 500


def test_a_picture_without_a_loss_is_nobodys_favourite():
    """Where it was not finite; where none has a loss nothing is chosen."""
    losses = [None, 2.0, 1.0, None]
    some = [record("a", n, loss == 1.0, loss) | {"held_out": loss} for n, loss in enumerate(losses)]
    assert [x["loss"] for x in methods.favourites(some, 2)] == [2.0, 1.0]
    assert [point.count for point in methods.points("row", 10.0, {"colour": some})] == [1, 2, 4]
    none = [record("a", n, False, None) for n in range(4)]
    assert [point.count for point in methods.points("row", 10.0, {"colour": none})] == [1]
