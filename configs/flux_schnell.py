"""FLUX.1-schnell's starting noise, moved by ReNO's four referees: one step of the generator an iteration.

    python -m referee_jax.weights.lavis HPS_v2.1_compressed.pt checkpoints/hps-v2.1
    python -m referee_jax.weights.lavis ImageReward.pt checkpoints/image-reward
    python -m referee_jax.run --config=configs/flux_schnell.py --prompts=prompts.txt

As configs/reno.py (arXiv 2406.04312), whose step size is not tuned for this generator's larger noise. The first two lines
are needed once (extra [train]), of the authors' files.
The generator has 24 GB of weights: chips share them with --config.mesh.model=4. Its T5, 10 GB, stays on the host.

Hardware: a GPU with 80 GB, in bfloat16; or groups of chips. Time of an image, by the compiler's estimate (launch/README.md):
19 s on TPU v5p, 10 s on two of v6e, 21 s on four of v5e.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The published numbers of ReNO; the weights are of the referees' raw outputs."""
    settings = config.read(pathlib.Path(__file__).with_name("reno.py"))
    settings.generator.checkpoint = "black-forest-labs/FLUX.1-schnell"
    settings.batch_size = 0
    return settings
