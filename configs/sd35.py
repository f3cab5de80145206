"""Stable Diffusion 3.5 medium with CLIP L/14 as its referee: its own sampler at 1024 px, pulled by the referee.

    python -m referee_jax.run --config=configs/sd35.py --prompts=prompts.txt

`method = "guided"` (docs/method.md) with the generator's own guidance. Its T5 reads the prompts from the host's memory,
once each: 10 GB there, which the device holds only while it reads.

Its terms are to be accepted on the hub first. Hardware: a GPU or TPU core with 32 GB, in bfloat16. Time of an image, by the
compiler's estimate (launch/README.md): 12 s on TPU v5p, 14 s on v6e, 27 s on v5e.
"""

import pathlib

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """Forty levels, before the generator's shift, the referee between timesteps 800 and 200."""
    settings = config.read(pathlib.Path(__file__).with_name("sdxl.py"))
    settings.generator.checkpoint = "stabilityai/stable-diffusion-3.5-medium"
    settings.steps, settings.referee.stop = 40, 40
    settings.guided.guidance, settings.guided.first = 4.5, 999
    return settings
