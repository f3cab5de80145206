"""The paper's setting on a TPU slice: bfloat16, and as many images a chip as a v5e holds.

    python -m referee_jax.doctor --compile-for=v5e:16x16 --config=configs/tpu_pod.py
    python -m referee_jax.run --distributed --config=configs/tpu_pod.py --prompts=/shared/prompts.txt \\
        --workdir=/shared/runs/mine

The second line on every host of the slice, by a recipe of launch/; checkpoints as for configs/paper.py. Hardware: any slice of
v5e (16 GB a chip), or of larger chips, which hold more: --config.batch_size. Time: see launch/README.md.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """configs/paper.py in bfloat16, one image a chip."""
    settings = config.read(pathlib.Path(__file__).with_name("paper.py"))
    settings.precision, settings.batch_size = "bfloat16", 1
    return settings
