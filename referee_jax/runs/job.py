"""A job: a command executed in its run directory."""

import contextlib
import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax

from referee_jax import config, console
from referee_jax import items as items_lib
from referee_jax.console import say
from referee_jax.engine import builders, inverter
from referee_jax.hardware import chips, compile_cache, processes
from referee_jax.items import Item
from referee_jax.referees.questions import YES, Atom, atoms
from referee_jax.runs import metric_writers, prompt_file, recovery, worker
from referee_jax.runs import work as work_lib
from referee_jax.runs.command import Command, CommandError
from referee_jax.runs.prompt_file import Rejected
from referee_jax.storage import checkpoints as checkpoints_lib
from referee_jax.storage import gallery_page, run_directory
from referee_jax.weights import hub

SHOWN_REJECTED = 20
SHOWN_IDS = 5

Load = Callable[[config.Settings], worker.Engine]


@dataclasses.dataclass(frozen=True)
class Todo:
    """The missing images of a process, by how often the device failed at them."""

    new: Collection[Item] = ()  # never
    again: Sequence[Item] = ()  # once: made last
    failed: Sequence[Item] = ()  # twice: left out

    @property
    def items(self) -> Iterator[Item]:
        """What is to be made."""
        return itertools.chain(self.new, self.again)

    @property
    def texts(self) -> list[items_lib.Texts]:
        """Prompts and negative prompts of what is to be made."""
        new = self.new.texts if isinstance(self.new, items_lib.Missing) else [item.texts for item in self.new]
        return list(dict.fromkeys([*new, *(item.texts for item in self.again)]))

    @property
    def count(self) -> int:
        """How many are to be made."""
        return len(self.new) + len(self.again)

    def without(self, texts: Collection[items_lib.Texts]) -> "Todo":
        """Returns this without the items of some texts."""
        keep = lambda items: [item for item in items if item.texts not in texts]
        new = self.new.without(texts) if isinstance(self.new, items_lib.Missing) else keep(self.new)
        return dataclasses.replace(self, new=new, again=keep(self.again))


def select(items: Collection[Item], done: Collection[str], failures: recovery.Failures) -> Todo:
    """Sorts the items that are not done."""
    tried = {name for name, count in failures.counts.items() if count} - set(done)
    groups = [], []
    for item in items_lib.named(items, tried):
        groups[failures.counts[item.id] >= recovery.TRIES].append(item)
    return Todo(items_lib.missing(items, tried.union(done)), *groups)


def load_inverter(settings: config.Settings) -> worker.Engine:
    """Loads the networks of a config."""
    return inverter.Inverter.from_config(settings)


def execute(command: Command, *, load: Load = load_inverter, stop: worker.Stop | None = None) -> int:
    """Executes a command and returns the exit code; `load` returns the engine.

    Raises the errors that run.main explains.
    """
    if not command.entries:
        raise CommandError("there are no prompts; give --prompts=FILE, --prompt=TEXT or config.prompts")
    rows, rejected = prompt_file.sift(command.entries)
    if not rows:
        raise CommandError(f"no prompt can be used; {rejected[0]}")
    device = f"{jax.local_devices()[0].device_kind} x {jax.local_device_count()}"
    run = run_directory.RunDirectory.open(
        command.workdir, command.settings, device=device, process=command.shard_index, resume=command.resume
    )
    with contextlib.closing(run.storage), contextlib.ExitStack() as stack:
        stack.callback(metric_writers.attach(run, command.writers))
        return make_images(command, run, rows, rejected, load, stop or worker.Stop())


def make_images(
    command: Command,
    run: run_directory.RunDirectory,
    rows: Sequence[items_lib.Row],
    rejected: Sequence[Rejected],
    load: Load,
    stop: worker.Stop,
) -> int:
    """Makes all images of this process and returns the exit code.

    Args:
        command: the command.
        run: its run directory.
        rows: the prompts.
        rejected: prompts that are left out.
        load: returns the engine.
        stop: the stop request.
    """
    start = time.monotonic()
    report_rejected(run, rejected)
    done, made = run.done(), worker.Made()
    items = items_lib.Items(rows, command.settings.samples)
    share = items_lib.share(items, command.shard_index, command.shard_count)
    missing = len(items_lib.missing(items, done))  # of all processes, which write to the same disk
    todo = select(share, done, recovery.Failures.read(run))
    questions = check_questions(run, prompt_file.questions(command.entries), command.resume)
    if count := len(share) - todo.count - len(todo.failed):
        say(f"{count} of {len(share)} images are there already")
    if todo.count:
        run.check_space(missing)
        check_weights(run, command.resume)
        engine = load_engine(run, load)
        if questions:
            engine = engine.asking(questions)
        reasons = unreadable(engine, todo.texts)
        unfit = [Rejected(prompt, "prompt", reason) for (prompt, _), reason in reasons.items()]
        report_rejected(run, unfit)
        rejected, todo = [*rejected, *unfit], todo.without(reasons)
        if not todo.count and not run.done():
            raise CommandError(f"no prompt can be used; {unfit[0]}")
        try:
            made = generate(fitted(engine, command, len(share), todo.count), run, todo, stop)
        except recovery.DeviceFailed as error:
            if stop():
                raise
            todo, made = after_failure(error, run, todo), error.made
    finish(run, made, len(rejected), time.monotonic() - start)
    # Other processes may have made some.
    if failed := todo.failed and items_lib.missing(todo.failed, run.done()):
        recovery.log_failed(run, failed)
        text = f"the device failed twice at {len(failed)} images, which the same command tries again"
        return console.fail(1, f"{text}: {shorten([item.id for item in failed])}")
    return 0


