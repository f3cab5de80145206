"""Makes images for prompts.

    python -m referee_jax.run --config=configs/shapes.py
    python -m referee_jax.run --config=configs/clip.py --prompts=prompts.txt --samples=4 --workdir=runs/mine

Any setting can be changed: --config.sds.guidance=20. The same command on the same run directory continues it.
Exit codes: 0 done, 1 disk or memory failed, 2 the command cannot be carried out, 130 or 143 interrupted.
"""

import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
import numpy as np
import tqdm
from absl import app, flags, logging
from ml_collections import config_flags

from referee_jax import config, outputs, prompts, queue
from referee_jax.weights import convert

SECONDS_BETWEEN_LINES = 30  # of progress, where it is not a terminal that reads it
SHOWN_REJECTED = 20
SHOWN_METRICS = 4


class CommandError(ValueError):
    """A command that cannot be carried out; one sentence."""


class Terminated(KeyboardInterrupt):
    """SIGTERM: stop as after Ctrl-C."""


@dataclasses.dataclass(frozen=True)
class Command:
    """What was asked for: settings, the prompts as they were given, and the run directory."""

    settings: config.Settings
    entries: tuple[prompts.Entry, ...]
    workdir: Path


# --- the command line -------------------------------------------------------------------------------------------------


def define_flags(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """The flags; overrides of the config are looked for in `argv`."""
    config_flags.DEFINE_config_file(
        "config", None, "file of settings, as configs/shapes.py", flag_values=values, sys_argv=list(argv)
    )
    flags.DEFINE_string("prompts", None, "text file of prompts, one per line", flag_values=values)
    flags.DEFINE_multi_string("prompt", [], "a prompt; may be repeated", flag_values=values)
    flags.DEFINE_integer("samples", None, "images per prompt; default: config.samples", flag_values=values)
    flags.DEFINE_integer("seed", None, "default: config.seed", flag_values=values)
    flags.DEFINE_string("workdir", None, "run directory; default: runs/<config>-<fingerprint>", flag_values=values)
    flags.DEFINE_bool("estimate", False, "say what the config costs, without any weights, and end", flag_values=values)
    flags.DEFINE_bool("warmup", False, "compile what a run needs, fill the compile cache, and end", flag_values=values)


def parse_flags(argv: Sequence[str], values: flags.FlagValues) -> list[str]:
    """Parses `argv` into `values`; what is left of it. Raises CommandError."""
    define_flags(values, argv)
    try:
        rest = values(list(argv))
        is_missing = values.config is None
        if not is_missing:
            values.config.keys()  # a file that could not be read says so when its values are asked for
    except config.ConfigError as error:
        raise CommandError(str(error)) from error
    except (flags.Error, AttributeError, LookupError, TypeError, ValueError, SyntaxError, OSError) as error:
        # config_flags reads the file and sets what is overridden while flags are parsed, and raises what comes.
        raise CommandError(_why(error, argv)) from error
    if is_missing:
        raise CommandError("--config is missing, for example --config=configs/shapes.py")
    return rest


def _why(error: Exception, argv: Sequence[str]) -> str:
    """One sentence on an error of absl or ml_collections."""
    keys = [match[1] for argument in argv if (match := re.match(r"--?config\.([^=]+)", argument))]
    for key in keys:
        if unknown := _unknown(key):
            return unknown
    # A KeyError's text is quoted once, or twice.
    text = str(error.args[0] if isinstance(error, LookupError) and error.args else error).replace("\\n", "\n").strip()
    if locked := re.search(r'Key "(\w+)" does not exist', text):
        near = re.search(r'Did you mean "(\w+)"', text)
        return f"{locked[1]} is not a setting" + (f"; did you mean {near[1]}?" if near else "")
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, flags.IllegalFlagValueError) and "Traceback" in text:
        return f"the config file fails: {lines[-1].removeprefix('referee_jax.config.ConfigError: ')}"
    if override := re.match(r"flag --config\.(\S+?)=(.*?): (.*)", lines[0]):
        return f"{override[1]} = {override[2]!r} is not possible: {override[3]}"
    if keys and isinstance(error, AttributeError | LookupError):
        return f"{' or '.join(keys)} cannot be set: {lines[0]}"
    if isinstance(error, OSError):
        return "the config file cannot be read: " + re.sub(r"^\[Errno \d+\] ", "", lines[-1])
    return f"the config file fails: {lines[0]}" if isinstance(error, SyntaxError) else lines[0]


