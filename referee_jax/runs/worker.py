"""The loop of a process: batch after batch, with logging, checkpoints and stop requests after each chunk."""

import contextlib
import dataclasses
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from absl import logging

from referee_jax import config, console
from referee_jax.hardware import chips, processes
from referee_jax.items import Item, Part
from referee_jax.performance import cost
from referee_jax.referees.questions import Atom
from referee_jax.runs import recovery
from referee_jax.runs import work as work_lib
from referee_jax.storage import checkpoints as checkpoints_lib
from referee_jax.storage import run_directory
from referee_jax.storage import writer as writer_lib


class Batch(Protocol):
    """A batch between two chunks; what else it holds is the engine's."""

    items: tuple[Item, ...]
    step: int  # iterations that are done
    prompt: Any  # encoded prompts


class Engine(Protocol):
    """What a run needs of an engine; engine.inverter.Inverter is one."""

    settings: config.Settings  # with the engine's choice where `batch_size` was 0
    steps: int  # iterations of an image
    groups: int  # groups of devices; each holds `settings.batch_size` images
    batch_size: int  # images of a batch on all devices
    compiled: bool  # whether a chunk has run
    compiling: str  # a message: what is compiled

    def check(self, prompt: str, negative: str | None = None) -> str | None:
        """Returns why a prompt, with a negative prompt of its own, cannot be used, or None."""

    def asking(self, questions: Mapping[str, Sequence[Atom]]) -> "Engine":
        """Returns the engine where some prompts have questions of their user's."""

    def begin(self, items: Sequence[Item], seed: int, *, look: Callable[[Batch, str], None] | None = None) -> Batch:
        """Returns a batch before its first iteration; may call `look` with one of the first samples, and what they are."""

    def shapes(self) -> Batch:
        """Returns an abstract batch, for `trace`."""

    def trace(self, batch: Batch) -> jax.stages.Traced:
        """Returns the program of an iteration, not compiled."""

    def ahead(self) -> contextlib.AbstractContextManager:
        """Compiles in threads what the first batch needs, while it is made."""

    def snapshot(self, batch: Batch) -> Part:
        """Returns the items of a batch and their state, to be saved."""

    def resume(self, part: Part, seed: int) -> Batch:
        """Returns the batch of a saved part. Raises ValueError if its state is of other settings."""

    def advance(self, batch: Batch) -> tuple[Batch, dict[str, np.ndarray]]:
        """Runs a chunk of iterations; returns the batch and metrics `[item, iteration]`."""

    def preview(self, batch: Batch) -> np.ndarray:
        """Returns the images so far, uint8 `[item, H, W, 3]`."""

    def finish(self, batch: Batch) -> Sequence[writer_lib.Picture]:
        """Returns the finished images, one per item."""

    def at_once(self, size: int) -> "Engine":
        """Returns the engine with `size` images per group of devices."""

    def halved(self) -> "Engine | None":
        """Returns the engine with half the batch size, None if that is 1."""


