"""A job: a command carried out in its run directory."""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from referee_jax import config, console
from referee_jax import items as items_lib
from referee_jax.console import say
from referee_jax.engine import inverter
from referee_jax.hardware import compile_cache
from referee_jax.items import Item
from referee_jax.runs import prompt_file, recovery, worker
from referee_jax.runs import work as work_lib
from referee_jax.runs.command import Command, CommandError
from referee_jax.runs.prompt_file import Rejected
from referee_jax.storage import checkpoints as checkpoints_lib
from referee_jax.storage import gallery_page, run_directory
from referee_jax.weights import hub

SHOWN_REJECTED = 20


def load_inverter(settings: config.Settings) -> Any:
    """The engine."""

    return inverter.Inverter.from_config(settings)


def execute(
    command: Command,
    *,
    load: Callable[[config.Settings], Any] = load_inverter,
    stop: worker.Stop | None = None,
    tried: recovery.Tried | None = None,
) -> int:
    """Carries out a command and returns the exit code; `load` gives the engine, and what was `tried` in vain is left out.

    Raises what `main` explains.
    """
    if not command.entries:
        raise CommandError("there are no prompts; give --prompts=FILE, --prompt=TEXT or config.prompts")
    texts, rejected = prompt_file.sift(command.entries)
    if not texts:
        raise CommandError(f"no prompt can be used; {rejected[0]}")
    device = f"{jax.local_devices()[0].device_kind} x {jax.local_device_count()}"
    # A fresh process finds what the one before it has begun.
    resume = "auto" if tried and tried.once and command.resume == "never" else command.resume
    run = run_directory.RunDirectory.open(
        command.workdir, command.settings, device=device, process=command.shard_index, resume=resume
    )
    with contextlib.closing(run.storage):
        return carry_out(command, run, texts, rejected, load=load, stop=stop, tried=tried or recovery.Tried())


def carry_out(
    command: Command,
    run: run_directory.RunDirectory,
    texts: Sequence[str],
    rejected: list[Rejected],
    *,
    load: Callable[[config.Settings], Any],
    stop: worker.Stop | None,
    tried: recovery.Tried,
) -> int:
    """`execute` in an open run directory."""
    settings, start = command.settings, time.monotonic()
    report_rejected(run, rejected)
    wanted = everything = items_lib.expand(texts, settings.samples)
    if not command.claim:
        wanted = items_lib.share(wanted, command.shard_index, command.shard_count)
    done = run.done()
    missing = items_lib.missing(wanted, done)
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} images are there already")
    failed = [item for item in missing if tried.says(item)]
    missing = [item for item in missing if not tried.says(item)]
    # A process of a job cannot begin anew: the launcher's next one leaves for last what the device failed at.
    failures = run.failures() if command.distributed else collections.Counter()
    missing.sort(key=lambda item: failures[item.id])
    made = worker.Made()
    if missing:
        run.check_space(len(items_lib.missing(everything, done)))  # the others write to the same disk
        say(f"loading {settings.generator.checkpoint} and {len(settings.referees)} referees")
        # What was begun with one state of a checkpoint goes on with it, whatever its owners do meanwhile.
        engine = load(config.pinned(settings, run.noted("commits")))
        note_checkpoints(run)
        refused = {item.prompt: engine.check(item.prompt) for item in missing}
        unfit = [Rejected(text, "prompt", reason) for text, reason in refused.items() if reason]
        report_rejected(run, unfit)
        rejected += unfit
        missing = [item for item in missing if not refused[item.prompt]]
        if not missing and not run.done():
            raise CommandError(f"no prompt can be used; {unfit[0]}")
        engine = fitted(engine, settings, len(missing))
        made = generate(engine, run, missing, command, stop or worker.Stop(), failures)
    finish(run, made, len(rejected), time.monotonic() - start)
    if failed := items_lib.missing(failed, run.done()):  # another may have made them meanwhile
        run.log("failed", items=[item.id for item in failed])
        run.storage.send()
        names = ", ".join(item.id for item in failed[:5]) + (", ..." if len(failed) > 5 else "")
        return console.fail(
            1, f"the device failed twice at {len(failed)} images, which the same command tries again: {names}"
        )
    return 0


