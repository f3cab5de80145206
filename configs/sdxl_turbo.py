"""SDXL-Turbo's starting noise, moved by ReNO's four referees: one step of the generator an iteration.

    python -m referee_jax.weights.lavis HPS_v2.1_compressed.pt checkpoints/hps-v2.1
    python -m referee_jax.weights.lavis ImageReward.pt checkpoints/image-reward
    python -m referee_jax.run --config=configs/sdxl_turbo.py --prompts=prompts.txt

As configs/reno.py (arXiv 2406.04312), whose published code has this generator, too: 512 px, 50 iterations. The first two
lines are needed once (extra [train]), of the authors' files.

Hardware: a GPU or TPU core with 32 GB, in bfloat16. Time of an image, by the compiler's estimate (launch/README.md): 7 s on
TPU v5p, 8 s on v6e, 13 s on v5e.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The published numbers; the weights are of the referees' raw outputs."""
    settings = config.read(pathlib.Path(__file__).with_name("reno.py"))
    settings.generator.checkpoint = "stabilityai/sdxl-turbo"
    settings.batch_size = 0
    return settings
