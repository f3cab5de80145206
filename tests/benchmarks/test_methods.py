"""The table of the shapes world: what is counted, what is not made twice."""

import dataclasses
import json
import types

import numpy as np
import pytest
from PIL import Image

from referee_jax import config
from referee_jax import items as items_lib
from referee_jax.benchmarks import methods
from referee_jax.engine import inverter
from referee_jax.shapes import benchmark, world
from referee_jax.weights import hub

SETTINGS = config.override(config.load("shapes"), {"samples": 2, "prompts": ("a red circle and a blue square",)})


class Engine:
    """Draws the prompt, but for every second sample, and counts what it is asked for."""

    batch_size = 4

    def __init__(self):
        self.asked = []

    def make(self, engine, texts, samples, seed):
        """As the rows of methods.ROWS."""
        self.asked += texts
        items = items_lib.expand(texts, samples)
        images = []
        for item in items:
            things = world.parse(item.prompt).things[: 1 if item.sample else None]
            objects = tuple(
                world.Object(thing.shape, thing.colour or "red", x=18 + 28 * n, radius=10)
                for n, thing in enumerate(things)
            )
            images.append(world.draw(world.Scene(objects))[0].astype(np.float32))
        scores = [{"held_out_0/probability": 0.25 + 0.5 * (item.sample == 0)} for item in items]
        return inverter.Result(items, np.stack(images), scores, np.zeros((len(items), 2)), {})


def measured(engine, out, category="colour", split="seen", limit=3):
    return methods.measure("a row", category, split, SETTINGS, engine.make, out, lambda settings: engine, limit=limit)


def test_records_are_kept_and_not_made_again(tmp_path):
    engine = Engine()
    first = measured(engine, tmp_path, limit=2)
    assert engine.asked == benchmark.prompts("colour", "seen")[:2]
    assert [record["right"] for record in first] == [True, False] * 2
    more = measured(engine, tmp_path, limit=3)
    assert engine.asked == benchmark.prompts("colour", "seen")[:3] and more[:4] == first and len(more) == 6
    lines = (tmp_path / "a_row-colour-seen.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == more
    assert all((tmp_path / record["file"]).is_file() for record in more)


def test_only_what_is_asked_for_counts(tmp_path):
    """Not what an earlier command made besides, and nothing twice, also after half a line."""
    more = dataclasses.replace(SETTINGS, samples=3)
    first = measured(Engine(), tmp_path, limit=2)
    file = tmp_path / "a_row-colour-seen.jsonl"
    file.write_bytes(file.read_bytes() + b'{"prompt": "a r')
    engine = Engine()
    found = methods.measure("a row", "colour", "seen", more, engine.make, tmp_path, lambda settings: engine, limit=2)
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


def test_summary(tmp_path):
    records = {("a row", "colour", split): measured(Engine(), tmp_path, split=split) for split in benchmark.SPLITS}
    found = methods.summary(records)
    assert list(found) == ["a row"] and list(found["a row"]) == [
        "seen",
        "unseen",
        "both",
        "quality, dB",
        "held-out referee",
    ]
    # Every prompt has one right picture of two, so that there is no doubt about the mean over prompts.
    for name, images in (("seen", 6), ("unseen", 6), ("both", 12), ("held-out referee", 12)):
        assert found["a row"][name][:3] == (0.5, 0.5, 0.5) and found["a row"][name].images == images
    assert found["a row"]["quality, dB"].mean > 35
    records["a row", "shape", "seen"] = measured(Engine(), tmp_path, "shape")
    found = methods.summary(records)
    assert list(found) == ["colour: a row", "shape: a row"]
    assert found["shape: a row"]["seen"].mean == 0.5 and "unseen" not in found["shape: a row"]


def test_what_is_written(tmp_path, monkeypatch):
    """By the command, of a row that is there: table, CSV, figure."""
    monkeypatch.setattr(methods, "ROWS", {"a row": (lambda settings: settings, Engine().make)})
    monkeypatch.setattr(methods, "Engines", lambda: lambda settings: Engine())
    args = types.SimpleNamespace(
        config=config.read("shapes"), samples=2, out=str(tmp_path), rows=["a row"], category=["shape"], limit=3
    )
    printed = methods.compare(args)
    half = "0.500 (0.50..0.50)"
    assert printed.splitlines()[2].startswith(f"| a row | {half} | - | {half} | ")
    assert (tmp_path / "table.md").read_text() == printed
    assert (tmp_path / "table.csv").read_text().splitlines()[1] == "a row,seen,0.5,0.5,0.5,3,6"
    assert Image.open(tmp_path / "figure.png").size[0] > 500