def fitted(engine: Any, settings: config.Settings, count: int) -> Any:
    """The engine with batches of what it chose, but no more than `count` images: what is missing is computed as well."""
    if settings.batch_size:
        return engine
    return engine.at_once(max(1, min(engine.settings.batch_size, -(-count // engine.groups))))


def note_checkpoints(run: run_directory.RunDirectory) -> None:
    """Notes of what others made which state of it is used, and under which license."""
    used = [(name, revision) for name, revision in config.checkpoints(run.settings) if not hub.is_embedded(name)]
    run.note("commits", {name: x for name, revision in used if not revision and (x := hub.commit(name, None))})
    said = {name: hub.license_of(name, revision or run.noted("commits").get(name)) for name, revision in used}
    run.note("licenses", {name: license for name, license in said.items() if license})


def generate(
    engine: Any,
    run: run_directory.RunDirectory,
    items: Sequence[Item],
    command: Command,
    stop: worker.Stop,
    failures: Mapping[str, int],
) -> worker.Made:
    """Makes and writes all of `items`; in a pool of workers, those that no other makes.

    What was begun comes first, but for batches with `failures` of the device.
    """
    claims = run.storage.claims(command.claim_expiry) if command.claim else None
    checkpoints = in_flight(run)
    left = [part for part in checkpoints.begun(run.fingerprint) if not any(failures.get(x.id) for x in part.items)]
    work = work_lib.Work(items, left, claims=claims, done=run.done)
    if begun := sum(len(part.items) for part in work.begun):
        say(f"{begun} images go on where they were left")
    try:
        with console.shown(len(items), engine.steps) as bar, run.writing() as writer:
            generator = worker.Worker(engine, run, writer, checkpoints, bar, stop=stop)
            generator.work(work)
    finally:
        if claims:
            with contextlib.suppress(OSError):  # they expire, and what went wrong before is what counts
                claims.close()
    return generator.made


def in_flight(run: run_directory.RunDirectory) -> checkpoints_lib.Checkpoints:
    """What any process has left in the middle."""
    run.storage.fetch_checkpoints()
    return checkpoints_lib.Checkpoints(run.path / "checkpoints")


def finish(run: run_directory.RunDirectory, made: worker.Made, skipped: int, seconds: float) -> None:
    """Joins the journals, draws the contact sheet and the gallery, and tells what was done."""
    in_flight(run).forget(run.done())
    run.merge()  # whoever is last brings all together
    sheet, page = run.contact_sheet(), gallery_page.write(run)
    finished = run.finished()
    hacked = [record["id"] for record in finished if record.get("hacked")]
    if hacked:
        shown = ", ".join(hacked[:5]) + (", ..." if len(hacked) > 5 else "")
        say(
            f"pleases the referees more than its start did, and the held-out ones less ({len(hacked)} of "
            f'{len(finished)} images, "hacked" in {run.journal.name}): {shown}'
        )
    run.log(
        "end", hacked=hacked, images=made.images, skipped=skipped, nonfinite=made.nonfinite, seconds=round(seconds, 1)
    )
    run.storage.send()
    see = f"{run.name}/{sheet.name} and {page.name}" if sheet and page else run.name
    broken = f" ({made.nonfinite} of them not finite)" if made.nonfinite else ""
    say(f"{made.images} images done{broken}, {skipped} prompts skipped, {seconds:.0f} s; see {see}")


def warm_up(command: Command, *, load: Callable[[config.Settings], Any] = load_inverter, **_: Any) -> int:
    """Compiles what a run of the command needs, by a chunk of one image in each phase; writes no run directory."""
    settings, start = command.settings, time.monotonic()
    engine = load(settings)
    if command.entries:
        engine = fitted(engine, settings, len(command.entries) * settings.samples)
    say(engine.compiling)
    batch = engine.begin(items_lib.expand(["a photo"], 1), settings.seed)
    last = settings.steps - 1
    # The referees are not asked in all iterations, and the held-out ones look in few.
    look = min(settings.look_every - 1, last) if settings.look_every > settings.chunk else 0
    for step in sorted({0, min(settings.referee.start, last), look, last}):
        batch, _ = engine.advance(dataclasses.replace(batch, step=step))
    engine.finish(batch)
    where = compile_cache.directory()
    kept = f"kept in {where}" if where else "not kept: JAX_COMPILATION_CACHE_DIR names no directory"
    say(f"compiled in {time.monotonic() - start:.0f} s, some chunks of iterations included; {kept}")
    return 0


def report_rejected(run: run_directory.RunDirectory, rejected: Sequence[Rejected]) -> None:
    """Notes the prompts that are left out in the log, and tells of the first ones."""
    for one in rejected:
        run.log("skipped", text=one.text, where=one.where, reason=one.reason)
    for one in rejected[:SHOWN_REJECTED]:
        say(f"skipped {one}", file=sys.stderr)
    if len(rejected) > SHOWN_REJECTED:
        say(f"... and {len(rejected) - SHOWN_REJECTED} more, see {run.log_file}", file=sys.stderr)