def _unknown(path: str) -> str | None:
    """What is wrong with the key of `--config.path=`, if there is no such setting."""
    group: Any = config.Settings()
    done = ""
    for part in path.split("."):
        match = re.fullmatch(r"(\w+)(\[\d+\])?", part)
        name, index = match.groups() if match else (part, None)
        if not dataclasses.is_dataclass(group):
            return None
        known = [field.name for field in dataclasses.fields(group)]
        if name not in known:
            return config.unknown_key(f"{done}{name}", known)
        group, done = getattr(group, name), f"{done}{part}."
        if index and isinstance(group, tuple) and group:
            group = group[0]
    return None


def read_command(values: flags.FlagValues, rest: Sequence[str]) -> Command:
    """The command of parsed flags. Raises CommandError, ConfigError or PromptError."""
    if rest:
        raise CommandError(f"unexpected argument {rest[0]!r}; prompts are given with --prompt or --prompts")
    wanted = dict(values.config.items())
    wanted |= {key: values[key].value for key in ("samples", "seed", "workdir") if values[key].value is not None}
    settings = config.from_config(wanted)
    entries = [prompts.Entry(text, f"--prompt {n}") for n, text in enumerate(values.prompt, 1)]
    if values.prompts is not None:
        entries = prompts.read_prompts(values.prompts) + entries
    elif not entries:
        entries = [prompts.Entry(text, f"prompt {n} of the config") for n, text in enumerate(settings.prompts, 1)]
    if not entries and not (values.estimate or values.warmup):
        raise CommandError("there are no prompts; give --prompts=FILE, --prompt=TEXT or config.prompts")
    file = Path(config_flags.get_config_filename(values["config"]).partition(":")[0])
    workdir = settings.workdir or Path("runs", f"{file.stem}-{config.fingerprint(settings)[:8]}")
    return Command(settings, tuple(entries), Path(workdir))


# --- telling the user -------------------------------------------------------------------------------------------------


def say(text: str, *, file: TextIO | None = None) -> None:
    """Prints a line; where nobody reads any more (`| head`), the work goes on silently."""
    file = file or sys.stdout
    try:
        tqdm.tqdm.write(text, file=file)
        file.flush()
    except BrokenPipeError:
        # What is still in the buffer would raise again at exit.
        with contextlib.suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, file.fileno())
            os.close(null)


class Progress:
    """Iterations of all batches: a bar on a terminal, a line now and then elsewhere."""

    def __init__(self, images: int, batches: int, steps: int):
        self.images, self.total, self.steps = images, batches * steps, 0
        self.done, self.bar = 0, None
        self.is_terminal = sys.stderr.isatty()
        self.counted_from = self.said = time.monotonic()
        self.uncounted = 0

    def advance(self, steps: int, metrics: dict[str, np.ndarray]) -> None:
        """After a chunk of `steps` iterations with its metrics."""
        self.steps += steps
        # What is not measured in every iteration is shown where it was.
        means = {name: _mean(np.ravel(x)) for name, x in metrics.items()}
        there = [f"{name} {mean:.3g}" for name, mean in means.items() if not np.isnan(mean)]
        losses = " ".join(there[:SHOWN_METRICS])
        if not self.uncounted:
            # The first chunk is compiled: its time says nothing about the others.
            self.counted_from, self.uncounted = time.monotonic(), self.steps
        if self.is_terminal:
            if self.bar is None:
                self.bar = tqdm.tqdm(total=self.total, initial=self.steps, unit="step", dynamic_ncols=True)
            self.bar.update(self.steps - self.bar.n)
            self.bar.set_postfix_str(losses, refresh=False)
            self._describe()
        elif time.monotonic() - self.said > SECONDS_BETWEEN_LINES:
            self._line(losses)

    def finished(self, images: int) -> None:
        """After a batch: so many images more."""
        self.done += images
        if self.is_terminal:
            self._describe()
        else:
            self._line("")

    def close(self) -> None:
        """Leaves the bar as it is and the cursor below it."""
        if self.bar is not None:
            self.bar.close()

    def _describe(self) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"{self.done}/{self.images} images")

    def _line(self, losses: str) -> None:
        self.said = time.monotonic()
        rate = (self.steps - self.uncounted) / max(self.said - self.counted_from, 1e-9)
        parts = [f"{self.done}/{self.images} images", f"{self.steps}/{self.total} steps"]
        if rate > 0:
            parts += [f"{rate:.2f} steps/s", f"{(self.total - self.steps) / rate:.0f} s left"]
        say(", ".join([*parts, losses] if losses else parts))