class Stopped(Exception):
    """A run ended by a signal, after saving its batch."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


@dataclasses.dataclass
class Stop:
    """A stop request: the signal that came, or None."""

    number: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.number is not None


@dataclasses.dataclass
class Made:
    """Counts of written images, and of those among them that are not finite."""

    images: int = 0
    nonfinite: int = 0


class Saver:
    """Keeps the disk up to date: checkpoints of the batch in flight, and the images of finished ones."""

    def __init__(
        self, run: run_directory.RunDirectory, writer: writer_lib.Writer, checkpoints: checkpoints_lib.Checkpoints
    ):
        self.run, self.writer, self.checkpoints = run, writer, checkpoints
        self.interval = run.settings.checkpoint_seconds
        self.saved = self.committed = time.monotonic()  # last save of the batch in flight; last commit of images
        self.is_settled = True  # whether all finished batches are on disk, without checkpoint

    def begin(self) -> None:
        """Starts the time to the first checkpoint of a batch."""
        self.saved = time.monotonic()

    def is_due(self, since: float) -> bool:
        """Whether more than `checkpoint_seconds` have passed."""
        return time.monotonic() - since > self.interval

    def save(self, part: Part) -> None:
        """Saves the batch in flight."""
        self.run.check_settings()
        self.checkpoints.save(part, self.run.fingerprint)
        self.run.storage.send()
        self.saved = time.monotonic()

    def settle(self, *, commit: bool = False) -> None:
        """Waits until all images are written, and removes their checkpoint.

        With `commit`, images in an open shard come into the journal, too.
        """
        self.writer.flush(commit=commit)
        if commit:
            self.committed = time.monotonic()
        if not self.is_settled:
            self.checkpoints.clear()
            self.is_settled = True
        self.run.storage.send()


class Worker:
    """Makes images with an engine, while `saver` writes those of the batch before; `made` counts them."""

    def __init__(self, engine: Engine, saver: Saver, bar: console.Progress, *, stop: Stop):
        self.engine, self.saver, self.run, self.bar, self.stop = engine, saver, saver.run, bar, stop
        self.made, self.position, self.looked = Made(), "", -math.inf
        self.watchdog = recovery.Watchdog(self.run.settings.stall_seconds, self.report_stall)

    def work(self, work: work_lib.Work) -> None:
        """Makes all items of `work`.

        Halves the batch where the device's memory is too small. Raises Stopped, DeviceFailed, and
        JaxRuntimeError if the memory is too small for one image.
        """
        with self.watchdog.watching():
            while not self.stop() and (part := work.take(self.engine.batch_size)):
                try:
                    self.make(part)
                except jax.errors.JaxRuntimeError as error:
                    if not chips.is_out_of_memory(error):
                        raise self.log_failure(part, error) from error
                    self.halve(error)
                    work.put_back(part)
            self.settle()
        self.check()

    def make(self, part: Part) -> None:
        """Makes and writes the images of one batch, from the start or a checkpoint. Raises Stopped."""
        self.check()
        start = time.monotonic()
        self.saver.begin()
        running = None
        if not self.engine.compiled:
            console.say(self.engine.compiling)
            running = costs(self.engine)
        with self.engine.ahead():
            if running:  # what it counts is traced while threads compile
                log_cost(self.run, running, self.bar.images - self.bar.done)
            part, batch = self.begin(part)
            batch, frames = self.advance(part, batch)
            self.write(batch, frames, start)

    def begin(self, part: Part) -> tuple[Part, Batch]:
        """Returns the batch of a part, and the part without its state if that is of other settings."""
        seed, batch = self.run.settings.seed, None
        if part.state:
            try:
                batch = self.engine.resume(part, seed)
            except ValueError as error:
                logging.warning("%s; this batch starts again", error)
                part = Part(part.items)
        if batch is None:
            batch = self.engine.begin(part.items, seed, look=self.look)
        if not part.state and self.run.settings.init == "sample":
            self.look(batch)
        self.position = f"{part.items[0].id} and {len(part.items) - 1} others"
        return part, batch

    def advance(self, part: Part, batch: Batch) -> tuple[Batch, list[np.ndarray]]:
        """Runs all chunks of a batch; returns it, and a preview after each chunk for trajectories."""
        frames = []
        while batch.step < self.engine.steps:
            before = batch.step
            batch, metrics = self.engine.advance(batch)
            self.watchdog.moved()
            log_chunk(self.run, part.items, batch.step, metrics)
            if before == part.step:
                self.bar.skip(before * len(part.items))
            self.bar.advance((batch.step - before) * len(part.items), metrics)
            self.saver.writer.refresh()
            if batch.step < self.engine.steps:
                self.look(batch)
            if before == part.step:
                self.settle()  # the batch before, which was written during this chunk
            if self.run.settings.outputs.trajectory:
                frames.append(self.engine.preview(batch))
            if batch.step < self.engine.steps and (self.stop() or self.saver.is_due(self.saver.saved)):
                self.saver.save(self.engine.snapshot(batch))
                self.check()
        return batch, frames

    def look(self, batch: Batch, what: str = "") -> None:
        """Draws what a batch looks like so far, now and then until the first one is finished."""
        if self.run.preview and not self.made.images and self.saver.is_due(self.looked):
            title = what or f"after {batch.step} of {self.engine.steps} iterations"
            self.run.show_preview([item.prompt for item in batch.items], self.engine.preview(batch), title)
            self.looked = time.monotonic()

    def write(self, batch: Batch, frames: Sequence[np.ndarray], start: float) -> None:
        """Gives the images of a finished batch, begun at `start`, to the writer."""
        self.run.check_settings()
        count = len(batch.items)
        for n, picture in enumerate(self.engine.finish(batch)):
            seconds = (time.monotonic() - start) / count
            status = self.saver.writer.write(picture, seconds=seconds, frames=[frame[n] for frame in frames])
            self.made.nonfinite += status != "done"
        self.saver.is_settled = False
        self.made.images += count
        self.run.remove_preview()
        self.bar.finished(count)
        if self.run.storage.is_remote:
            # At once: with this machine all that is only here would be lost, open shards included.
            self.settle(commit=self.saver.is_due(self.saver.committed))

    def settle(self, *, commit: bool = False) -> None:
        """See Saver.settle; a slow disk is no hang."""
        self.saver.settle(commit=commit)
        if self.engine.compiled:
            self.watchdog.moved()

    def report_stall(self, seconds: float) -> None:
        """Prints and logs which process hangs, and at which batch."""
        message = f"error: {processes.HOST}: nothing has moved for {seconds:.0f} s, at {self.position}; ending"
        console.say(message, file=sys.stderr)
        self.run.log("stalled", host=processes.HOST, at=self.position, seconds=round(seconds))
        self.run.storage.send()

    def log_failure(self, part: Part, error: jax.errors.JaxRuntimeError) -> recovery.DeviceFailed:
        """Logs an error of the device; returns the exception to raise."""
        reason, ids = console.first_line(error)[:300], [item.id for item in part.items]
        self.run.log("device failed", host=processes.HOST, items=ids, images=self.made.images, error=reason)
        return recovery.DeviceFailed(part.items, self.made, reason)

    def halve(self, error: jax.errors.JaxRuntimeError) -> None:
        """Halves the batch size; raises `error` if it is 1."""
        self.engine = halved(self.engine, error)
        self.run.log("halved", batch_size=self.engine.settings.batch_size)

    def check(self) -> None:
        """Raises Stopped if a stop was requested."""
        if self.stop.number is not None:
            raise Stopped(self.stop.number)


def halved(engine: Engine, error: jax.errors.JaxRuntimeError) -> Engine:
    """The engine with half the batch size, and says so; raises `error` if it is 1."""
    smaller = engine.halved()
    if smaller is None:
        raise error
    size = smaller.settings.batch_size
    console.say(f"the device's memory is too small, going on with --config.batch_size={size}")
    return smaller


def costs(engine: Engine) -> cost.Running:
    """What the engine's program costs, before it is compiled. ConfigError where it is too large for this machine's CPU."""
    batch = engine.shapes()
    running, limit = cost.running(engine, batch), chips.machine_memory()
    needed = engine.groups * (running.weights + running.batch)  # devices of a CPU share the machine's memory
    if limit and needed > limit:
        size, side = engine.settings.batch_size, engine.settings.image_size
        fitting = int((limit / engine.groups - running.weights) * size // running.batch)
        if fitting > 0:
            advice = f"--config.batch_size={fitting} fits"
        elif engine.groups > 1:
            advice = f"simulate fewer than {engine.groups} devices (JAX_NUM_CPU_DEVICES)"
        else:
            advice = "choose a smaller --config.image_size"
        raise config.ConfigError(
            f"{engine.groups * size} images of {side} x {side} pixels at once need about {cost.amount(needed, 'B')} "
            f"of memory, this machine has {cost.amount(limit, 'B')}; {advice}"
        )
    return running


def log_cost(run: run_directory.RunDirectory, running: cost.Running, images: int) -> None:
    """Prints and logs the cost of one image, and of all `images`."""
    console.say(running.line(images))
    run.log("cost", flops=running.image, weights=running.weights, batch=running.batch)


def log_chunk(run: run_directory.RunDirectory, items: Sequence[Item], step: int, metrics: Mapping[str, Any]) -> None:
    """Logs a chunk: of each metric `[item, iteration]` the mean over the iterations that have it (not NaN)."""
    means = {name: console.mean(x) for name, x in metrics.items()}
    run.log("chunk", step=step, items=[item.id for item in items], metrics=means)
