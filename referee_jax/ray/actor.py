"""An actor: the networks on the chips that Ray gave a process, and batch after batch of rows made with them."""

import collections
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import pyarrow as pa

from referee_jax import config, console
from referee_jax import items as items_lib
from referee_jax.hardware import chips, compile_cache, devices
from referee_jax.items import Item
from referee_jax.ray import rows as rows_lib
from referee_jax.ray import tables
from referee_jax.runs import job, worker
from referee_jax.storage import writer

TRIES = 2  # processes that may die at a table of rows, and then at each row alone, before it is left
PROBE = items_lib.expand(
    ["a photo"], 1
)  # with which programs are compiled: whoever cannot make this has a broken device

Row = Mapping[str, Any]


class Tally(Protocol):
    """What all actors tell: see progress.Counts."""

    def begin(self, name: str) -> int:
        """Notes that a table or row of this name is begun; returns how often it was before."""

    def add(self, name: str, counts: Mapping[str, int]) -> None:
        """Notes how many rows of a table came to which status."""


class Actor:
    """Makes the images of tables of rows (rows.SCHEMA), and returns tables of tables.FIELDS.

    The constructor compiles, so that Ray gives rows to actors that are ready.

    Args:
        settings: as a dictionary; the config's own modules may not be importable where it was read.
        device: one of devices.KINDS.
        types: of the carried columns.
        load: returns the engine of settings.
        tally: is told what is begun and made.
        end: ends a process whose device is broken: Ray starts another and gives it the same rows.
    """

    def __init__(
        self,
        settings: Mapping[str, Any],
        *,
        device: str = "auto",
        types: Mapping[str, pa.DataType],
        load: job.Load = job.load_inverter,
        tally: Tally,
        end: Callable[[int], None] = os._exit,
    ):
        self.settings, self.types, self.tally, self.end = config.from_config(dict(settings)), types, tally, end
        if problem := compile_cache.use(devices.choose(device)):
            console.say(f"warning: {problem}", file=sys.stderr)
        self.engine = job.compiled(load(self.settings), self.settings)
        self.encoder = writer.Encoder(self.settings)

    def __call__(self, table: pa.Table) -> pa.Table:
        """The rows with their images, each with a status: ok, nonfinite, refused, or failed, the last two with a reason.

        Where processes have died at this table, its rows are made one by one, and those left at which they die again.
        """
        given, made = table.to_pylist(), {}
        name = f"table {given[0]['id']}"
        is_deadly = self.tally.begin(name) >= TRIES
        self.engine = self.engine.asking(rows_lib.questions_of(given))
        todo: dict[Item, Row] = {}
        for row in given:
            if reason := row["refused"] or self.engine.check(row["prompt"], row["negative"]):
                made[row["id"]] = self.result(row, status="refused", error=reason)
            elif is_deadly and self.tally.begin(row["id"]) >= TRIES:
                made[row["id"]] = self.result(row, status="failed", error=f"{TRIES} processes died of it")
            else:
                todo[rows_lib.item_of(row)] = row
                if is_deadly:
                    made |= self.attempt(todo)
                    self.tally.add(row["id"], {})
        made |= self.attempt(todo)
        results = [made[row["id"]] for row in given]
        self.tally.add(name, collections.Counter(result["status"] for result in results))
        return tables.table(results, self.types)

    def attempt(self, todo: dict[Item, Row]) -> dict[str, dict[str, Any]]:
        """Takes all items out of `todo`, and returns what becomes of them, by id."""
        made = {}
        while todo:  # by the batch size of now, which may shrink
            part = [(item, todo.pop(item)) for item in list(todo)[: self.engine.batch_size]]
            results = self.make([item for item, _ in part])
            made |= {row["id"]: self.result(row, **results[item]) for item, row in part}
        return made

    def result(self, row: Row, **values: Any) -> dict[str, Any]:
        """A row of the output."""
        seed = self.settings.seed if row["seed"] is None else row["seed"]
        given = {name: row[name] for name in ("id", "prompt", "sample", "negative")}
        return {**given, "seed": seed, "columns": json.loads(row["columns"]), **values}

    def make(self, items: Sequence[Item]) -> dict[Item, dict[str, Any]]:
        """What becomes of each item of a batch. Where the batch fails each is tried alone, in a batch of the same size."""
        try:
            return self.iterate(items)
        except Exception as error:  # of whatever kind: one row must not stop a million others
            if chips.is_out_of_memory(error):
                return self.make_smaller(items, error)
        results: dict[Item, dict[str, Any]] = {}
        for item in items:
            try:
                results |= self.iterate([item])
            except Exception as error:
                results[item] = {
                    "status": "failed",
                    "error": f"{type(error).__name__}: {console.first_line(error)[:500]}",
                }
        if all(result["status"] == "failed" for result in results.values()):
            self.check_device()
        return results

    def make_smaller(self, items: Sequence[Item], error: Exception) -> dict[Item, dict[str, Any]]:
        """The same in batches of half the size, also from now on; all failed where that is none."""
        try:
            self.engine = worker.halved(self.engine, error)
        except Exception:
            reason = "the device's memory is too small even for a batch of one (--config.remat=full needs least)"
            return {item: {"status": "failed", "error": reason} for item in items}
        results = {}
        for part in items_lib.batches(items, self.engine.batch_size):
            results |= self.make(part)
        return results

    def check_device(self) -> None:
        """Ends the process where its device cannot make anything any more: rows are not to blame for that."""
        try:
            self.iterate(PROBE)
        except Exception as error:
            console.say(f"error: the device failed: {console.first_line(error)[:300]}; ending", file=sys.stderr)
            self.end(os.EX_TEMPFAIL)

    def iterate(self, items: Sequence[Item]) -> dict[Item, dict[str, Any]]:
        """Makes a batch, or what of it there is; padded by the engine."""
        start = time.monotonic()
        batch = self.engine.begin(items, self.settings.seed)
        while batch.step < self.engine.steps:
            batch, _ = self.engine.advance(batch)
        pictures = self.engine.finish(batch)
        seconds = round((time.monotonic() - start) / len(items), 3)
        return {item: self.encode(picture, seconds) for item, picture in zip(items, pictures, strict=True)}

    def encode(self, picture: writer.Picture, seconds: float) -> dict[str, Any]:
        """What becomes of a picture; its file is the one that a run writes."""
        record = self.encoder.record(picture)
        data = self.encoder.image(picture, self.encoder.chunk(record))
        return {
            "status": "ok" if record["status"] == "done" else record["status"],
            "seconds": seconds,
            "scores": record["scores"],
            "record": record,
            "image": {"bytes": data, "path": f"{record['id']}.{writer.ending(self.settings.outputs)}"},
        }