def check_questions(
    run: run_directory.RunDirectory, questions: Mapping[str, Sequence[Atom]], resume: str
) -> Mapping[str, Sequence[Atom]]:
    """The users' questions that a referee asks. RunError where an image was made with others about its prompt."""
    if not any(spec.questions for spec in run.settings.referees):
        if questions:
            say(f"the questions of {len(questions)} prompts are not asked: no referee's setting questions is above 0")
        return {}
    for record in run.finished() if resume != "force" else ():
        for asked in record.get("questions", {}).values():
            before = [(x["question"], x.get("answer", YES)) for x in asked]
            now = [(atom.question, atom.answer) for atom in questions.get(record["text"]) or atoms(record["text"])]
            if before != now[: len(before)]:
                first = " ".join(before[0])
                raise run_directory.RunError(
                    f"{run.name} has an image of {record['text'][:60]!r} with other questions, {first!r}; choose another "
                    "--workdir, go on with these by --resume=force, or put those back"
                )
    return questions


def check_weights(run: run_directory.RunDirectory, resume: str) -> None:
    """Notes the digests of checkpoints that are directories. RunError for others than the run began with.

    Those of the hub are loaded by the commit that is noted.
    """
    digests = hub.versions(pair for pair in config.checkpoints(run.settings) if hub.is_local(pair[0]))
    noted = run.noted("weights")
    if changed := [name for name, digest in digests.items() if noted.get(name, digest) != digest]:
        if resume != "force" and run.is_bound():
            raise run_directory.RunError(
                f"{run.name} was begun with other files in {', '.join(changed)}; choose another --workdir, go on with these "
                "by --resume=force, or put those back"
            )
        run.log("weights", changed=changed)
    run.note("weights", digests, anew=True)


def load_engine(run: run_directory.RunDirectory, load: Load) -> worker.Engine:
    """Loads the engine, with the commits of checkpoints that the run began with."""
    settings = run.settings
    first = f"; a first look will be in {run.preview}" if run.preview and not run.done() else ""
    say(f"loading {settings.generator.checkpoint} and {len(settings.referees)} referees{first}")
    engine = load(config.pinned(settings, run.noted("commits")))
    note_checkpoints(run)
    return engine


def note_checkpoints(run: run_directory.RunDirectory) -> None:
    """Notes commits and licenses of checkpoints from the hub."""
    used = [(name, revision) for name, revision in config.checkpoints(run.settings) if not hub.is_embedded(name)]
    commits = {name: hub.commit(name, None) for name, revision in used if not revision}
    run.note("commits", {name: commit for name, commit in commits.items() if commit})
    licenses = {name: hub.license_of(name, revision or run.noted("commits").get(name)) for name, revision in used}
    run.note("licenses", {name: license for name, license in licenses.items() if license})


def unreadable(engine: worker.Engine, texts: Sequence[items_lib.Texts]) -> dict[items_lib.Texts, str]:
    """Which texts the networks cannot read, and why."""
    reasons = {pair: engine.check(*pair) for pair in texts}
    return {pair: reason for pair, reason in reasons.items() if reason}


def report_rejected(run: run_directory.RunDirectory, rejected: Sequence[Rejected]) -> None:
    """Logs the prompts that are left out, and prints the first ones."""
    for one in rejected:
        run.log("skipped", text=one.text, where=one.where, reason=one.reason)
    for one in rejected[:SHOWN_REJECTED]:
        say(f"skipped {one}", file=sys.stderr)
    if len(rejected) > SHOWN_REJECTED:
        say(f"... and {len(rejected) - SHOWN_REJECTED} more, see {run.log_file}", file=sys.stderr)


