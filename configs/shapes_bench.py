"""The fixed prompts of the shapes world, seven categories, seen and unseen; scored by ground truth afterwards.

    python -m referee_jax.run --config=configs/shapes_bench.py --workdir=runs/shapes_bench
    python -m referee_jax.evaluate --workdir=runs/shapes_bench --benchmark=shapes

Some 490 prompts by two samples of 64x64 pixels. Hardware: any CPU, an hour or so on two cores; seconds each on an accelerator.
"""

import pathlib

import ml_collections

from referee_jax import config
from referee_jax.shapes import benchmark


def get_config() -> ml_collections.ConfigDict:
    """configs/shapes.py over the benchmark's prompts."""
    settings = config.read(pathlib.Path(__file__).with_name("shapes.py"))
    settings.prompts, settings.samples, settings.batch_size = benchmark.every_prompt(), 2, 16
    return settings
