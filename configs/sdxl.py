"""SDXL with CLIP L/14 as its referee: DDIM at 1024 px, pulled by the referee on its way from noise.

    python -m referee_jax.run --config=configs/sdxl.py --prompts=prompts.txt

`method = "guided"` (docs/method.md) with the generator's own guidance; one pass and one gradient of the decoder an
iteration. Its numbers are not tuned.

Hardware: a GPU or TPU core with 32 GB, in bfloat16. Time of an image, at the least (`--estimate`): 1.5 s on an H100, 1.6 s on
TPU v6e; the compiler's estimates of other generators are two to eleven times their least (launch/README.md).
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Fifty levels, the referee between timesteps 800 and 200."""
    settings = config.read(pathlib.Path(__file__).with_name("clip.py"))
    settings.init, settings.init_candidates = "noise", 1
    settings.generator.checkpoint = "stabilityai/stable-diffusion-xl-base-1.0"
    settings.method, settings.image_size, settings.steps = "guided", 1024, 50
    settings.precision, settings.batch_size = "bfloat16", 0
    settings.guided.guidance = 5.0
    settings.referee.stop = 50
    settings.optim.noise = settings.optim.tail_noise = 0.0
    return settings
