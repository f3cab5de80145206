"""The table of the shapes world: what is counted, what is not made twice."""

import json

import numpy as np

from referee_jax import config, inverter, queue
from referee_jax.benchmarks import methods, shapes
from referee_jax.shapes import world

SETTINGS = config.from_config({"samples": 2, "prompts": ("a red circle and a blue square",)})


class Engine:
    """Draws the prompt, but for every second sample, and counts what it is asked for."""

    batch_size = 4

    def __init__(self):
        self.asked = []

    def make(self, engine, texts, samples, seed):
        """As the rows of methods.ROWS."""
        self.asked += texts
        items = queue.items(texts, samples)
        images = []
        for item in items:
            things = world.parse(item.prompt).things[: 1 if item.sample else None]
            objects = tuple(
                world.Object(thing.shape, thing.colour or "red", x=18 + 28 * n, radius=10)
                for n, thing in enumerate(things)
            )
            images.append(world.draw(world.Scene(objects))[0].astype(np.float32))
        scores = [{"held_out_0_probability": 0.25 + 0.5 * (item.sample == 0)} for item in items]
        return inverter.Result(items, np.stack(images), scores, np.zeros((len(items), 2)), {})


def measured(engine, out, category="colour", split="seen", limit=3):
    return methods.measure("a row", category, split, SETTINGS, engine.make, out, lambda settings: engine, limit=limit)


def test_records_are_kept_and_not_made_again(tmp_path):
    engine = Engine()
    first = measured(engine, tmp_path, limit=2)
    assert engine.asked == shapes.prompts("colour", "seen")[:2]
    assert [record["right"] for record in first] == [True, False] * 2
    more = measured(engine, tmp_path, limit=3)
    assert engine.asked == shapes.prompts("colour", "seen")[:3] and more[:4] == first and len(more) == 6
    lines = (tmp_path / "a_row-colour-seen.jsonl").read_text().splitlines()
    assert list(map(json.loads, lines)) == more
    assert all((tmp_path / record["file"]).is_file() for record in more)


def test_table(tmp_path):
    records = {("a row", "colour", split): measured(Engine(), tmp_path, split=split) for split in shapes.SPLITS}
    lines = methods.table(records).splitlines()
    assert len(lines) == 3
    # Every prompt has one right picture of two, so that there is no doubt about the mean over prompts.
    half, (quality, sure) = "0.500 (0.50..0.50)", lines[2].rstrip(" |").split(" | ")[4:]
    assert lines[2].startswith(f"| a row | {half} | {half} | {half} |")
    assert float(quality) > 35 and sure == "0.50"
    records["a row", "shape", "seen"] = measured(Engine(), tmp_path, "shape")
    *_, colour, shape = methods.table(records).splitlines()
    assert colour.startswith("| colour: a row |") and shape.startswith(f"| shape: a row | {half} | - | {half} |")
