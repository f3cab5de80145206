"""Makes images for prompts.

    python -m referee_jax.run --config=configs/shapes.py
    python -m referee_jax.run --config=configs/clip.py --prompts=prompts.txt --samples=4 --workdir=runs/mine

Any setting can be changed: --config.sds.guidance=20. The same command on the same run directory continues it, in the middle of
its images. Several processes may share one: --shard_index and --shard_count, or --claim for workers that come and go.
Exit codes: 0 done, 1 disk, memory or device failed, or nothing moved any more, 2 the command cannot be carried out, 130 or 143
interrupted.
"""

import collections
import contextlib
import dataclasses
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags, logging

from referee_jax import config, console, generation, prompts, queue, trouble
from referee_jax import items as items_lib
from referee_jax.console import say
from referee_jax.engine import inverter
from referee_jax.hardware import chips, compile_cache, devices, processes
from referee_jax.items import Item
from referee_jax.performance import cost
from referee_jax.runs import prompt_file
from referee_jax.runs.command import Command, CommandError, parse_flags, read_command
from referee_jax.runs.prompt_file import Rejected
from referee_jax.storage import bucket, gallery_page, run_directory
from referee_jax.storage import checkpoints as checkpoints_lib
from referee_jax.weights import convert, hub

SHOWN_REJECTED = 20
SIGNALS = (signal.SIGINT, signal.SIGTERM)
GRACE = 8.0  # seconds that a run has to finish its chunk and save when it is asked to end


def load_inverter(settings: config.Settings) -> Any:
    """The engine."""

    return inverter.Inverter.from_config(settings)


