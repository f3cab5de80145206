"""A driver as `python -m referee_jax.ray` is one, on three CPUs: `python tests/ray/driver.py ENGINE PROMPTS OUT FLAGS`."""

import os
import sys
import time

import ray

from referee_jax.ray import pipeline
from referee_jax.ray.folder import Folder
from referee_jax.runs import job
from tests import fakes

MEMORY = 100 * 2**20  # of Ray's object store


class Slow(fakes.FakeInverter):
    """Long enough at a batch to be killed; fails at some prompts, and dies of others."""

    def advance(self, batch):
        time.sleep(float(os.environ.get("PAUSE", 0.1)))
        prompts = " ".join(item.prompt for item in batch.items)
        if "deadly" in prompts:
            os._exit(1)
        if "failing" in prompts:
            raise ArithmeticError("no such picture\nand more")
        return super().advance(batch)


def main(engine: str, prompts: str, out: str, *flags: str) -> None:
    ray.init(
        num_cpus=int(os.environ.get("CPUS", 3)),
        include_dashboard=False,
        object_store_memory=MEMORY,
        logging_level="ERROR",
    )
    load = job.load_inverter if engine == "shapes" else Slow
    asked = fakes.command(f"--prompts={prompts}", *flags, path=fakes.ROOT / "configs" / "shapes_clip.py")
    pool = pipeline.Pool(2, 2, "cpu", rows=int(os.environ.get("ROWS", 8)))
    layout = os.environ.get("LAYOUT", "parquet")
    print(pipeline.generate(asked.settings, asked.entries, Folder(out), pool=pool, layout=layout, part=16, load=load))


if __name__ == "__main__":
    main(*sys.argv[1:])