@contextlib.contextmanager
def progress(images: int, batches: int, steps: int) -> Iterator[Progress]:
    """A Progress that is closed at the end, whatever happens."""
    bar = Progress(images, batches, steps)
    try:
        yield bar
    finally:
        bar.close()


# --- the work ---------------------------------------------------------------------------------------------------------


def load_inverter(settings: config.Settings) -> Any:
    """The engine."""
    from referee_jax import inverter  # the networks' code is slow to import, and a wrong command should say so at once

    return inverter.Inverter.from_config(settings)


def execute(command: Command, *, load: Callable[[config.Settings], Any] = load_inverter) -> int:
    """Carries out a command and returns the exit code; `load` gives the engine. Raises what `main` explains."""
    settings, start = command.settings, time.monotonic()
    texts, rejected = prompts.sift(command.entries)
    if not texts:
        raise CommandError(f"no prompt can be used; {rejected[0]}")
    device = f"{jax.local_devices()[0].device_kind} x {jax.local_device_count()}"
    run = outputs.RunDirectory.open(command.workdir, settings, device=device)
    report_rejected(run, rejected)
    wanted = queue.items(texts, settings.samples)
    missing = queue.missing(wanted, run.done())
    if len(missing) < len(wanted):
        say(f"{len(wanted) - len(missing)} of {len(wanted)} images are there already")
    made = nonfinite = 0
    if missing:
        say(f"loading {settings.generator.checkpoint} and {len(settings.referees)} referees")
        engine = load(settings)
        refused = {item.prompt: engine.check(item.prompt) for item in missing}
        unfit = [prompts.Rejected(text, "prompt", reason) for text, reason in refused.items() if reason]
        report_rejected(run, unfit)
        rejected += unfit
        missing = [item for item in missing if not refused[item.prompt]]
        if not missing and not run.done():
            raise CommandError(f"no prompt can be used; {unfit[0]}")
        made, nonfinite = generate(engine, run, missing)
    sheet = run.contact_sheet()
    finished = run.finished()
    hacked = [record["id"] for record in finished if record.get("hacked")]
    if hacked:
        shown = ", ".join(hacked[:5]) + (", ..." if len(hacked) > 5 else "")
        say(
            f"pleases the referees more than its start did, and the held-out ones less ({len(hacked)} of "
            f'{len(finished)} images, "hacked" in {run.journal.name}): {shown}'
        )
    seconds = time.monotonic() - start
    run.log("end", hacked=hacked, images=made, skipped=len(rejected), nonfinite=nonfinite, seconds=round(seconds, 1))
    broken = f" ({nonfinite} of them not finite)" if nonfinite else ""
    say(f"{made} images done{broken}, {len(rejected)} prompts skipped, {seconds:.0f} s; see {sheet or run.path}")
    return 0


def estimate(command: Command, *, load: Callable[[config.Settings], Any] = load_inverter) -> int:
    """Says what a command's config costs; loads and writes nothing."""
    from referee_jax import cost  # slow to import, as above

    say(cost.table(cost.estimate(command.settings), precision=command.settings.precision))
    return 0


def warm_up(command: Command, *, load: Callable[[config.Settings], Any] = load_inverter) -> int:
    """Compiles what a run of the command needs, by the first chunk of one image; writes no run directory."""
    engine = load(command.settings)
    start = time.monotonic()
    say(f"compiling for {engine.devices}, {engine.batch_size} images at once")
    batch, _ = engine.advance(engine.begin(queue.items(["a photo"], 1), command.settings.seed))
    engine.finish(batch)
    where = jax.config.jax_compilation_cache_dir
    kept = f"kept in {where}" if where else "not kept: JAX_COMPILATION_CACHE_DIR names no directory"
    say(f"compiled in {time.monotonic() - start:.0f} s, one chunk of iterations included; {kept}")
    return 0


def report_rejected(run: outputs.RunDirectory, rejected: Sequence[prompts.Rejected]) -> None:
    """Notes the prompts that are left out in the log, and tells of the first ones."""
    for one in rejected:
        run.log("skipped", text=one.text, where=one.where, reason=one.reason)
    for one in rejected[:SHOWN_REJECTED]:
        say(f"skipped {one}", file=sys.stderr)
    if len(rejected) > SHOWN_REJECTED:
        say(f"... and {len(rejected) - SHOWN_REJECTED} more, see {run.log_file}", file=sys.stderr)