def fitted(engine: worker.Engine, command: Command, count: int, missing: int) -> worker.Engine:
    """Shrinks a batch to the `missing` of `count` images: padding takes time, too.

    A size that is set is shrunk to `count`, so that a command which goes on does so with the same programs.
    """
    size, groups = engine.settings.batch_size, engine.groups
    images = min(size * groups // command.split, count if command.settings.batch_size else missing)
    size = max(1, -(-images // groups))
    return engine if size == engine.settings.batch_size else engine.at_once(size)


def generate(engine: worker.Engine, run: run_directory.RunDirectory, todo: Todo, stop: worker.Stop) -> worker.Made:
    """Makes and writes all items of `todo`, new ones first.

    Raises what Worker.work raises.
    """
    checkpoints = in_flight(run)
    new = work_lib.Work(todo.new, checkpoints.begun(run.fingerprint))
    again = work_lib.Work(todo.again)  # from the start, in batches of their own
    if begun := sum(len(part.items) for part in new.begun):
        say(f"{begun} images go on where they were left")
    with console.shown(todo.count, engine.steps) as bar, run.writing() as writer:
        loop = worker.Worker(engine, worker.Saver(run, writer, checkpoints), bar, stop=stop)
        loop.work(new)
        loop.work(again)
    return loop.made


def after_failure(error: recovery.DeviceFailed, run: run_directory.RunDirectory, todo: Todo) -> Todo:
    """Returns what is left out if nothing else is left to make; else raises `error`."""
    failures = recovery.Failures.read(run)
    done = run.done()
    groups = [select(items, done, failures) for items in (todo.new, todo.again)]
    if not any(group.count for group in groups):
        return Todo(failed=[*todo.failed, *(item for group in groups for item in group.failed)])
    if failures.in_a_row >= recovery.IN_A_ROW:
        recovery.log_failed(
            run, [item for item in itertools.chain(todo.failed, todo.items) if failures.counts[item.id]]
        )
        error.is_given_up = True
    raise error


def in_flight(run: run_directory.RunDirectory) -> checkpoints_lib.Checkpoints:
    """The checkpoints of all processes."""
    run.storage.fetch_checkpoints()
    return checkpoints_lib.Checkpoints(run.path / "checkpoints")


def finish(run: run_directory.RunDirectory, made: worker.Made, skipped: int, seconds: float) -> None:
    """Merges the journals, draws contact sheet and gallery, and prints a summary."""
    in_flight(run).forget(run.done())
    run.remove_preview()
    run.merge()
    finished = run.finished()
    run.write_table(finished)
    sheet, page = run.contact_sheet(finished), gallery_page.write(run, finished)
    hacked = [record["id"] for record in finished if record.get("hacked")]
    if hacked:
        say(
            f"pleases the referees more than its start did, and the held-out ones doubt it ({len(hacked)} of "
            f'{len(finished)} images, "hacked" in {run.journal.name}): {shorten(hacked)}'
        )
    run.log(
        "end", host=processes.HOST, hacked=hacked, images=made.images, skipped=skipped, nonfinite=made.nonfinite,
        seconds=round(seconds, 1),
    )  # fmt: skip
    run.storage.send()
    files = f"{run.name}/{sheet.name} and {page.name}" if sheet and page else run.name
    broken = f" ({made.nonfinite} of them not finite)" if made.nonfinite else ""
    say(f"{made.images} images done{broken}, {skipped} prompts skipped, {seconds:.0f} s; see {files}")


def shorten(ids: Sequence[str]) -> str:
    """The first ids of a list, for a message."""
    return ", ".join(ids[:SHOWN_IDS]) + (", ..." if len(ids) > SHOWN_IDS else "")


def _run_each_phase(engine: worker.Engine, settings: config.Settings) -> None:
    """A chunk with and one without referees, and one with the evaluation by held-out referees, which few chunks have."""
    batch, last = engine.begin(items_lib.expand(["a photo"], 1), settings.seed), settings.steps - 1
    evaluation = min(settings.look_every - 1, last) if settings.look_every > settings.chunk else 0
    acts = builders.make_referee(settings, settings.referee)
    for step in sorted({0, min(acts.start, last), evaluation, last}):
        batch, _ = engine.advance(dataclasses.replace(batch, step=step))
    engine.finish(batch)


def compiled(engine: worker.Engine, settings: config.Settings) -> worker.Engine:
    """Compiles the programs of an engine; returns it, with a smaller batch where the memory was too small for that."""
    while True:
        try:
            worker.costs(engine)
            with engine.ahead():
                _run_each_phase(engine, settings)
            return engine
        except jax.errors.JaxRuntimeError as error:
            if not chips.is_out_of_memory(error):
                raise
            engine = worker.halved(engine, error)


def warm_up(command: Command, *, load: Load = load_inverter, **_: Any) -> int:
    """Compiles the programs of a run by running a chunk of one image in each phase; writes no run directory."""
    settings, start = command.settings, time.monotonic()
    engine = load(settings)
    rows, _ = prompt_file.sift(command.entries)
    if rows:
        share = items_lib.share(items_lib.Items(rows, settings.samples), command.shard_index, command.shard_count)
        engine = fitted(engine, command, len(share), len(share))
    say(engine.compiling)
    compiled(engine, settings)
    directory = compile_cache.directory()
    kept = f"kept in {directory}" if directory else "not kept: JAX_COMPILATION_CACHE_DIR names no directory"
    say(f"compiled in {time.monotonic() - start:.0f} s, some chunks of iterations included; {kept}")
    return 0
