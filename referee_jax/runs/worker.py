"""The loop of a run: batch after batch, and between two chunks progress, the log, checkpoints and the wish to stop."""

import dataclasses
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from absl import logging

from referee_jax import console
from referee_jax.hardware import chips, processes
from referee_jax.items import Item, Part
from referee_jax.performance import cost
from referee_jax.runs import recovery
from referee_jax.runs import work as work_lib
from referee_jax.storage import checkpoints as checkpoints_lib
from referee_jax.storage import claims as claims_lib
from referee_jax.storage import run_directory
from referee_jax.storage import writer as writer_lib


class Stopped(Exception):
    """The run was asked to end, by this signal, and has saved what it was at."""

    def __init__(self, number: signal.Signals):
        super().__init__(number.name)
        self.number = number


@dataclasses.dataclass
class Stop:
    """The wish to end the run: the signal that came, or none yet."""

    number: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.number is not None


@dataclasses.dataclass
class Made:
    """How many images were written, and how many of them are not finite."""

    images: int = 0
    nonfinite: int = 0


class Worker:
    """Makes images with an engine and writes them to a run with `writer`, beside the next ones; `made` counts.

    `checkpoints` are saved every `checkpoint_seconds` and when a stop comes.
    """

    def __init__(
        self,
        engine: Any,
        run: run_directory.RunDirectory,
        writer: writer_lib.Writer,
        checkpoints: checkpoints_lib.Checkpoints,
        bar: console.Progress,
        *,
        stop: Stop,
    ):
        self.engine, self.run, self.writer, self.checkpoints, self.bar = engine, run, writer, checkpoints, bar
        self.stop, self.save_every, self.made, self.is_settled = stop, run.settings.checkpoint_seconds, Made(), True
        self.committed = time.monotonic()  # when all that was finished was last sure
        self.watchdog, self.at = recovery.Watchdog(run.settings.stall_seconds, self.tell_stall), ""

    def work(self, work: work_lib.Work) -> None:
        """Makes all that `work` hands out.

        Where the device's memory is too small the batch is halved, once for each size. Raises Stopped, DeviceFailed, and the
        error of a device whose memory is too small for one image.
        """

        # Others may wait for what is in our open shard, while we wait for theirs.
        def commit() -> None:
            self.settle(work.claims, commit=True)
            self.watchdog.waits()

        with self.watchdog.watching():
            while part := work.take(self.engine.batch_size, stopped=self.stop, before_waiting=commit):
                try:
                    self.make(part, work.claims)
                except jax.errors.JaxRuntimeError as error:
                    if not chips.is_out_of_memory(error):
                        why = console.first_line(error)[:300]
                        self.run.log("device failed", items=[item.id for item in part.items], error=why)
                        raise recovery.DeviceFailed(part.items, self.made.images, why) from error
                    self.halve(error)
                    work.put_back(part)
            self.settle(work.claims)
        self.check()

    def make(self, part: Part, claims: claims_lib.Claims | None = None) -> None:
        """Makes one batch, from its start or from where it was left, and writes its images. Raises Stopped."""
        self.check()
        engine, begun = self.engine, time.monotonic()
        saved = begun
        if not engine.compiled:
            console.say(engine.compiling)
        part, batch = self.begin(part)
        if not engine.compiled:
            tell_cost(engine, self.run, batch, self.bar.images - self.bar.done)
        self.at = f"{part.items[0].id} and {len(part.items) - 1} others"
        frames = []
        while batch.step < engine.steps:
            before = batch.step
            batch, metrics = engine.advance(batch)
            self.watchdog.moved()
            if before == part.step:
                self.bar.skip(before * len(part.items))
            log_chunk(self.run, part.items, batch.step, metrics)
            self.bar.advance((batch.step - before) * len(part.items), metrics)
            self.writer.refresh()
            if claims:
                claims.refresh()
            if before == part.step:
                self.settle(claims)  # the batch before, which had the time of a chunk
            if self.run.settings.outputs.trajectory:
                frames.append(engine.preview(batch))
            if batch.step < engine.steps and (self.stop() or time.monotonic() - saved > self.save_every):
                self.checkpoints.save(engine.snapshot(batch), self.run.fingerprint)
                self.run.storage.send()
                saved = time.monotonic()
                self.check()
        for n, picture in enumerate(engine.finish(batch)):
            seconds = (time.monotonic() - begun) / len(part.items)
            status = self.writer.write(picture, seconds=seconds, frames=[frame[n] for frame in frames])
            self.made.nonfinite += status != "done"
        self.is_settled = False
        self.made.images += len(part.items)
        self.bar.finished(len(part.items))
        if self.run.storage.is_remote:
            # At once: what is on this machine alone is lost with it, an open shard too.
            self.settle(claims, commit=time.monotonic() - self.committed > self.save_every)

    def begin(self, part: Part) -> tuple[Part, Any]:
        """The batch of a part, which is begun anew where its saved state is not this version's; and the part as it is then."""
        seed = self.run.settings.seed
        if part.state:
            try:
                return part, self.engine.resume(part, seed)
            except ValueError as error:
                logging.warning("%s; begun anew", error)
                part = Part(part.items)
        return part, self.engine.begin(part.items, seed)

    def settle(self, claims: claims_lib.Claims | None, *, commit: bool = False) -> None:
        """Waits for the images written so far, and gives up their checkpoint and claims; see writers.Writer.flush."""
        written = self.writer.flush(commit=commit)
        if commit:
            self.committed = time.monotonic()
        if not self.is_settled:
            self.checkpoints.clear()
            self.is_settled = True
        self.run.storage.send()
        if claims:
            claims.release(written)
        if self.engine.compiled:
            self.watchdog.moved()

    def tell_stall(self, seconds: float) -> None:
        """Says and notes who hangs, and at what."""
        console.say(
            f"error: {processes.HOST}: nothing has moved for {seconds:.0f} s, at {self.at}; ending", file=sys.stderr
        )
        self.run.log("stalled", host=processes.HOST, at=self.at, seconds=round(seconds))
        self.run.storage.send()

    def halve(self, error: jax.errors.JaxRuntimeError) -> None:
        """Goes on with batches half as large; raises `error` where they are of one already."""
        smaller = self.engine.halved()
        if smaller is None:
            raise error
        self.engine = smaller
        size = smaller.settings.batch_size
        console.say(f"the device's memory is too small, going on with --config.batch_size={size}")
        self.run.log("halved", batch_size=size)

    def check(self) -> None:
        """Raises Stopped if a stop was asked for."""
        if self.stop.number is not None:
            raise Stopped(self.stop.number)


def tell_cost(engine: Any, run: run_directory.RunDirectory, batch: Any, images: int) -> None:
    """Says and notes what an image costs, and all that are to be made."""
    found = cost.running(engine, batch)
    console.say(found.line(images))
    run.log("cost", flops=found.image, weights=found.weights, batch=found.batch)


def log_chunk(
    run: run_directory.RunDirectory, items: Sequence[Item], step: int, metrics: dict[str, np.ndarray]
) -> None:
    """Notes the mean of each metric `[item, iteration]` over those of a chunk's iterations in which there is one."""
    means = {name: console.mean(x) for name, x in metrics.items()}
    run.log("chunk", step=step, items=[item.id for item in items], metrics=means)
