"""The paper's numbers as its authors' code has them, for Stable Diffusion 1.5; the referee is CLIP L/14.

    python -m referee_jax.run --config=configs/paper.py --prompts=prompts.txt

Hardware: a GPU or TPU core with 40 GB; --config.batch_size=1 --config.precision=bfloat16 for 16 GB. 160 iterations of a
512x512 image, seconds to a minute each image on a current accelerator.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """All defaults: they are the paper's."""
    return config.default()
