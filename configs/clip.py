"""Stable Diffusion 1.5 with CLIP L/14 as its referee, with the changes to the authors' code that we recommend.

    python -m referee_jax.run --config=configs/clip.py --prompts=prompts.txt

Hardware and time as configs/paper.py.
"""

import ml_collections

from referee_jax import config


def get_config() -> ml_collections.ConfigDict:
    """The paper's numbers but for what its code had unintended."""
    settings = config.default()
    settings.output = "best"
    settings.clamp = "straight_through"
    settings.sds.prompt = "{}"
    settings.referee.balance_epsilon = 1e-8
    settings.views.affine_translate = (0.1, 0.1)
    settings.views.shared_erase = False
    return settings
