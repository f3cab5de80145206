"""`python -m referee_jax.run` with the engine of fakes.py: a program, for tests of several processes."""

import dataclasses
import faulthandler
import functools
import os
import pathlib
import time
import zlib
from collections.abc import Sequence

import numpy as np
from absl import app

from referee_jax import run
from referee_jax.items import Part
from tests import fakes, programs

CHUNK_SECONDS = 0.05


@dataclasses.dataclass(frozen=True)
class Batch(fakes.Batch):
    """`sums` are those of all iterations so far, one for each item."""

    sums: tuple[int, ...] = ()


class SlowInverter(fakes.FakeInverter):
    """Takes some time, and its images depend on every iteration: one that is left out or made twice is seen."""

    def begin(self, items, seed, *, look=None):
        return Batch(
            tuple(items), seed, sums=tuple(zlib.crc32(f"{x.prompt} {x.sample} {seed}".encode()) for x in items)
        )

    def snapshot(self, batch):
        part = super().snapshot(batch)
        return Part(part.items, part.step, part.state | {"sums": np.array(batch.sums, np.int64)})

    def resume(self, part, seed):
        batch = super().resume(part, seed)
        return Batch(batch.items, seed, batch.step, sums=tuple(part.state["sums"].tolist()))

    def advance(self, batch):
        time.sleep(CHUNK_SECONDS)
        after, metrics = super().advance(batch)
        sums = batch.sums
        for step in range(batch.step, after.step):
            sums = tuple(zlib.crc32(bytes([step]), x) for x in sums)
        return dataclasses.replace(after, sums=sums), metrics

    def finish(self, batch):
        images = [np.broadcast_to(np.float32(list(x.to_bytes(4)[:3])) / 255, (8, 8, 3)) for x in batch.sums]
        return [dataclasses.replace(x, image=y) for x, y in zip(super().finish(batch), images, strict=True)]


def main(load, *argv: str) -> None:
    """The program, with `load` in place of `Inverter.from_config`; ends the process."""
    run.main = functools.partial(run.main, load=load)
    app.run(run._absl_main, flags_parser=run._absl_flags, argv=list(argv) or None)


def forked(arguments: Sequence[str], log: pathlib.Path) -> None:
    """The program with the slow engine in a process that multiprocessing has begun, which has all modules already."""
    os.chdir(fakes.ROOT)
    programs.redirect(log, log)
    faulthandler.enable()
    main(SlowInverter, "run", *arguments)


if __name__ == "__main__":
    main(fakes.FakeInverter)
