"""Many images in one run: does the memory stay as it is, how fast is the writer, how long does the next start take?

    python tests/tools/load_test.py --items=10000                       # the writer alone: an engine that makes noise
    python tests/tools/load_test.py --items=10000 --engine=shapes       # configs/shapes_clip.py from noise, 2 steps each
    python tests/tools/load_test.py --items=300 --image_size=512 --format=webp

Prints a line of JSON. Exit code 1 if the last quarter's peak of memory is more than 5 % above that of the second, or an image
is missing.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time

import numpy as np
from absl import app, flags

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from referee_jax import config, run  # noqa: E402
from referee_jax.engine import inverter, results  # noqa: E402
from referee_jax.hardware import devices  # noqa: E402
from referee_jax.runs.command import Command  # noqa: E402
from referee_jax.runs.prompt_file import Entry  # noqa: E402
from referee_jax.storage import run_directory  # noqa: E402
from tests import fakes  # noqa: E402

LIMIT = 1.05
PAGE = os.sysconf("SC_PAGE_SIZE")


class NoiseEngine(fakes.FakeInverter):
    """No work: smooth pictures with some noise, which compress as photographs do."""

    def __init__(self, settings):
        super().__init__(settings)
        self.at_once(16)
        self.size, self.rng = settings.image_size, np.random.default_rng(0)

    def finish(self, batch):
        ramp = np.linspace(0.2, 0.8, self.size, dtype=np.float32)[:, None, None]
        shape = (len(batch.items), self.size, self.size, 3)
        noisy = self.rng.standard_normal(shape, np.float32) * 0.02 + ramp
        return [results.Picture(item, x, {"cosine": 0.5}, x) for item, x in zip(batch.items, noisy, strict=True)]


class Memory:
    """Peak of the resident memory (Linux) in each quarter of the items, and after them.

    Looked at 20 times a second, and around each batch: a quick run's quarter is shorter than that.
    """

    def __init__(self, items: int):
        self.items, self.made, self.peaks, self.stopped = items, 0, [0] * 5, threading.Event()
        self.thread = threading.Thread(target=self._watch)

    def count(self, engine):
        """The engine, whose pictures are counted."""
        finish = engine.finish

        def counted(batch):
            pictures = finish(batch)
            self._look()
            self.made += len(pictures)
            self._look()
            return pictures

        engine.finish = counted
        return engine

    def _watch(self):
        while not self.stopped.wait(0.05):
            self._look()

    def _look(self):
        resident = int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * PAGE
        quarter = self.made * 4 // self.items  # the fifth is the contact sheet's
        self.peaks[quarter] = max(self.peaks[quarter], resident)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        self.thread.join()


def measure(
    items: int, *, engine: str, form: str, image_size: int | None, shard_size: int, workdir: pathlib.Path
) -> dict:
    """What the docstring asks, of a run of so many items in an empty directory."""
    settings = config.override(
        config.load(ROOT / "configs" / "shapes_clip.py"),
        {"steps": 2, "init": "noise", "init_candidates": 1, "outputs.format": form, "outputs.shard_size": shard_size},
    )
    if image_size:
        settings = config.override(settings, {"image_size": image_size})
    devices.keep_freed_memory()  # as the program does
    make = NoiseEngine if engine == "fake" else inverter.Inverter.from_config
    colours, shapes = ("red", "blue", "green", "yellow"), ("circle", "square", "ring", "star")
    texts = [f"{n}: a {colours[n % 4]} {shapes[n // 4 % 4]}" for n in range(items)]
    entries = tuple(Entry(text, f"line {n}") for n, text in enumerate(texts, 1))
    with Memory(items) as memory:
        start = time.monotonic()
        code = run.main(Command(settings, entries, workdir), load=lambda settings: memory.count(make(settings)))
        seconds = time.monotonic() - start
    size = sum(file.stat().st_size for folder in run_directory.FOLDERS for file in (workdir / folder).glob("*"))
    start = time.monotonic()
    opened = run_directory.RunDirectory.open(workdir, settings)
    began = time.monotonic()
    done = opened.done()
    return {
        "engine": engine, "format": form, "image_size": settings.image_size, "items": items, "code": code,
        "done": len(done), "seconds": round(seconds, 1), "images_per_second": round(items / seconds, 1),
        "megabytes_per_second": round(size / seconds / 1e6, 2), "start_seconds": round(began - start, 3),
        "scan_seconds": round(time.monotonic() - began, 3), "peak_megabytes": [round(x / 1e6) for x in memory.peaks],
        "growth": round(memory.peaks[3] / max(memory.peaks[1], 1), 4),
    }  # fmt: skip


def main(_: list[str]) -> int:
    """The command line."""
    args = flags.FLAGS
    workdir = pathlib.Path(args.workdir or tempfile.mkdtemp())
    try:
        found = measure(
            args.items,
            engine=args.engine,
            form=args.format,
            image_size=args.image_size,
            shard_size=args.shard_size,
            workdir=workdir / "run",
        )
    finally:
        if not args.workdir:
            shutil.rmtree(workdir)
    print(json.dumps(found))
    return 0 if found["growth"] <= LIMIT and found["done"] == args.items and found["code"] == 0 else 1


if __name__ == "__main__":
    flags.DEFINE_integer("items", 10_000, "images to make", lower_bound=4)
    flags.DEFINE_enum("engine", "fake", ["fake", "shapes"], "noise, or the shapes world's networks")
    flags.DEFINE_enum("format", "png", ["png", "webp", "webdataset"], "config.outputs.format")
    flags.DEFINE_integer("image_size", None, "default: that of configs/shapes_clip.py")
    flags.DEFINE_integer("shard_size", 10_000, "config.outputs.shard_size")
    flags.DEFINE_string("workdir", None, "where to make it, and keep it; default: a directory that is removed")
    app.run(main)