def generate(engine: Any, run: outputs.RunDirectory, items: Sequence[queue.Item]) -> tuple[int, int]:
    """Makes and writes all of `items`, batch by batch; how many, and how many of them are not finite."""
    batches = list(queue.batches(items, engine.batch_size))
    made = nonfinite = 0
    with progress(len(items), len(batches), engine.steps) as bar:
        for number, wanted in enumerate(batches):
            begun = time.monotonic()
            if not engine.compiled:
                say(f"compiling for {engine.devices}, {engine.batch_size} images at once (this takes a while, once)")
            batch = engine.begin(wanted, run.settings.seed)
            if not engine.compiled:
                each = engine.flops(batch)
                say(f"{each / 1e12:.3g} TFLOP for an iteration of an image, {each * engine.steps / 1e12:.3g} for all")
                run.log("cost", flops=each)
            frames = []
            while batch.step < engine.steps:
                before = batch.step
                batch, metrics = engine.advance(batch)
                log_chunk(run, number, wanted, batch.step, metrics)
                bar.advance(batch.step - before, metrics)
                if run.settings.outputs.trajectory:
                    frames.append(engine.preview(batch))
            for n, picture in enumerate(engine.finish(batch)):
                status = run.write(picture, seconds=(time.monotonic() - begun) / len(wanted))
                nonfinite += status != "done"
                if frames:
                    run.trajectory(picture.item.id, [frame[n] for frame in frames])
            made += len(wanted)
            bar.finished(len(wanted))
    return made, nonfinite


def log_chunk(
    run: outputs.RunDirectory, number: int, items: Sequence[queue.Item], step: int, metrics: dict[str, np.ndarray]
) -> None:
    """Notes the mean of each metric `[item, iteration]` over those of a chunk's iterations in which there is one."""
    means = {name: _mean(x) for name, x in metrics.items()}
    run.log("chunk", batch=number, step=step, items=[item.id for item in items], metrics=means)


def _mean(metric: np.ndarray) -> np.ndarray:
    """Over the last axis, of what is not NaN; NaN where that is nothing."""
    there = ~np.isnan(metric)
    with np.errstate(all="ignore"):
        return np.where(there, metric, 0).sum(-1, dtype=np.float64) / there.sum(-1)


# --- the program ------------------------------------------------------------------------------------------------------


def _fail(code: int, text: str) -> int:
    say(f"error: {text}", file=sys.stderr)
    return code


def main(
    command: Command,
    *,
    load: Callable[[config.Settings], Any] = load_inverter,
    work: Callable[..., int] = execute,
) -> int:
    """Carries out a command by `work`; the exit code. What goes wrong is told in a sentence."""
    keeps = f"the finished images are in {command.workdir}, and the same command continues"
    try:
        return work(command, load=load)
    except (CommandError, config.ConfigError, prompts.PromptError, outputs.RunError, convert.WeightsError) as error:
        return _fail(2, str(error))
    except KeyboardInterrupt as stop:
        say(f"interrupted; {keeps}", file=sys.stderr)
        return 143 if isinstance(stop, Terminated) else 130
    except OSError as error:
        return _fail(1, f"{error}; {keeps}")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        size = command.settings.batch_size
        return _fail(1, f"the device's memory is too small for --config.batch_size={size}; try a smaller one; {keeps}")


def catch_signals() -> None:
    """Makes SIGTERM an exception, as Ctrl-C is one."""

    def terminate(*_: Any) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def _absl_flags(argv: list[str]) -> list[str]:
    try:
        return parse_flags(argv, flags.FLAGS)
    except CommandError as error:
        sys.exit(_fail(2, str(error)))


def _absl_main(argv: list[str]) -> int:
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX tells of every kind of device that is not there
    catch_signals()
    try:
        command = read_command(flags.FLAGS, argv[1:])
    except (CommandError, config.ConfigError, prompts.PromptError) as error:
        return _fail(2, str(error))
    work = estimate if flags.FLAGS.estimate else warm_up if flags.FLAGS.warmup else execute
    return main(command, work=work)


if __name__ == "__main__":
    app.run(_absl_main, flags_parser=_absl_flags)
