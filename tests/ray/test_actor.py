"""An actor without a cluster: what becomes of rows, whatever the device does."""

import dataclasses
import json

import jax
import pytest

from referee_jax import items as items_lib
from referee_jax.items import Row
from referee_jax.ray import rows as rows_lib
from referee_jax.ray import tables
from referee_jax.ray.actor import Actor
from referee_jax.ray.progress import Counts, line
from referee_jax.runs.prompt_file import Rejected
from tests import fakes, tiny

MEMORY = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: too much")
BROKEN = jax.errors.JaxRuntimeError("INTERNAL: the device is gone\nand more")


class Ended(BaseException):
    """The end of a process."""


class Engine(fakes.FakeInverter):
    """Fails at batches that `fails` says."""

    fails = staticmethod(lambda prompts: None)

    def advance(self, batch):
        if error := self.fails([item.prompt for item in batch.items]):
            raise error
        return super().advance(batch)


def actor(fails=lambda prompts: None, *, counts=None):
    """An actor, and its counts."""
    settings, counts = dataclasses.asdict(tiny.settings()), counts or Counts()

    def end(code):
        raise Ended(code)

    made = Actor(settings, types={}, load=Engine, tally=counts, end=end)
    made.engine.fails = fails
    return made, counts


def table(*prompts, rejected=()):
    """The rows of prompts."""
    kept = items_lib.Items([Row(prompt, prompt[:9].strip()) for prompt in prompts], 1)
    (found,) = rows_lib.tables((*rows_lib.of_items(kept, {}), *rows_lib.of_rejected(rejected)), 100)
    return found


def statuses(found):
    return {row["id"]: (row["status"], row["error"]) for row in found.to_pylist()}


def test_each_row_has_a_status():
    made, counts = actor(lambda prompts: ValueError("no\nmore") if "bad" in prompts else None)
    rejected = [Rejected("\ud800", "line 3 of a.txt", "half a character", {"kind": 1})]
    found = made(table("a", "bad", "broken", "too long", "e", rejected=rejected))
    assert statuses(found) == {
        "a": ("ok", None), "bad": ("failed", "ValueError: no"), "broken": ("nonfinite", None),
        "too long": ("refused", "99 tokens, the prior reads 77"), "e": ("ok", None),
        "refused-line_3_of_a_txt": ("refused", "half a character"),
    }  # fmt: skip
    assert counts.read() == {"ok": 2, "failed": 1, "nonfinite": 1, "refused": 2} and not counts.begun
    assert found.schema.names == list(tables.FIELDS)
    row = found.to_pylist()[0]
    assert row["image"]["path"] == "a.png" and json.loads(row["scores"]) == {"cosine": 0.5}
    assert found.to_pylist()[5]["prompt"] == "\\ud800"


def test_too_little_memory_halves_the_batch_for_good():
    made, _ = actor(lambda prompts: MEMORY if len(prompts) > 1 else None)
    assert {status for status, _ in statuses(made(table("a", "b", "c", "d"))).values()} == {"ok"}
    assert made.engine.batch_size == 1
    none, _ = actor(lambda prompts: MEMORY)
    reason = "the device's memory is too small even for a batch of one (--config.remat=full needs least)"
    assert statuses(none(table("a", "b"))) == {"a": ("failed", reason), "b": ("failed", reason)}


def test_a_broken_device_is_no_fault_of_rows():
    """Where not even the probe can be made the process ends; a batch of bad rows alone ends none."""
    made, _ = actor(lambda prompts: BROKEN)
    with pytest.raises(Ended, match="75"):
        made(table("a", "b"))
    made, _ = actor(lambda prompts: None if prompts == ["a photo"] else BROKEN)
    failed = "failed", "JaxRuntimeError: INTERNAL: the device is gone"
    assert statuses(made(table("a", "b"))) == {"a": failed, "b": failed}


def test_a_row_of_which_processes_die():
    """The third process makes the rows one by one, as does each after it; only the row at which two of these died is left."""
    counts, ended = Counts(), 0

    def dies(prompts):
        if "deadly" in prompts:
            raise Ended

    while True:
        made, _ = actor(dies, counts=counts)
        try:
            found = made(table("a", "deadly", "b"))
            break
        except Ended:
            ended += 1
    assert ended == 4 and statuses(found) == {
        "a": ("ok", None), "deadly": ("failed", "2 processes died of it"), "b": ("ok", None)
    }  # fmt: skip
    assert counts.read() == {"ok": 2, "failed": 1}


def test_progress():
    assert line({}, 10, 0.0) == "0/10 images"
    assert line({"ok": 3, "failed": 1}, 10, 0.5) == "4/10 images, 1 failed, 0.50 images/s, 12 s left"
