"""The driver: which rows are to be made, handed by Ray Data to a pool of actors, whose rows are written as they come.

What is done is what stands in the output. Ray's own checkpoint would keep a second list of that beside it, and reads its
input by tasks of its own, which hand one actor many batches at once.
"""

import collections
import contextlib
import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.data

from referee_jax import config, console
from referee_jax import items as items_lib
from referee_jax.hardware import devices
from referee_jax.ray import progress, tables
from referee_jax.ray import rows as rows_lib
from referee_jax.ray.actor import Actor
from referee_jax.ray.folder import Folder
from referee_jax.ray.sink import Sink
from referee_jax.runs import job, prompt_file
from referee_jax.runs.command import CommandError
from referee_jax.runs.prompt_columns import Entry
from referee_jax.storage import parquet, run_directory

CONFIG = "config.json"
# Where actors have all CPUs, writers that want one would wait for the last image, and all would be lost with the driver.
WRITERS = {"num_cpus": 0}


@dataclasses.dataclass(frozen=True)
class Pool:
    """What each actor gets, and how many there are.

    Attributes:
        least, most: actors; between these Ray starts and ends them as there is work and room.
        device: "cpu", "gpu" or "tpu".
        chips: of an actor: GPUs, or all of a TPU host.
        cpus: of an actor.
        rows: that an actor gets at once: a few batches.
    """

    least: int = 1
    most: int = 1
    device: str = "cpu"
    chips: int = 1
    cpus: float = 1.0
    rows: int = 32

    def resources(self) -> dict[str, Any]:
        """As Ray takes them."""
        kinds = {
            "cpu": {"runtime_env": {"env_vars": devices.KEEPING_FREED_MEMORY}},
            "gpu": {"num_gpus": self.chips},
            "tpu": {"resources": {"TPU": self.chips}},
        }
        return {"num_cpus": self.cpus, **kinds[self.device]}


def generate(
    settings: config.Settings,
    entries: Sequence[Entry],
    out: Folder,
    *,
    pool: Pool,
    layout: str = "parquet",
    part: int = 100,
    load: job.Load = job.load_inverter,
) -> dict[str, int]:
    """Makes all rows that do not stand in the output, and returns how many stand there, by status.

    Args:
        settings: of the images.
        entries: the prompts; what cannot be used is a row that says why.
        out: the output.
        pool: the actors.
        layout: "parquet" or "webdataset".
        part: rows of a file, at least, but for the last ones.
        load: returns the engine of settings, in an actor.

    Raises CommandError where the output is another's, and RayError where actors cannot begin.
    """
    begin(out, settings)
    kept, rejected = prompt_file.sift(entries)
    questions = prompt_file.questions(entries) if any(spec.questions for spec in settings.referees) else {}
    given = itertools.chain(
        rows_lib.of_items(items_lib.Items(kept, settings.samples), questions), rows_lib.of_rejected(rejected)
    )
    todo, done, total = [], tables.finished(out), 0
    for table in rows_lib.tables((row for row in given if row["id"] not in done), pool.rows):
        todo.append(table)
        total += table.num_rows
    if done:
        console.say(f"{len(done)} images are there already")
    if todo:
        types = carried([entry.columns for entry in entries])
        with quiet(), progress.shown(total) as tally:
            made = actors(settings, pool, types, load, tally)
            images = ray.data.from_arrow(todo).map_batches(Actor, **made)
            images.write_datasink(Sink(out, layout, part), ray_remote_args=WRITERS)
        done = tables.finished(out)
    return dict(sorted(collections.Counter(done.values()).items()))


def actors(
    settings: config.Settings, pool: Pool, types: Mapping[str, Any], load: job.Load, tally: progress.Tally
) -> dict[str, Any]:
    """The arguments of Dataset.map_batches."""
    return {
        "fn_constructor_args": (config.to_dict(settings),),
        "fn_constructor_kwargs": {"device": pool.device, "types": dict(types), "load": load, "tally": tally},
        "compute": ray.data.ActorPoolStrategy(min_size=pool.least, max_size=pool.most, max_tasks_in_flight_per_actor=2),
        "batch_format": "pyarrow",
        "batch_size": pool.rows,
        **pool.resources(),
    }


def carried(columns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The types of the tables' other columns. CommandError for one that the output has, too."""
    types = parquet.column_types(columns)
    if double := [name for name in types if name in tables.FIELDS]:
        raise CommandError(f"the table has a column {double[0]}, which the output has, too; rename it")
    return types


def begin(out: Folder, settings: config.Settings) -> None:
    """Notes the settings in the output. CommandError where it was begun with others."""
    found = config.fingerprint(settings)
    try:
        with out.open(CONFIG) as file:
            before = json.loads(file.read())
    except FileNotFoundError:
        record = {"fingerprint": found, "settings": config.to_dict(settings), "versions": run_directory.versions()}
        out.write(CONFIG, json.dumps(record, indent=2).encode() + b"\n")
        return
    if before["fingerprint"] != found:
        changes = config.diff(config.image_part(before["settings"]), config.image_settings(settings))
        raise CommandError(f"{out.name} was begun with other settings; choose another --out, or take back:\n{changes}")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Ray Data's own bars: they count blocks, and write over our lines."""
    context = ray.data.DataContext.get_current()
    before, context.enable_progress_bars = context.enable_progress_bars, False
    try:
        yield
    finally:
        context.enable_progress_bars = before