def execute(
    command: Command,
    *,
    load: Callable[[config.Settings], Any] = load_inverter,
    stop: generation.Stop | None = None,
    tried: trouble.Tried | None = None,
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
    with contextlib.closing(run.place):
        return carry_out(command, run, texts, rejected, load=load, stop=stop, tried=tried or trouble.Tried())


def carry_out(
    command: Command,
    run: run_directory.RunDirectory,
    texts: Sequence[str],
    rejected: list[Rejected],
    *,
    load: Callable[[config.Settings], Any],
    stop: generation.Stop | None,
    tried: trouble.Tried,
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
    made = generation.Made()
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
        made = generate(engine, run, missing, command, stop or generation.Stop(), failures)
    finish(run, made, len(rejected), time.monotonic() - start)
    if failed := items_lib.missing(failed, run.done()):  # another may have made them meanwhile
        run.log("failed", items=[item.id for item in failed])
        run.place.send()
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
    stop: generation.Stop,
    failures: Mapping[str, int],
) -> generation.Made:
    """Makes and writes all of `items`; in a pool of workers, those that no other makes.

    What was begun comes first, but for batches with `failures` of the device.
    """
    claims = run.place.claims(command.claim_expiry) if command.claim else None
    checkpoints = in_flight(run)
    left = [part for part in checkpoints.begun(run.fingerprint) if not any(failures.get(x.id) for x in part.items)]
    work = queue.Work(items, left, claims=claims, done=run.done)
    if begun := sum(len(part.items) for part in work.begun):
        say(f"{begun} images go on where they were left")
    try:
        with console.shown(len(items), engine.steps) as bar, run.writing() as writer:
            generator = generation.Generator(engine, run, writer, checkpoints, bar, stop=stop)
            generator.work(work)
    finally:
        if claims:
            with contextlib.suppress(OSError):  # they expire, and what went wrong before is what counts
                claims.close()
    return generator.made


def in_flight(run: run_directory.RunDirectory) -> checkpoints_lib.Checkpoints:
    """What any process has left in the middle."""
    run.place.fetch_checkpoints()
    return checkpoints_lib.Checkpoints(run.path / "checkpoints")


def finish(run: run_directory.RunDirectory, made: generation.Made, skipped: int, seconds: float) -> None:
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
    run.place.send()
    see = f"{run.name}/{sheet.name} and {page.name}" if sheet and page else run.name
    broken = f" ({made.nonfinite} of them not finite)" if made.nonfinite else ""
    say(f"{made.images} images done{broken}, {skipped} prompts skipped, {seconds:.0f} s; see {see}")


def estimate(command: Command, **_: Any) -> int:
    """Says what a command's config costs; loads and writes nothing."""

    say(cost.table(cost.estimate(command.settings), precision=command.settings.precision))
    return 0


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


# --- the program ------------------------------------------------------------------------------------------------------


def main(
    command: Command,
    *,
    load: Callable[[config.Settings], Any] = load_inverter,
    stop: generation.Stop | None = None,
    work: Callable[..., int] = execute,
    begin_anew: Callable[[trouble.Tried], int] | None = trouble.begin_anew,
) -> int:
    """Carries out a command by `work`; the exit code. What goes wrong is told in a sentence.

    Where the device fails, the command begins anew in a fresh process (`begin_anew`), unless it cannot (None).
    """
    keeps = f"the finished images are in {command.workdir}, and the same command continues"
    tried = trouble.Tried.read()
    try:
        return work(command, load=load, stop=stop, tried=tried)
    except trouble.DeviceFailed as error:
        if stop and stop.number:
            say(f"interrupted; {keeps}", file=sys.stderr)
            return 128 + stop.number
        tried = tried.after(error)
        if begin_anew is None:
            return console.fail(1, f"the device failed ({error.why}); {keeps}")
        if tried.in_a_row >= trouble.FAILURES:
            return console.fail(1, f"the device fails at whatever it is given ({error.why}); {keeps}")
        say(f"the device failed ({error.why}) at {len(error.items)} images; a fresh process goes on", file=sys.stderr)
        try:
            return begin_anew(tried)
        except OSError as why:
            return console.fail(1, f"no fresh process can be begun ({why}); {keeps}")
    except (
        CommandError,
        config.ConfigError,
        prompts.PromptError,
        run_directory.RunError,
        convert.WeightsError,
    ) as error:
        return console.fail(2, str(error))
    except KeyboardInterrupt:
        say(f"interrupted; {keeps}", file=sys.stderr)
        return 130
    except generation.Stopped as stopped:
        say(f"interrupted; {keeps}", file=sys.stderr)
        return 128 + stopped.number
    except OSError as error:
        return console.fail(1, f"{error}; {keeps}")
    except jax.errors.JaxRuntimeError as error:
        if chips.is_out_of_memory(error):
            return console.fail(
                1,
                f"the device's memory is too small even for --config.batch_size=1 (--config.remat=full needs least); {keeps}",
            )
        return console.fail(1, f"the device failed: {console.first_line(error)[:300]}; {keeps}")


def catch_signals(stop: generation.Stop) -> None:
    """SIGINT and SIGTERM ask the run to end; when GRACE is over, or a second one comes, it ends at once.

    Python runs its handlers between two lines of the main thread, and a compilation is one line: what must happen in time
    happens in a thread, which the wake-up descriptor tells at once.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    threading.Thread(target=_end, args=(reader, stop), daemon=True).start()


def _end(reader: int, stop: generation.Stop) -> None:
    number = 0
    while number not in SIGNALS:
        number = os.read(reader, 1)[0]
    stop.number = signal.Signals(number)
    # The kernel's, for when Python itself is ending and some thread does not let it.
    signal.setitimer(signal.ITIMER_REAL, GRACE + 1)
    say(f"{stop.number.name}: ending after this chunk, or in {GRACE:.0f} s", file=sys.stderr)
    select.select([reader], [], [], GRACE)
    os._exit(128 + number)  # nothing is ever half written, and what is in flight goes on from its last checkpoint


def _absl_flags(argv: list[str]) -> list[str]:
    try:
        return parse_flags(argv, flags.FLAGS)
    except CommandError as error:
        sys.exit(console.fail(2, str(error)))


def _absl_main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX tells of every kind of device that is not there
    stop = generation.Stop()
    catch_signals(stop)
    try:
        command = read_command(flags.FLAGS, argv[1:])
        devices.keep_freed_memory(command.device)
        if command.distributed:  # which must come before any device is looked at
            place = None if bucket.is_remote(command.workdir) else Path(command.workdir).expanduser()
            index, count = processes.join(command.shard_index, command.shard_count, place)
            command = dataclasses.replace(command, shard_index=index, shard_count=count)
        device = devices.choose(command.device)
    except (CommandError, config.ConfigError, prompts.PromptError, devices.DeviceError) as error:
        return console.fail(2, str(error))
    if problem := compile_cache.use(device):
        say(f"warning: {problem}", file=sys.stderr)
    work = estimate if flags.FLAGS.estimate else warm_up if flags.FLAGS.warmup else execute
    # JAX lets nobody join a job again, and what came through a pipe does not come twice.
    once = command.distributed or (flags.FLAGS.prompts and not Path(flags.FLAGS.prompts).is_file())
    return main(command, stop=stop, work=work, begin_anew=None if once else trouble.begin_anew)


if __name__ == "__main__":
    app.run(_absl_main, flags_parser=_absl_flags)
